"""Settings that a device cannot train with, or only slowly: said before anything loads, with what to set."""

from dataclasses import dataclass

import torch
from omegaconf import DictConfig

from kandinsky_exp.errors import ConfigError


@dataclass(frozen=True)
class Facts:
    """What counts of a device: its type, as torch calls it; older GPUs emulate bfloat16, slower than float32."""

    kind: str
    has_bf16: bool = True


def facts(device: torch.device) -> Facts:
    return Facts(device.type, device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False))


def half(device: Facts) -> str:
    """The half precision that a device computes in."""
    return "bf16" if device.has_bf16 else "fp16"


def of_precision(precision: str, device: Facts) -> list[str]:
    """Why a mixed precision (`no`, `fp16`, `bf16`) cannot be, as `key: ...` messages."""
    if precision == "bf16" and not device.has_bf16:
        return ["precision: this GPU only emulates bf16, slower than fp32; set precision=fp16, or fp32"]
    return []


def of_training(precision: str, attention: str, base_precision: str | None, device: Facts) -> list[str]:
    """Why these settings cannot train there: `precision` and what needs CUDA."""
    found = of_precision(precision, device)
    if precision == "fp16" and device.kind == "cpu":
        found.append(
            "precision: fp16 trains on a GPU, for its loss scaling, and this is a CPU; set precision=bf16, or fp32"
        )
    if attention == "xformers" and device.kind != "cuda":
        found.append(f"trainer.attention: xformers needs a CUDA device, and this is {device.kind}; set sdpa")
    if base_precision is not None and device.kind != "cuda":
        found.append(
            f"adapter.base_precision: {base_precision} needs a CUDA device, and this is {device.kind}; leave it null, "
            "precision=bf16 halves the frozen network on any device"
        )
    return found


def cost(precision: str, tf32: bool, device: Facts) -> str | None:
    """What a precision costs where another is much faster."""
    if device.kind != "cuda" or precision != "no" or tf32:
        return None
    return (
        "precision=fp32 without TF32 leaves most of this GPU's speed unused: "
        f"precision={half(device)} trains faster in less memory, precision.tf32=true rounds products of float32 alone"
    )


def check_precision(cfg: DictConfig, device: torch.device) -> None:
    """Refuse a precision that the device only emulates.

    Raises:
        ConfigError: naming the setting.
    """
    if found := of_precision(cfg.precision.mixed_precision, facts(device)):
        raise ConfigError(found)


def check_training(cfg: DictConfig, device: torch.device, hint: str = "") -> None:
    """Refuse what cannot train on the device.

    Args:
        hint: what else to do about it, behind each problem.

    Raises:
        ConfigError: naming the settings.
    """
    wanted = (cfg.precision.mixed_precision, cfg.trainer.attention, cfg.adapter.base_precision)
    if found := of_training(*wanted, facts(device)):
        raise ConfigError([f"{problem}{hint}" for problem in found])


def cost_of(cfg: DictConfig, device: torch.device) -> str | None:
    """One line, where the device is much faster in another precision."""
    return cost(cfg.precision.mixed_precision, cfg.precision.tf32, facts(device))
