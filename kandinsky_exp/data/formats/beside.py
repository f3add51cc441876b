"""Pictures that belong to the pictures of a list or a folder."""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import pyarrow as pa

from kandinsky_exp.data import tally
from kandinsky_exp.data.formats.folders import NO_PICTURES, is_picture, walk
from kandinsky_exp.data.tally import Tally
from kandinsky_exp.errors import DataError


@dataclass(frozen=True, eq=False)
class Beside:
    """Pictures that belong to those of the rows.

    Args:
        home: the folder that relative file names start from.
        files: of each row, (n,); null where there is none.
        absent: why.
    """

    home: str
    files: pa.Array
    absent: str


def of_same_name(name: str, home: Path, files: Sequence[str | None], unused: Tally) -> Beside:
    """Pictures of a folder that are called as others are, whatever their endings.

    Args:
        name: what they are, such as `hole`.
        files: the others, by row; of one with an absolute path the name alone counts.
        unused: gets what is in the folder and belongs to none of them.

    Raises:
        DataError: one would belong to two of the others, or two to one.
    """
    asked = [None if file is None else _stem(Path(file).name if Path(file).is_absolute() else file) for file in files]
    wanted: dict[str | None, str] = {}
    for key, file in zip(asked, files, strict=True):
        if file and wanted.setdefault(key, file) != file:
            same = f"{wanted[key]} and {file} would have the same {name}"
            raise DataError(f"data.{name}s: {same}; name them by data.{name}_column")
    there: dict[str, str] = {}
    for inner, prefix, found in walk(home, (), unused):
        for file in found:
            key = _stem(prefix + file)
            if not is_picture(inner / file):
                tally.count(unused, NO_PICTURES, f"{home.name}/{prefix}{file}")
            elif there.setdefault(key, prefix + file) != prefix + file and key in wanted:
                raise DataError(f"data.{name}s: {home} holds both {there[key]} and {prefix}{file}; keep one of them")
    for key in there.keys() - set(asked):
        tally.count(unused, f"not used, {name}s of no picture's name", f"{home.name}/{there[key]}")
    paths = pa.array([there.get(key or "") for key in asked], pa.large_string())
    return Beside(str(home), paths, f"no picture of its name lies in {home}")


def _stem(name: str) -> str:
    """A relative path without its ending, accents as one letter."""
    return unicodedata.normalize("NFC", str(PurePosixPath(name).with_suffix("")))
