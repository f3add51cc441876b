"""`trainer.group_by_length`: captions of a step have similar lengths; exact resume, and refused where it cannot be."""

import json
from pathlib import Path
from typing import Any

import pytest
from running import composed, network, problems_of, same, stopped_at, train

from kandinsky_exp.errors import ConfigError
from kandinsky_exp.stages.prior import PriorStage

GROUPED = ["model=prior", "trainer.group_by_length=true", "trainer.max_steps=6", "trainer.log_every=1", "tracker=none"]


@pytest.fixture
def lengths(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Of the captions of each batch that trains."""
    seen: list[list[int]] = []
    loss = PriorStage.loss

    def noted(self: Any, network: Any, features: Any, *more: Any) -> Any:
        if network.training:
            seen.append(features["text_mask"].sum(1).tolist())
            assert features["text_states"].shape[1] == max(seen[-1])
        return loss(self, network, features, *more)

    monkeypatch.setattr(PriorStage, "loss", noted)
    return seen


def spread(seen: list[list[int]]) -> float:
    return sum(max(step) - min(step) for step in seen) / len(seen)


def test_a_step_has_captions_of_similar_length_and_a_stopped_run_ends_the_same(
    tmp_path: Path, lengths: list[list[int]]
) -> None:
    train(tmp_path, "name=plain", *GROUPED, "trainer.group_by_length=false")
    plain, lengths[:] = [*lengths], []
    train(tmp_path, "name=whole", *GROUPED)
    whole, lengths[:] = [*lengths], []
    assert spread(whole) < 0.6 * spread(plain)
    epochs = [sorted(length for step in seen[:3] for length in step) for seen in (plain, whole)]  # 12 rows
    assert epochs[0] == epochs[1]
    with stopped_at("step 4 of"):
        train(tmp_path, "name=part", *GROUPED)
    train(tmp_path, "name=part", *GROUPED)
    assert lengths == whole
    assert same(*(network(tmp_path / name / "pipeline" / "prior") for name in ("whole", "part")))
    for name, grouped in (("plain", False), ("whole", True)):
        state = json.loads((max((tmp_path / name / "checkpoints").iterdir()) / "state.json").read_text())
        assert (state["order"], state["group_by_length"]) == ("permutation", grouped)


def test_it_is_fixed_once_a_run_has_begun(tmp_path: Path) -> None:
    train(tmp_path, "name=run", *GROUPED, "trainer.group_by_length=false", "trainer.max_steps=2")
    config = tmp_path / "run" / "config.yaml"
    lines = config.read_text().splitlines()
    config.write_text("\n".join(line for line in lines if "group_by_length" not in line))  # of an earlier version
    with pytest.raises(ConfigError, match=r"trainer\.group_by_length: was False, is True"):
        train(tmp_path, "name=run", *GROUPED)
    train(tmp_path, "name=run", *GROUPED, "trainer.group_by_length=false")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model=decoder", "trainer.group_by_length: decoder reads no captions; leave it false"),
        (
            "data.cache=false",
            "trainer.group_by_length: lengths are known of encoded captions only; set data.cache=true",
        ),
    ],
)
def test_where_it_means_nothing_it_is_refused(tmp_path: Path, override: str, message: str) -> None:
    (found,) = problems_of(composed(tmp_path, *GROUPED, override))
    assert found.startswith(message)
