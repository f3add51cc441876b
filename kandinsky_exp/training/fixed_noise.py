"""The fixed-noise loss: what a network is worth on held-out rows, the same noise in every run and at every step."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from kandinsky_exp.stages.base import DiffusionStage, Features
from kandinsky_exp.system import distributed
from kandinsky_exp.system.halving import Halving
from kandinsky_exp.training.seeding import derive_seed, validation_generator


class HeldOut(Protocol):
    """Rows that do not train."""

    def __len__(self) -> int: ...

    def rows(self, indices: list[int]) -> Features:
        """These rows as features on the device."""

    def batches(self, indices: list[int], size: int) -> Iterator[list[int]]:
        """`indices` in batches whose rows have equal shapes."""


@contextmanager
def uncompiled(network: nn.Module) -> Iterator[None]:
    """The network as it is, where `trainer.compile` compiled it for the training step.

    Validation asks for other batch sizes, no gradient and evaluation mode: each would cost a compilation of its own,
    minutes long, for a few calls.
    """
    if getattr(network, "_compiled_call_impl", None) is None:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


@torch.no_grad()
def validate(
    stage: DiffusionStage,
    network: nn.Module,
    held_out: HeldOut,
    *,
    accelerator: Accelerator,
    seed: int,
    draws: int,
    batches: Halving,
) -> float:
    """Mean unweighted loss over held-out rows, with noise and timesteps that depend on (seed, row, draw) alone.

    The draws of a row fall into equal parts of the timestep range, so that the estimate falls smoothly. It does not
    depend on batch size or number of processes (beyond rounding), nor on a run's loss weighting or dropped conditions.
    """
    network.eval()

    def summed(size: int) -> Tensor:
        return _summed(stage, network, held_out, accelerator, seed, draws, size)

    total = distributed.on_all_processes(lambda: batches.run(summed))
    network.train()
    everywhere: Tensor = accelerator.reduce(total, reduction="sum")
    return float(everywhere[0] / everywhere[1])


def _summed(
    stage: DiffusionStage,
    network: nn.Module,
    held_out: HeldOut,
    accelerator: Accelerator,
    seed: int,
    draws: int,
    size: int,
) -> Tensor:
    """(sum of losses, their number) over the rows of this process."""
    mine = list(range(accelerator.process_index, len(held_out), accelerator.num_processes))
    total = torch.zeros(2, device=accelerator.device)
    for chunk in held_out.batches(mine, size):
        features = held_out.rows(chunk)
        for draw in range(draws):
            generators = [validation_generator(seed, row, draw) for row in chunk]
            timesteps = spread_timesteps(seed, chunk, draw, draws, stage.num_timesteps).to(accelerator.device)
            losses = stage.loss(network, features, generators, timesteps).per_sample
            total += torch.stack([losses.sum(), torch.tensor(float(len(chunk)), device=accelerator.device)])
    return total


def spread_timesteps(seed: int, rows: list[int], draw: int, draws: int, num_timesteps: int) -> Tensor:
    """One timestep per row from part `draw` of `draws` equal parts of [0, T): a row's offset is the same in each."""
    offsets = [derive_seed("timestep", seed, row) / (1 << 63) for row in rows]
    return torch.tensor([int(num_timesteps * (draw + offset) / draws) for offset in offsets])
