"""The table of a source: encoded by the main process if it is not there yet, opened by all of them."""

import contextlib
from collections.abc import Callable
from pathlib import Path

import torch

from kandinsky_exp.data.encoded.cache import cache_key, encode_table
from kandinsky_exp.data.encoded.encode_loop import EncodeSettings
from kandinsky_exp.data.encoded.table import FeatureTable
from kandinsky_exp.data.examples import Source
from kandinsky_exp.data.file_hashes import FileDigests
from kandinsky_exp.errors import DataError, encoding_told
from kandinsky_exp.stages.base import DiffusionStage
from kandinsky_exp.system import distributed


def encode_here(
    source: Source,
    stage: DiffusionStage,
    digests: FileDigests,
    folder: Path,
    how: EncodeSettings,
    log: Callable[[str], None],
    *,
    encoders: str,
    device: torch.device,
) -> tuple[str, Path]:
    """The source's fingerprint and the folder of its table. Main process only.

    Args:
        folder: of all tables.
        encoders: fingerprint of their weights.

    Raises:
        DataError: an image or caption cannot be used, or the table cannot be written.
    """
    fingerprint = source.fingerprint(digests)
    table = folder / cache_key(fingerprint, encoders, stage.preprocess, how)
    encode_table(
        source,
        stage,
        table,
        how,
        log,
        encoders=stage.weights.on_device(stage.encoders, device),
        about={"stage": stage.name, "source": source.name},
    )
    return fingerprint, table


def stay_on_device(stage: DiffusionStage, device: torch.device) -> None:
    """Place the encoders of a run that encodes in every step.

    Raises:
        DataError: the device has no room for them.
    """
    with encoding_told("data.cache=true or "):
        for part in stage.encoders:
            stage.weights.load(part).to(device)


def opened_by_all(folder: Path) -> FeatureTable:
    """A table that the main process has just opened.

    Raises:
        DataError: another process does not see it; on all of them, so that none waits for one that is gone.
    """
    table = None
    with contextlib.suppress(OSError, ValueError, KeyError):
        table = FeatureTable(folder)
    if distributed.on_any_process(table is None) or table is None:
        raise DataError(
            f"output_root: not every process can read {folder}; output_root has to be on a disk that all machines share"
        )
    return table
