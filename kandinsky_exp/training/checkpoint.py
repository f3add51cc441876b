"""Checkpoints: the network in diffusers layout and the loop's state, complete or not there at all.

    step-00000500/  prior/ or unet/  [prior_ema/ or unet_ema/]  optimizer.safetensors  state.json

A folder is written under another name and renamed when it is whole; older ones are removed only after that.
"""

import contextlib
import inspect
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import recursively_apply
from safetensors import SafetensorError
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from kandinsky_exp.errors import CheckpointError, first_line, is_out_of_memory
from kandinsky_exp.models import adapters, weight_files
from kandinsky_exp.models.adapters import NetworkFiles
from kandinsky_exp.runs.integrity import read_state, seal
from kandinsky_exp.system.files import replacing_folder
from kandinsky_exp.training import ema, state_file
from kandinsky_exp.training.loop import Training


@dataclass(frozen=True)
class Snapshot:
    """All that a checkpoint holds; first as views of what trains, then, `on_host`, as copies out of its reach.

    Args:
        networks: by folder, such as `unet` and `unet_ema`.
        tensors: what goes to `optimizer.safetensors`.
        state: what goes to `state.json`.
    """

    step: int
    networks: dict[str, NetworkFiles]
    tensors: dict[str, Any]
    state: dict[str, Any]

    def on_host(self) -> "Snapshot":
        copies: dict[int, Tensor] = {}  # by id: what files share is copied once

        def copy(value: Tensor) -> Tensor:
            # Contiguous, as the files need it. Not pinned: as much memory as a checkpoint takes would be locked for
            # good, or be locked anew each time, which takes as long as it saves.
            if id(value) not in copies:
                copies[id(value)] = value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
            return copies[id(value)]

        networks = {
            name: replace(files, tensors=recursively_apply(copy, files.tensors))
            for name, files in self.networks.items()
        }
        return replace(self, networks=networks, tensors=recursively_apply(copy, self.tensors))

    def size(self) -> int:
        """Bytes that `on_host` asks for."""
        found: dict[int, int] = {}
        every = [self.tensors, *(files.tensors for files in self.networks.values())]
        recursively_apply(lambda value: found.update({id(value): value.nbytes}), every)
        return sum(found.values())

    def write(self, root: Path) -> Path:
        """`root/step-…`, whole or not at all."""
        folder = root / f"step-{self.step:08d}"
        for left in root.glob(".step-*.part"):  # by a process that was killed
            shutil.rmtree(left)
        with replacing_folder(folder) as aside:  # it may be a damaged one that was passed over when the run was resumed
            for name, files in self.networks.items():
                files.write(aside / name)
                weight_files.refuse_other_names(weight_files.written(aside / name), files.tensors, folder / name)
            state_file.write(self.tensors, aside / state_file.NAME)
            seal(aside, self.state)
        return folder


def snapshot(
    training: Training,
    accelerator: Accelerator,
    *,
    validated: bool,
    validation_loss: float | None,
    total_batch: int,
    order: dict[str, Any],
    progress: dict[str, Any] | None = None,
) -> Snapshot:
    """The state at this step, not copied yet.

    Args:
        validated: whether this very step was validated, with or without a loss.
        validation_loss: the fixed-noise loss at this very step, None where it was not measured.
        total_batch: samples per optimizer step, over all processes.
        order: of the visits, for `state.json`.
        progress: of the validation losses, likewise.

    Raises:
        RunFailure: its tensors would not have the names of the bare network.
    """
    network, part = accelerator.unwrap_model(training.network), training.stage.part
    networks = {part: training.stage.snapshot(network, {})}
    if network is not training.stage.network:  # something that nobody unwraps is around it
        bare = training.stage.snapshot(training.stage.network, {})
        weight_files.refuse_other_names(networks[part].tensors, bare.tensors, f"the checkpoint of step {training.step}")
    state: dict[str, Any] = {"step": training.step, "validated": validated, "validation_loss": validation_loss}
    state["optimizer"] = type(ema.bare(training.optimizer)).__name__
    state |= {"total_batch": total_batch, "processes": accelerator.num_processes, **order}
    if progress is not None:
        state["progress"] = progress
    if (averages := ema.averages(training)) is not None:
        names = [name for name, parameter in network.named_parameters() if parameter.requires_grad]
        networks[f"{part}_ema"] = training.stage.snapshot(network, dict(zip(names, averages, strict=True)))
    if training.ema is not None:
        state["ema_step"] = training.ema.optimization_step
    tensors = {"optimizer": training.optimizer.state_dict(), "scheduler": training.scheduler.state_dict()}
    tensors["unread"] = training.unread
    if accelerator.scaler is not None:
        tensors["scaler"] = accelerator.scaler.state_dict()
    return Snapshot(training.step, networks, tensors, state)


def complete(root: Path) -> dict[Path, dict[str, Any]]:
    """The complete checkpoints with their states, oldest first; one whose state cannot be read is none."""
    found = {}
    for folder in sorted(root.glob("step-*")):
        with contextlib.suppress(CheckpointError):
            found[folder] = read_state(folder)
    return found


def load(training: Training, folder: Path, accelerator: Accelerator) -> dict[str, Any]:
    """Put a checkpoint back into `training`, exactly.

    Returns:
        Its loop state: see `snapshot`.

    Raises:
        CheckpointError: it does not fit this run's network, optimizer or EMA setting.
    """
    state = read_state(folder)
    part = training.stage.part
    if not (folder / part).is_dir():
        raise CheckpointError(f"checkpoint.resume: {folder} has no '{part}': it belongs to another stage; set model=…")
    used, chosen = state.get("optimizer"), type(ema.bare(training.optimizer)).__name__
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
        tensors = state_file.read(folder / state_file.NAME)
        _load_optimizer(training, tensors)
        training.unread = tensors["unread"]
        if accelerator.scaler is not None and "scaler" in tensors:
            accelerator.scaler.load_state_dict(tensors["scaler"])
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, SafetensorError) as error:
        if is_out_of_memory(error):  # it does fit this run
            raise
        raise CheckpointError(
            f"checkpoint.resume: {folder} does not fit this run ({first_line(error)}); use the settings it was made "
            "with, start anew under another name"
        ) from error
    training.step = state["step"]
    return state


def _load_optimizer(training: Training, tensors: dict[str, Any]) -> None:
    """What the optimizer and its schedule have learned, under the settings of now: a new `optimizer.lr` counts.

    Both keep their settings among their state, so that plain loading would quietly bring the old ones back.
    """
    optimizer, scheduler = ema.bare(training.optimizer), training.scheduler
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
    best = next(iter(by_loss(found)), None)
    for folder in list(found)[: max(len(found) - keep, 0)]:
        if folder != best:
            shutil.rmtree(folder)


def by_loss(found: Mapping[Path, Mapping[str, Any]]) -> list[Path]:
    """Those of some checkpoints that have a validation loss, the lowest first."""
    losses = {folder: state.get("validation_loss") for folder, state in found.items()}
    measured = {folder: loss for folder, loss in losses.items() if loss is not None and math.isfinite(loss)}
    return sorted(measured, key=lambda folder: measured[folder])
