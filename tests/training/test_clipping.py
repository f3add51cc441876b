"""Clipping that is folded into a fused optimizer's step gives what clipping first gives."""

import copy
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from kandinsky_exp.training.clipping import clip

FUSED = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.01, fused=True),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=1e-2, momentum=0.9, fused=True),
}


def gradients(network: torch.nn.Module, step: int) -> list[torch.nn.Parameter]:
    parameters = [*network.parameters()]
    generator = torch.Generator().manual_seed(step)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    return parameters


@pytest.mark.parametrize("max_norm", [0.5, 30.0, None], ids=["clips", "leaves them", "off"])
@pytest.mark.parametrize("make", FUSED.values(), ids=FUSED)
def test_it_is_folded_into_the_step(make: Any, max_norm: float | None) -> None:
    torch.manual_seed(0)
    ours = torch.nn.Sequential(torch.nn.Linear(9, 17), torch.nn.Linear(17, 5))
    plain, accelerator = copy.deepcopy(ours), Accelerator(cpu=True)
    folded, first = make([*ours.parameters()]), make([*plain.parameters()])
    for step in range(5):
        parameters = gradients(ours, step)
        before = [parameter.grad.clone() for parameter in parameters]
        norm = clip(parameters, folded, accelerator, max_norm)
        assert all(torch.equal(parameter.grad, grad) for parameter, grad in zip(parameters, before, strict=True))
        expected = torch.nn.utils.clip_grad_norm_(
            gradients(plain, step), float("inf") if max_norm is None else max_norm
        )
        assert torch.equal(norm, expected)
        folded.step()
        first.step()
    for one, other in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


def test_what_cannot_scale_is_clipped_first() -> None:
    network = torch.nn.Linear(9, 17)
    parameters = gradients(network, 0)
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, foreach=True)
    norm = clip(parameters, optimizer, Accelerator(cpu=True), 0.5)
    assert float(norm) > 0.5
    assert float(torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters])) == pytest.approx(
        0.5, 1e-4
    )
