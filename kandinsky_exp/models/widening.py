"""Make a decoder that sees more of a plain one: it begins as the plain one, and at first does not heed the rest."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from diffusers.models.embeddings import ImageHintTimeEmbedding
from torch import Tensor, nn

from kandinsky_exp.models.adapter_files import CONV_IN, HINT_BLOCK
from kandinsky_exp.models.decoder_kinds import EMBEDDING, HINT, KINDS, PLAIN, DecoderKind, kind_of_network

SILU_GAIN = 1.68  # 1/√E[silu(x)²] of a normal x
SEED = 2022  # of the hint block: what a network begins with hangs on no run's seed

Layers = Mapping[str, Mapping[str, Tensor]]  # tensors of layers that trained as a whole, by layer and own name


def widened(network: Any, kind: DecoderKind) -> nn.Module:
    """Let a plain decoder see what one of another kind does; one of that kind stays as it is. It is returned.

    The new weights of its first layer are zero. Those of a hint block are not: were both zero, neither would learn.
    """
    if kind_of_network(network) is kind:
        return cast(nn.Module, network)
    old, latents = network.conv_in, network.config.in_channels
    device, dtype = old.weight.device, old.weight.dtype
    new = nn.Conv2d(
        kind.inputs(latents), old.out_channels, old.kernel_size, padding=old.padding, device=device, dtype=dtype
    )
    with torch.no_grad():
        new.weight.zero_()
        new.weight[:, :latents] = old.weight
        new.bias = old.bias
    network.conv_in = new
    network.register_to_config(in_channels=kind.inputs(latents), **{EMBEDDING: kind.embedding})
    if kind is HINT:
        network.add_embedding = _with_hints(network.add_embedding, device, dtype)
    return cast(nn.Module, network)


def _with_hints(old: Any, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The embedding of the image, with a block for hints beside it.

    The block passes the variance of a hint on (He et al. 2015). As torch begins convolutions, eight in a row leave a
    constant: their biases drown the hint, and hundreds of steps teach nothing.
    """
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(SEED)
        new: Any = ImageHintTimeEmbedding(old.image_proj.in_features, old.image_proj.out_features).to(dtype)
        for layer in new.input_hint_block:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, std=SILU_GAIN / layer.weight[0].numel() ** 0.5)
                nn.init.zeros_(cast(Tensor, layer.bias))
    new.image_proj, new.image_norm = old.image_proj, old.image_norm
    return cast(nn.Module, new.train(old.training))


@torch.no_grad()
def add_trained(network: Any, found: Sequence[tuple[Layers, float]]) -> None:
    """Go from layers of a network towards trained ones; a plain decoder is widened for it.

    Args:
        found: what trained as a whole, and how far to go: 0 = not at all, 1 = all the way.

    Raises:
        RuntimeError: they are another decoder's.
    """
    if not found:
        return
    first = found[0][0]
    if kind_of_network(network) is PLAIN:
        channels, latents = first[CONV_IN]["weight"].shape[1], network.config.in_channels
        widened(network, next(kind for kind in KINDS if kind.inputs(latents) == channels))
        if HINT_BLOCK in first:  # there was none to begin with
            network.get_submodule(HINT_BLOCK).load_state_dict(dict(first[HINT_BLOCK]))
    for layer in first:
        for name, own in network.get_submodule(layer).named_parameters():
            one, *others = (torch.lerp(own, trained[layer][name].to(own), scale) for trained, scale in found)
            own.copy_(one + sum(other - own for other in others) if others else one)
