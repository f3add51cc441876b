"""Open a table on every process, or place the encoders of a run that encodes in every step."""

import contextlib
from pathlib import Path

import torch

from kandinsky_exp.data.encoded.table import FeatureTable
from kandinsky_exp.errors import DataError, memory_told
from kandinsky_exp.stages.base import DiffusionStage
from kandinsky_exp.system import distributed


def stay_on_device(stage: DiffusionStage, device: torch.device) -> None:
    """Place the encoders of a run that encodes in every step.

    Raises:
        DataError: the device has no room for them.
    """
    with memory_told(DataError, "the encoders ran out of memory ({}); set data.cache=true or precision=bf16"):
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
