"""A subject from a few pictures, and pictures of the class that it belongs to (Ruiz et al. 2022, arXiv:2208.12242)."""

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from kandinsky_exp.data.beside import is_picture, is_unicode, walk
from kandinsky_exp.data.metadata import caption_problem
from kandinsky_exp.data.rows import FileRow, FileRows, gather
from kandinsky_exp.errors import DataError
from kandinsky_exp.paths import expanded, is_folder

DRAWN = re.compile(r"drawn-\d{5,}\.png")


@dataclass(frozen=True)
class ClassImages:
    """Pictures of a class, all with one caption: a folder's own, and as many drawn ones as are missing.

    Args:
        folder: None where it is not known yet, because its name follows from what draws them.
        count: how many train: the folder's own in alphabetical order, then drawn ones by number.
        weight: of their loss.
    """

    folder: Path | None
    prompt: str
    count: int
    weight: float

    def missing(self) -> list[int]:
        """Numbers of the pictures that have to be drawn."""
        own, drawn = self._found()
        return [number for number in range(self.count - len(own)) if drawn_name(number) not in drawn]

    def source(self) -> FileRows:
        """The pictures that are there."""
        assert self.folder is not None  # nosec B101 # narrows the type
        own, drawn = self._found()
        return captioned(self.folder, [*own, *drawn][: self.count], self.prompt)

    def _found(self) -> tuple[list[str], list[str]]:
        names = [] if self.folder is None else list(pictures(self.folder))
        own = [name for name in names if not DRAWN.fullmatch(name)]
        return own, sorted(set(names) - set(own), key=lambda name: (len(name), name))


def drawn_name(number: int) -> str:
    return f"drawn-{number:05d}.png"


def of_class(folder: Path | None, prompt: str, count: int, weight: float) -> ClassImages:
    """What is asked for, as far as it can be judged before anything is drawn.

    Raises:
        DataError: the prompt is no caption.
    """
    _refuse("data.class_prompt", prompt)
    return ClassImages(folder, prompt, count, weight)


def subject(key: str, path: str | Path, prompt: str, skip: Collection[Path] = ()) -> FileRows:
    """All pictures of a folder and the folders in it, in alphabetical order, with one caption.

    Args:
        key: the setting that names the folder.
        skip: folders inside that are left out.

    Raises:
        DataError: there is no such folder, no picture in it, or the prompt is no caption.
    """
    folder = expanded(path).absolute()
    if not is_folder(folder):
        raise DataError(f"{key}: {folder} is not a folder; give the folder that holds the pictures of your subject")
    _refuse("data.instance_prompt", prompt)
    names = list(pictures(folder, skip))
    if not names:
        raise DataError(f"{key}: there is no picture in {folder}; put some of your subject there, five are a start")
    return captioned(folder, names, prompt)


def _refuse(key: str, prompt: str) -> None:
    if problem := caption_problem([prompt]):
        raise DataError(f"{key}: {problem}")


def pictures(folder: Path, skip: Collection[Path] = ()) -> Iterator[str]:
    """Names of pictures, relative to the folder."""
    for inner, files in walk(folder, skip):
        inside = "" if inner == folder else f"{inner.relative_to(folder).as_posix()}/"
        yield from (inside + name for name in files if is_picture(name))


def captioned(folder: Path, names: list[str], prompt: str) -> FileRows:
    """Pictures that all have the same caption."""
    return gather(str(folder), folder, folder, "", (_row(number, name, prompt) for number, name in enumerate(names)))


def _row(number: int, name: str, prompt: str) -> FileRow:
    if not is_unicode(name):
        return FileRow(number, None, (prompt,), (f"{name!a} is not UTF-8; give it another name", ""))
    return FileRow(number, name, (prompt,))
