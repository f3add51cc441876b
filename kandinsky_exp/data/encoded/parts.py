"""The parts of a table: blocks of rows of the source, each made by one process and then never changed."""

import json
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from kandinsky_exp.data.encoded.catalog import writing
from kandinsky_exp.data.encoded.columns import Columns, ColumnWriter, check_files, head_checksum
from kandinsky_exp.data.encoded.layout import PART, part_folder
from kandinsky_exp.data.long_texts import cut_caption
from kandinsky_exp.data.tally import Tally
from kandinsky_exp.system import files

CHUNK = 256  # examples that are encoded before they are written
PARTS = 1000  # about so many at most, as long as they are not too large to be lost
LARGEST = 64  # chunks: what a killed process does again at most
OF_UNKNOWN = 16  # chunks, where nobody knows how many rows will come
NAMED = 1000  # captions that were cut, so that a table of millions stays readable


def rows_of_chunk(batch_size: int) -> int:
    """Examples that are encoded together: whole batches."""
    return -(-CHUNK // batch_size) * batch_size


def rows_of_part(count: int | None, batch_size: int) -> int:
    """Examples of every part but the last, whatever the number of processes.

    Args:
        count: of the source; None where nobody knows.
    """
    rows = chunk = rows_of_chunk(batch_size)
    if count is None:
        return OF_UNKNOWN * chunk
    while count > PARTS * rows and rows < LARGEST * chunk:
        rows *= 2
    return rows


@dataclass
class PartFacts:
    """What is in a part: its `part.json`.

    Args:
        table: name of the table that it is of, which follows data, weights and settings.
        batch_size: images per batch of the encoders; another one would not give the same bits.
        source_rows: examples of the source, the skipped ones among them.
        images, captions: encoded images (not counting mirrors) and different captions.
        truncated: captions that were cut.
        cut: the first of them, and where.
        skipped: what was wrong with the examples that were left out.
        noted: what else was not used: parts of files, or members of a stream that are no examples.
        bytes, heads: size of each file, and `head_checksum`.
    """

    table: str
    number: int
    batch_size: int
    source_rows: int = 0
    images: int = 0
    captions: int = 0
    truncated: int = 0
    cut: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    noted: Tally = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)
    heads: dict[str, int] = field(default_factory=dict)

    def note_cut(self, name: str, read: Iterable[str]) -> None:
        """Note the captions of an example of which only the beginning is read."""
        for text in read:
            self.truncated += 1
            if len(self.cut) < NAMED:
                self.cut.append(cut_caption(name, text))

    @property
    def entry(self) -> dict[str, Any]:
        """The part's line in the manifest."""
        return {"images": self.images, "captions": self.captions, "bytes": self.bytes, "heads": self.heads}


class PartWriter:
    """Writes one part beside the others, where it appears whole or not at all.

    Args:
        making: folder of the table in the making.
        mark: tells apart processes that make the same part.

    Raises:
        DataError: here and in every method, if the disk is full or cannot be written.
    """

    def __init__(self, making: Path, facts: PartFacts, mark: str) -> None:
        self.facts, self._making, self._files = facts, making, dict[str, ColumnWriter]()
        self._target = part_folder(making, facts.number)
        self._aside = making / f".{self._target.name}.{mark}"
        with writing(making):
            self._aside.mkdir()

    def append(self, name: str, columns: Columns) -> None:
        with writing(self._making):
            if name not in self._files:
                self._files[name] = ColumnWriter(self._aside / name)
            self._files[name].append(columns)

    def finish(self) -> None:
        """Make it one of the table's parts."""
        with writing(self._making):
            for name, file in self._files.items():
                file.flush()
                file.close()
                self.facts.bytes[name], self.facts.heads[name] = file.size, head_checksum(self._aside / name)
            files.write_atomically(self._aside / PART, json.dumps(asdict(self.facts), indent=1))
            try:
                self._aside.rename(self._target)
            except OSError:
                if not self._target.exists():
                    raise
                self.discard()  # another process, which took this one for dead, has made the same

    def discard(self) -> None:
        """Leave nothing of it, if it is not finished."""
        for file in self._files.values():
            file.close()
        shutil.rmtree(self._aside, ignore_errors=True)


def read_part(folder: Path) -> PartFacts:
    """The facts of a part whose files are as they were written.

    Raises:
        OSError, ValueError, KeyError, TypeError, AttributeError: they are not.
    """
    facts = PartFacts(**json.loads((folder / PART).read_text("utf-8")))
    check_files(folder, facts.entry)
    return facts
