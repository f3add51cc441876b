"""Checkpoints: the network in diffusers layout and the loop's state, complete or not there at all.

    step-00000500/  prior/ or unet/  [prior_ema/ or unet_ema/]  optimizer.pt  state.json

A folder is written under another name and renamed when it is whole; older ones are removed only after that.
"""

import inspect
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from kandinsky_exp import adapters
from kandinsky_exp.adapters import NetworkFiles
from kandinsky_exp.errors import CheckpointError
from kandinsky_exp.loop import Training


@dataclass(frozen=True)
class Snapshot:
    """All that a checkpoint holds; first as views of what trains, then, `on_host`, as copies out of its reach.

    Args:
        networks: by folder, such as `unet` and `unet_ema`.
        tensors: what goes to `optimizer.pt`.
        state: what goes to `state.json`.
    """

    step: int
    networks: dict[str, NetworkFiles]
    tensors: dict[str, Any]
    state: dict[str, Any]

    def on_host(self) -> "Snapshot":
        copies: dict[int, Tensor] = {}
        networks = {name: files.on_host(copies) for name, files in self.networks.items()}
        return replace(self, networks=networks, tensors=_mapped(self.tensors, _on_host))

    def size(self) -> int:
        """Bytes that `on_host` asks for."""
        found = {id(value): value for files in self.networks.values() for value in files.tensors.values()}
        _mapped(self.tensors, lambda value: found.setdefault(id(value), value))
        return sum(value.nbytes for value in found.values())

    def write(self, root: Path) -> Path:
        """`root/step-…`, whole or not at all."""
        folder = root / f"step-{self.step:08d}"
        aside = root / f".{folder.name}.part"
        for left in root.glob(".step-*.part"):  # by a process that was killed
            shutil.rmtree(left)
        aside.mkdir(parents=True)
        for name, files in self.networks.items():
            files.write(aside / name)
        torch.save(self.tensors, aside / "optimizer.pt")
        (aside / "state.json").write_text(json.dumps(self.state, indent=2) + "\n", "utf-8")
        for path in [*aside.rglob("*"), aside]:
            _flush_to_disk(path)
        if folder.exists():
            shutil.rmtree(folder)
        aside.rename(folder)
        return folder


def snapshot(training: Training, part: str, accelerator: Accelerator, validation_loss: float | None) -> Snapshot:
    """The state at this step, not copied yet.

    Args:
        part: name of the network's subfolder, `prior` or `unet`.
        validation_loss: the fixed-noise loss at this very step, None where it was not measured.
    """
    network = accelerator.unwrap_model(training.network)
    networks = {part: training.stage.snapshot(network, {})}
    state: dict[str, Any] = {"step": training.step, "validation_loss": validation_loss}
    state["optimizer"] = type(_bare(training.optimizer)).__name__
    if training.ema is not None:
        names = [name for name, parameter in network.named_parameters() if parameter.requires_grad]
        averages = dict(zip(names, training.ema.shadow_params, strict=True))
        networks[f"{part}_ema"] = training.stage.snapshot(network, averages)
        state["ema_step"] = training.ema.optimization_step
    tensors = {"optimizer": training.optimizer.state_dict(), "scheduler": training.scheduler.state_dict()}
    if accelerator.scaler is not None:
        tensors["scaler"] = accelerator.scaler.state_dict()
    return Snapshot(training.step, networks, tensors, state)


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Nested dicts, lists and tuples made anew, with other tensors."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: _mapped(item, change) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_mapped(item, change) for item in value)
    return value


def _on_host(value: Tensor) -> Tensor:
    return value.detach().to("cpu", copy=True)


def _flush_to_disk(path: Path) -> None:
    """A rename may reach the disk before the data it names: force the data first."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def complete(root: Path) -> list[Path]:
    """The complete checkpoints, oldest first; one whose state cannot be read is none."""
    return sorted(folder for folder in root.glob("step-*") if _is_complete(folder))


def _is_complete(folder: Path) -> bool:
    try:
        read_state(folder)
    except CheckpointError:
        return False
    return True


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
    used, chosen = state.get("optimizer"), type(_bare(training.optimizer)).__name__
    if used not in (None, chosen):
        raise CheckpointError(
            f"checkpoint.resume: {folder} was made with the optimizer {used}, not {chosen}; set optimizer=… as it was, "
            "or start anew under another name"
        )
    network = accelerator.unwrap_model(training.network)
    try:
        if training.ema is not None:
            # The averages pass through the network itself: what was saved by name comes back by name.
            source = folder / f"{part}_ema"
            adapters.load(network, source if source.is_dir() else folder / part)
            training.ema.shadow_params = [parameter.detach().clone() for parameter in training.trainable]
            training.ema.optimization_step = int(state.get("ema_step", 0))
        adapters.load(network, folder / part)
        tensors = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
        _load_optimizer(training, tensors)
        if accelerator.scaler is not None and "scaler" in tensors:
            accelerator.scaler.load_state_dict(tensors["scaler"])
    except (OSError, RuntimeError, ValueError, KeyError, EOFError, UnpicklingError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"checkpoint.resume: {folder} does not fit this run ({reason}); use the settings it was made with, start "
            "anew under another name, or, if it is damaged, remove it to go on from the one before"
        ) from error
    training.step = state["step"]


def _bare(optimizer: Any) -> Any:
    """The optimizer inside Accelerate's."""
    return getattr(optimizer, "optimizer", optimizer)


def _load_optimizer(training: Training, tensors: dict[str, Any]) -> None:
    """What the optimizer and its schedule have learned, under the settings of now: a new `optimizer.lr` counts.

    Both keep their settings among their state, so that plain loading would quietly bring the old ones back.
    """
    optimizer, scheduler = _bare(training.optimizer), training.scheduler
    names = inspect.signature(type(optimizer)).parameters.keys() - {"params", "lr"}
    settings = [{name: group[name] for name in names if name in group} for group in optimizer.param_groups]
    base_rates = list(scheduler.base_lrs)
    training.optimizer.load_state_dict(tensors["optimizer"])
    _match_strides(optimizer)
    scheduler.load_state_dict(tensors["scheduler"])
    for group, values in zip(optimizer.param_groups, settings, strict=True):
        group.update(values)
        _place_steps(optimizer, group)
    if isinstance(scheduler, LambdaLR):
        scheduler.base_lrs = base_rates
        rates = [
            base * curve(scheduler.last_epoch) for base, curve in zip(base_rates, scheduler.lr_lambdas, strict=True)
        ]
        for group, base, rate in zip(optimizer.param_groups, base_rates, rates, strict=True):
            group["initial_lr"], group["lr"] = base, rate
        scheduler._last_lr = rates


def _place_steps(optimizer: Any, group: dict[str, Any]) -> None:
    """Where the setting of now wants the step counts: loading leaves them where that of the checkpoint wanted them."""
    if not group.keys() & {"fused", "capturable"}:
        return
    on_device = bool(group.get("fused") or group.get("capturable"))
    for parameter in group["params"]:
        state = optimizer.state.get(parameter, {})
        if isinstance(state.get("step"), Tensor):
            state["step"] = state["step"].to(parameter.device if on_device else "cpu")


def _match_strides(optimizer: Any) -> None:
    """Fused optimizers want the strides of a parameter in its state too: the file may come from another format."""
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.stride() != parameter.stride():
                state[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def prune(root: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints and the one with the best validation loss."""
    found = complete(root)
    measured = [(loss, folder) for folder in found if (loss := read_state(folder).get("validation_loss")) is not None]
    best = min(measured)[1] if measured else None
    for folder in found[: max(len(found) - keep, 0)]:
        if folder != best:
            shutil.rmtree(folder)
