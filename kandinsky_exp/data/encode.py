"""Encode a data set once: every image and every caption through the frozen encoders, into a table on disk."""

import errno
import hashlib
import json
from contextlib import AbstractContextManager, closing, nullcontext
from pathlib import Path
from typing import Any

from kandinsky_exp.data import cache
from kandinsky_exp.data.encoding import Encoder, EncodeSettings, Walk
from kandinsky_exp.data.examples import Source
from kandinsky_exp.data.journal import Journal
from kandinsky_exp.data.metadata import first_few
from kandinsky_exp.data.preprocess import Preprocess
from kandinsky_exp.data.progress import Log
from kandinsky_exp.data.table import FORMAT, FeatureTable
from kandinsky_exp.errors import DataError


def cache_key(source_fingerprint: str, encoder_fingerprint: str, preprocess: Preprocess, how: EncodeSettings) -> str:
    """Name of the folder of a table: all that its content depends on."""
    parts = [FORMAT, source_fingerprint, encoder_fingerprint, preprocess.fingerprint(), how.dtype, how.mirrored]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def encode_table(
    source: Source,
    stage: Encoder,
    folder: Path,
    how: EncodeSettings,
    log: Log,
    *,
    encoders: AbstractContextManager[Any] | None = None,
    about: dict[str, object] | None = None,
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
            cannot hold; for a disk that is full or cannot be written.
    """
    table = cache.open_table(folder, log)
    if table is None:
        try:
            with cache.locked(folder, log):
                table = cache.open_table(folder, log)  # another process may have made it meanwhile
                if table is None:
                    with nullcontext() if encoders is None else encoders:
                        _encode(source, stage, folder, how, log, about or {})
                    return _accepted(FeatureTable(folder), how)
        except OSError as error:
            raise DataError(_about_disk(folder, error)) from error
    log(f"encoded features of {len(table):,} images found in {folder}")
    return _accepted(table, how)


def _accepted(table: FeatureTable, how: EncodeSettings) -> FeatureTable:
    if table.skipped and not how.skip_bad:
        raise DataError(first_few(table.skipped))
    return table


def _about_disk(folder: Path, error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"output_root: the disk of {folder.parent} is full. What was encoded so far stays: make room and give the "
            "same command again, or set output_root to another disk (kandinsky-exp encode list=true shows the caches)"
        )
    return (
        f"output_root: encoded features cannot be written to {folder.parent} ({error.strerror or error}); set "
        "output_root to a folder that can, or data.cache=false to train without them"
    )


def _encode(
    source: Source, stage: Encoder, folder: Path, how: EncodeSettings, log: Log, about: dict[str, object]
) -> None:
    journal = Journal(cache.partial(folder), how.batch_size)
    with closing(journal):
        Walk(source, stage, how, journal, log).encode_all()
        if not journal.progress.images:
            journal.close()
            reasons = first_few(journal.progress.skipped) or "it holds no image"
            raise DataError(f"{source.name}: none of its examples can be used\n{reasons}")
        tokenizer = stage.preprocess.tokenizer
        facts = {
            "views": 1 + how.mirrored,
            "text_length": tokenizer.model_max_length if tokenizer is not None else 0,
            "dtype": how.dtype,
            "buckets": bool(stage.preprocess.buckets),
        }
        journal.finish({**facts, **about}, folder)
