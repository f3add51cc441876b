"""Rows of a `.jsonl`, `.csv` or `.parquet` file, one at a time, each with the line or row that it stands on."""

import csv
import json
import re
from collections.abc import Iterator, Sequence
from itertools import chain, repeat
from pathlib import Path
from typing import IO, Any, AnyStr

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json as pa_json
import pyarrow.parquet as pq

from kandinsky_exp.errors import DataError, cause_of, first_line
from kandinsky_exp.system import text_files

NAMES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
CHUNK = 4096
SEPARATORS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "vertical bar"}  # of a CSV file's columns
# A picture written as text, in base64, where the name of a file should be: that has 255 bytes at most.
NO_NAME = re.compile(r"^(data:|iVBORw0KGgo|/9j/4)|[^/]{256}")
MAX_LINE = 16 << 20  # bytes of JSON, characters of CSV
MAX_CAPTION = 1 << 16  # characters; CLIP reads the first 77 tokens
MAX_CAPTIONS = 1000  # of one image

Row = dict[str, Any]
Numbered = Iterator[tuple[int, Row | str]]  # a string says why there is no row


def find(folder: Path) -> Path | None:
    """The metadata file of a folder, None where there is none. Two of them are refused: which one counts?"""
    files = [folder / name for name in NAMES if (folder / name).is_file()]
    if len(files) > 1:
        raise DataError(f"data.path: {folder} holds both {files[0].name} and {files[1].name}; keep one of them")
    return files[0] if files else None


def unit(file: Path) -> str:
    """What the numbers of `read` count: lines from 1 on, or rows from 0 on."""
    return "row" if file.suffix.lower() == ".parquet" else "line"


def read(file: Path, columns: Sequence[str]) -> Numbered:
    """All rows with their numbers, or what is wrong with a line that is no row.

    Args:
        columns: whose values are needed; the others of a Parquet file are None.

    Raises:
        DataError: if the file cannot be read, is not UTF-8 text, or no table.
    """
    kind = file.suffix.lower()
    try:
        if kind == ".parquet":
            yield from _parquet(file, columns)
        else:
            yield from _jsonl(file) if kind == ".jsonl" else _csv(file, columns)
    except UnicodeDecodeError:
        raise DataError(f"{file}, line {_undecodable(file)}: not UTF-8 text; save the file as UTF-8") from None
    except OSError as error:
        raise DataError(f"{file} cannot be read: {cause_of(error)}") from None


def _undecodable(file: Path) -> int:
    with file.open("rb") as content:
        for number, line in enumerate(_lines(content, file), start=1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return number
    return 1


def _lines(content: IO[AnyStr], file: Path) -> Iterator[AnyStr]:
    """Its lines, none of them so long that it could fill the memory."""
    number = 1
    while line := content.readline(MAX_LINE + 1):
        if len(line) > MAX_LINE:
            raise DataError(f"{file}, line {number}: longer than {MAX_LINE >> 20} MB; write one row per image")
        yield line
        number += 1


def caption_problem(texts: Sequence[str]) -> str:
    """Why the captions of one image are too many or too long, or nothing."""
    if len(texts) > MAX_CAPTIONS:
        return f"{len(texts):,} captions for one image, more than {MAX_CAPTIONS:,}; keep the good ones"
    longest = max(map(len, texts), default=0)
    return f"a caption of {longest:,} characters, more than {MAX_CAPTION:,}; cut it" if longest > MAX_CAPTION else ""


def read_plain(file: Path, image_columns: Sequence[str], caption_column: str) -> tuple[pa.Array, pa.Array] | None:
    """File names and captions, (n,) each, of a file in which every row has one of both. None where that is not so.

    Ten times as fast as `read`, which knows what to say of all other files.
    """
    try:
        if file.suffix.lower() == ".jsonl":
            table = _json_table(file, [*image_columns, caption_column])
        elif file.suffix.lower() == ".parquet":
            with pq.ParquetFile(file) as content:
                _refuse_too_many(file, content)
                table = content.read([*image_columns, caption_column])  # those of them that there are
        else:
            return None  # Arrow is more lenient than `csv`
        name = next(column for column in image_columns if column in table.column_names)
        files = _plain(table.column(name))
        if pc.any(pc.match_substring_regex(files, NO_NAME.pattern)).as_py():
            raise ValueError("pictures as text")
        return files, _plain(table.column(caption_column))
    except (OSError, ValueError, KeyError, StopIteration, pa.ArrowException):
        return None


def _json_table(file: Path, columns: Sequence[str]) -> pa.Table:
    schema = pa.schema([(name, pa.string()) for name in columns])
    options = pa_json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore")
    table = pa_json.read_json(file, pa_json.ReadOptions(use_threads=False), options)  # each would keep some memory
    with file.open("rb") as content:
        if sum(1 for _ in content) != len(table):
            raise ValueError("rows are not lines")
    return table.select([name for name in columns if table.column(name).null_count < len(table)])


def _plain(column: pa.ChunkedArray) -> pa.Array:
    if column.null_count or not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        raise ValueError("not a string in every row")
    values = pa.concat_arrays(column.cast(pa.large_string()).chunks)
    values.validate(full=True)  # UTF-8
    if pc.any(pc.equal(pc.utf8_trim_whitespace(values), "")).as_py():
        raise ValueError("an empty string")
    if (pc.max(pc.utf8_length(values)).as_py() or 0) > MAX_CAPTION:
        raise ValueError("a string that is too long")
    return values


def _jsonl(path: Path) -> Numbered:
    # Only \n ends a line: a caption may hold one of the rarer line separators.
    with path.open(encoding=text_files.encoding(path), newline="\n") as file:
        for number, line in enumerate(_lines(file, path), start=1):
            if line.strip():
                yield number, _object(line)


def _object(text: str) -> Row | str:
    try:
        row = json.loads(text)
        if "\\u" in text:
            json.dumps(row, ensure_ascii=False).encode()  # half of a pair of escapes is no character
    except (ValueError, RecursionError) as error:
        return f'not JSON ({error}); every line is one object like {{"file_name": …, "text": …}}'
    return row if isinstance(row, dict) else 'not a JSON object; write {"file_name": …, "text": …}'


def _csv(path: Path, columns: Sequence[str]) -> Numbered:
    with path.open(encoding=text_files.encoding(path), newline="") as file:
        lines = _lines(file, path)
        before, first, separator = _head(lines, columns)
        reader = csv.reader(chain([first], lines), delimiter=separator, strict=True)
        try:
            header = next(reader, [])
            if twice := [name for name in columns if header.count(name) > 1]:
                raise DataError(f"{path}, line {before + 1}: '{twice[0]}' heads several columns; rename the others")
            for row in reader:
                number = before + reader.line_num
                if len(row) == len(header):
                    yield number, dict(zip(header, row, strict=True))
                elif row:
                    names, mark = ", ".join(header), SEPARATORS.get(separator, separator)
                    yield number, f"fields do not match the header ({names}); put quotes around a text with a {mark}"
        except csv.Error as error:
            where = f"{path}, line {before + reader.line_num}"
            raise DataError(f"{where}: not CSV: {error}; put quotes around a text, and double those in it") from None


def _head(lines: Iterator[str], columns: Sequence[str]) -> tuple[int, str, str]:
    """(lines before it, the header's first line, what separates its columns)."""
    before, chosen = 0, ""
    for line in lines:
        if said := re.fullmatch(r"sep=(.)\s*", line):  # Excel's way to say it
            chosen = said[1]
        elif line.strip():
            return before, line, chosen or _separator(line, columns)
        before += 1
    return before, "", ","


def _separator(header: str, columns: Sequence[str]) -> str:
    """The one by which a header has most of the columns that are looked for; of equal ones that which gives most."""

    def found(separator: str) -> tuple[int, int]:
        names = next(csv.reader([header], delimiter=separator), [])
        return len(set(names) & set(columns)), len(names)

    return max(SEPARATORS, key=found)


def _parquet(path: Path, columns: Sequence[str]) -> Numbered:
    try:
        with pq.ParquetFile(path) as file:
            _refuse_too_many(path, file)
            schema = file.schema_arrow
            wanted = [name for name in schema.names if name in columns]
            _refuse_pictures(path, schema, wanted)
            others = dict.fromkeys(schema.names)
            rows = chain.from_iterable(batch.to_pylist() for batch in file.iter_batches(CHUNK, columns=wanted))
            for number, row in enumerate(rows if wanted else repeat({}, file.metadata.num_rows)):
                yield number, others | row
    except pa.ArrowException as error:
        raise DataError(f"{path}: not a Parquet file that can be read: {first_line(error)}; write it again") from None


def picture_column(file: Path, columns: Sequence[str]) -> str | None:
    """The first of these columns in which a Parquet file holds pictures themselves; None where none does.

    Raises:
        DataError: if it cannot be read.
    """
    try:
        with pq.ParquetFile(file) as content:
            _refuse_too_many(file, content)
            schema = content.schema_arrow
    except (OSError, pa.ArrowException):
        return None  # who reads it for its rows says why
    return next((name for name in columns if name in schema.names and holds_pictures(schema.field(name).type)), None)


def holds_pictures(kind: pa.DataType) -> bool:
    """Whether values are the bytes of files, alone or beside a path, as `datasets` and pandas write pictures."""
    if pa.types.is_struct(kind):
        index = kind.get_field_index("bytes")
        return index >= 0 and holds_pictures(kind.field(index).type)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _refuse_too_many(path: Path, content: pq.ParquetFile) -> None:
    """Equal values take no room in a file, however many they are; but every image has another name."""
    rows, size = content.metadata.num_rows, path.stat().st_size
    if rows > 1_000_000 + 16 * size:
        raise DataError(f"{path}: {rows:,} rows in {size:,} bytes cannot be a list of images; write it again")


def _refuse_pictures(path: Path, schema: pa.Schema, columns: Sequence[str]) -> None:
    for name in columns:
        kind = schema.field(name).type
        if pa.types.is_struct(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
            cure = f"pictures inside are read by data=list data.path={path}"
            raise DataError(f"{path}: column '{name}' holds {kind}, not text; {cure}")
