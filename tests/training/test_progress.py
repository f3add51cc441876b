"""What a run makes of its validation losses: when it ends early, which weights are the result, what it tells."""

import json
import logging
import math
import shutil
from pathlib import Path

import pytest
from running import client, network, runs, same, train

from kandinsky_exp import results
from kandinsky_exp.data.sources import EMOJI
from kandinsky_exp.errors import ConfigError
from kandinsky_exp.runs import integrity
from kandinsky_exp.runs.run_folder import RunFolder, read_record
from kandinsky_exp.tracking.tracker import NullTracker
from kandinsky_exp.training import checkpoint
from kandinsky_exp.training.progress import Progress

# The validation loss rises from the third step on: the network is thrown about.
WORSE = ["model=prior", "optimizer.lr=0.1", "trainer.max_steps=12", "validation.every=1", "checkpoint.every=5"]


def after(losses: list[float], **settings: int) -> Progress:
    progress = Progress(**settings)
    for step, loss in enumerate([0.0, *losses]):  # that of the start counts for nothing
        progress.validated(step, loss)
    return progress


def test_patience_counts_validations_without_a_better_loss() -> None:
    assert after([3.0, 2.0, 2.0, 2.5], patience=3).ended is None
    ended = after([3.0, 2.0, 2.0, 2.5, 2.1], patience=3).ended
    assert ended == "no better validation loss than 2 of step 2 in 3 validations"
    assert after([3.0, 2.0, 2.0, 2.5, 1.9], patience=3).ended is None
    assert after([3.0, math.nan, math.inf], patience=2).ended is not None
    assert after([math.nan, math.nan, 1.0], patience=3).best == 1.0
    assert after([1.0] * 99).ended is None


def test_it_goes_on_as_it_was() -> None:
    assert (
        after([math.nan] * 2, patience=2).ended == "no better validation loss than one that is finite in 2 validations"
    )
    one, other = after([3.0, 2.0, 2.5], patience=3), Progress(patience=3)
    other.restore(json.loads(json.dumps(one.state())))
    for loss in (2.4, 2.3):
        assert one.ended is None
        one.validated(5, loss)
        other.validated(5, loss)
    assert one.ended == other.ended
    assert one.ended is not None


@pytest.mark.parametrize(
    ("trained", "validated", "is_told"),
    [
        ([4, 3, 2, 1], [1, 2, 3, 4], True),
        ([4, 3, 2, 1], [1, 2, 3, 3], False),  # it rose only twice
        ([1, 2, 3, 4], [1, 2, 3, 4], False),  # nothing learns
        ([4, 3, 2, 1], [4, 3, 2, 1], False),
        ([4, 3, 2], [1, 2, 3], False),
    ],
)
def test_overfitting_is_told_once(
    trained: list[float], validated: list[float], is_told: bool, caplog: pytest.LogCaptureFixture
) -> None:
    progress = Progress()
    with caplog.at_level(logging.WARNING):
        for step, (train_loss, loss) in enumerate([*zip(trained, validated, strict=True)]):
            progress.trained(train_loss + 1)
            progress.trained(train_loss - 1)
            progress.validated(step, loss)
        if is_told:
            progress.trained(0)
            progress.validated(9, 9)
    told = [record.getMessage() for record in caplog.records if "the run overfits" in record.getMessage()]
    assert len(told) == is_told
    if is_told:
        assert "rose from 1.00000 to 4.00000 while the training loss fell from 4.00000 to 1.00000" in told[0]


def test_a_run_out_of_patience_is_finished_and_stays_so(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = [*WORSE, "name=p", "validation.patience=3"]
    train(tmp_path, *words)
    record = read_record(tmp_path / "p")
    assert record is not None
    assert (record.status, record.patience) == ("FINISHED", 3)
    assert record.step < 12
    last = tmp_path / "p" / "checkpoints" / f"step-{record.step:08d}"
    state = integrity.read_state(last)
    assert (state["validated"], state["progress"]["stale"]) == (True, 3)
    assert same(network(last / "prior"), network(tmp_path / "p" / "pipeline" / "prior"))
    (run,) = runs(tmp_path)
    assert run.info.status == "FINISHED"
    assert run.data.tags["stopped_early"].startswith(f"step {record.step}: no better validation loss than ")
    capfd.readouterr()
    train(tmp_path, *words)
    assert "nothing left to do. Raise validation.patience to train on" in capfd.readouterr().err
    train(tmp_path, *WORSE, "name=p")
    record = read_record(tmp_path / "p")
    assert record is not None
    assert (record.step, record.patience) == (12, None)
    (run,) = runs(tmp_path)
    assert run.data.tags["stopped_early"] == "no: it went on to step 12"  # what is recorded stays true


def test_stopped_and_resumed_it_ends_at_the_same_step(tmp_path: Path) -> None:
    words = [*WORSE, "validation.patience=3", "tracker=none"]
    train(tmp_path, *words, "name=whole")
    for steps in (2, 3, 12):
        train(tmp_path, *words, "name=parts", f"trainer.max_steps={steps}", "checkpoint.every=1")
    whole, parts = (read_record(tmp_path / name) for name in ("whole", "parts"))
    assert whole is not None
    assert parts is not None
    assert whole.step == parts.step < 12
    assert same(*(network(tmp_path / name / "pipeline" / "prior") for name in ("whole", "parts")))


@pytest.mark.parametrize("more", [[], ["trainer.ema_decay=0.5"], ["adapter=lora"]])
def test_the_result_holds_the_best_weights_and_says_so(more: list[str], tmp_path: Path) -> None:
    loss = train(tmp_path, *WORSE, *more, "name=p", "checkpoint.result=best", "checkpoint.keep=1")
    record = read_record(tmp_path / "p")
    assert record is not None
    states = {
        folder: state["validation_loss"]
        for folder, state in checkpoint.complete(tmp_path / "p" / "checkpoints").items()
    }
    best = min(states, key=lambda folder: states[folder])
    assert record.result_step == int(best.name.removeprefix("step-"))
    assert loss == record.validation_loss == states[best]
    assert record.metrics is not None
    assert record.metrics["validation/loss"] == loss  # of these weights
    (run,) = runs(tmp_path)
    assert run.data.tags["result_step"] == str(record.result_step)
    history = {
        point.step: point.value for point in client(tmp_path).get_metric_history(run.info.run_id, "validation/loss")
    }
    trained = {step: value for step, value in history.items() if step > 0}
    assert min(trained, key=lambda step: trained[step]) == record.result_step
    source = best / ("prior_ema" if "trainer.ema_decay=0.5" in more else "prior")
    result = tmp_path / "p" / ("adapter" if "adapter=lora" in more else "pipeline/prior")
    for file in source.iterdir():
        assert file.read_bytes() == (result / file.name).read_bytes()


def test_the_result_is_of_the_best_checkpoint_that_is_whole(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(tmp_path, *WORSE, "name=p", "checkpoint.every=4")
    record = read_record(tmp_path / "p")
    assert record is not None
    space = RunFolder(tmp_path / "p", record)
    first, second, *_ = checkpoint.by_loss(found := checkpoint.complete(space.checkpoints))
    (first / "prior" / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    best = results.best(space)
    assert (best.folder, best.loss) == (second, found[second]["validation_loss"])
    assert best.metrics["validation/loss"] == best.loss
    assert f"{first} is damaged" in caplog.text
    shutil.rmtree(first)  # as by a run that kept no best checkpoints before
    results.note_end(record, NullTracker(), Progress(best=0.1, best_step=3), 12, results.best(space))
    assert f"0.10000 at step 3, which has no whole checkpoint: the result is of step {best.step}\n" in caplog.text
    assert record.result_step == best.step


@pytest.mark.parametrize("setting", ["validation.patience=2", "checkpoint.result=best", "validation.metrics=[cmmd]"])
def test_without_held_out_pictures_it_is_refused(setting: str, tmp_path: Path) -> None:
    data = ["data=folder", f"data.path={EMOJI}/train", "data.resolution=64", "validation.fraction=0"]
    with pytest.raises(ConfigError, match=f"{setting.partition('=')[0]}: nothing is held out"):
        train(tmp_path, "model=prior", *data, setting, "tracker=none", "name=p")
    assert not (tmp_path / "p").exists()
