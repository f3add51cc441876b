"""How a network computes attention: `trainer.attention`."""

from typing import Any

import torch

from kandinsky_exp.errors import ConfigError


def enable_attention(network: Any, attention: str) -> None:
    """`sdpa` (torch's fused), `xformers` (memory efficient, CUDA) or `eager` (plain matrix products).

    Raises:
        ConfigError: xformers is asked for where it cannot work.
    """
    if attention == "eager":
        network.set_default_attn_processor()
    elif attention == "xformers":
        try:
            import xformers.ops  # noqa: F401
        except (ImportError, OSError) as error:
            raise ConfigError(
                "trainer.attention: xformers is not installed; pip install 'kandinsky-exp[xformers]', or set sdpa"
            ) from error
        if not torch.cuda.is_available():
            raise ConfigError("trainer.attention: xformers needs a CUDA device and none is here; set sdpa")
        network.enable_xformers_memory_efficient_attention()
