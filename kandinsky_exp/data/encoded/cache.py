"""Find the encoded table of a data set by its key, or encode every image and caption once into a new one."""

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

from kandinsky_exp.data.encoded import catalog
from kandinsky_exp.data.encoded.claims import Claims
from kandinsky_exp.data.encoded.encode_loop import EncodeLoop, Encoder, EncodeSettings
from kandinsky_exp.data.encoded.layout import META, PICTURE_RULES, partial, removal
from kandinsky_exp.data.encoded.making import Making, Plan, read_plan
from kandinsky_exp.data.encoded.part_queue import PartQueue
from kandinsky_exp.data.encoded.progress import ProgressBar
from kandinsky_exp.data.encoded.table import EARLIER, FORMAT, FeatureTable
from kandinsky_exp.data.examples import Source
from kandinsky_exp.data.preprocess import Preprocess
from kandinsky_exp.data.tally import SHOWN, first_few
from kandinsky_exp.errors import DataError, memory_told
from kandinsky_exp.system.logs import Log

SHORTEST_PAUSE, LONGEST_PAUSE = 0.05, 1.0  # seconds between looks at what other processes make


def cache_key(
    source_fingerprint: str, encoder_fingerprint: str, preprocess: Preprocess, how: EncodeSettings, form: int = FORMAT
) -> str:
    """Name of the folder of a table: all that its content depends on. It begins with a letter that no number has."""
    parts = [form, source_fingerprint, encoder_fingerprint, preprocess.fingerprint, how.dtype, how.mirrored]
    return "t" + hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:31]


def table_folder(
    cache: Path, source_fingerprint: str, encoders: str, preprocess: Preprocess, how: EncodeSettings, log: Log
) -> Path:
    """Where a table is, or is to be: one that an earlier version has made serves as it is."""
    facts = source_fingerprint, encoders, preprocess, how
    folder = cache / cache_key(*facts)
    if not (folder / META).exists():
        for earlier in (cache / cache_key(*facts, form) for form in EARLIER):
            if catalog.open_table(earlier, log) is not None:
                return earlier
            if partial(earlier).exists():
                log(f"{partial(earlier)} was begun by an earlier version and is not used: {removal(earlier)}")
    return folder


def encode_table(
    source: Source,
    stage: Encoder,
    folder: Path,
    how: EncodeSettings,
    log: Log,
    *,
    only: int | None = None,
    encoders: AbstractContextManager[Any] | None = None,
    about: Mapping[str, object] | None = None,
) -> FeatureTable | None:
    """Open the table in `folder`, after encoding every image and every caption once if it is not there.

    The folder appears complete or not at all. Any number of processes may ask for it, here and on other machines that
    share the disk: each takes parts, and all return when the last one is there. A part that a killed process had begun
    is made by another one, now or when somebody asks for the table again; the finished ones lie in `<folder>.partial`.

    Args:
        folder: the table's own folder, named by `cache_key`.
        only: make this part alone, and return None as long as others are missing.
        encoders: entered while this process encodes: where the encoders go to their device and come back.
        about: facts for whoever lists the caches.

    Raises:
        DataError: for an unreadable image or a missing caption, unless these are skipped; for features that the dtype
            cannot hold; for a disk that is full or cannot be written; for want of memory.
    """
    made, table = None, catalog.open_table(folder, log)
    if table is None:
        with catalog.locked(folder, log):
            table = catalog.open_table(folder, log, mend=True)  # another process may have made it meanwhile
    if table is None:
        try:
            made = _encode(source, stage, folder, how, log, only, encoders or nullcontext(), about or {})
        except DataError:
            if not (folder / META).exists():  # others, who had taken this process for dead, may have finished it
                raise
        table = catalog.open_table(folder, log)
    if table is None and only is not None and partial(folder).exists():
        return None
    if table is None:
        raise DataError(f"{folder} was removed or damaged while it was encoded; give the same command again")
    if made is None:
        log(f"encoded features of {len(table):,} images found in {folder}")
    else:
        made.sum_up(len(table), table.meta["captions"])
    _refuse_gaps(table.skipped, folder, how)
    if len(table.skipped) > SHOWN:  # whoever opens the table names the first few of them
        log("all examples that were left out:\n" + "\n".join(table.skipped))
    return table


def parts_of(source: Source, folder: Path, how: EncodeSettings) -> int | None:
    """How many parts a table has, or will have; None where the source is read in one sweep."""
    plan = read_plan(folder) or read_plan(partial(folder))
    return (plan or _first_plan(source, folder, how)).parts


def _first_plan(source: Source, folder: Path, how: EncodeSettings) -> Plan:
    return Plan.of(folder, source, how.batch_size, version("kandinsky_exp"))


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
    only: int | None,
    encoders: AbstractContextManager[Any],
    about: Mapping[str, object],
) -> ProgressBar | None:
    """Make the parts that no other process makes, wait for the others, and join them; None if it made none."""
    making = Making(folder, _first_plan(source, folder, how), log, fixed_batch=how.fixed_batch)
    _refuse_gaps([problem for part in making.found.values() for problem in part.skipped], folder, how)
    with closing(Claims(making.folder)) as claims:
        loop = EncodeLoop(source, stage, how, PartQueue(source, making, claims, only), log)
        with closing(loop.bar):
            made = _make_parts(loop, making, encoders, log)
    facts = {
        "views": 1 + how.mirrored,
        "text_length": stage.preprocess.text_length,
        "dtype": how.dtype,
        "buckets": bool(stage.preprocess.buckets),
        "rules": PICTURE_RULES,
    }
    there, parts = len(making.there()), making.plan.parts
    if parts is None or there == parts:
        making.join(source.name, {**facts, **about})
    else:
        log(f"{there:,} of {parts:,} parts of {folder} are there; the same command without data.part makes the others")
    return loop.bar if made else None


def _make_parts(loop: EncodeLoop, making: Making, encoders: AbstractContextManager[Any], log: Log) -> bool:
    """Until all are there, whoever makes them; whether this process has made any."""
    made, pause = False, SHORTEST_PAUSE
    size = making.plan.batch_size
    smaller = f"data.encode_batch={size // 2} (it is {size}) or " if size > 1 else ""
    out_of_memory = f"the encoders ran out of memory ({{}}); set {smaller}precision=bf16"
    with ExitStack() as held:
        while not making.is_joined and not loop.queue.is_done():
            if (first := loop.queue.take()) is not None:
                if not made:
                    held.enter_context(memory_told(DataError, out_of_memory))
                    held.enter_context(encoders)
                made = True
                loop.make(first)
                continue
            if pause == SHORTEST_PAUSE:
                log(f"other processes are encoding what is left of {making.target}; waiting for them")
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)
    return made
