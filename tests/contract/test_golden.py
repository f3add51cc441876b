"""Golden losses: what makes a step faster leaves its numbers as they are."""

import json
from pathlib import Path

import pytest
from running import history, train

COMMON = ["data.max_samples=24", "data.cache_dtype=fp32", "trainer.max_steps=6", "trainer.log_every=1"]
COMMON += ["validation.every=6", "checkpoint.every=6", "validation.reconstructions=0"]
EXTRAS = ["trainer.grad_accumulation=2", "trainer.ema_decay=0.9", "model.snr_gamma=5", "trainer.max_grad_norm=0.1"]
# (stage, with the extras) → `train/loss` of the six steps, then the `validation/loss` after them; CPU, fp32.
GOLDEN = {
    ("prior", False): [0.3919216, 0.1640808, 0.9415879, 0.1413146, 0.3804770, 0.3031102, 0.3219535],
    ("prior", True): [0.2469269, 0.3719118, 0.4130642, 0.2226444, 0.1748352, 0.1329886, 0.2955119],
    ("decoder", False): [0.01054022, 0.1706613, 0.03469130, 0.06491552, 0.1443255, 0.2121729, 0.05415152],
    ("decoder", True): [0.02238194, 0.08083002, 0.04778632, 0.1010754, 0.09889789, 0.05681843, 0.05508288],
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("golden")


@pytest.mark.parametrize(
    ("stage", "cache", "extras"),
    [
        ("prior", True, False),
        pytest.param("prior", False, False, marks=pytest.mark.soak),
        ("prior", True, True),
        ("decoder", True, False),
        pytest.param("decoder", False, True, marks=pytest.mark.soak),
        ("decoder", True, True),
    ],
)
def test_the_losses_are_the_golden_ones(stage: str, cache: bool, extras: bool, root: Path) -> None:
    """That runs without a cache train like those with one, `tests/runs/test_run.py` tells each time."""
    name = f"{stage}-{cache}-{extras}"
    more = EXTRAS if extras else []
    final = train(root, f"model={stage}", f"name={name}", f"data.cache={str(cache).lower()}", *COMMON, *more)
    run_id = json.loads((root / name / "run.json").read_text())["run_id"]
    losses = history(root, run_id, "train/loss")
    assert list(losses) == [1, 2, 3, 4, 5, 6]
    assert [*losses.values(), final] == pytest.approx(GOLDEN[stage, extras], rel=1e-4)
