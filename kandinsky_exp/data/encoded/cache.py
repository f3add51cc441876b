"""Find the encoded table of a data set by its key, or encode every image and caption once into a new one."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from kandinsky_exp.data.encoded import catalog
from kandinsky_exp.data.encoded.encode_loop import EncodeLoop, Encoder, EncodeSettings
from kandinsky_exp.data.encoded.journal import Journal
from kandinsky_exp.data.encoded.layout import PICTURE_RULES, removal
from kandinsky_exp.data.encoded.table import FORMAT, FeatureTable
from kandinsky_exp.data.examples import Source
from kandinsky_exp.data.preprocess import Preprocess
from kandinsky_exp.data.tally import SHOWN, first_few
from kandinsky_exp.errors import DataError, encoding_told
from kandinsky_exp.system.logs import Log


def cache_key(source_fingerprint: str, encoder_fingerprint: str, preprocess: Preprocess, how: EncodeSettings) -> str:
    """Name of the folder of a table: all that its content depends on. It begins with a letter that no number has."""
    parts = [FORMAT, source_fingerprint, encoder_fingerprint, preprocess.fingerprint, how.dtype, how.mirrored]
    return "t" + hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:31]


def encode_table(
    source: Source,
    stage: Encoder,
    folder: Path,
    how: EncodeSettings,
    log: Log,
    *,
    encoders: AbstractContextManager[Any] | None = None,
    about: Mapping[str, object] | None = None,
) -> FeatureTable:
    """Open the table in `folder`, after encoding every image and every caption once if it is not there.

    The folder appears complete or not at all. Several processes may ask for it: one encodes, the others wait. One that
    is killed leaves what it committed in `<folder>.partial`, and the next one goes on from there.

    Args:
        folder: the table's own folder, named by `cache_key`.
        encoders: entered while something is encoded: where the encoders go to their device and come back.
        about: facts for whoever lists the caches.

    Raises:
        DataError: for an unreadable image or a missing caption, unless these are skipped; for features that the dtype
            cannot hold; for a disk that is full or cannot be written; for want of memory.
    """
    is_new = False
    table = catalog.open_table(folder, log)
    if table is None:
        with catalog.locked(folder, log):
            table = catalog.open_table(folder, log, mend=True)  # another process may have made it meanwhile
            if table is None:
                _encode(source, stage, folder, how, log, encoders or nullcontext(), about or {})
                table, is_new = catalog.open_table(folder, log), True
    assert table is not None  # made just now, and the lock was held  # nosec B101
    if not is_new:
        log(f"encoded features of {len(table):,} images found in {folder}")
    _refuse_gaps(table.skipped, folder, how)
    if len(table.skipped) > SHOWN:  # whoever opens the table names the first few of them
        log("all examples that were left out:\n" + "\n".join(table.skipped))
    return table


def _refuse_gaps(skipped: Sequence[str], folder: Path, how: EncodeSettings) -> None:
    if skipped and not how.skip_bad:
        raise DataError(
            f"{first_few(skipped)}\n(data.on_error=skip leaves such examples out and lists them; if they were mended "
            f"meanwhile: {removal(folder)})"
        )


def _encode(
    source: Source,
    stage: Encoder,
    folder: Path,
    how: EncodeSettings,
    log: Log,
    encoders: AbstractContextManager[Any],
    about: Mapping[str, object],
) -> None:
    journal = Journal(catalog.partial(folder), how.batch_size, log, fixed_batch=how.fixed_batch)
    progress = journal.progress
    with closing(journal):
        _refuse_gaps(progress.skipped, folder, how)
        size = progress.batch_size
        with encoding_told(f"data.encode_batch={size // 2} (it is {size}) or " if size > 1 else ""), encoders:
            EncodeLoop(source, stage, replace(how, batch_size=size), journal, log).encode_all()
        if not progress.images:
            reasons = first_few(progress.skipped) or "it holds no image"
            raise DataError(f"{source.name}: none of its examples can be used\n{reasons}")
        facts = {
            "views": 1 + how.mirrored,
            "text_length": stage.preprocess.text_length,
            "dtype": how.dtype,
            "buckets": bool(stage.preprocess.buckets),
            "rules": PICTURE_RULES,
        }
        journal.finish({**facts, **about}, folder)
