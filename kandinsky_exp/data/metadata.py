"""Rows of `metadata.jsonl` and `metadata.csv`, each with the line it stands on."""

import csv
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from kandinsky_exp.errors import DataError

NAMES = ("metadata.jsonl", "metadata.csv")
SHOWN = 5

Row = dict[str, Any]


def find(folder: Path) -> Path | None:
    """The metadata file of a folder, None where there is none. Two of them are refused: which one counts?"""
    files = [folder / name for name in NAMES if (folder / name).is_file()]
    if len(files) > 1:
        raise DataError(f"data.path: {folder} holds both {NAMES[0]} and {NAMES[1]}; keep one of them")
    return files[0] if files else None


def read(file: Path) -> list[tuple[int, Row]]:
    """All rows with their line numbers, 1 being the first line of the file.

    Raises:
        DataError: listing the first lines that are no rows, or that the file is not UTF-8 text.
    """
    rows, problems = [], []
    for line, row in (_csv if file.suffix == ".csv" else _jsonl)(_text(file)):
        if isinstance(row, str):
            problems.append(f"{file}, line {line}: {row}")
        else:
            rows.append((line, row))
    if problems:
        raise DataError(first_few(problems))
    return rows


def _text(file: Path) -> str:
    content = b""
    try:
        content = file.read_bytes()
        return content.decode("utf-8-sig")  # -sig: spreadsheets put a byte order mark in front
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{file}, line {line}: not UTF-8 text; save the file as UTF-8") from None
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}") from None


def first_few(problems: Sequence[str]) -> str:
    """The first problems, one a line, and how many more there are."""
    rest = len(problems) - SHOWN
    return "\n".join([*problems[:SHOWN], *([f"… and {rest:,} more"] if rest > 0 else [])])


def _jsonl(text: str) -> Iterator[tuple[int, Row | str]]:
    # Not splitlines(): a caption may hold one of the rarer line separators.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            yield number, f'not JSON ({error}); every line is one object like {{"file_name": …, "text": …}}'
            continue
        yield number, row if isinstance(row, dict) else 'not a JSON object; write {"file_name": …, "text": …}'


def _csv(text: str) -> Iterator[tuple[int, Row | str]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        for row in reader:
            if None in row or None in row.values():
                columns = ", ".join(reader.fieldnames or [])
                yield reader.line_num, f"fields do not match the header ({columns}); put quotes around a comma"
            else:
                yield reader.line_num, dict(row)
    except csv.Error as error:
        yield reader.reader.line_num, f"not CSV: {error}"
