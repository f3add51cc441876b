"""`trainer.group_by_length`: captions of a step have similar lengths; exact resume, and refused where it cannot be."""

import json
from pathlib import Path
from typing import Any

import pytest
from running import composed, network, prepare, problems_of, same, stopped_at, train

from kandinsky_exp.errors import ConfigError
from kandinsky_exp.run import run
from kandinsky_exp.stages.base import Features, StageLoss
from kandinsky_exp.stages.prior import PriorStage

GROUPED = ["model=prior", "trainer.group_by_length=true", "trainer.max_steps=6", "trainer.log_every=1", "tracker=none"]


SEEN: list[list[int]] = []  # lengths of the captions of each batch that trained


class Noting(PriorStage):
    """The prior, which notes what it trains on."""

    def loss(self, network: Any, features: Features, *more: Any) -> StageLoss:
        if network.training:
            SEEN.append(features["text_mask"].sum(1).tolist())
            assert features["text_states"].shape[1] == max(SEEN[-1])
        return super().loss(network, features, *more)


def seen(root: Path, *overrides: str) -> list[list[int]]:
    SEEN.clear()
    stage = ["model._target_=test_group_by_length.Noting"]
    prepare(root, overrides, encoded=True)
    run(composed(root, *GROUPED, *stage, *overrides), ["test_group_by_length"])
    return [*SEEN]


def spread(steps: list[list[int]]) -> float:
    return sum(max(step) - min(step) for step in steps) / len(steps)


def test_a_step_has_captions_of_similar_length_and_a_stopped_run_ends_the_same(tmp_path: Path) -> None:
    plain = seen(tmp_path, "name=plain", "trainer.group_by_length=false")
    whole = seen(tmp_path, "name=whole")
    assert spread(whole) < 0.6 * spread(plain)
    epochs = [sorted(length for step in some[:3] for length in step) for some in (plain, whole)]  # 12 rows
    assert epochs[0] == epochs[1]
    with stopped_at("step 4 of"):
        seen(tmp_path, "name=part")
    first = [*SEEN]
    assert first + seen(tmp_path, "name=part") == whole
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
