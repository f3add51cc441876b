"""What an adapter learns beside what all weights learn, on pictures that neither saw."""

import json
from pathlib import Path

import pytest
from running import history, train

COMMON = ["data.max_samples=null", "trainer.max_steps=15", "trainer.batch_size=16", "trainer.log_every=15"]
COMMON += ["validation.every=15", "validation.draws=8", "validation.reconstructions=0", "checkpoint.every=15"]


def fall(root: Path, name: str, *overrides: str) -> float:
    """By how much the fixed-noise validation loss falls."""
    train(root, f"name={name}", *COMMON, *overrides)
    before, after = history(
        root, json.loads((root / name / "run.json").read_text())["run_id"], "validation/loss"
    ).values()
    return before - after


@pytest.mark.parametrize(
    ("stage", "rate"), [("prior", "1e-4"), pytest.param("decoder", "1e-5", marks=pytest.mark.soak)]
)
def test_rank_8_learns_at_least_half_of_what_all_weights_learn(stage: str, rate: str, tmp_path: Path) -> None:
    """Each at the better one of some rates: see the table of docs/adapters.md."""
    full = fall(tmp_path, "full", f"model={stage}", f"optimizer.lr={rate}")
    small = fall(tmp_path, "small", f"model={stage}", "optimizer.lr=3e-3", "adapter=lora", "adapter.rank=8")
    assert full > 0
    assert small >= full / 2
