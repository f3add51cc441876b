"""Rows whose images are files: Arrow columns, so that memory hardly grows with the rows."""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from kandinsky_exp.data import tally
from kandinsky_exp.data.examples import Example, Indexed, no_columns, nothing, read_file
from kandinsky_exp.data.file_hashes import FileDigests, release, update
from kandinsky_exp.data.formats import metadata
from kandinsky_exp.data.formats.beside import Beside, of_same_name
from kandinsky_exp.data.formats.metadata import CHUNK, Row
from kandinsky_exp.data.tally import SHOWN, Tally, first_few
from kandinsky_exp.errors import DataError

SCHEMA = pa.schema(
    [
        ("file", pa.large_string()),  # null: the row has no image
        ("captions", pa.large_list(pa.large_string())),
        ("number", pa.int32()),
        ("problems", pa.int32()),
    ]
)
LEADS_OUT = re.compile(r"^/|(^|/)\.\.(/|$)")
EXTRA = "extra"  # a column behind these, where a stage reads further ones: their cells as JSON
Captions = tuple[tuple[str, ...], str]  # or none, and why
Problems = tuple[str, str]  # as in Example: with the image, with the captions


@dataclass(frozen=True)
class FileRow:
    """One row as it is read: see `Example`."""

    number: int
    file: str | None
    captions: tuple[str, ...]
    problems: Problems = ("", "")


@dataclass(frozen=True, eq=False)
class FileRows(Indexed):
    """Examples whose images are files.

    Args:
        name: what the data set is called.
        home: the folder that relative file names start from.
        origin: the file that lists the images, or the folder.
        unit: what `number` counts there, "line" or "row"; empty where no file lists them.
        columns: of `SCHEMA`.
        problems: that `columns.problems` points at; the first is none.
        unused: what lies in the folder and is no example.
        beside: pictures that belong to those of the rows, by name.
    """

    name: str
    home: str
    origin: str
    unit: str
    columns: pa.RecordBatch
    problems: tuple[Problems, ...]
    unused: Tally = field(default_factory=dict)
    beside: Mapping[str, Beside] = field(default_factory=dict)

    def __len__(self) -> int:
        return int(self.columns.num_rows)

    def __getitem__(self, row: int) -> Example:
        file, captions, number, code, *extra = (column[row].as_py() for column in self.columns.columns)
        problem, caption_problem = self.problems[code]
        position = f"{self.unit} {number}"
        where = f"{self.origin}, {position}" if self.unit else self.origin
        beside = {name: own.files[row].as_py() for name, own in self.beside.items()}
        lacking = [f"it has no {name}: {self.beside[name].absent}" for name, found in beside.items() if found is None]
        return Example(
            file or position,
            tuple(captions),
            _reading(self.home, file),
            where,
            caption_problem,
            problem or "; ".join(lacking),
            json.loads(extra[0]) if extra else {},
            {name: _reading(self.beside[name].home, found) for name, found in beside.items()},
        )

    def with_columns(self, names: Sequence[str]) -> "FileRows":
        extra = pa.array(map(json.dumps, self._cells(names)), pa.large_string())
        return replace(self, columns=self.columns.append_column(EXTRA, extra))

    def _cells(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """Of columns of the metadata, by row; None where there is nothing."""
        rows = dict(metadata.read(Path(self.origin), names)) if self.unit else {}
        found = (rows.get(number) for number in self.columns.column("number").to_pylist())
        cells = [{name: row.get(name) if isinstance(row, dict) else None for name in names} for row in found]
        if lacking := [name for name in names if all(row[name] is None for row in cells)]:
            raise no_columns(self.origin, lacking)
        return cells

    def with_companions(self, columns: Mapping[str, str], folders: Mapping[str, Path]) -> "FileRows":
        found = {name: self._named(column) for name, column in columns.items()}
        unused: Tally = {}
        tally.add(unused, self.unused)
        for name, folder in folders.items():
            own = Path(self.home).name  # that of a split
            home = folder / own if own in ("train", "validation") and (folder / own).is_dir() else folder
            found[name] = of_same_name(name, home, self.columns.column("file").to_pylist(), unused)
        return replace(self, beside=found, unused=unused)

    def _named(self, column: str) -> Beside:
        """Files that a column of the metadata names."""
        names = [row[column] for row in self._cells([column])]
        files = [name if isinstance(name, str) and name else None for name in names]
        if self.name == self.home and (out := [file for file in files if file and LEADS_OUT.search(file)]):
            raise DataError(f"{self.origin}: '{column}' names {out[0]}, which leads out of the folder; move it inside")
        return Beside(self.home, pa.array(files, pa.large_string()), f"'{column}' names no file")

    def left_out(self) -> Tally:
        return self.unused

    def caption_counts(self) -> NDArray[np.int64]:
        return np.asarray(pc.list_value_length(self.columns.column("captions")))

    def suspects(self, captions: bool) -> NDArray[np.int64]:
        bad = np.array([bool(problem or (captions and wordless)) for problem, wordless in self.problems])
        suspect = bad[self.columns.column("problems").to_numpy()]
        for own in self.beside.values():
            suspect = suspect | own.files.is_null().to_numpy(zero_copy_only=False)
        return np.flatnonzero(suspect)

    def fingerprint(self, digests: FileDigests) -> str:
        files = self.columns.column("file")
        home = Path(self.home).absolute()
        total = hashlib.sha256(b"files")
        update(total, files)
        update(total, self.columns.column("captions"))
        if EXTRA in self.columns.schema.names:
            update(total, self.columns.column(EXTRA))
        update(total, digests(f"{home} {self.origin}", _paths(str(home), files)))
        for name, own in sorted(self.beside.items()):
            place = str(Path(own.home).absolute())
            total.update(name.encode())
            update(total, own.files)
            update(total, digests(f"{name} {place} {self.origin}", _paths(place, own.files)))
        release()
        return total.hexdigest()


def _reading(home: str, file: str | None) -> Callable[[], bytes]:
    return nothing if file is None else partial(read_file, os.path.join(home, file))  # noqa: PTH118 - NUL


def _paths(home: str, files: pa.Array) -> pa.Array:
    """Absolute paths; an empty one where there is no file."""
    separator, start = (pa.scalar(text, pa.large_string()) for text in ("/", home))
    joined = pc.binary_join_element_wise(start, files, separator)
    return pc.if_else(pc.starts_with(files, "/"), files, joined).fill_null("")


def gather(name: str, home: Path, origin: Path, unit: str, rows: Iterable[FileRow]) -> FileRows:
    """A source of rows, few of which are Python objects at any time.

    Raises:
        DataError: if there are none.
    """
    codes: dict[Problems, int] = {("", ""): 0}
    batches, rows = [], iter(rows)
    while some := list(islice(rows, CHUNK)):
        numbers = [codes.setdefault(row.problems, len(codes)) for row in some]
        cells = [(row.file, row.captions, row.number, code) for row, code in zip(some, numbers, strict=True)]
        arrays = [pa.array(column, kind.type) for column, kind in zip(zip(*cells, strict=True), SCHEMA, strict=True)]
        batches.append(pa.RecordBatch.from_arrays(arrays, schema=SCHEMA))
    release()
    if not batches:
        raise DataError(f"{origin}: it has no rows; write one per image")
    (columns,) = pa.Table.from_batches(batches).combine_chunks().to_batches()
    return FileRows(name, str(home), str(origin), unit, columns, tuple(codes))


def image_columns(asked: str) -> list[str]:
    """`file_name` as in the image folders of `datasets`; a column that was asked for counts alone."""
    return ["file_name", "image"] if asked == "image" else [asked]


def read_listed(file: Path, image_column: str, caption_column: str, *, inside: bool) -> FileRows:
    """The rows of a file that lists images. A bad row becomes an example with a problem.

    Args:
        inside: whether the images have to lie in the file's folder.

    Raises:
        DataError: if no line of the file is a row.
    """
    names = image_columns(image_column)
    home, origin, unit = file.parent, file, metadata.unit(file)
    title = str(home if inside else file)
    plain = metadata.read_plain(file, names, caption_column)
    release()
    if plain and not (inside and pc.any(pc.match_substring_regex(plain[0], LEADS_OUT.pattern)).as_py()):
        return FileRows(title, str(home), str(origin), unit, _all_good(*plain, unit == "line"), (("", ""),))
    rows = (
        FileRow(number, None, (), (row, ""))
        if isinstance(row, str)
        else _file_row(number, row, names, caption_column, inside)
        for number, row in metadata.read(file, [*names, caption_column])
    )
    source = gather(title, home, origin, unit, rows)
    if source.columns.column("file").null_count == len(source):
        some = (f"{source[row].where}: {source[row].problem}" for row in range(min(len(source), SHOWN)))
        raise DataError(first_few(some, len(source)))
    return source


def _all_good(files: pa.Array, captions: pa.Array, from_one: bool) -> pa.RecordBatch:
    """Columns of rows with one caption each and no problem."""
    rows = len(files)
    lists = pa.LargeListArray.from_arrays(pa.array(np.arange(rows + 1)), captions)
    numbers = np.arange(from_one, rows + from_one, dtype=np.int32)
    return pa.RecordBatch.from_arrays(
        [files, lists, pa.array(numbers), pa.array(np.zeros_like(numbers))], schema=SCHEMA
    )


def _file_row(number: int, row: Row, names: list[str], caption_column: str, inside: bool) -> FileRow:
    captions, wordless = parse_captions(row, caption_column)
    file = next((row[column] for column in names if column in row), None)
    problem = ""
    if isinstance(file, dict) or (isinstance(file, str) and metadata.NO_NAME.search(file)):
        problem = "its image is no file name but the picture as text; write files, or Parquet with the pictures' bytes"
    elif not isinstance(file, str) or not file:
        wanted, columns = names[0], ", ".join(row) or "none"
        problem = f"no image file in column '{wanted}' (columns: {columns}); name it there or set data.image_column"
    elif inside and LEADS_OUT.search(file):
        problem = f"{file} leads out of the folder; move the image inside, or list paths in a file: data=list"
    return FileRow(number, file if not problem else None, captions, (problem, wordless))


def parse_captions(row: dict[str, Any], column: str) -> Captions:
    """The captions of a row, or none and the reason."""
    value = row.get(column)
    if column not in row:
        return (), f"no column '{column}' among {', '.join(map(str, row))}; set data.caption_column"
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        return (), f"'{column}' holds {value!r:.60}; a caption is a string or a list of strings"
    if not texts or not all(text.strip() for text in texts):
        return (), f"an empty caption in '{column}'; write one or take the row out"
    if problem := metadata.caption_problem(texts):
        return (), f"'{column}': {problem}"
    return tuple(texts), ""
