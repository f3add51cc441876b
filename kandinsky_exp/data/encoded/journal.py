"""The journal of an unfinished table: what is committed survives when the process is killed."""

import json
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from kandinsky_exp.data.encoded.catalog import writing
from kandinsky_exp.data.encoded.columns import Columns, ColumnWriter, head_checksum
from kandinsky_exp.data.encoded.layout import CAPTIONS, IMAGES, META, PROGRESS
from kandinsky_exp.data.encoded.table import FORMAT, NO_FEATURES
from kandinsky_exp.data.long_texts import cut_caption
from kandinsky_exp.data.tally import Tally
from kandinsky_exp.system.files import write_atomically
from kandinsky_exp.system.logs import Log

NAMED = 1000  # captions that were cut, so that a table of millions stays readable


@dataclass
class Progress:
    """What is in the files of a table so far.

    Args:
        batch_size: images per batch of the encoders; another one would not give the same bits.
        columns: of `images.arrow` beside the features; what was begun with fewer is begun anew.
        source_rows: examples of the source that are done, the skipped ones among them.
        images, captions: encoded images (not counting mirrors) and captions.
        truncated: captions that were cut.
        cut: the first of them, and where.
        skipped: what was wrong with the examples that were left out.
        noted: what else was not used: parts of files, or members of a stream that are no examples.
        bytes: size of each file.
    """

    batch_size: int
    columns: int
    source_rows: int = 0
    images: int = 0
    captions: int = 0
    truncated: int = 0
    cut: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    noted: Tally = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)

    def note_cut(self, name: str, read: Iterable[str]) -> None:
        """Note the captions of an example of which only the beginning is read."""
        for text in read:
            self.truncated += 1
            if len(self.cut) < NAMED:
                self.cut.append(cut_caption(name, text))


class Journal:
    """A table in the making, in a folder of its own. What was committed is there for good.

    Args:
        folder: where an earlier process may have left its part.
        batch_size: of the encoders; `progress.batch_size` is the one to encode with.
        fixed_batch: make again what was made with another one, instead of going on with that one.

    Raises:
        DataError: here and in every method, if the disk is full or cannot be written.
    """

    def __init__(self, folder: Path, batch_size: int, log: Log, *, fixed_batch: bool = True) -> None:
        self.folder = folder
        found = _committed(folder)
        if found is not None and fixed_batch and found.batch_size != batch_size:
            log(f"{folder} was begun with batches of {found.batch_size}: encoding again")
            found = None
        self.progress = found or Progress(batch_size, len(NO_FEATURES))
        with writing(folder):
            if self.progress.source_rows == 0:
                shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True, exist_ok=True)
            sizes = self.progress.bytes
            self._files = {name: ColumnWriter(folder / name, sizes.get(name, 0)) for name in (IMAGES, CAPTIONS)}

    def append(self, name: str, columns: Columns) -> None:
        with writing(self.folder):
            self._files[name].append(columns)

    def commit(self) -> None:
        """Make all that was appended, and `progress` as it now is, last."""
        with writing(self.folder):
            for name, file in self._files.items():
                file.flush()
                self.progress.bytes[name] = file.size
            write_atomically(self.folder / PROGRESS, json.dumps(asdict(self.progress), indent=1))

    def finish(self, about: dict[str, object], target: Path) -> None:
        """Turn the folder into the complete table `target`.

        Args:
            about: further facts for its `table.json`.
        """
        self.close()
        facts = asdict(self.progress)
        with writing(self.folder):
            if not self.progress.captions:
                (self.folder / CAPTIONS).unlink()
                del facts["bytes"][CAPTIONS]
            heads = {name: head_checksum(self.folder / name) for name in facts["bytes"]}
            facts = {"format": FORMAT, **facts, "heads": heads, **about}
            write_atomically(self.folder / META, json.dumps(facts, indent=1))
            (self.folder / PROGRESS).unlink()
            self.folder.replace(target)

    def close(self) -> None:
        with writing(self.folder):
            for file in self._files.values():
                file.close()


def _committed(folder: Path) -> Progress | None:
    """What an earlier process committed; None, if it cannot be gone on with."""
    try:
        progress = Progress(**json.loads((folder / PROGRESS).read_text("utf-8")))
        whole = all((folder / name).stat().st_size >= size for name, size in progress.bytes.items())
        same = progress.columns == len(NO_FEATURES)
        return progress if whole and same and progress.batch_size >= 1 else None
    except (OSError, ValueError, TypeError, AttributeError):
        return None
