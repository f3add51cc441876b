"""Text files of users: UTF-8, or UTF-16 and UTF-32 with a byte order mark."""

import codecs
from pathlib import Path

MARKS = (  # the longer ones first: one of them begins as a shorter one does
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
MARK = "\ufeff"  # what is left of it where texts were put together


def encoding(file: Path) -> str:
    """How a file is to be opened as text."""
    with file.open("rb") as content:
        return _encoding(content.read(4))


def _encoding(start: bytes) -> str:
    return next((name for mark, name in MARKS if start.startswith(mark)), "utf-8-sig")


def decode(content: bytes) -> str:
    """The text of a whole file, without a mark.

    Raises:
        UnicodeDecodeError: it is none.
    """
    return content.decode(_encoding(content))


def lines(file: Path) -> list[str]:
    """What stands on the lines of a file that are not empty.

    Raises:
        UnicodeDecodeError, OSError: it is no text, or cannot be read.
    """
    return [text for line in decode(file.read_bytes()).splitlines() if (text := line.strip().strip(MARK).strip())]
