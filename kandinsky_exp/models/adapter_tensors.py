"""The tensors of an adapter's file, whichever trainer wrote it, as the network that it goes onto calls them."""

import warnings
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from kandinsky_exp.models import adapter_files, weight_files, widening


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


def of_layer(folder: Path, layer: str) -> dict[str, Tensor]:
    """Of a layer that trained as a whole, by its own names."""
    stored = load_file(adapter_files.whole_file(folder, layer))
    return {name.removeprefix(f"{layer}."): value for name, value in stored.items()}


# --- onto a network that does not train


@torch.no_grad()
def apply(network: Any, found: Iterable[tuple[Path, float]]) -> None:
    """Put adapters that this or another trainer wrote onto a network.

    Args:
        found: folders, and what each adapter's own scale is multiplied by; with 0 the network is what it was. Of a DoRA
            the magnitudes, too, go that part of the way from the network's own.

    Raises:
        OSError, ValueError, RuntimeError, SafetensorError: a file is damaged, or does not fit.
    """
    from peft.tuners.lora import LoraLayer

    found = list(found)
    beside: list[tuple[widening.Layers, float]] = [
        ({layer: of_layer(file.parent, layer) for layer, file in adapter_files.whole_files(place).items()}, scale)
        for place, scale in found
    ]
    widening.add_trained(network, [(own, scale) for own, scale in beside if own])
    scales, modules = {}, layers(network)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several are what is wanted
        for index, (folder, scale) in enumerate(found):
            scales[name := f"adapter_{index}"] = scale
            tensors, settings = read(folder, modules)
            network.load_lora_adapter(tensors, prefix=None, adapter_name=name, metadata=settings)
    for module in network.modules():
        if isinstance(module, LoraLayer):
            module.set_adapter(list(scales))
            for name, scale in scales.items():
                module.set_scale(name, scale)
                if name in module.lora_magnitude_vector:
                    _scale_magnitude(module, name, scale)
    network.requires_grad_(False)


def _scale_magnitude(module: Any, name: str, scale: float) -> None:
    layer, weight = module.lora_magnitude_vector[name], module.get_base_layer().weight
    own = layer.get_weight_norm(weight, torch.zeros_like(weight), 0.0)
    layer.weight.copy_(torch.lerp(own.to(layer.weight), layer.weight, scale))


def merge(network: Any) -> None:
    """Make what `apply` put on a network part of its weights."""
    network.fuse_lora(safe_fusing=True)
    network.unload_lora()
