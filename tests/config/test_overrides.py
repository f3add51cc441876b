"""Hydra's own grammar and its modes: what a command line or a file means for Hydra, it means here."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from running import hydra_compose

from kandinsky_exp import cli
from kandinsky_exp.config import command_line, grammar, hydra_errors
from kandinsky_exp.errors import ConfigError
from kandinsky_exp.runs import description
from kandinsky_exp.sweeps import check, launch, supervise

TINY = ["model=prior", "weights=tiny", "data=emoji", "tracker=none"]
MODULE = """
from pathlib import Path
def write(cfg):
    folder = Path(cfg.output_root) / "seeds"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / str(cfg.seed)).write_text(cfg.scheduler._target_)
    return float(cfg.seed)
def tell(cfg):
    from kandinsky_exp.runs import description
    print(description.command())
"""


@pytest.fixture(autouse=True)
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of yaml files, and the working directory beside it."""
    for name, text in {
        "experiment/swept": "hydra: {mode: MULTIRUN}",
        "experiment/params": "hydra: {sweeper: {params: {seed: '1,2'}}}",
        "experiment/plain": "seed: 7",
        "own": "defaults: [train, _self_]\nhydra: {mode: MULTIRUN}",
        "scheduler/own": "_target_: kandinsky_exp.schedules.constant\n_partial_: true\nwarmup_steps: 0",
    }.items():
        file = tmp_path / "mine" / f"{name}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"# @package _global_\n{text}\n" if name.startswith("experiment") else f"{text}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    return tmp_path / "mine"


def settled(*words: str) -> command_line.CommandLine:
    line, problems = command_line.settled(command_line.parse("train", ["weights=tiny", *words], cli.VERBS))
    if problems:
        raise ConfigError(problems)
    return line


def problems(*words: str) -> list[str]:
    """All that is answered to a command line, a sweep's or a run's, before anything starts."""
    try:
        line, found = command_line.settled(command_line.parse("train", [*TINY, *words], cli.VERBS))
        found += hydra_errors.find_problems(line)
        if line.sweeps and not found:
            check.checked(line)
    except ConfigError as error:
        return error.problems
    return [str(problem) for problem in found]


# --- one run or a sweep


@pytest.mark.parametrize(
    ("words", "sweeps"),
    [
        (["--multirun"], True),
        (["-m"], True),
        (["hydra.mode=MULTIRUN"], True),
        (["++hydra.mode=MULTIRUN"], True),
        (["sweep=lr"], True),
        (["--config-dir=mine", "experiment=swept"], True),
        (["hydra.searchpath=[mine]", "experiment=swept"], True),
        (["--config-dir=mine", "--config-name=own"], True),
        (["--multirun", "hydra.mode=RUN"], True),
        (["hydra.mode=MULTIRUN", "model=pior", "trainer.stepz=1"], True),  # what is wrong elsewhere does not matter
        (["--config-dir=mine", "experiment=swept", "model=pior", "name=[["], True),
        (["sweep=lr", "hydra.mode=RUN"], False),
        (["--config-dir=mine", "experiment=params"], False),
        (["seed=1"], False),
    ],
)
def test_what_sweeps_for_hydra_sweeps(words: list[str], sweeps: bool) -> None:
    assert settled(*words).sweeps == sweeps


def test_what_wins_is_said() -> None:
    line = settled("--multirun", "hydra.mode=RUN", "seed=1,2")
    assert line.notes == ("hydra.mode=RUN: --multirun was given too, and wins; leave one of them out",)
    assert line.sweeps
    assert settled("--config-dir=mine", "experiment=params").notes == (
        "hydra.sweeper.params: seed would vary with --multirun; this is a single run",
    )
    assert settled("--config-dir=mine", "experiment=params", "hydra.mode=RUN").notes == ()


@pytest.mark.parametrize("word", ["hydra/sweeper=optuna", "hydra/launcher=basic", "hydra.sweeper.max_batch_size=2"])
def test_what_is_for_a_sweep_is_refused_for_a_run(word: str) -> None:
    key = word.partition("=")[0]
    with pytest.raises(ConfigError, match=f"{key}: is for a sweep, and this is a single run; add --multirun"):
        settled(word)
    assert settled(word, "hydra.mode=RUN").sweeps is False


def test_what_learns_from_jobs_is_refused_where_none_trains() -> None:
    typed = [*TINY, "-m", "hydra/sweeper=optuna", "optimizer.lr=interval(1e-6,1e-3)"]
    _, (problem,) = command_line.settled(command_line.parse("plan", typed, cli.VERBS), trains=False)
    assert str(problem) == "hydra/sweeper: it learns from what jobs have trained, and plan trains none; list values"


@pytest.mark.parametrize("words", [["hydra.mode=MULTIRUN"], ["--config-dir=mine", "experiment=swept"]])
def test_a_mode_makes_the_same_sweep(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A job limit, a process for each job, a table."""
    (tmp_path / "mode_jobs.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setitem(cli.VERBS, "train", cli.Verb("mode_jobs:write", "", trains=True))
    typed = [*TINY, *words, f"output_root={tmp_path}/out", "name=s"]
    with pytest.raises(SystemExit) as end:
        cli.main([*typed, "seed=1,2,3", "sweep.max_jobs=2"])
    assert end.value.code == 2
    assert "sweep.max_jobs: this makes 3 jobs" in capfd.readouterr().err
    cli.main([*typed, "seed=1,2"])
    assert re.search(r"^1 +2 +FINISHED +2 ", capfd.readouterr().out, re.MULTILINE)
    assert {file.name for file in (tmp_path / "out" / "s" / ".jobs").glob("*.json")} == {"seed=1.json", "seed=2.json"}


# --- what an override means


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("scheduler=glob(co*)", ["constant", "cosine", "cosine_with_restarts"]),
        ("optimizer=glob(adam*,exclude=adamw_8bit)", ["adamw"]),
        ("seed=choice(3,1)", ["3", "1"]),
        ("seed=range(1,6,2)", ["1", "3", "5"]),
        ("seed=range(5,1,-2)", ["5", "3"]),
        ("optimizer.lr=range(0.1,0.4,0.1)", ["0.1", "0.2", "0.30000000000000004", "0.4"]),
        ("seed=sort(3,1,reverse=true)", ["3", "1"]),
        ("validation.prompts=['a, b'],[\"c=d\"]", ["['a, b']", '["c=d"]']),
        ("+data.x=a,b", ["a", "b"]),
        ("++seed=1,2", ["1", "2"]),
        ("seed=tag(any,choice(1,2))", ["1", "2"]),
    ],
)
def test_values_are_those_of_hydra(text: str, values: list[str]) -> None:
    line = command_line.parse("train", ["--multirun", text], cli.VERBS)
    with line.composing() as loader:
        override = grammar.read(text, loader)
        assert grammar.values(override) == values
        assert grammar.count(override) == len(values)
        assert sorted(grammar.values(grammar.read("seed=shuffle(range(1,4))", loader))) == ["1", "2", "3"]


def test_a_range_is_counted_without_going_through_it() -> None:
    assert grammar.count(grammar.read("seed=range(0,1000000000000)")) == 10**12
    assert "makes 1,000,000,000,000 jobs" in problems("-m", "seed=range(0,1000000000000)")[0]


GOOD = [
    ["-m", "scheduler=glob([co*,linear])", "trainer.max_steps=10"],
    ["-m", "hydra.searchpath=[mine]", "experiment=plain,swept"],
    ["-m", "hydra.searchpath=[file://mine]", "experiment=plain", "seed=1,2"],
    ["-m", "--config-dir=mine", "scheduler=glob(own)"],
    ["-m", "--config-dir=mine", "experiment=params"],
    ["--config-dir=mine", "--config-name=own", "seed=1,2"],
    ["~experiment"],
]


@pytest.mark.parametrize("words", GOOD, ids=" ".join)
def test_what_hydra_takes_is_taken(words: list[str]) -> None:
    assert problems(*words) == []


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["+experiment=plain"], "+experiment=plain: there is a place for experiment already; write experiment=plain"),
        (["++experiment=plain"], "there is a place for experiment already; write experiment=plain"),
        (["+sweep=lr", "-m", "seed=1,2"], "there is a place for sweep already; write sweep=lr"),
        (["-m", "+experiment=plain,swept"], "write experiment=plain,swept"),
        (["experiment@there=plain"], "write experiment=plain"),
        (["~optimizer=sgd"], "~optimizer=sgd: Could not delete 'optimizer=sgd'. No match in the defaults list"),
        (["-m", "optimizer=glob(zz*)"], "optimizer: glob(zz*) fits none of its files; choose from adafactor, adamw"),
        (["-m", "optimizer.lr=glob(*)"], "optimizer.lr: glob is for the files of a group, and this is none"),
        (["-m", "seed=range(3,1)"], "seed: range(3,1) has no value in it; write range(start,stop,step)"),
        (["-m", "seed=range(1,3,0)"], "seed: range(1,3,0) has no value in it"),
        (["-m", "optimizer=interval(0,1)"], "optimizer: needs a name; choose one of adafactor"),
        (["seed=choice()"], "seed=choice(): cannot be read: empty choice is not legal"),
        (["seed=rnge(1,2)"], "seed=rnge(1,2): cannot be read: Unknown function 'rnge' Available: bool,choice,float"),
        (["hydra.searchpath=mine"], "hydra.searchpath: has to be a list; write hydra.searchpath=[mine]"),
        (["hydra.searchpath=[nowhere]"], "hydra.searchpath: folder 'nowhere' not found"),
        (["-m", "seed=1,2", "hydra.sweeper.max_batch_size=1,2"], "Sweeping over Hydra's configuration is not"),
        (["-m", "seed=1,2", "hydra.launcher.n_jobs=abc", "hydra/launcher=joblib"], "could not be converted to Integer"),
        (["-m", "seed=1,2", "hydra.launcher.n_jobs=0", "hydra/launcher=joblib"], "hydra.launcher.n_jobs: has to be a"),
        (["-m", "seed=1,2", "hydra.sweeper.max_batch_size=0"], "hydra.sweeper.max_batch_size: has to be a"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)  # fmt: skip
def test_what_is_wrong_is_answered_truthfully(words: list[str], answer: str) -> None:
    if any("joblib" in word for word in words):
        pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    found = problems("--config-dir=mine", *words)
    assert len(found) == 1, found
    assert answer in found[0]
    assert "mend the file" not in found[0]


def composed(*words: str) -> DictConfig:
    """What a command composes, without Hydra's section."""
    line = command_line.parse("train", [*TINY, *words], cli.VERBS)
    with line.composing() as loader:
        cfg = loader.load_configuration("train", line.overrides, run_mode=RunMode.RUN)
    OmegaConf.set_struct(cfg, False)
    del cfg["hydra"]
    return cfg


@pytest.mark.parametrize("words", [[], ["adapter=lora", "optimizer=sgd"], ["experiment=demo_prior", "seed=3"]])
def test_what_was_composed_before_is_composed_again(words: list[str]) -> None:
    expected = hydra_compose("train", [*TINY, *words])
    for _ in range(2):
        cfg = composed(*words)
        assert cfg == expected
        cfg.trainer.max_steps, cfg.optimizer = 77, {"lr": 5}  # no later one has that


def test_a_users_file_that_changes_is_read_again(mine: Path) -> None:
    words = ["--config-dir=mine", "experiment=plain"]
    assert composed(*words).seed == 7
    (mine / "experiment" / "plain.yaml").write_text("# @package _global_\nseed: 8\n")
    assert composed(*words).seed == 8
    (mine / "experiment").rename(mine.parent / "experiment")
    assert composed("--config-dir=.", "experiment=plain").seed == 8


def test_a_mode_that_there_is_not(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main([*TINY, "hydra.mode=MULTRUN"])
    assert end.value.code == 2
    assert "Invalid value 'MULTRUN', expected one of [RUN, MULTIRUN]" in capfd.readouterr().err


def test_settings_of_plugins_are_tried_before_there_is_a_folder() -> None:
    line = command_line.parse("train", [*TINY, "-m", "seed=1,2", "+hydra.launcher.foo=1"], cli.VERBS)
    cfg, varied = check.checked(line)
    with pytest.raises(ConfigError, match=r"hydra.launcher: .*unexpected keyword argument 'foo'"):
        launch._try_plugins(line, cfg, varied)


def test_a_home_folder_in_a_list() -> None:
    line = command_line.parse("train", ["-m", "data.path=~/a,~/b", "name=~x"], cli.VERBS)
    assert line.overrides == [f"data.path={Path.home()}/a,{Path.home()}/b", "name=~x"]


# --- what is noted of a job


@pytest.fixture
def of_job(request: pytest.FixtureRequest) -> Iterator[None]:
    """Hydra's settings as they are in a job."""
    words, mode = request.param
    line = command_line.parse("train", words, cli.VERBS)
    with line.composing() as loader:
        cfg = loader.load_configuration("train", line.overrides, run_mode=RunMode.RUN)
    before = HydraConfig.instance().cfg
    OmegaConf.set_readonly(cfg.hydra, False)
    cfg.hydra.mode = mode
    HydraConfig.instance().set_config(cfg)
    yield
    HydraConfig.instance().cfg = before


SWEPT = ["--config-dir=mine", "experiment=swept", "seed=1", "name=s"]


@pytest.mark.parametrize(
    ("of_job", "words"),
    [
        ((SWEPT, "MULTIRUN"), ["--config-dir=mine", "experiment=swept", "seed=1", "hydra.mode=RUN"]),
        (([*SWEPT, "hydra.mode=RUN", "hydra.verbose=false", "hydra.mode=RUN"], "RUN"), [*SWEPT, "hydra.mode=RUN"]),
        (([*SWEPT[2:], "hydra.mode=RUN"], "RUN"), SWEPT[2:]),
        ((["hydra.searchpath=[mine]", "seed=1"], "RUN"), ["seed=1", "hydra.searchpath=[mine]"]),
    ],
    indirect=["of_job"],
)
@pytest.mark.usefixtures("of_job")
def test_the_command_of_a_job_makes_one_run(words: list[str], mine: Path) -> None:
    words = [word.replace("--config-dir=mine", f"--config-dir={mine}") for word in words]
    typed = shlex.split(description.command() or "")
    assert typed[:2] == ["kandinsky-exp", "train"]
    assert sorted(typed[2:]) == sorted(words)
    assert not settled(*typed[2:]).sweeps


def test_the_command_of_a_run_that_undoes_a_files_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run_jobs.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(cli.VERBS, "train", cli.Verb("run_jobs:tell", "", trains=True))
    cli.main([*TINY, "--config-dir=mine", "experiment=swept", "hydra.mode=RUN"])
    typed = shlex.split(capfd.readouterr().out)
    assert not settled(*typed[2:]).sweeps


@pytest.mark.parametrize(
    "of_job", [(["scheduler=cosine", "+optimizer.foo='a=b'", "~experiment", "seed=1", "sweep.trial=3"], "MULTIRUN")],
    indirect=True,
)  # fmt: skip
@pytest.mark.usefixtures("of_job")
def test_what_tells_a_job_from_the_others() -> None:
    settings = HydraConfig.get()
    OmegaConf.set_readonly(settings, False)
    settings.job.config.override_dirname.exclude_keys = ["seed"]
    assert supervise.varied(settings) == {"scheduler": "cosine", "optimizer.foo": "'a=b'"}
