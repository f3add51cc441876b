"""Optimizers that torch has in parts."""

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor, nn

from kandinsky_exp.errors import ConfigError


class Muon(torch.optim.Optimizer):
    """torch's Muon for matrices and AdamW for all other weights – kernels, biases, norms – as one optimizer.

    Each has a parameter group, so that a schedule drives both, and a checkpoint holds both.

    Args:
        lr, weight_decay: of both. Muon's update gets the root mean square that AdamW's has (Liu et al. 2025, "Muon is
            Scalable for LLM Training", arXiv:2502.16982, section 2.2), so that they mean what they mean for AdamW.
        momentum, nesterov, ns_steps: of Muon; the last counts the Newton-Schulz iterations of an update.
        betas, eps, fused: of AdamW.

    Raises:
        ConfigError: this torch has no Muon.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float = 1e-5,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        fused: bool | None = None,
    ) -> None:
        if not hasattr(torch.optim, "Muon"):
            raise ConfigError(
                f"optimizer: Muon needs torch 2.9 or newer, this is {torch.__version__}; pip install -U torch, or take "
                "another, e.g. optimizer=adamw"
            )
        weights = list(params)
        matrices = [weight for weight in weights if weight.ndim == 2]
        others = [weight for weight in weights if weight.ndim != 2]
        self._parts: list[torch.optim.Optimizer] = []
        if matrices:
            how = partial(torch.optim.Muon, ns_steps=ns_steps, adjust_lr_fn="match_rms_adamw")
            self._parts.append(how(matrices, lr, weight_decay, momentum, nesterov))
        if others:
            beta1, beta2 = betas
            self._parts.append(torch.optim.AdamW(others, lr, (beta1, beta2), eps, weight_decay, fused=fused))
        super().__init__([part.param_groups[0] for part in self._parts], {"lr": lr, "weight_decay": weight_decay})

    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        loss = None if closure is None else torch.enable_grad()(closure)()
        for part, group in zip(self._parts, self.param_groups, strict=True):
            part.param_groups, part.state = [group], self.state  # those of now: loading a state makes new ones
            part.step()
        return loss
