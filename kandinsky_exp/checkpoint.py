"""Checkpoints: the network in diffusers layout and the loop's state, complete or not there at all.

    step-00000500/  prior/ or unet/  [prior_ema/ or unet_ema/]  optimizer.pt  state.json

A folder is written under another name and renamed when it is whole; older ones are removed only after that.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from kandinsky_exp import adapters
from kandinsky_exp.errors import CheckpointError
from kandinsky_exp.loop import Training, averaged_weights


def save(training: Training, root: Path, part: str, accelerator: Accelerator, validation_loss: float | None) -> Path:
    """Write `root/step-…` on the main process; every process waits until it is there.

    Args:
        part: name of the network's subfolder, `prior` or `unet`.
        validation_loss: the fixed-noise loss at this very step, None where it was not measured.
    """
    folder = root / f"step-{training.step:08d}"
    if accelerator.is_main_process:
        aside = root / f".{folder.name}.part"
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        _write(training, aside, part, accelerator, validation_loss)
        if folder.exists():
            shutil.rmtree(folder)
        aside.rename(folder)
    accelerator.wait_for_everyone()
    return folder


def _write(
    training: Training, folder: Path, part: str, accelerator: Accelerator, validation_loss: float | None
) -> None:
    network = accelerator.unwrap_model(training.network)
    training.stage.save(network, folder / part)
    state: dict[str, Any] = {"step": training.step, "validation_loss": validation_loss}
    if training.ema is not None:
        with averaged_weights(training):
            training.stage.save(network, folder / f"{part}_ema")
        state["ema_step"] = training.ema.optimization_step
    tensors = {"optimizer": training.optimizer.state_dict(), "scheduler": training.scheduler.state_dict()}
    if accelerator.scaler is not None:
        tensors["scaler"] = accelerator.scaler.state_dict()
    torch.save(tensors, folder / "optimizer.pt")
    (folder / "state.json").write_text(json.dumps(state, indent=2) + "\n", "utf-8")
    for file in folder.rglob("*"):
        _flush_to_disk(file)


def _flush_to_disk(path: Path) -> None:
    """A rename may reach the disk before the data it names: force the data first."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def complete(root: Path) -> list[Path]:
    """The complete checkpoints, oldest first."""
    return sorted(folder for folder in root.glob("step-*") if (folder / "state.json").is_file())


def newest(root: Path) -> Path | None:
    found = complete(root)
    return found[-1] if found else None


def read_state(folder: Path) -> dict[str, Any]:
    """The loop state of a checkpoint.

    Raises:
        CheckpointError: the file is missing or is no such state.
    """
    try:
        state: dict[str, Any] = json.loads((folder / "state.json").read_text("utf-8"))
        state["step"] = int(state["step"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"checkpoint.resume: {folder} is no complete checkpoint ({error}); give a checkpoints/step-… folder"
        ) from error
    return state


def load(training: Training, folder: Path, part: str, accelerator: Accelerator) -> None:
    """Put a checkpoint back into `training`, exactly.

    Raises:
        CheckpointError: it does not fit this run's network, optimizer or EMA setting.
    """
    state = read_state(folder)
    if not (folder / part).is_dir():
        raise CheckpointError(f"checkpoint.resume: {folder} has no '{part}': it belongs to another stage; set model=…")
    network = accelerator.unwrap_model(training.network)
    try:
        if training.ema is not None:
            # The averages pass through the network itself: what was saved by name comes back by name.
            source = folder / f"{part}_ema"
            adapters.load(network, source if source.is_dir() else folder / part)
            training.ema.shadow_params = [parameter.detach().clone() for parameter in training.trainable()]
            training.ema.optimization_step = int(state.get("ema_step", 0))
        adapters.load(network, folder / part)
        tensors = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
        training.optimizer.load_state_dict(tensors["optimizer"])
        training.scheduler.load_state_dict(tensors["scheduler"])
        if accelerator.scaler is not None and "scaler" in tensors:
            accelerator.scaler.load_state_dict(tensors["scaler"])
    except (OSError, RuntimeError, ValueError, KeyError, EOFError) as error:
        reason = str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"checkpoint.resume: {folder} does not fit this run ({reason}); use the settings it was made with, "
            "or start anew under another name"
        ) from error
    training.step = state["step"]


def prune(root: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints and the one with the best validation loss."""
    found = complete(root)
    measured = [(loss, folder) for folder in found if (loss := read_state(folder).get("validation_loss")) is not None]
    best = min(measured)[1] if measured else None
    for folder in found[: max(len(found) - keep, 0)]:
        if folder != best:
            shutil.rmtree(folder)
