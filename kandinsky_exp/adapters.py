"""Which weights train: all of them, or a low-rank adapter beside frozen ones."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kandinsky_exp.errors import ConfigError

WEIGHTS_NAME = "pytorch_lora_weights.safetensors"
# `add_k_proj` and `add_v_proj` are where the image embedding enters the decoder's attention.
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_v_proj")


def attach_lora(
    network: Any,
    *,
    rank: int,
    alpha: float | None,
    dropout: float,
    target_modules: list[str] | None,
    use_dora: bool,
    dtype: torch.dtype,
) -> None:
    """Freeze the network in `dtype` and give it a trainable fp32 adapter, initialised as the identity.

    Args:
        alpha: the adapter's output is scaled by alpha / rank; None = rank, so no scaling.
        target_modules: endings of module names; None = every attention projection.

    Raises:
        ConfigError: no module of the network has such a name.
    """
    from peft import LoraConfig

    network.requires_grad_(False)
    nn.Module.to(network, dtype)  # diffusers' own `to` warns of modules to keep in float32, of which there are none
    config = LoraConfig(
        r=rank,
        lora_alpha=rank if alpha is None else alpha,  # type: ignore[arg-type]  # peft divides by it: floats are fine
        lora_dropout=dropout,
        target_modules=list(target_modules or ATTENTION),
        use_dora=use_dora,
        init_lora_weights=True,
    )
    try:
        network.add_adapter(config)
    except ValueError as error:
        raise ConfigError(
            f"adapter.target_modules: {target_modules} match no module of {type(network).__name__}; "
            f"use names such as {', '.join(ATTENTION)}"
        ) from error
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def has_adapter(network: nn.Module) -> bool:
    return bool(getattr(network, "peft_config", None))


def save(network: Any, folder: Path) -> None:
    """Write the trained weights: a diffusers model, or the adapter as diffusers' own `save_lora_adapter` does."""
    if has_adapter(network):
        network.save_lora_adapter(folder, weight_name=WEIGHTS_NAME)
    else:
        network.save_pretrained(folder)


@dataclass(frozen=True)
class NetworkFiles:
    """What `save` writes of a network, before it is written.

    Args:
        tensors: by their names in the file `name`.
        config_of: the diffusers model whose `config.json` goes beside it; None for an adapter.
    """

    name: str
    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    config_of: Any

    def on_host(self, copies: dict[int, Tensor]) -> "NetworkFiles":
        """The same in host memory, out of training's reach; `copies`, by id, so that what files share is copied once.

        The copies are contiguous, as the file needs them: a network may train in another memory format.
        """
        for value in self.tensors.values():
            if id(value) not in copies:
                form = torch.contiguous_format
                copies[id(value)] = value.detach().to("cpu", copy=True, memory_format=form)
        return replace(self, tensors={key: copies[id(value)] for key, value in self.tensors.items()})

    def write(self, folder: Path) -> None:
        from safetensors.torch import save_file

        folder.mkdir(parents=True)
        if self.config_of is not None:
            self.config_of.save_config(folder)
        tensors = {key: value.detach().contiguous() for key, value in self.tensors.items()}
        save_file(tensors, folder / self.name, metadata=self.metadata)


def snapshot(network: Any, trained: Mapping[str, Tensor]) -> NetworkFiles:
    """What `save` would write now; `trained` takes the place of the parameters of these names (their averages, say).

    Nothing is copied: the tensors are the network's own.
    """
    if not has_adapter(network):
        tensors = {**network.state_dict(keep_vars=True), **trained}
        return NetworkFiles("diffusion_pytorch_model.safetensors", tensors, {"format": "pt"}, network)
    from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
    from peft.utils import get_peft_model_state_dict

    tensors = get_peft_model_state_dict(network, state_dict={**network.state_dict(keep_vars=True), **trained})
    settings = {
        key: list(value) if isinstance(value, set) else value
        for key, value in network.peft_config["default"].to_dict().items()
    }
    metadata = {"format": "pt", LORA_ADAPTER_METADATA_KEY: json.dumps(settings, indent=2, sort_keys=True)}
    return NetworkFiles(WEIGHTS_NAME, tensors, metadata, None)


@torch.no_grad()
def load(network: Any, folder: Path) -> None:
    """Put weights that `save` wrote back into the network, in place and exactly.

    Raises:
        ValueError, RuntimeError: they are those of another network or of another kind of adapter.
    """
    if has_adapter(network):
        from peft import set_peft_model_state_dict
        from safetensors.torch import load_file

        result: Any = set_peft_model_state_dict(network, load_file(folder / WEIGHTS_NAME))
        lost = [*result.unexpected_keys, *(key for key in result.missing_keys if "lora_" in key)]
        if lost:
            raise ValueError(f"{folder / WEIGHTS_NAME} is another adapter: {len(lost)} tensors such as {lost[0]}")
    else:
        source = type(network).from_pretrained(folder, use_safetensors=True, local_files_only=True)
        network.load_state_dict(source.state_dict())
