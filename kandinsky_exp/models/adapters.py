"""Which weights train: all of them, or a low-rank adapter beside frozen ones."""

import json
import logging
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kandinsky_exp.errors import ConfigError
from kandinsky_exp.models import adapter_files, adapter_tensors
from kandinsky_exp.models.adapter_files import WEIGHTS_NAME as WEIGHTS_NAME

logger = logging.getLogger(__name__)

# `add_k_proj` and `add_v_proj` are where the image embedding enters the decoder's attention.
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_v_proj")
PRESETS = ("attention", "all-linear")
Init = Literal["default", "gaussian", "pissa", "olora"]
# Meng et al. 2024 and Büyükakyüz 2024 begin with parts of the weights, and take these out of the frozen network.
TAKEN_FROM_WEIGHTS = ("pissa", "olora")


def attach_lora(
    network: Any,
    *,
    rank: int,
    alpha: float | None,
    dropout: float,
    target_modules: Sequence[str] | str | None,
    use_dora: bool,
    dtype: torch.dtype,
    use_rslora: bool = False,
    init: Init = "default",
    whole: Sequence[str] = (),
) -> None:
    """Freeze the network in `dtype` and give it a trainable fp32 adapter, with which it is what it was at first.

    Args:
        alpha: the adapter's output is scaled by alpha / rank; None = rank, so no scaling.
        target_modules: endings of module names, or a preset; None = `attention`.
        dtype: of a network that is not quantised.
        use_rslora: scale by alpha / √rank instead (Kalajdzievski 2023).
        init: what the adapter begins with.
        whole: names of layers that train as they are, beside it.

    Raises:
        ConfigError: as `problems` has it.
        ValueError: a layer is to train as a whole whose weights nothing could read again.
    """
    from peft import LoraConfig

    if unknown := set(whole) - {adapter_files.CONV_IN, adapter_files.HINT_BLOCK}:  # nobody would read what was trained
        raise ValueError(f"trains_whole: {', '.join(sorted(unknown))} has no file beside an adapter")
    if found := problems(network, rank, target_modules, init, whole):
        raise ConfigError(found)
    network.requires_grad_(False)
    if not getattr(network, "is_quantized", False):
        nn.Module.to(network, dtype)  # diffusers' own `to` warns of modules to keep in float32, of which there are none
    config = LoraConfig(
        r=rank,
        lora_alpha=rank if alpha is None else alpha,  # type: ignore[arg-type]  # peft divides by it: floats are fine
        lora_dropout=dropout,
        target_modules=targets(network, target_modules),
        use_dora=use_dora,
        use_rslora=use_rslora,
        init_lora_weights=True if init == "default" else init,
    )
    if init in TAKEN_FROM_WEIGHTS:
        # Before the network is on its device: another device's decompositions are other ones, and a checkpoint holds
        # none of the frozen weights that they leave.
        what = "decomposes the weights on the CPU, where a run that goes on finds the same: minutes at full size"
        logger.info("adapter.init=%s %s", init, what)
    network.add_adapter(config)
    for name in whole:
        network.get_submodule(name).requires_grad_(True)
    network.trained_whole = tuple(whole)
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if init in TAKEN_FROM_WEIGHTS:  # A_0 and B_0: the frozen weights are W - s·B_0·A_0
        network.initial_factors = {key: value.clone() for key, value in _factors(network, network.state_dict()).items()}


def targets(network: nn.Module, target_modules: Sequence[str] | str | None) -> list[str]:
    """The names, or endings of names, that stand for a setting."""
    if target_modules == "all-linear":
        return [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    return list(ATTENTION if target_modules in (None, "attention") else target_modules)


def problems(
    network: nn.Module,
    rank: int,
    target_modules: Sequence[str] | str | None,
    init: Init,
    whole: Collection[str] = (),
) -> list[str]:
    """What is wrong with an adapter for this network, which may be without data, as `key: ...` messages.

    Args:
        whole: layers that train as they are, and so take none.
    """
    matches = {name: _matching(network, name) for name in targets(network, target_modules)}
    by_name = target_modules is not None and not isinstance(target_modules, str)
    layers = {name: module for found in matches.values() for name, module in found.items()}
    missing = [name for name, found in matches.items() if not found and (by_name or not layers)]
    if missing:
        return [
            f"adapter.target_modules: {', '.join(missing)} match no module of {type(network).__name__}; use names such "
            f"as {', '.join(ATTENTION)}, or a preset: {', '.join(PRESETS)}"
        ]
    if twice := sorted(name for name in layers if _is_in(name, whole)):
        return [f"adapter.target_modules: {twice[0]} trains as a whole here; leave it out"]
    fit = nn.Linear if init in TAKEN_FROM_WEIGHTS else (nn.Linear, nn.Conv2d)
    odd = [f"{name} ({type(module).__name__})" for name, module in layers.items() if not isinstance(module, fit)]
    if odd:
        wanted = "linear layers" if init in TAKEN_FROM_WEIGHTS else "linear layers and convolutions"
        return [f"adapter.target_modules: {odd[0]} takes no such adapter, {wanted} do; name others"]
    size, smallest = min((_largest_rank(module), name) for name, module in layers.items())
    if rank > size:
        return [f"adapter.rank: {rank} is more than the {size} of {smallest}; make it smaller, or name other modules"]
    return []


def _matching(network: nn.Module, name: str) -> dict[str, nn.Module]:
    """The modules of this name, or whose names end with it, as peft finds them."""
    return {found: module for found, module in network.named_modules() if f".{found}".endswith(f".{name}")}


def _largest_rank(module: Any) -> int:
    """Of a change to the weights of a linear layer or a convolution: its rank as a matrix."""
    if isinstance(module, nn.Linear):  # a quantised one has its weights packed
        return min(module.in_features, module.out_features)
    return int(min(len(module.weight), module.weight[0].numel()))


def has_adapter(network: nn.Module) -> bool:
    return bool(getattr(network, "peft_config", None))


@dataclass(frozen=True)
class NetworkFiles:
    """What is written of a network that trains: a diffusers model, or as `save_lora_adapter` does the adapter alone.

    Args:
        tensors: by their names in the file `name`; those of the layers `apart` have a file of that layer's name.
        config_of: the diffusers model whose `config.json` goes beside it; None for an adapter.
    """

    name: str
    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    config_of: Any
    apart: tuple[str, ...] = ()

    def write(self, folder: Path) -> None:
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        if self.config_of is not None:
            self.config_of.save_config(folder)
        # To the host before anything else: the device may have no room for a copy in the file's order.
        tensors = {key: value.detach().to("cpu").contiguous() for key, value in self.tensors.items()}
        for layer in self.apart:
            own = {name: tensors.pop(name) for name in list(tensors) if _is_in(name, [layer])}
            save_file(own, adapter_files.whole_file(folder, layer), metadata={"format": "pt"})
        save_file(tensors, folder / self.name, metadata=self.metadata)


def snapshot(network: Any, trained: Mapping[str, Tensor]) -> NetworkFiles:
    """What there is to write now; `trained` takes the place of the parameters of these names (their averages, say).

    Nothing is copied: the tensors are the network's own.
    """
    if not has_adapter(network):
        tensors = {**network.state_dict(keep_vars=True), **trained}
        return NetworkFiles("diffusion_pytorch_model.safetensors", tensors, {"format": "pt"}, network)
    from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY

    state = {**network.state_dict(keep_vars=True), **trained}
    tensors = _factors(network, state)
    config = network.peft_config["default"]
    settings = {key: list(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    if initial := getattr(network, "initial_factors", None):
        tensors = {key: _beside(key, value, initial) for key, value in tensors.items()}
        settings |= {"r": 2 * config.r, "init_lora_weights": True}
        settings["lora_alpha"] = config.lora_alpha * (math.sqrt(2) if config.use_rslora else 2)
    metadata = {"format": "pt", LORA_ADAPTER_METADATA_KEY: json.dumps(settings, indent=2, sort_keys=True)}
    if network.trained_whole:
        metadata[adapter_files.WHOLE] = ",".join(network.trained_whole)
    tensors |= {name: value for name, value in state.items() if _is_in(name, network.trained_whole)}
    return NetworkFiles(WEIGHTS_NAME, tensors, metadata, None, network.trained_whole)


def _factors(network: Any, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The adapter's tensors among all of a network's, under the names of its file."""
    from peft.utils import get_peft_model_state_dict

    found: dict[str, Tensor] = get_peft_model_state_dict(network, state_dict=state)
    return found


def _beside(key: str, value: Tensor, initial: Mapping[str, Tensor]) -> Tensor:
    """[A; A_0] and [B, -B_0]: together with W they are what A and B are with W - s·B_0·A_0, at twice the rank."""
    if ".lora_A." in key:
        return torch.cat([value, initial[key].to(value.device)])
    if ".lora_B." in key:
        return torch.cat([value, -initial[key].to(value.device)], dim=1)
    return value


@torch.no_grad()
def load(network: Any, folder: Path) -> None:
    """Put weights of a `snapshot` back into the network, in place and exactly.

    Raises:
        ValueError, RuntimeError: they are those of another network or of another kind of adapter.
    """
    if has_adapter(network):
        from peft import set_peft_model_state_dict
        from safetensors.torch import load_file

        stored = load_file(folder / WEIGHTS_NAME)
        if hasattr(network, "initial_factors"):
            stored = {key: _first_half(key, value) for key, value in stored.items()}
        result: Any = set_peft_model_state_dict(network, stored)
        lost = [*result.unexpected_keys, *(key for key in result.missing_keys if "lora_" in key)]
        if lost:
            raise ValueError(f"{folder / WEIGHTS_NAME} is another adapter: {len(lost)} tensors such as {lost[0]}")
        for layer in network.trained_whole:
            network.get_submodule(layer).load_state_dict(adapter_tensors.of_layer(folder, layer))
    else:
        source = type(network).from_pretrained(folder, use_safetensors=True, local_files_only=True)
        network.load_state_dict(source.state_dict())


def _is_in(name: str, layers: Collection[str]) -> bool:
    """Whether a module or tensor is one of these layers, or in one."""
    return any(name == layer or name.startswith(f"{layer}.") for layer in layers)


def _first_half(key: str, value: Tensor) -> Tensor:
    """What `_beside` put A_0 or B_0 beside."""
    if ".lora_A." in key:
        return value[: len(value) // 2].contiguous()
    return value[:, : value.shape[1] // 2].contiguous() if ".lora_B." in key else value
