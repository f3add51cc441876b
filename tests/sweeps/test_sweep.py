"""Sweeps: each job in a process of its own under every launcher, one parent run, and the same command again."""

import contextlib
import csv
import io
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from commands import Forked, command
from hydra.core.override_parser.overrides_parser import OverridesParser
from PIL import Image
from running import client, composed, prepare
from sweeping import LAUNCHERS, PRIOR, family, signalled, swept, wait

from kandinsky_exp import cli
from kandinsky_exp.config import hydra_errors
from kandinsky_exp.reports import figures, run_data
from kandinsky_exp.runs import run_folder
from kandinsky_exp.sweeps import devices, job_process, outcomes, session
from kandinsky_exp.system import files, threads
from kandinsky_exp.tracking import mlflow_names

# A schedule whose jobs come to different ends, until they are mended.
FAULTS = """
import multiprocessing, os, pathlib, signal, sys, time
from torch.optim.lr_scheduler import LambdaLR

def faulty(optimizer, total_steps, how, mended):
    pathlib.Path(mended).with_name("start_method").write_text(multiprocessing.get_start_method())
    def factor(step):
        if step == 3 and not pathlib.Path(mended).exists():
            if how == "raise": raise RuntimeError("out of luck")
            if how == "exit": sys.exit(7)
            if how == "kill": os.kill(os.getpid(), signal.SIGKILL)
            if how == "memory": raise MemoryError()
            if how == "wait": time.sleep(600)
        return 1.0
    return LambdaLR(optimizer, factor)
"""
WAYS = ["first", "raise", "exit", "kill", "memory", "last"]
ENDS = {
    "first": "FINISHED",
    "raise": "FAILED",
    "exit": "FAILED",
    "kill": "KILLED",
    "memory": "FAILED",
    "last": "FINISHED",
}


@pytest.fixture(autouse=True)
def faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sweep_faults.py").write_text(FAULTS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)


def faulty(root: Path, ways: Sequence[str]) -> list[str]:
    return [
        "trusted_modules=[sweep_faults]", "scheduler._target_=sweep_faults.faulty", "~scheduler.warmup_steps",
        f"+scheduler.how={','.join(ways)}", f"+scheduler.mended={root}/mended", "validation.every=4",
        "checkpoint.behind=false",
    ]  # fmt: skip


def test_why_a_job_failed_is_told_whole(tmp_path: Path) -> None:
    """It becomes the tag `error`, over the one that the job's run may have set."""
    cfg = composed(tmp_path, *[f"{key}=-1" for key in ("trainer.batch_size", "trainer.max_steps", "optimizer.lr")])
    answer = cli.answered(job_process.Call(cli.answered, "train", "kandinsky_exp.run:run", (), False), cfg)
    assert answer.message.count("\n") == 2
    assert all(f"{key}: " in answer.message for key in ("trainer.batch_size", "trainer.max_steps", "optimizer.lr"))


def artifact(root: Path, run: Any, name: str) -> str:
    return Path(client(root).download_artifacts(run.info.run_id, name)).read_text()


@pytest.mark.slow
def test_one_crashed_job_costs_one_job(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Under one launcher, again under another, which repeats what did not finish, and at last, mended, all finish."""
    root = tmp_path / "out"
    overrides = ["name=six", *faulty(tmp_path, WAYS)]
    assert swept(root, *overrides, *LAUNCHERS["basic"]) == 1
    parent, children = failed(root, capfd.readouterr().out)
    assert [run.data.tags["sweep.job"] for _, run in sorted(children.items(), key=in_order)] == [
        f"{number:04d}" for number in range(6)
    ]
    assert children["how=raise"].data.tags["override.scheduler.how"] == "raise"
    assert {path.name for path in (root / "six").iterdir() if not path.name.startswith(".")} >= {
        f"+scheduler.how={way}" for way in WAYS
    }

    # A job starts the workers that read its images as a run by itself does: others would import all anew.
    assert (tmp_path / "start_method").read_text() == multiprocessing.get_start_method()

    first = (root / "six" / "+scheduler.how=first" / "train.log").read_text()
    assert swept(root, *overrides, *LAUNCHERS["joblib"]) == 1
    again, children_again = failed(root, capfd.readouterr().out)
    assert ids(again, children_again) == ids(parent, children)
    (tmp_path / "mended").touch()
    assert swept(root, *overrides, *LAUNCHERS["basic"]) == 0, capfd.readouterr().out
    assert (root / "six" / "+scheduler.how=first" / "train.log").read_text() == first  # it was finished
    killed = (root / "six" / "+scheduler.how=kill" / "train.log").read_text()
    assert "going on from" in killed
    mended, children_mended = family(root, "six")
    assert ids(mended, children_mended) == ids(parent, children)
    assert {run.info.status for run in [mended, *children_mended.values()]} == {"FINISHED"}
    assert re.search(r"^best: how=", capfd.readouterr().out, re.MULTILINE)
    report = (root / "six" / "report" / "report.html").read_text()
    assert artifact(root, parent, "compare/report.html") == report
    assert all(run.info.run_id in report for run in children_mended.values())
    note = children_mended["how=kill"].data.tags["mlflow.note.content"]
    assert "+scheduler.how=kill" in note
    assert f"/runs/{parent.info.run_id}/artifacts/compare/report.html" in note
    assert "--multirun" in parent.data.tags["mlflow.note.content"]


def failed(root: Path, table: str) -> tuple[Any, dict[str, Any]]:
    """The parent and its children, each of which ended as it had to, and is told so."""
    parent, children = family(root, "six")
    assert {name: run.info.status for name, run in children.items()} == {f"how={way}": ENDS[way] for way in WAYS}
    assert parent.info.status == "FAILED"
    assert "out of luck" in children["how=raise"].data.tags["error"]
    assert "SIGKILL" in children["how=kill"].data.tags["error"]
    assert "sys.exit(7)" in children["how=exit"].data.tags["error"]
    for way in WAYS:
        assert re.search(rf"^\d +{way} +{ENDS[way]} ", table, re.MULTILINE), table
    assert artifact(root, parent, "jobs.txt") in table
    lines = list(csv.DictReader(io.StringIO(artifact(root, parent, "jobs.csv"))))
    assert {line["how"]: line["run id"] for line in lines} == {
        name.removeprefix("how="): run.info.run_id for name, run in children.items()
    }
    return parent, children


def ids(parent: Any, children: dict[str, Any]) -> dict[str, str]:
    return {"": parent.info.run_id, **{name: run.info.run_id for name, run in children.items()}}


def in_order(item: tuple[str, Any]) -> int:
    return WAYS.index(item[0].removeprefix("how="))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "ways"),
    [
        ("submitit", ["fine", "raise"]),
        ("ray", ["fine", "kill"]),
        *(pytest.param(name, ["fine", "kill", "raise"], marks=pytest.mark.soak) for name in ("submitit", "ray")),
    ],
)
def test_other_launchers(launcher: str, ways: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip({"submitit": "submitit", "ray": "ray"}[launcher], reason=f"LOUD: no {launcher} here")
    root = tmp_path / "out"
    assert swept(root, "name=three", *faulty(tmp_path, ways), *LAUNCHERS[launcher]) == 1, capfd.readouterr().err
    _, children = family(root, "three")
    ends = {"fine": "FINISHED", **ENDS}
    assert {name: run.info.status for name, run in children.items()} == {f"how={way}": ends[way] for way in ways}
    assert not list((root / "three").rglob("*.pkl"))  # they hold the config, passwords and all


@pytest.mark.slow
def test_a_job_that_came_to_no_run_is_one_run_in_mlflow(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, good, bad = tmp_path / "out", tmp_path / "good", tmp_path / "bad"
    for folder in (good, bad):
        folder.mkdir()
        for number in range(4):
            Image.new("RGB", (64, 64), (60 * number, 90, 0)).save(folder / f"{number}.png")
            (folder / f"{number}.txt").write_text(f"picture {number}")
    (bad / "1.txt").unlink()
    settings = ["data=folder", f"data.path={good},{bad}", "name=s", "trainer.max_steps=2", "trainer.batch_size=2"]
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    assert swept(root, *settings) == 1
    assert "Traceback" in capfd.readouterr().err
    monkeypatch.delenv("HYDRA_FULL_ERROR")
    assert swept(root, *settings) == 1
    error = capfd.readouterr().err
    assert "1.png" in error
    assert "Traceback" not in error
    _, first = family(root, "s")
    ids = {name.rpartition("/")[2]: run.info for name, run in first.items()}
    assert {name: info.status for name, info in ids.items()} == {"good": "FINISHED", "bad": "FAILED"}
    assert "1.png" in first[f"path={bad}"].data.tags["error"]
    assert run_folder.read_record(next((root / "s").glob("data.path=*_bad"))) is None
    shutil.copy(good / "1.txt", bad / "1.txt")
    assert swept(root, *settings) == 0
    _, mended = family(root, "s")
    assert {run.info.run_id for run in mended.values()} == {info.run_id for info in ids.values()}
    assert {run.info.status for run in mended.values()} == {"FINISHED"}
    # Who removes a job's folder starts it anew: that is another run, and no second curve in the old one.
    (job,) = (path for path in (root / "s").glob("data.path=*_good"))
    shutil.rmtree(job)
    assert swept(root, *settings) == 0
    record = run_folder.read_record(job)
    assert record is not None
    assert record.run_id not in {info.run_id for info in ids.values()}


@pytest.mark.slow
def test_precision_varies_and_a_new_store_has_many_first_users(tmp_path: Path) -> None:
    settings = ["name=s", "precision=fp32,bf16", "tracker=mlflow", "trainer.max_steps=2"]
    prepare(tmp_path / "out", settings)  # the jobs encode for themselves
    assert swept(tmp_path / "out", *settings, *LAUNCHERS["joblib"]) == 0
    _, children = family(tmp_path / "out", "s")
    precisions = {name: run.data.params["precision.mixed_precision"] for name, run in children.items()}
    assert precisions == {"precision=fp32": "no", "precision=bf16": "bf16"}
    assert {run.info.status for run in children.values()} == {"FINISHED"}


@pytest.mark.slow
def test_an_interrupt_stops_the_jobs_that_run_and_then_the_sweep(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "out"
    overrides = ["name=s", *LAUNCHERS["joblib"], "trainer.max_steps=5000", "optimizer.lr=1e-5,2e-5,3e-5"]
    logs = [root / "s" / f"optimizer.lr={lr}" / "train.log" for lr in ("1e-05", "2e-05")]
    with signalled(signal.SIGINT, lambda: all(log.is_file() and "step 10 " in log.read_text() for log in logs)) as sent:
        code = swept(root, *overrides, "checkpoint.every=5000")
    output = "".join(capfd.readouterr())
    assert sent.is_set(), output
    assert code == 130, output
    parent, children = family(root, "s")
    assert {name: run.info.status for name, run in children.items()} == {"lr=1e-05": "KILLED", "lr=2e-05": "KILLED"}
    assert parent.info.status == "KILLED"
    assert "1 of 3 jobs were not started" in output
    for log in logs:
        assert list((log.parent / "checkpoints").glob("step-*"))


@pytest.mark.slow
def test_a_killed_sweep_ends_its_jobs_after_a_checkpoint(tmp_path: Path) -> None:
    root = tmp_path / "out"
    overrides = ["name=s", "trainer.max_steps=5000", "optimizer.lr=1e-5,2e-5", "checkpoint.every=5000"]
    prepare(root, overrides)
    process = Forked(command, ["--multirun", *PRIOR, f"output_root={root}", *overrides])
    job = root / "s" / "optimizer.lr=1e-05"
    process.wait_for("step 10 ", job / "train.log")
    process.kill()
    wait(lambda: (record := run_folder.read_record(job)) is not None and record.status == "KILLED")
    assert list((job / "checkpoints").glob("step-*"))


# --- what is refused


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "--multirun: nothing varies; give a setting several values"),
        (["name=a,b"], "name: the jobs of a sweep share it"),
        (["trainer.stepz=1,2"], "trainer.stepz: no such setting; did you mean trainer.max_steps"),
        (["optimizer.lr=1e-5,1e-5"], "optimizer.lr: 1e-05 is there more than once"),
        (["optimizer.lr=1e-5,abc"], "optimizer.lr: has to be a number, above 0, not 'abc'"),
        (["seed=range(0,100)", "trainer.max_steps=range(1,101)"], "makes 10,000 jobs, and at most 200 are allowed"),
        (["seed=interval(1,9)"], "seed: an interval has no end of values; take hydra/sweeper=optuna"),
        (["seed=1,2", "hydra/launcher=dask"], "hydra/launcher: there is no hydra/launcher=dask"),
        (["hub.private=true,false"], "hub.private: all jobs would go to one repository"),
        (["tracker=none,mlflow"], "tracker: one store records the whole sweep"),
        (["seed=1,2", "sweep.devices=[0,2]"], "sweep.devices: 0, 2 is not there, there is no GPU here"),
        (["seed=1,2", "name=compare"], "name: 'compare' is what all runs share in output_root"),
    ],
)  # fmt: skip
def test_a_sweep_that_makes_no_sense_is_refused(
    overrides: list[str],
    message: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(SystemExit) as end:
        cli.main(["--multirun", *PRIOR, f"output_root={tmp_path}/out", *overrides])
    assert end.value.code == 2
    error = capfd.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_values_in_a_file_that_cannot_be_read(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "mine.yaml").write_text(
        "# @package _global_\nhydra:\n  mode: MULTIRUN\n  sweeper:\n    params:\n      optimizer.lr: '1e-5,(2'\n"
    )
    with pytest.raises(SystemExit) as end:
        cli.main(["--config-dir", str(tmp_path), "sweep=mine", *PRIOR, f"output_root={tmp_path}/out"])
    assert end.value.code == 2
    error = capfd.readouterr().err
    assert "optimizer.lr=1e-5,(2: cannot be read" in error
    assert "Traceback" not in error


def test_a_store_that_does_not_answer_leaves_no_folder(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert swept(tmp_path, "seed=1,2", "tracker.uri=http://me:pa55w0rd@127.0.0.1:9") == 2
    error = capfd.readouterr().err
    assert "127.0.0.1:9" in error
    assert "pa55w0rd" not in error
    assert {path.name for path in tmp_path.iterdir()} <= {"cache", "sweep_faults.py"}


def test_what_is_not_installed_is_named_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)  # as Python marks what cannot be imported
    assert swept(tmp_path, "hydra/sweeper=optuna", "seed=1,2", "tracker=none") == 2
    assert 'optuna is not installed; pip install "kandinsky-exp[sweep]"' in capfd.readouterr().err
    override = OverridesParser.create().parse_override("hydra/launcher=ray")
    problem = hydra_errors._wrong_option(override, ["basic"])  # all that Hydra brings
    assert str(problem) == 'hydra/launcher: ray is not installed; pip install "kandinsky-exp[ray]"'


def test_two_sweeps_into_one_folder(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "out"
    (root / "s" / ".jobs").mkdir(parents=True)
    process = Forked(hold, str(root / "s"))
    process.wait_until(lambda: "held" in process.printed())
    assert swept(root, "name=s", "seed=1,2", "tracker=none") == 2
    process.kill()
    assert "another process runs a sweep in" in capfd.readouterr().err


def hold(folder: str) -> None:
    with files.occupied(Path(folder), ".jobs/lock"):
        print("held", flush=True)
        time.sleep(600)


def test_the_name_of_a_run_is_no_name_for_a_sweep(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "out" / "p"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text('{"stage": "prior", "status": "FINISHED"}')
    assert swept(tmp_path / "out", "name=p", "seed=1,2", "tracker=none") == 2
    assert "holds a prior, and no sweep" in capfd.readouterr().err


# --- names


def outcome(number: int, score: float | None, **further: Any) -> outcomes.Outcome:
    name = f"job{number}"
    return outcomes.Outcome(number, name, name, {"model": name}, "FINISHED", score, **further)


def test_the_best_job_is_the_best_of_its_stage() -> None:
    """A prior's loss says nothing beside a decoder's."""
    jobs = [outcome(number, score, stage="prior") for number, score in enumerate([0.3, 0.2])]
    assert session.table(jobs, 2).splitlines()[-1] == "best: job1 (0.2)"
    both = [*jobs, outcome(2, 0.02, stage="decoder"), outcome(3, 0.01, stage="decoder"), outcome(4, None)]
    assert session.table(both, 5).splitlines()[-2:] == ["best decoder: job3 (0.01)", "best prior: job1 (0.2)"]


def test_jobs_are_ranked_by_the_objective(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rates = ["optimizer.lr=1e-5,1e-1", "trainer.max_steps=2", "validation.every=9"]
    assert swept(tmp_path, *rates, "name=s", "sweep.objective=train/loss", "sweep.direction=maximize") == 0
    printed = capfd.readouterr()
    jobs = {job.varied["optimizer.lr"]: job for job in outcomes.JobFolder(tmp_path / "s").outcomes()}
    assert all(job.objective == "train/loss" and job.maximizes for job in jobs.values())
    best = max(jobs.values(), key=lambda job: job.score or 0)
    assert f"best: {best.name} ({best.score:.5g})" in printed.out + printed.err
    read = run_data.read(client(tmp_path), [str(job.run_id) for job in jobs.values()])
    page = (tmp_path / "s" / "report" / "report.html").read_text()
    assert ">best train/loss<" in page
    assert "best val. loss" not in page
    (scatter,) = figures.scores(read)
    assert scatter.spec["layout"]["yaxis"]["title"]["text"] == "best train/loss"
    assert [run_data.rank(read, run) for run in read] == [float(job is not best) for job in jobs.values()]
    # Beside a run that is ranked by another metric, all are ranked by what they have in common.
    client(tmp_path).set_tag(str(best.run_id), "config.sweep.objective", "validation/loss")
    mixed = run_data.read(client(tmp_path), [str(job.run_id) for job in jobs.values()])
    assert {run.objective for run in mixed} == {"validation/loss"}
    assert not any(run.maximizes for run in mixed)


def test_a_training_loss_is_not_called_the_best_loss() -> None:
    trained = [outcome(0, 0.5, stage="prior", is_training=True), outcome(1, 0.4, stage="prior", is_training=True)]
    lines = session.table(trained, 2).splitlines()
    assert "last training loss" in lines[0]
    assert "best" not in "".join(lines)
    assert lines[-1] == "lowest last training loss: job1 (0.4)"
    names, rows = session.rows([*trained, outcome(2, 0.9, stage="prior")])
    assert names[2:5] == ["status", "best loss", "last training loss"]
    assert [row[3:5] for row in rows] == [["–", "0.5"], ["–", "0.4"], ["0.9", "–"]]


def test_jobs_are_named_by_what_they_vary() -> None:
    assert outcomes.job_name({"optimizer.lr": 1e-05, "model.snr_gamma": 5.0}) == "lr=1e-05 snr=5"
    assert outcomes.job_name({"model": "prior", "model.snr_gamma": None}) == "model=prior snr=null"
    names = mlflow_names.short_names(["trainer.batch_size", "validation.batch_size", "seed"])
    assert list(names.values()) == ["trainer.batch_size", "validation.batch_size", "seed"]


# --- devices


@pytest.fixture
def two_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An nvidia-smi that knows of two."""
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho GPU-aaaa-test\necho GPU-bbbb-test\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for name in devices.SHARED_OUT:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("two_gpus")
def test_each_parallel_job_has_a_gpu_of_its_own(tmp_path: Path) -> None:
    with (
        devices.held("auto", 4, tmp_path, lambda: False) as first,
        devices.held("auto", 4, tmp_path, lambda: False) as second,
        devices.held("auto", 4, tmp_path, lambda: True) as third,
    ):
        assert first is not None
        assert second is not None
        taken = [share["CUDA_VISIBLE_DEVICES"] for share in (first, second)]
        assert taken == ["GPU-aaaa-test", "GPU-bbbb-test"]
        assert third is None  # it would wait
    with devices.held([5], 4, tmp_path, lambda: False) as chosen:
        assert chosen == {"CUDA_VISIBLE_DEVICES": "5"}
    with devices.held(None, 4, tmp_path, lambda: False) as left_alone:
        assert left_alone == {}


@pytest.mark.usefixtures("two_gpus")
def test_a_job_waits_for_a_gpu(tmp_path: Path) -> None:
    taken = contextlib.ExitStack()
    for _ in range(2):
        taken.enter_context(devices.held("auto", 4, tmp_path, lambda: False))
    timer = threading.Timer(0.2, taken.close)
    timer.start()
    with devices.held("auto", 4, tmp_path, lambda: False) as share:
        timer.join()
        assert share == {"CUDA_VISIBLE_DEVICES": "GPU-aaaa-test"}


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize(
    ("named", "answer"),
    [
        ("auto", None),
        (None, None),
        ([0, 1], None),
        (["GPU-aaaa-test", 1], None),
        (["GPU-bb"], None),  # CUDA takes the beginning
        (["MIG-1"], None),  # nvidia-smi does not list these
        ([], "names no GPU"),
        ([0, 2], "2 is not there, the GPUs here are GPU-aaaa-test, GPU-bbbb-test, 0, 1"),
        ([-1], "-1 is not there"),
        (["GPU-cc"], "GPU-cc is not there"),
        ([1, 0, "1"], "1 is there more than once"),
    ],
)
def test_gpus_that_are_named_are_looked_for(named: Any, answer: str | None) -> None:
    problem = devices.problem(named)
    assert problem is None if answer is None else answer in str(problem)


@pytest.mark.usefixtures("two_gpus")
def test_gpus_that_are_hidden_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-bbbb-test")
    assert devices.problem([3]) is None
    assert devices.problem(["GPU-bbbb-test", "3"]) is None
    assert "0 is not there, the GPUs here are 3, GPU-bbbb-test" in str(devices.problem([0]))
    monkeypatch.setenv("SLURM_JOB_ID", "4711")  # whoever set it shares out the devices
    assert devices.problem([0]) is None


def test_without_gpus_jobs_share_the_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    cores = threads.usable_cores()
    with devices.held("auto", cores, tmp_path, lambda: False) as share:
        assert share == ({"OMP_NUM_THREADS": "1"} if cores > 1 else {})
    with devices.held("auto", 1, tmp_path, lambda: False) as alone:
        assert alone == {}


# --- Slurm, as far as its script


def test_slurm_gets_a_script(tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    for name, text in {"sbatch": 'cp "$1" "$SCRIPT"; echo Submitted batch job 4711', "srun": "", "sacct": ""}.items():
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(f"#!/bin/sh\n{text}\n")
        program.chmod(0o755)
    script = tmp_path / "script.sh"
    settings = ["hydra/launcher=submitit_slurm", "hydra.launcher.gpus_per_node=1", "hydra.launcher.timeout_min=90"]
    words = ["--multirun", *PRIOR, f"output_root={tmp_path}/out", "tracker=none", "name=s", "seed=1,2", *settings]
    path = f"{tmp_path}/bin{os.pathsep}{os.environ['PATH']}"
    process = Forked(command, words, environment={"PATH": path, "SCRIPT": str(script)})
    process.wait_until(lambda: script.is_file() and "submitit" in script.read_text())
    process.kill()
    text = script.read_text()
    assert "#SBATCH --gpus-per-node=1" in text
    assert "#SBATCH --time=90" in text
    assert "#SBATCH --array=0-1" in text
    assert sys.executable in text
