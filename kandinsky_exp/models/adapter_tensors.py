"""The tensors of an adapter's file, whichever trainer wrote it, as the network that it goes onto calls them."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn

from kandinsky_exp.models import adapter_files, weight_files


def read(place: Path, modules: Collection[str]) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """(tensors, what peft's `LoraConfig` is told beside them); None where they say it all.

    The strength of other trainers' files, as a tensor for each module or in a file of settings, goes into the factors.

    Args:
        modules: names of the network's, as `layers` gives them.

    Raises:
        OSError, ValueError, SafetensorError: the file cannot be read, or has a module that the network has not.
    """
    file = adapter_files.weights_file(place)
    stored, settings = load_file(file), adapter_files.settings(file)
    if is_plain(place):
        return stored, settings or None
    by_name = {str(adapter_files.bare(name)): value for name, value in stored.items()}
    found = {}
    for name, value in by_name.items():
        module, _, kind = name.removesuffix(".weight").rpartition(".")
        if (own := adapter_files.in_network(module, modules)) is None:
            raise ValueError(f"{file} changes {module}, which the base has not")
        if kind == "lora_B":
            alpha, rank = by_name.get(f"{module}.alpha"), value.shape[1]
            strength = adapter_files.scale(own, rank, None if alpha is None else alpha.item(), settings)
            value = value if strength == 1 else value.float() * strength
        if kind != "alpha":
            found[f"{own}{name[len(module) :]}"] = value.flatten() if kind == "lora_magnitude_vector" else value
    return found, None


def is_plain(place: Path) -> bool:
    """Whether an adapter's file is as diffusers' own models write it."""
    file = adapter_files.weights_file(place)
    names = weight_files.header(file)
    return file.name != adapter_files.PEFT_NAME and all(
        name == adapter_files.bare(name) and not name.endswith(".alpha") for name in names
    )


def layers(network: nn.Module) -> set[str]:
    """The names of the modules that an adapter can change."""
    return {name for name, module in network.named_modules() if hasattr(module, "weight")}
