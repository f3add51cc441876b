"""Check that a new run can begin at the checkpoint of another, by a few headers and before anything loads."""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from kandinsky_exp.errors import CheckpointError
from kandinsky_exp.models import adapter_files, adapters, weight_files
from kandinsky_exp.models.components import PARTS, PipelineHalf
from kandinsky_exp.runs import integrity
from kandinsky_exp.system.files import setting

Shapes = dict[str, tuple[int, ...]]


def check(
    start: Path,
    part: str,
    adapter: Mapping[str, Any],
    bare: Callable[[], nn.Module],
    optimizer: str,
) -> None:
    """Compare what a checkpoint holds with what the run would put it into; its stage, the config's check has compared.

    Args:
        start: the checkpoint.
        part: the network that the run trains.
        adapter: the settings of its adapter.
        bare: makes the network, with the adapter if there is one, without data.
        optimizer: name of the class that the run trains with.

    Raises:
        CheckpointError: with all that does not fit, and how to start from the other run's weights instead.
    """
    side = PARTS[part][0]
    problems = list(_misfits(start / part, side, adapter, bare))
    used = integrity.read_state(start).get("optimizer")
    if used not in (None, optimizer):
        problems.append(f"optimizer: it was made with {used}, and this run trains with {optimizer}")
    if problems:
        listed = "\n  ".join(problems)
        raise CheckpointError(
            f"checkpoint.resume: a run with these settings cannot go on from {start}\n  {listed}\nSet these as they "
            f"were there; or leave checkpoint.resume off and start from that run's result, by "
            f"{setting(f'weights.{side}', start.parents[1])}"
        )


def check_length(start: Path, steps: int) -> None:
    """Refuse a run that would end before it begins.

    Raises:
        CheckpointError: naming the steps.
    """
    done = int(integrity.read_state(start)["step"])
    if done >= steps:
        raise CheckpointError(
            f"checkpoint.resume: {start} is of step {done}, and this run has {steps} in all: nothing is left to train. "
            "Steps are counted from the beginning of that run; raise trainer.max_steps (or max_epochs)"
        )


def _misfits(
    folder: Path, side: PipelineHalf, adapter: Mapping[str, Any], bare: Callable[[], nn.Module]
) -> Iterator[str]:
    """What keeps the network of the run from taking the weights in a folder."""
    has_adapter, adapts = adapter_files.is_adapter(folder), adapter["name"] != "none"
    if has_adapter != adapts:
        yield (
            "adapter: it holds an adapter, and this run trains all weights"
            if has_adapter
            else f"adapter: it holds all weights of a run without one, and this run trains a {adapter['name']}"
        )
        return
    files = adapters.snapshot(bare(), {})
    ours = {name: tuple(value.shape) for name, value in files.tensors.items()}
    if not adapts:
        headers = map(weight_files.header, folder.glob("*.safetensors"))
        theirs: Shapes = {name: shape for header in headers for name, shape in header.items()}
        yield from _difference(f"weights.{side}: its network is another", ours, theirs)
        return
    if set(files.apart) != adapter_files.whole_files(folder).keys():
        shown = (", ".join(layers) or "none" for layers in (adapter_files.whole_files(folder), files.apart))
        yield "model: another one; layers that train as a whole beside the adapter are {} there, {} here".format(*shown)
        return
    theirs = weight_files.header(folder / adapter_files.WEIGHTS_NAME)
    times = 2 if adapter["init"] in adapters.TAKEN_FROM_WEIGHTS else 1  # what it began with is in the file too
    yield from _other_settings(folder / adapter_files.WEIGHTS_NAME, files.metadata, times)
    if _layers(ours) != _layers(theirs):
        yield f"adapter.target_modules: it changes {len(_layers(theirs))} layers, this run {len(_layers(ours))}"


def _layers(shapes: Shapes) -> set[str]:
    """The layers that an adapter changes."""
    return {name.rpartition(".lora_")[0] for name in shapes if ".lora_" in name}


def _difference(what: str, ours: Shapes, theirs: Shapes) -> Iterator[str]:
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            yield f"{what}: {name} is {_shape(theirs.get(name))} there, {_shape(ours.get(name))} here"
            return


def _shape(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else str(list(shape))


def _other_settings(file: Path, metadata: dict[str, str], times: int) -> Iterator[str]:
    """Settings of an adapter that its file tells, and that make it another function of the same weights."""
    theirs, ours = _settings(weight_files.metadata(file)), _settings(metadata)
    if not theirs:
        return
    if theirs["use_dora"] != ours["use_dora"]:
        names = {True: "dora", False: "lora"}
        yield f"adapter: it is {names[theirs['use_dora']]}, this run's {names[ours['use_dora']]}"
    if theirs["rank"] != times * ours["rank"]:
        yield f"adapter.rank: it has {theirs['rank']}, this run's file would have {times * ours['rank']}"
    elif not math.isclose(theirs["scale"], ours["scale"]):
        yield (
            f"adapter.alpha, adapter.use_rslora: its output is scaled by {theirs['scale']:.4g}, this run's by "
            f"{ours['scale']:.4g}"
        )


def _settings(metadata: dict[str, str]) -> dict[str, Any]:
    """Rank, scale and kind; nothing where a file does not tell."""
    try:
        told = json.loads(metadata[adapter_files.METADATA])
        rank, alpha = told["r"], told["lora_alpha"]
        scale = alpha / (math.sqrt(rank) if told.get("use_rslora") else rank)
        return {"rank": rank, "scale": scale, "use_dora": bool(told.get("use_dora"))}
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return {}
