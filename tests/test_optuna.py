"""`hydra/sweeper=optuna`: samplers, pruning, and a study that goes on."""

import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from running import prepare
from test_sweep import LAUNCHERS, PRIOR, family, swept, wait

optuna = pytest.importorskip("optuna", reason="LOUD: optuna is not installed")

from kandinsky_exp import studies, sweep_jobs  # noqa: E402

OPTUNA = ["hydra/sweeper=optuna"]
# Jobs that cost next to nothing: their loss is a function of what varies.
MODULE = """
def parabola(cfg):
    return (cfg.optimizer.lr * 1000 - 3) ** 2 + (cfg.trainer.batch_size - 4) ** 2
def odd(cfg):
    if cfg.seed % 2: raise RuntimeError("odd")
    return float(cfg.seed)
"""


@pytest.fixture
def functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`train` is what a test says."""
    (tmp_path / "optuna_jobs.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))


def study(folder: Path, storage: str | None = None) -> "optuna.Study":
    return optuna.load_study(study_name="s", storage=studies.storage(storage or str(folder / "study.journal")))


def train_is(function: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from kandinsky_exp import cli

    monkeypatch.setitem(cli.VERBS, "train", cli.Verb(f"optuna_jobs:{function}", "", trains=True))


@pytest.mark.usefixtures("functions")
@pytest.mark.parametrize(("sampler", "launcher"), [("tpe", "joblib"), ("random", "basic"), ("cmaes", "basic")])
def test_a_sampler_learns_over_two_starts(
    sampler: str, launcher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_is("parabola", monkeypatch)
    settings = [
        *OPTUNA, f"hydra/sweeper/sampler={sampler}", "tracker=none", "name=s", *LAUNCHERS[launcher],
        "hydra.sweeper.n_jobs=2", "optimizer.lr=tag(log,interval(1e-4,1e-2))", "trainer.batch_size=range(1,9)",
    ]  # fmt: skip
    assert swept(tmp_path, *settings, "hydra.sweeper.n_trials=3") == 0
    first = study(tmp_path / "s").trials
    assert swept(tmp_path, *settings, "hydra.sweeper.n_trials=6") == 0
    trials = study(tmp_path / "s").trials
    assert len(trials) == 6
    assert [trial.params for trial in trials[:3]] == [trial.params for trial in first]
    assert len({trial.params["optimizer.lr"] for trial in trials}) == 6  # the second start draws others
    for trial in trials:
        lr, batch = trial.params["optimizer.lr"], trial.params["trainer.batch_size"]
        assert 1e-4 <= lr <= 1e-2
        assert trial.value == pytest.approx((lr * 1000 - 3) ** 2 + (batch - 4) ** 2)


@pytest.mark.usefixtures("functions")
def test_a_grid_is_done_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train_is("parabola", monkeypatch)
    settings = [
        *OPTUNA, "hydra/sweeper/sampler=grid", "tracker=none", "name=s", "optimizer.lr=1e-3,3e-3",
        "trainer.batch_size=range(2,6,2)",
    ]  # fmt: skip
    assert swept(tmp_path, *settings) == 0
    made = {
        (trial.params["optimizer.lr"], trial.params["trainer.batch_size"]) for trial in study(tmp_path / "s").trials
    }
    assert made == {("0.001", 2), ("0.001", 4), ("0.003", 2), ("0.003", 4)}
    assert study(tmp_path / "s").best_value == 0


@pytest.mark.usefixtures("functions")
def test_a_grid_over_an_interval_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    train_is("parabola", monkeypatch)
    settings = [*OPTUNA, "hydra/sweeper/sampler=grid", "tracker=none", "optimizer.lr=interval(1e-5,1e-3)"]
    assert swept(tmp_path, *settings) == 2
    assert "optimizer.lr: a grid needs single values" in capfd.readouterr().err


@pytest.mark.usefixtures("functions")
def test_a_trial_that_fails_costs_a_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train_is("odd", monkeypatch)
    settings = [*OPTUNA, "hydra/sweeper/sampler=grid", "tracker=none", "name=s", "seed=1,2,3,4", "hydra.sweeper.seed=0"]
    assert swept(tmp_path, *settings) == 1
    states = {trial.params["seed"]: trial.state.name for trial in study(tmp_path / "s").trials}
    assert states == {"1": "FAIL", "2": "COMPLETE", "3": "FAIL", "4": "COMPLETE"}


@pytest.mark.slow
def test_a_hopeless_job_is_given_up(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The second rate is far too high, and its first validation loss tells; the study is in a data base."""
    storage = f"sqlite:///{tmp_path}/studies.db"
    settings = [
        f"hydra.sweeper.storage={storage}",
        *OPTUNA, "hydra/sweeper/sampler=grid", "hydra/sweeper/pruner=median", "hydra.sweeper.pruner.n_startup_trials=1",
        "name=s", "trainer.max_steps=6", "validation.every=2", "hydra.sweeper.seed=0",
    ]  # fmt: skip
    assert swept(tmp_path, *settings, "optimizer.lr=3e-3") == 2  # a grid of one value is no sweep
    assert swept(tmp_path, *settings, "optimizer.lr=3e-3,1e2") == 0
    outcomes = {job.varied["optimizer.lr"]: job for job in sweep_jobs.JobFolder(tmp_path / "s").outcomes()}
    states = {trial.params["optimizer.lr"]: trial.state.name for trial in study(tmp_path, storage).trials}
    assert states == {"0.003": "COMPLETE", "100.0": "PRUNED"}
    assert outcomes["100.0"].status == "PRUNED"
    assert "pruned at step 2" in outcomes["100.0"].message
    assert not (tmp_path / "s" / "optimizer.lr=100.0" / "pipeline").exists()
    _, children = family(tmp_path, "s")
    assert children["lr=100"].info.status == "KILLED"
    assert children["lr=100"].data.tags["pruned"] == "step 2"
    assert "PRUNED" in capfd.readouterr().out
    assert outcomes["0.003"].status == "FINISHED"
    assert math.isfinite(outcomes["0.003"].score or math.nan)


@pytest.mark.slow
def test_a_study_goes_on_with_the_trial_that_was_stopped(tmp_path: Path) -> None:
    settings = [*OPTUNA, "hydra.sweeper.n_trials=2", "name=s", "optimizer.lr=interval(1e-5,1e-4)"]
    words = ["--multirun", *PRIOR, f"output_root={tmp_path}", *settings, "trainer.max_steps=60", "checkpoint.every=2"]
    prepare(tmp_path, settings)
    with (tmp_path / "printed.txt").open("w") as file:
        process = subprocess.Popen([sys.executable, "-m", "kandinsky_exp", *words], stdout=file, stderr=file)
    try:
        wait(lambda: any("step 6 " in log.read_text() for log in (tmp_path / "s").glob("*/train.log")))
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 143
    finally:
        process.kill()
    (trial,) = study(tmp_path / "s").trials
    assert trial.state.name == "RUNNING"
    assert swept(tmp_path, *settings, "trainer.max_steps=60", "checkpoint.every=2") == 0
    trials = study(tmp_path / "s").trials
    assert [trial.state.name for trial in trials] == ["COMPLETE", "COMPLETE"]
    assert trials[0].params == trial.params
    log = (tmp_path / "s" / f"optimizer.lr={trial.params['optimizer.lr']}" / "train.log").read_text()
    assert "going on from" in log
    _, children = family(tmp_path, "s")
    assert len(children) == 2
