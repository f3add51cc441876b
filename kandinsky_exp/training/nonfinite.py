"""Save the batch of a step whose loss or gradient is not finite."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import save_file

from kandinsky_exp.errors import NonFiniteLoss
from kandinsky_exp.tracking.tracker import Tracker
from kandinsky_exp.training.feature_reader import FeatureReader

FOLDER = "nonfinite"


@contextlib.contextmanager
def batch_saved(folder: Path, reader: FeatureReader, accelerator: Accelerator, tracker: Tracker) -> Iterator[None]:
    """Where a loss or gradient was not finite, write the step's batch below `folder`, and say so.

    nonfinite/step-00000007/  report.json  batch.safetensors (`<micro-batch>.<feature>`), of other ranks `batch-<rank>`

    The order of the data is a function of the step: the batch is read once more, as it was.
    """
    try:
        yield
    except NonFiniteLoss as error:
        if error.step is None:  # on another process, which keeps it
            raise
        target = folder / FOLDER / f"step-{error.step:08d}"
        _save(target, error.step, str(error), reader, accelerator)
        tracker.log_artifact(target / "report.json", FOLDER)
        raise NonFiniteLoss(f"{error}. The batch is kept in {target}", error.step) from error


def _save(target: Path, step: int, what: str, reader: FeatureReader, accelerator: Accelerator) -> None:
    target.mkdir(parents=True, exist_ok=True)
    with contextlib.closing(reader.stream(step - 1, step, accelerator)) as batches:
        micro_batches = list(batches)
    rank = accelerator.process_index
    tensors = {
        f"{micro}.{name}": value.cpu().contiguous()
        for micro, batch in enumerate(micro_batches)
        for name, value in batch.items()
    }
    save_file(tensors, target / (f"batch-{rank}.safetensors" if rank else "batch.safetensors"))
    report = {
        "step": step,
        "rank": rank,
        "what": what,
        "samples": [[reader.id(int(row)) for row in batch["index"]] for batch in micro_batches],
        "finite": {name: bool(torch.isfinite(value).all()) for name, value in tensors.items()},
    }
    (target / "report.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", "utf-8")
