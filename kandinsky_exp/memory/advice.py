"""What to do when memory runs out: the settings that lower it most for the very run that failed.

The amounts are estimates to rank settings by, from what is known when it happens: the parameters, the optimizer's
state as it would be, and the peak of the device. Activations are what the peak holds beyond these.
"""

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from omegaconf import DictConfig
from torch import Tensor

from kandinsky_exp import build
from kandinsky_exp.errors import OutOfMemory, first_line, is_of_host, is_out_of_memory
from kandinsky_exp.memory import device_limits
from kandinsky_exp.stages.base import DiffusionStage
from kandinsky_exp.training.metrics import peak_memory

NAMED = 3
ASKED = re.compile(r"allocate (\d+) bytes|allocate ([\d.]+) ([KMGT])iB")
UNUSED = re.compile(r"([\d.]+) ([KMGT])iB is reserved by PyTorch but unallocated")
# Parts of the activations that a setting takes away: guesses that nobody measured, good enough to rank settings by.
CHECKPOINTED, HALVED, QUARTERED = 0.7, 0.45, 0.5


@dataclass(frozen=True)
class Use:
    """What a run's memory goes to, in bytes.

    Args:
        trainable, frozen: weights of the network.
        optimizer: state beside the trainable weights.
        average: of `trainer.ema_decay`.
        encoders: frozen parts that stay because nothing is cached.
        activations: the rest of the peak.
    """

    trainable: int
    frozen: int
    optimizer: int
    average: int
    encoders: int
    activations: int


@contextlib.contextmanager
def given(cfg: DictConfig, device: torch.device, stage: DiffusionStage) -> Iterator[None]:
    """Turn the end of memory into a message that says what to set.

    Raises:
        OutOfMemory: in place of torch's error, or Python's.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        validating = not stage.network.training
        listed = "; ".join(advice(cfg, use_of(cfg, device, stage, error), device.type, validating=validating))
        where = "the machine" if is_of_host(error) else "the device"
        raise OutOfMemory(
            f"{where} has no memory left{' for validation' if validating else ''} ({first_line(error)}). What lowers "
            f"it most for this run: {listed}{in_pieces(error)}"
        ) from error


def in_pieces(error: BaseException) -> str:
    """What helps where there was memory enough, and no piece of it was large enough; PyTorch says how much was."""
    found = UNUSED.search(str(error))
    if found is None or _bytes(found[1], found[2]) < asked_for(error):
        return ""
    return "; or the environment variable PYTORCH_ALLOC_CONF=expandable_segments:True, for what is free is in pieces"


def use_of(cfg: DictConfig, device: torch.device, stage: DiffusionStage, error: BaseException) -> Use:
    parameters = list(stage.network.parameters())
    trained = [value for value in parameters if value.requires_grad]
    trainable = sum(value.nbytes for value in trained)
    frozen = sum(value.nbytes for value in parameters) - trainable
    encoders = 0 if cfg.data.cache else sum(value.nbytes for value in stage.frozen_parameters())
    optimizer = int(sum(value.nbytes * state_per_weight(cfg.optimizer._target_, value) for value in trained))
    average = trainable if cfg.trainer.ema_decay is not None else 0
    known = 2 * trainable + frozen + optimizer + average + encoders  # twice: weights and gradients
    return Use(
        trainable, frozen, optimizer, average, encoders, max(peak_memory(device) - known, asked_for(error), trainable)
    )


def asked_for(error: BaseException) -> int:
    """Bytes of the allocation that failed, as the message has them; 0 if it does not say."""
    found = ASKED.search(str(error))
    if found is None:
        return 0
    if found[1]:
        return int(found[1])
    return _bytes(found[2], found[3])


def _bytes(number: str, unit: str) -> int:
    return int(float(number) * 1024 ** (1 + "KMGT".index(unit)))


def state_per_weight(optimizer: str, weight: Tensor) -> float:
    """Bytes of an optimizer's state per byte of a weight, in fp32.

    Args:
        weight: its shape counts where an optimizer factors matrices, or knows nothing but these.
    """
    name = optimizer.rpartition(".")[2].lower()
    if "8bit" in name:
        return 0.5
    if name == "adafactor":  # a row and a column in place of the last two dimensions
        return 1.0 if weight.ndim < 2 else sum(1 / side for side in weight.shape[-2:])
    if name == "muon":
        return 1.0 if weight.ndim == 2 else 2.0
    return {"sgd": 1.0, "prodigy": 4.0}.get(name, 2.0)


def advice(cfg: DictConfig, use: Use, device: str, *, validating: bool = False) -> list[str]:
    """The settings that lower the peak most, with what they save, the largest first.

    Args:
        validating: it ran out while nothing trained.
    """
    savings = dict(_of_activations(cfg, use, validating, device))
    if cfg.adapter.name == "none":
        savings["adapter=lora (under another name: it trains other weights)"] = (
            use.trainable + use.optimizer + use.average
        )
    if use.encoders:
        savings["data.cache=true"] = use.encoders
    if use.average:
        savings["trainer.ema_decay=null"] = use.average
    if use.optimizer >= use.trainable:
        small, left = ("adamw_8bit", 0.5) if device == "cuda" else ("adafactor", 0.01)
        savings[f"optimizer={small} (under another name)"] = use.optimizer - int(left * use.trainable)
    largest = sorted(savings.items(), key=lambda item: -item[1])[:NAMED]
    return [f"{setting}, about {saved / 1e9:.2g} GB less" for setting, saved in largest]


def _of_activations(cfg: DictConfig, use: Use, validating: bool, device: str) -> Iterator[tuple[str, int]]:
    trainer = cfg.trainer
    if validating and cfg.validation.batch_size > 1:
        yield f"validation.batch_size={cfg.validation.batch_size // 2}", use.activations // 2
    if not validating and trainer.batch_size > 1:
        smaller = max(part for part in range(1, trainer.batch_size // 2 + 1) if trainer.batch_size % part == 0)
        times = trainer.batch_size // smaller
        setting = f"trainer.batch_size={smaller} trainer.grad_accumulation={trainer.grad_accumulation * times}"
        yield f"{setting} (the same steps)", use.activations - use.activations // times
    if not validating and not trainer.gradient_checkpointing:
        yield "trainer.gradient_checkpointing=true", int(CHECKPOINTED * use.activations)
    if cfg.precision.mixed_precision == "no":
        half = device_limits.half(device_limits.facts(torch.device(device)))
        yield f"precision={half}", int(HALVED * use.activations) + (use.frozen + use.encoders) // 2
    if build.stage_class(cfg).reads_pixels() and cfg.data.resolution >= 512:
        yield f"data.resolution={cfg.data.resolution * 3 // 4 // 64 * 64}", int(QUARTERED * use.activations)
