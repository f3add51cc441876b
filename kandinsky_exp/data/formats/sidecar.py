"""Images with their captions beside them: `cat.png` and `cat.txt`."""

import unicodedata
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from kandinsky_exp.data import tally
from kandinsky_exp.data.examples import read_file
from kandinsky_exp.data.formats.file_rows import Captions, FileRow, FileRows, gather
from kandinsky_exp.data.formats.folders import NO_PICTURES, is_picture, is_unicode, suffix, walk
from kandinsky_exp.data.formats.metadata import caption_problem
from kandinsky_exp.data.tally import Tally
from kandinsky_exp.errors import DataError
from kandinsky_exp.system.text_files import decode

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
    unused: Tally = {}
    holds_text = any(suffix(name) == TEXT for _, _, files in walk(home, [skip], {}) for name in files)
    source = gather(str(home), home, home, "", _rows(home, skip, unused)) if holds_text else None
    if source is None or not source.caption_counts().any():
        raise DataError(
            f"data.path: {home} holds neither metadata.jsonl nor .csv nor .parquet, and no image with a .txt beside "
            'it; write one row per image, such as {"file_name": "1.png", "text": "a caption"}'
        )
    return replace(source, unused=unused)


def _rows(home: Path, skip: Path, unused: Tally) -> Iterator[FileRow]:
    number = 0
    for folder, inside, files in walk(home, [skip], unused):
        texts = {_stem(name): name for name in files if suffix(name) == TEXT}
        pictures = {name for name in files if is_picture(folder / name)}
        pictured = set(map(_stem, pictures))
        for name in files:
            if not is_unicode(inside + name):
                yield FileRow(number, None, (), (f"{inside + name!a} is not UTF-8; give it another name", ""))
            elif name in pictures:
                text = texts.get(_stem(name))
                captions, wordless = _captions(home, inside + name, inside + text if text else None)
                yield FileRow(number, inside + name, captions, ("", wordless))
            elif suffix(name) == TEXT and _stem(name) not in pictured:
                problem = f"{inside}{name} has no image beside it; add one or remove it"
                yield FileRow(number, None, (), (problem, ""))
            else:
                if suffix(name) != TEXT:
                    tally.count(unused, NO_PICTURES, inside + name)
                continue
            number += 1


def _stem(name: str) -> str:
    """Equal for names that look the same: some systems take accents apart."""
    return unicodedata.normalize("NFC", Path(name).stem)


def _captions(home: Path, name: str, text: str | None) -> Captions:
    if text is None:
        return (), f"{name} has no {TEXT} of its name beside it; write one"
    try:
        caption = decode(read_file(str(home / text), MAX_TEXT)).strip()
    except UnicodeDecodeError:
        return (), f"{text}: not UTF-8 text; save it as UTF-8"
    except OSError as error:
        return (), f"{text} cannot be read: {error.strerror}"
    if not caption:
        return (), f"{text} is empty; write a caption or take the image out"
    problem = caption_problem([caption])
    return ((), f"{text}: {problem}") if problem else ((caption,), "")
