"""Settings that lower the memory of a run, the ones that cost its user least first."""

from collections.abc import Callable, Iterator
from importlib.resources import files

import torch
from omegaconf import DictConfig, OmegaConf

from kandinsky_exp import build
from kandinsky_exp.config import targets
from kandinsky_exp.memory import device_limits

LOWEST_SIDE = 256  # pixels

Settings = tuple[str, ...]  # as they are typed


def candidates(cfg: DictConfig, device: torch.device) -> Iterator[Settings]:
    """First what changes no result, then what rounds, then what trains otherwise, then what trains less."""
    trainer = cfg.trainer
    if not cfg.data.cache:
        yield ("data.cache=true",)
    if not trainer.gradient_checkpointing:
        yield ("trainer.gradient_checkpointing=true",)
    yield from _smaller_batches(trainer.batch_size, trainer.grad_accumulation)
    if cfg.validation.batch_size > 1:
        yield ("validation.batch_size=1",)
    if cfg.data.encode_batch != 1:
        yield ("data.encode_batch=1",)
    if cfg.precision.mixed_precision == "no":
        yield (f"precision={device_limits.half(device_limits.facts(device))}",)
    if trainer.ema_decay is not None:
        yield ("trainer.ema_decay=null",)
    if cfg.adapter.name == "none":
        if device.type == "cuda" and targets.is_installed("bitsandbytes"):
            yield ("optimizer=adamw_8bit",)
        yield ("optimizer=adafactor",)
        yield ("adapter=lora",)
    if build.stage_class(cfg).reads_pixels() and cfg.data.resolution > LOWEST_SIDE:
        yield (f"data.resolution={max(LOWEST_SIDE, cfg.data.resolution * 3 // 4 // 64 * 64)}",)
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
