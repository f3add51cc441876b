"""Images with their captions beside them: `cat.png` and `cat.txt`."""

import os
from collections.abc import Collection, Iterator
from pathlib import Path

from kandinsky_exp.data.examples import read_file
from kandinsky_exp.data.metadata import caption_problem
from kandinsky_exp.data.rows import FileRow, FileRows, gather
from kandinsky_exp.errors import DataError
from kandinsky_exp.texts import decode

IMAGES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"})
TEXT = ".txt"
MAX_TEXT = 1 << 20  # bytes


def read_beside(home: Path, skip: Path) -> FileRows:
    """The images of a folder and the folders in it, in alphabetical order. The whole text of a file is one caption.

    A file that lacks its counterpart becomes an example with a problem.

    Args:
        skip: a folder inside that is left out.

    Raises:
        DataError: if no image has a text.
    """
    source = gather(str(home), home, home, "", _rows(home, skip)) if _holds_text(home, skip) else None
    if source is None or not source.caption_counts().any():
        raise DataError(
            f"data.path: {home} holds neither metadata.jsonl nor .csv nor .parquet, and no image with a .txt beside "
            'it; write one row per image, such as {"file_name": "1.png", "text": "a caption"}'
        )
    return source


def walk(home: Path, skip: Collection[Path]) -> Iterator[tuple[Path, list[str]]]:
    """A folder and those in it with their files, in alphabetical order; without those of `skip` and what is hidden."""
    for folder, inside, files in os.walk(home):
        inside[:] = sorted(name for name in inside if not name.startswith(".") and Path(folder, name) not in skip)
        yield Path(folder), sorted(name for name in files if not name.startswith("."))


def _holds_text(home: Path, skip: Path) -> bool:
    return any(_suffix(name) == TEXT for _, files in walk(home, [skip]) for name in files)


def _suffix(name: str) -> str:
    return Path(name).suffix.lower()


def is_picture(name: str) -> bool:
    return _suffix(name) in IMAGES


def is_unicode(name: str) -> bool:
    return name.isascii() or name.encode(errors="replace").decode() == name


def _rows(home: Path, skip: Path) -> Iterator[FileRow]:
    number = 0
    for folder, files in walk(home, [skip]):
        inside = "" if folder == home else f"{folder.relative_to(home).as_posix()}/"
        texts = {Path(name).stem: folder / name for name in files if _suffix(name) == TEXT}
        pictured = {Path(name).stem for name in files if is_picture(name)}
        for name in files:
            if not is_unicode(inside + name):
                yield FileRow(number, None, (), (f"{inside + name!a} is not UTF-8; give it another name", ""))
            elif is_picture(name):
                yield _picture(number, inside + name, texts.get(Path(name).stem))
            elif _suffix(name) == TEXT and Path(name).stem not in pictured:
                problem = f"{inside}{name} has no image beside it; add one or remove it"
                yield FileRow(number, None, (), (problem, ""))
            else:
                continue
            number += 1


def _picture(number: int, name: str, text: Path | None) -> FileRow:
    if text is None:
        return FileRow(number, name, (), ("", f"{name} has no {TEXT} of its name beside it; write one"))
    try:
        caption = decode(read_file(str(text), MAX_TEXT)).strip()
    except UnicodeDecodeError:
        return FileRow(number, name, (), ("", f"{text.name}: not UTF-8 text; save it as UTF-8"))
    except OSError as error:
        return FileRow(number, name, (), ("", f"{text.name} cannot be read: {error.strerror}"))
    if not caption:
        return FileRow(number, name, (), ("", f"{text.name} is empty; write a caption or take the image out"))
    if problem := caption_problem([caption]):
        return FileRow(number, name, (), ("", f"{text.name}: {problem}"))
    return FileRow(number, name, (caption,))
