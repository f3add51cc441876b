"""Networks that `torch.compile` compiles as they are: their tensors keep their names."""

import torch
from torch import nn


def compile_blocks(network: nn.Module, kinds: tuple[type[nn.Module], ...]) -> None:
    """Have the blocks of these kinds compiled when they are first asked, those of the same shape once."""
    found = [module for module in network.modules() if isinstance(module, kinds)]
    settings = torch._dynamo.config  # of one kind of block, more versions than it allows by itself
    settings.recompile_limit = max(settings.recompile_limit, 2 * len(found))
    for module in found:
        module.compile()


def is_compiled(network: nn.Module) -> bool:
    """Whether `trainer.compile` compiles it, or a part of it."""
    return any(module._compiled_call_impl is not None for module in network.modules())
