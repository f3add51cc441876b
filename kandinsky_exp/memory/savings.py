"""Settings that lower the memory of a run, the ones that cost its user least first; and what they save.

A plan tries them in this order. Where memory ran out they are ranked by what they save, estimated from what is known
then: the parameters, the optimizer's state and the peak of the device, the rest of which is activations.
"""

import contextlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.resources import files

import torch
from omegaconf import DictConfig, OmegaConf

from kandinsky_exp import build
from kandinsky_exp.config import targets
from kandinsky_exp.errors import OutOfMemory, first_line, is_of_host, is_out_of_memory
from kandinsky_exp.memory import device_limits, optimizer_state
from kandinsky_exp.stages.base import DiffusionStage
from kandinsky_exp.training.metrics import peak_memory

LOWEST_SIDE = 256  # pixels
NAMED = 3  # settings, where memory ran out
NOTES = {
    "trainer.batch_size": " (the same steps)",
    "optimizer": " (under another name)",
    "adapter": " (under another name: it trains other weights)",
}

Settings = tuple[str, ...]  # as they are typed


def candidates(cfg: DictConfig, device: torch.device) -> Iterator[Settings]:
    """First what changes no result, then what rounds, then what trains otherwise, then what trains less."""
    trainer, side = cfg.trainer, cfg.data.resolution
    if not cfg.data.cache:
        yield ("data.cache=true",)
    if not trainer.gradient_checkpointing:
        yield ("trainer.gradient_checkpointing=true",)
    yield from _smaller_batches(trainer.batch_size, trainer.grad_accumulation)
    if (size := cfg.validation.batch_size) > 1:
        yield from ((f"validation.batch_size={smaller}",) for smaller in (size // 2, 1))
    if cfg.data.encode_batch != 1:
        yield ("data.encode_batch=1",)
    if cfg.precision.mixed_precision == "no":
        yield (f"precision={device_limits.half(device_limits.facts(device))}",)
    if trainer.ema_decay is not None:
        yield ("trainer.ema_decay=null",)
    if device.type == "cuda" and targets.is_installed("bitsandbytes"):
        yield ("optimizer=adamw_8bit",)
    yield ("optimizer=adafactor",)
    if cfg.adapter.name == "none":
        yield ("adapter=lora",)
    if build.stage_class(cfg).reads_pixels() and side > LOWEST_SIDE:
        yield (f"data.resolution={max(LOWEST_SIDE, side * 3 // 4 // 64 * 64)}",)
        yield (f"data.resolution={LOWEST_SIDE}",)


def _smaller_batches(batch: int, accumulation: int) -> Iterator[Settings]:
    """The same steps in more passes."""
    while batch > 1:
        smaller = max(part for part in range(1, batch // 2 + 1) if batch % part == 0)
        batch, accumulation = smaller, accumulation * (batch // smaller)
        yield (f"trainer.batch_size={batch}", f"trainer.grad_accumulation={accumulation}")


def changed(cfg: DictConfig, settings: Settings) -> DictConfig:
    """The config with settings as they are typed, groups among them."""
    made = cfg.copy()
    for setting in settings:
        key, _, value = setting.partition("=")
        if "." in key:
            OmegaConf.update(made, key, OmegaConf.from_dotlist([f"value={value}"]).value)
        else:
            option = files("kandinsky_exp.conf").joinpath(key, f"{value}.yaml").read_text("utf-8")
            made[key] = OmegaConf.create(option)
    return made


def cheapest(cfg: DictConfig, device: torch.device, fits: Callable[[DictConfig], bool]) -> Settings | None:
    """The first candidate that fits alone; else as few as possible, the cheap ones rather than the dear; else None."""
    listed = list(candidates(cfg, device))
    if not fits(changed(cfg, _joined(listed))):
        return None
    for settings in listed:
        if fits(changed(cfg, settings)):
            return settings
    chosen = next(listed[:count] for count in range(2, len(listed) + 1) if fits(changed(cfg, _joined(listed[:count]))))
    for settings in chosen[-2::-1]:  # the dearest first: it may not be needed
        rest = [other for other in chosen if other is not settings]
        if fits(changed(cfg, _joined(rest))):
            chosen = rest
    return _joined(chosen)


def _joined(listed: list[Settings]) -> Settings:
    """One after the other; of two values of one key the last counts."""
    last = {setting.partition("=")[0]: setting for settings in listed for setting in settings}
    return tuple(last.values())


# --- where memory ran out


@dataclass(frozen=True)
class Use:
    """What a run's memory goes to, in bytes: encoders that stay because nothing is cached; activations are the rest."""

    trainable: int
    frozen: int
    optimizer: int
    average: int
    encoders: int
    activations: int

    def saved(self, cfg: DictConfig, validating: bool) -> dict[str, float]:
        """About what other values of these settings save. The parts of the activations are guesses, to rank by."""
        training, validation = (0, self.activations) if validating else (self.activations, 0)
        has_state = self.optimizer >= self.trainable  # of which 8 bits leave a quarter, and Adafactor next to nothing
        return {
            "validation.batch_size": validation / 2,
            "trainer.batch_size": training / 2,
            "trainer.gradient_checkpointing": 0.7 * training,
            "precision": 0.45 * self.activations + (self.frozen + self.encoders) / 2,
            "data.resolution": self.activations / 2 if cfg.data.resolution >= 512 else 0,
            "adapter": self.trainable + self.optimizer + self.average,
            "data.cache": self.encoders,
            "trainer.ema_decay": self.average,
            "optimizer": 0.75 * self.optimizer if has_state else 0,
        }


@contextlib.contextmanager
def explain_out_of_memory(cfg: DictConfig, device: torch.device, stage: DiffusionStage) -> Iterator[None]:
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
        listed = "; ".join(advice(cfg, use_of(cfg, device, stage, error), device, validating))
        where = "the machine" if is_of_host(error) else "the device"
        raise OutOfMemory(
            f"{where} has no memory left{' for validation' if validating else ''} ({first_line(error)}). What lowers "
            f"it most for this run: {listed}{_in_pieces(error)}"
        ) from error


def use_of(cfg: DictConfig, device: torch.device, stage: DiffusionStage, error: BaseException) -> Use:
    trained = [value for value in stage.network.parameters() if value.requires_grad]
    trainable, state = sum(value.nbytes for value in trained), 0
    with contextlib.suppress(Exception):  # there may be no memory for the small weights that it is measured on
        state = optimizer_state.measure(cfg, trained, device).state
    frozen = sum(value.nbytes for value in stage.network.parameters()) - trainable
    encoders = 0 if cfg.data.cache else stage.weights.bytes_loaded(stage.encoders)
    average = trainable if cfg.trainer.ema_decay is not None else 0
    known = 2 * trainable + frozen + state + average + encoders  # twice: weights and gradients
    activations = max(peak_memory(device) - known, size_in(error), trainable)
    return Use(trainable, frozen, state, average, encoders, activations)


def advice(cfg: DictConfig, use: Use, device: torch.device, validating: bool = False) -> list[str]:
    """The settings that lower the peak most, with what they save, the largest first; of each kind the mildest."""
    mildest: dict[str, Settings] = {}
    for settings in candidates(cfg, device):
        mildest.setdefault(settings[0].partition("=")[0], settings)
    saved = {key: size for key, size in use.saved(cfg, validating).items() if size and key in mildest}
    largest = sorted(saved, key=lambda key: -saved[key])[:NAMED]
    return [f"{' '.join(mildest[key])}{NOTES.get(key, '')}, about {saved[key] / 1e9:.2g} GB less" for key in largest]


def size_in(error: BaseException, before: str = "allocate ", after: str = "") -> int:
    """Bytes that a message names between these words, at first those that could not be had; 0 if it does not."""
    found = re.search(rf"{before}([\d.]+) (bytes|[KMGT]iB){after}", str(error))
    return int(float(found[1]) * 1024 ** "bKMGT".index(found[2][0])) if found else 0


def _in_pieces(error: BaseException) -> str:
    """What helps where there was memory enough, and no piece of it was large enough; PyTorch says how much was."""
    unused = size_in(error, "", " is reserved by PyTorch but unallocated")
    if not unused or unused < size_in(error):
        return ""
    return "; or the environment variable PYTORCH_ALLOC_CONF=expandable_segments:True, for what is free is in pieces"
