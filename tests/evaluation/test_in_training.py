"""`validation.metrics`: pictures of held-out captions, drawn and measured while a run trains."""

from pathlib import Path

import pytest
from running import client, composed, runs, train

from kandinsky_exp.config.validation import problems
from kandinsky_exp.errors import ConfigError
from kandinsky_exp.runs.run_folder import read_record

ALL = ["data.max_samples=null", "validation.reconstructions=0", "validation.metrics=[clip_score,cmmd]"]


def read_metric(run: Path, key: str) -> float | None:
    record = read_record(run)
    return None if record is None else (record.metrics or {}).get(key)


@pytest.mark.parametrize("stage", ["prior", "decoder"])
def test_both_are_recorded_at_each_validation(stage: str, tmp_path: Path) -> None:
    """From fixed noise: stopped and resumed, they come to the same."""
    words = [f"model={stage}", *ALL, "validation.every=2"]
    scored = train(tmp_path, *words, "name=whole", "trainer.max_steps=2", "sweep.objective=validation/cmmd")
    train(tmp_path, *words, "name=parts", "trainer.max_steps=1", "checkpoint.every=1")
    train(tmp_path, *words, "name=parts", "trainer.max_steps=2")
    whole, parts = sorted(runs(tmp_path), key=lambda run: str(run.info.run_name), reverse=True)
    for key in ("validation/clip_score", "validation/cmmd"):
        curves = [
            {point.step: point.value for point in client(tmp_path).get_metric_history(run.info.run_id, key)}
            for run in (whole, parts)
        ]
        assert list(curves[0]) == [0, 2]
        assert curves[0] == {step: value for step, value in curves[1].items() if step != 1}
        assert curves[0][0] != curves[0][2]
    assert scored == curves[0][2]  # of CMMD: what a sweep would optimize
    again = train(tmp_path, *words, "name=whole", "trainer.max_steps=2", "sweep.objective=validation/clip_score")
    assert again == read_metric(tmp_path / "whole", "validation/clip_score")


def test_what_cannot_be_measured_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"validation.metrics: 12 pictures are held out, and it takes 16"):
        train(tmp_path, "model=prior", "validation.metrics=[cmmd]", "tracker=none", "name=p")
    for words, told in (
        (["model=control", "validation.metrics=[cmmd]"], "captions alone say nothing of a decoder that draws hints"),
        (["validation.metrics=[fid]"], "has to be"),
    ):
        (problem,) = problems(composed(tmp_path, *words), "train")
        assert problem.key.startswith("validation.metrics")
        assert told in problem.text
