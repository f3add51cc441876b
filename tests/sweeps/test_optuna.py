"""`hydra/sweeper=optuna`: samplers, pruning, and a study that goes on."""

import math
import os
import signal
from pathlib import Path

import pytest
from sweeping import LAUNCHERS, PRIOR, client, family, signalled, swept

optuna = pytest.importorskip("optuna", reason="LOUD: optuna is not installed")

from optuna.distributions import CategoricalDistribution as Choice  # noqa: E402
from optuna.distributions import FloatDistribution as Float  # noqa: E402
from optuna.distributions import IntDistribution as Int  # noqa: E402

from kandinsky_exp import cli  # noqa: E402
from kandinsky_exp.config import grammar  # noqa: E402
from kandinsky_exp.errors import ConfigError  # noqa: E402
from kandinsky_exp.sweeps import optuna_study, search_space  # noqa: E402
from kandinsky_exp.sweeps.outcomes import JobFolder  # noqa: E402

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
    return optuna.load_study(study_name="s", storage=optuna_study.storage(storage or str(folder / "study.journal")))


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
    assert swept(tmp_path, *settings, "hydra.sweeper.n_trials=2") == 0
    first = study(tmp_path / "s").trials
    assert swept(tmp_path, *settings, "hydra.sweeper.n_trials=4") == 0
    trials = study(tmp_path / "s").trials
    assert len(trials) == 4
    assert [trial.params for trial in trials[:2]] == [trial.params for trial in first]
    assert len({trial.params["optimizer.lr"] for trial in trials}) == 4  # the second start draws others
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
@pytest.mark.parametrize("ranked", [[], ["sweep.objective=train/loss", "sweep.direction=maximize"]])
def test_a_hopeless_job_is_given_up(ranked: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The second rate is far too high, and its first validation loss tells, whatever the sweep is ranked by.

    The study is in a data base.
    """
    storage = f"sqlite:///{tmp_path}/studies.db"
    settings = [
        f"hydra.sweeper.storage={storage}",
        *OPTUNA, "hydra/sweeper/sampler=grid", "hydra/sweeper/pruner=median", "hydra.sweeper.pruner.n_startup_trials=1",
        "name=s", "trainer.max_steps=4", "validation.every=2", "hydra.sweeper.seed=0", *ranked,
    ]  # fmt: skip
    assert swept(tmp_path, *settings, "optimizer.lr=3e-3") == 2  # a grid of one value is no sweep
    assert swept(tmp_path, *settings, "optimizer.lr=3e-3,1e2") == 0
    outcomes = {job.varied["optimizer.lr"]: job for job in JobFolder(tmp_path / "s").outcomes()}
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
    (finished,) = [trial for trial in study(tmp_path, storage).trials if trial.state.name == "COMPLETE"]
    history = client(tmp_path).get_metric_history(
        children["lr=0.003"].info.run_id, "train/loss" if ranked else "validation/loss"
    )
    assert finished.value == history[-1].value


@pytest.mark.slow
def test_a_study_goes_on_with_the_trial_that_was_stopped(tmp_path: Path) -> None:
    settings = [*OPTUNA, "hydra.sweeper.n_trials=2", "name=s", "optimizer.lr=interval(1e-5,1e-4)"]
    settings += ["trainer.max_steps=60", "checkpoint.every=6", "validation.every=60"]
    logs = (tmp_path / "s").glob
    with signalled(signal.SIGTERM, lambda: any("step 6 " in log.read_text() for log in logs("*/train.log"))) as sent:
        assert swept(tmp_path, *settings) == 143
    assert sent.is_set()
    (trial,) = study(tmp_path / "s").trials
    assert trial.state.name == "RUNNING"
    assert swept(tmp_path, *settings) == 0
    trials = study(tmp_path / "s").trials
    assert [trial.state.name for trial in trials] == ["COMPLETE", "COMPLETE"]
    assert trials[0].params == trial.params
    log = (tmp_path / "s" / f"optimizer.lr={trial.params['optimizer.lr']}" / "train.log").read_text()
    assert "going on from" in log
    _, children = family(tmp_path, "s")
    assert len(children) == 2


# --- what varies


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("optimizer.lr=tag(log,interval(1e-6,1e-3))", Float(1e-6, 1e-3, log=True)),
        ("model.condition_dropout=interval(0,1)", Float(0.0, 1.0)),
        ("optimizer.lr=interval(0,1e-3)", Float(0.0, 1e-3)),  # the ends are never drawn
        ("adapter.dropout=interval(0,1)", Float(0.0, 1.0)),
        ("trainer.batch_size=interval(1,8)", Int(1, 8)),
        ("adapter.rank=tag(log,interval(1.5,64.5))", Int(2, 64, log=True)),
        ("+scheduler.mine=int(interval(1,8))", Int(1, 8)),
        ("+scheduler.mine=interval(1,8)", Float(1.0, 8.0)),
        ("seed=range(1,6,2)", Int(1, 5, step=2)),
        ("seed=range(5,1,-1)", Int(2, 5)),
        ("trainer.batch_size=tag(log,range(1,9))", Int(1, 8, log=True)),
        ("optimizer.lr=range(0.5,2,0.5)", Float(0.5, 1.5, step=0.5)),
        ("seed=shuffle(range(1,2))", Choice(["1"])),
        ("model=prior,decoder", Choice(["prior", "decoder"])),
    ],
)
def test_what_is_drawn(text: str, expected: object) -> None:
    assert search_space.distribution(grammar.read(text)) == expected


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("optimizer.lr=interval(1e-3,1e-6)", "optimizer.lr: interval(0.001,1e-06) has to begin below its end"),
        ("optimizer.lr=interval(0,inf)", "has to begin below its end"),
        ("optimizer.lr=tag(log,interval(0,1e-3))", "with the tag log it has to begin above 0, not at 0"),
        ("seed=tag(log,range(0,9))", "with the tag log it has to begin above 0, not at 0"),
        ("optimizer.lr=tag(lgo,interval(1e-6,1e-3))", "the tag lgo means nothing to Optuna"),
        ("seed=tag(log,choice(1,2))", "single values are not drawn by their logarithm"),
        ("seed=tag(log,range(1,9,2))", "Optuna draws by the logarithm without a step only"),
        ("optimizer.lr=tag(log,range(0.1,0.5,0.1))", "Optuna draws fractions by the logarithm without a step only"),
        ("seed=range(1,inf)", "has no end of values, or none"),
        ("optimizer.lr=interval(-1,1e-3)", "has to be a number, above 0, not -1.0; an interval draws all that lies in"),
        ("trainer.batch_size=interval(0,4)", "has to be a whole number, at least 1, not 0"),
        ("trainer.batch_size=interval(1.2,1.6)", "there is no whole number in 1.2 to 1.6"),
        ("data.resolution=interval(64,128)", "a multiple of 8, such as 512 or 768, not 65"),
        ("data.flip=interval(0,1)", "has to be true or false"),
    ],
)
def test_what_cannot_be_drawn_is_refused(text: str, answer: str) -> None:
    override = grammar.read(text)
    with pytest.raises(ConfigError) as error:
        search_space.space({override.key_or_group: override, "model": grammar.read("model=prior,decoder")})
    (problem,) = error.value.problems
    assert answer in problem


WRONG = {
    "n_trials=abc": "n_trials: has to be a whole number, at least 1, not 'abc'",
    "n_trials=0": "n_trials: has to be a whole number, at least 1, not 0",
    "n_jobs=x": "n_jobs: has to be a whole number, at least 1, not 'x'",
    "n_jobs=0": "n_jobs: has to be a whole number, at least 1, not 0",
    "direction=sideways": "direction: has to be one of minimize, maximize, not 'sideways'",
    "seed=x": "seed: has to be a whole number, between 0 and 2^32 - 1, or null, not 'x'",
}


def refused(root: Path, capfd: pytest.CaptureFixture[str], *words: str) -> str:
    """What is answered, in a line each, before there is a folder."""
    typed = ["-m", *PRIOR, *OPTUNA, "tracker=none", f"output_root={root}/out", *words]
    with pytest.raises(SystemExit) as end:
        cli.main(typed)
    assert end.value.code == 2
    assert not (root / "out").exists()
    out, err = capfd.readouterr()
    assert out == ""
    assert "Traceback" not in err
    return err


def test_wrong_settings_are_told_together(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for batch in ({"n_trials=abc", "n_jobs=x", "direction=sideways", "seed=x"}, {"n_trials=0", "n_jobs=0"}):
        error = refused(tmp_path, capfd, "seed=1,2", *(f"hydra.sweeper.{text}" for text in batch))
        assert all(f"  hydra.sweeper.{WRONG[text]}\n" in error for text in batch)


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["hydra.sweeper.sampler.n_startup_trials=abc"], "hydra.sweeper.sampler: '<' not supported between"),
        (["+hydra.sweeper.sampler.foo=1"], "hydra.sweeper.sampler: TPESampler.__init__() got an unexpected keyword"),
        (
            ["hydra/sweeper/pruner=median", "hydra.sweeper.pruner.n_startup_trials=-1"],
            "hydra.sweeper.pruner: Error in call to target 'optuna.pruners._median.MedianPruner'",
        ),
        (["hydra.sweeper.storage=nonsense"], "hydra.sweeper.storage: nonsense is no data base's URL"),
        (["optimizer.lr=interval(1e-3,1e-6)"], "optimizer.lr: interval(0.001,1e-06) has to begin below its end"),
    ],
)
def test_what_is_wrong_is_told_in_a_line(
    words: list[str], answer: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    error = refused(tmp_path, capfd, "seed=1,2", *words)
    assert answer in error
    assert error.count("\n") == 1


def test_where_a_study_may_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for place in ("sqlite:///studies.db", "my.journal", "studies/mine", f"{tmp_path}/mine"):
        assert optuna_study.location_problem(place) is None
    for place in ("nonsense", "sqlite:studies.db"):
        assert "is no data base's URL" in str(optuna_study.location_problem(place))
    assert "is a folder" in str(optuna_study.location_problem(str(tmp_path)))
    Path("nonsense").touch()  # of an earlier start
    assert optuna_study.location_problem("nonsense") is None
    with pytest.raises(ConfigError, match=r"hydra.sweeper.storage: cannot be used \(.*URL"):
        optuna_study.storage("no-such://host")


@pytest.mark.usefixtures("functions")
def test_a_trial_that_draws_the_same_is_told_and_the_table_keeps_its_numbers(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    train_is("parabola", monkeypatch)
    settings = [*OPTUNA, "hydra/sweeper/sampler=random", "tracker=none", "name=s", "trainer.batch_size=3,4"]
    assert swept(tmp_path, *settings, "hydra.sweeper.n_trials=6", "hydra.sweeper.n_jobs=3") == 0
    drawn = [trial.params["trainer.batch_size"] for trial in study(tmp_path / "s").trials]
    assert len(drawn) == 6
    for number, value in enumerate(drawn):
        first = drawn.index(value)
        text = f"trial {number} draws what trial {first} has: trainer.batch_size={value}; one job counts for both"
        assert (text in caplog.messages) == (first < number)
    jobs = {job.varied["trainer.batch_size"]: job.number for job in JobFolder(tmp_path / "s").outcomes()}
    assert jobs == {value: drawn.index(value) for value in drawn}
    assert len({trial.value for trial in study(tmp_path / "s").trials}) == len(jobs)

    # A later start cannot change what the study began with.
    for word, answer in {
        "hydra.sweeper.direction=maximize": "hydra.sweeper.direction: the study began with minimize",
        "sweep.direction=maximize": "hydra.sweeper.direction: the study began with minimize",
        "sweep.objective=train/loss": "sweep.objective: the study began with validation/loss; keep that",
        "trainer.batch_size=3,5": "trainer.batch_size: the study began with other values, and cannot change them",
    }.items():
        assert swept(tmp_path, *settings, word, "hydra.sweeper.n_trials=7") == 2
        assert answer in capfd.readouterr().err
    assert len(study(tmp_path / "s").trials) == 6
