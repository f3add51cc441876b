"""DreamBooth data: pictures of a subject and of its class (Ruiz et al. 2022, arXiv:2208.12242)."""

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from kandinsky_exp.data import tally
from kandinsky_exp.data.formats.file_rows import FileRow, FileRows, gather
from kandinsky_exp.data.formats.folders import NO_PICTURES, is_picture, is_unicode, walk
from kandinsky_exp.data.formats.metadata import caption_problem
from kandinsky_exp.data.tally import Tally
from kandinsky_exp.errors import DataError
from kandinsky_exp.system.files import expanded, is_folder

MADE = "drawn.json"  # beside drawn pictures: what they follow from
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
        own, drawn = self._found({})
        return [number for number in range(self.count - len(own)) if drawn_name(number) not in drawn]

    def drawn(self) -> list[str]:
        """Names of the pictures that were drawn, whatever for."""
        return self._found({})[1]

    def source(self) -> FileRows:
        """The pictures that are there."""
        assert self.folder is not None  # nosec B101 # narrows the type
        own, drawn = self._found({})
        rows = captioned(self.folder, [*own, *drawn][: self.count], self.prompt)
        return replace(rows, unused=self.left_out())

    def left_out(self) -> Tally:
        """What lies in the folder and does not train."""
        unused: Tally = {}
        own, drawn = self._found(unused)
        for name in [*own, *drawn][self.count :]:
            tally.count(unused, f"not used, class images beyond data.num_class_images={self.count}", name)
        return unused

    def _found(self, unused: Tally) -> tuple[list[str], list[str]]:
        folder = self.folder
        names = list(pictures(folder, (), unused)) if folder is not None and folder.is_dir() else []
        own = [name for name in names if not DRAWN.fullmatch(name)]
        return own, sorted(set(names) - set(own), key=lambda name: (len(name), name))


def drawn_name(number: int) -> str:
    return f"drawn-{number:05d}.png"


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
    refuse("data.instance_prompt", prompt)
    unused: Tally = {}
    names = list(pictures(folder, skip, unused))
    if not names:
        raise DataError(f"{key}: there is no picture in {folder}; put some of your subject there, five are a start")
    return replace(captioned(folder, names, prompt), unused=unused)


def refuse(key: str, prompt: str) -> None:
    """
    Raises:
        DataError: a prompt is no caption.
    """
    if problem := caption_problem([prompt]):
        raise DataError(f"{key}: {problem}")


def pictures(folder: Path, skip: Collection[Path], unused: Tally) -> Iterator[str]:
    """Names of pictures, relative to the folder; the others are counted in `unused`."""
    for inner, inside, files in walk(folder, skip, unused):
        for name in files:
            if is_picture(inner / name):
                yield inside + name
            elif name != MADE:
                tally.count(unused, NO_PICTURES, inside + name)


def captioned(folder: Path, names: list[str], prompt: str) -> FileRows:
    """Pictures that all have the same caption."""
    return gather(str(folder), folder, folder, "", (_row(number, name, prompt) for number, name in enumerate(names)))


def _row(number: int, name: str, prompt: str) -> FileRow:
    if not is_unicode(name):
        return FileRow(number, None, (prompt,), (f"{name!a} is not UTF-8; give it another name", ""))
    return FileRow(number, name, (prompt,))
