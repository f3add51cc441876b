"""The learning-rate curves, against diffusers' formulas and under accumulation."""

import math
from collections.abc import Callable

import pytest
import torch
from diffusers.optimization import get_scheduler
from torch.optim.lr_scheduler import LambdaLR

from kandinsky_exp import schedules

STEPS, WARMUP, LR = 40, 10, 2e-3
NAMES = ["constant", "linear", "cosine", "cosine_with_restarts", "polynomial"]
Schedule = Callable[..., LambdaLR]


def make_optimizer() -> torch.optim.Optimizer:
    return torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))], lr=LR)


def curve(make: Callable[[torch.optim.Optimizer], LambdaLR], steps: int = STEPS) -> list[float]:
    """The rate that each optimizer step is made with, and the one after the last."""
    optimizer = make_optimizer()
    schedule = make(optimizer)
    rates = []
    for _ in range(steps):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return [*rates, schedule.get_last_lr()[0]]


@pytest.mark.parametrize("warmup", [0, WARMUP])
@pytest.mark.parametrize("name", NAMES)
def test_same_curve_as_diffusers(name: str, warmup: int) -> None:
    arguments = {"num_cycles": 3} if name == "cosine_with_restarts" else {}
    published = "constant_with_warmup" if name == "constant" else name
    ours = curve(lambda o: getattr(schedules, name)(o, total_steps=STEPS, warmup_steps=warmup, **arguments))
    theirs = curve(lambda o: get_scheduler(published, o, None, warmup, STEPS, **arguments))
    assert ours == pytest.approx(theirs, rel=1e-12, abs=1e-18)


@pytest.mark.parametrize("name", NAMES)
def test_warm_up_rises_in_a_line_to_the_full_rate(name: str) -> None:
    rates = curve(lambda o: getattr(schedules, name)(o, total_steps=STEPS, warmup_steps=WARMUP))
    assert rates[: WARMUP + 1] == pytest.approx([LR * step / WARMUP for step in range(WARMUP + 1)])


@pytest.mark.parametrize(("name", "last"), [("constant", LR), ("linear", 0), ("cosine", 0), ("polynomial", 1e-7)])
def test_the_rate_after_the_last_step_and_beyond(name: str, last: float) -> None:
    rates = curve(lambda o: getattr(schedules, name)(o, total_steps=STEPS, warmup_steps=WARMUP), STEPS + 5)
    assert rates[STEPS:] == pytest.approx([last] * 6, abs=1e-12)


def test_cosine_is_at_half_in_the_middle() -> None:
    rates = curve(lambda o: schedules.cosine(o, total_steps=STEPS))
    assert rates[STEPS // 2] == pytest.approx(LR / 2)
    assert rates[STEPS // 4] == pytest.approx(LR * 0.5 * (1 + math.cos(math.pi / 4)))


def test_polynomial_power() -> None:
    rates = curve(lambda o: schedules.polynomial(o, total_steps=STEPS, power=2.0, lr_end=1e-4))
    assert rates[STEPS // 2] == pytest.approx((LR - 1e-4) * 0.25 + 1e-4)


def test_polynomial_refuses_to_rise() -> None:
    with pytest.raises(ValueError, match=r"scheduler\.lr_end .* below optimizer\.lr"):
        schedules.polynomial(make_optimizer(), total_steps=STEPS, lr_end=1.0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("total", "warmup"), [(1, 0), (1, 1), (3, 5), (5, 5)])
def test_short_runs(name: str, total: int, warmup: int) -> None:
    rates = curve(lambda o: getattr(schedules, name)(o, total_steps=total, warmup_steps=warmup), total)
    assert all(0 <= rate <= LR for rate in rates)


@pytest.mark.parametrize("name", NAMES)
def test_goes_on_from_its_state(name: str) -> None:
    def make(optimizer: torch.optim.Optimizer) -> LambdaLR:
        made: LambdaLR = getattr(schedules, name)(optimizer, total_steps=STEPS, warmup_steps=WARMUP)
        return made

    whole = curve(make)
    optimizer = make_optimizer()
    first = make(optimizer)
    for _ in range(17):
        optimizer.step()
        first.step()
    second_optimizer = make_optimizer()
    second = make(second_optimizer)
    second_optimizer.load_state_dict(optimizer.state_dict())
    second.load_state_dict(first.state_dict())
    assert second.get_last_lr()[0] == whole[17]
    second_optimizer.step()
    second.step()
    assert second_optimizer.param_groups[0]["lr"] == whole[18]


@pytest.mark.parametrize("accumulation", [1, 4])
def test_accumulation_does_not_change_the_curve(accumulation: int) -> None:
    """Stepped once per optimizer step and not prepared by Accelerate, as the loop does it."""
    optimizer = make_optimizer()
    schedule = schedules.cosine(optimizer, total_steps=STEPS, warmup_steps=WARMUP)
    rates = []
    for micro_step in range(STEPS * accumulation):
        if (micro_step + 1) % accumulation == 0:
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
    assert rates == curve(lambda o: schedules.cosine(o, total_steps=STEPS, warmup_steps=WARMUP))[:-1]
