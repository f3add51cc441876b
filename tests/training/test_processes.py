"""Runs as users start them: processes, signals, launchers, sweeps."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import fork_server
import pytest
from commands import USE_CPU, Forked, command, print_into, start, start_server, start_two
from PIL import Image
from running import SMALL, history, prepare, runs, train
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from kandinsky_exp import cli
from kandinsky_exp.data.sources import EMOJI

COMMAND = [sys.executable, "-m", "kandinsky_exp"]
# `accelerate launch --cpu` starts one process, whatever number it is given: torch's launcher, which it uses on GPUs.
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *COMMAND[1:], "train"]
# `train/loss` of the four steps of two processes, as it was before gradients lay in the buckets of their reduction.
TWO = {
    "prior": [0.6767117, 0.4034083, 0.3662962, 0.2510977],
    "decoder": [0.1215171, 0.1724811, 0.2764308, 0.1168231],
}
ENDLESS = ["trainer.max_steps=1000000", "validation.every=1000000", "checkpoint.every=1000000"]


def real(
    words: list[str], at: Path | None = None, number: int = 0, when: str = "step 2 of", **environment: str
) -> tuple[int, str, float]:
    """A process as a user has it, from its imports to its interpreter's end.

    Args:
        at: the log that speaks of its second step, or what `when` says, upon which it gets the signal `number`.

    Returns:
        Its exit code, what it printed, and the seconds since the signal.
    """
    process = subprocess.Popen(
        words, env={**os.environ, **environment}, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        deadline = time.monotonic() + 120
        while at is not None and not (at.is_file() and when in at.read_text()):
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline, "timed out"
            time.sleep(0.02)
        sent = time.monotonic()
        if at is not None:
            process.send_signal(number)
        output = process.communicate(timeout=240)[0]
    finally:
        process.kill()
    return process.returncode, output, time.monotonic() - sent


def interruptible(arguments: list[str]) -> None:
    """The command in a process that, as an interpreter, makes a KeyboardInterrupt of SIGINT if nobody else does."""
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    command(arguments)


def launch(arguments: list[str]) -> None:
    """What `LAUNCH` does with a command, but for imports: torch's agent starts two processes and watches over them."""
    settings = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "rdzv_configs": {"timeout": 60}}
    config = LaunchConfig(1, 1, 2, run_id="two", start_method="forkserver", monitor_interval=0.1, **settings)
    elastic_launch(config, launched_one)(arguments, Path("/dev/stdout").resolve(), dict(os.environ))


def launched_one(arguments: list[str], output: Path, environment: dict[str, str]) -> None:
    """One of them, which has its agent's variables and those that the agent set for it."""
    print_into(output)
    assert fork_server.PRELOADED in sys.modules  # it comes from the tests' own server
    os.environ.update(environment | os.environ)
    command(arguments)


def started(root: Path, *settings: str) -> str:
    """Two processes that know of each other by their environment alone; what they print."""
    return "".join(process.finish() for process in start_two(root, *settings))


def agent(root: Path, *settings: str) -> str:
    """Two that torch's agent starts."""
    prepare(root, settings, encoded=True)
    words = [*SMALL, f"output_root={root}", *settings]
    return Forked(launch, words, environment={"ACCELERATE_USE_CPU": USE_CPU}).finish()


def real_launcher(root: Path, *settings: str) -> str:
    """Two interpreters that torch's launcher starts, as a user types it."""
    return real([*LAUNCH, *SMALL, f"output_root={root}", *settings], ACCELERATE_USE_CPU=USE_CPU)[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "launched"),
    [("prior", agent), ("decoder", started), pytest.param("prior", real_launcher, marks=pytest.mark.soak)],
)
def test_two_processes_train_one_run(stage: str, launched: Callable[..., str], tmp_path: Path) -> None:
    settings = [f"model={stage}", "trainer.batch_size=2", "trainer.log_every=1", "validation.prompts=[a dog]",
                "trainer.grad_accumulation=2", "trainer.ema_decay=0.9",
                f"validation.sets={{again: {{path: {EMOJI}/validation}}}}"]  # fmt: skip
    output = launched(tmp_path, *settings)
    (found,) = runs(tmp_path)
    assert found.info.status == "FINISHED", output
    folders = [path for path in tmp_path.iterdir() if (path / "run.json").is_file()]
    assert len(folders) == 1
    assert (folders[0] / "pipeline" / "model_index.json").is_file()
    losses = history(tmp_path, found.info.run_id, "train/loss")
    assert list(losses) == [1, 2, 3, 4]
    assert list(losses.values()) == pytest.approx(TWO[stage], rel=1e-4)
    # Shared out over two processes, the fixed-noise loss of the untrained network is the same number.
    alone = tmp_path / "alone"
    train(alone, f"model={stage}", "trainer.max_steps=1", "validation.reconstructions=0")
    shared = history(tmp_path, found.info.run_id, "validation/loss")[0]
    assert shared == history(tmp_path, found.info.run_id, "validation/again/loss")[0]  # the same pictures
    assert shared == pytest.approx(history(alone, runs(alone)[0].info.run_id, "validation/loss")[0], rel=1e-4)


@pytest.mark.parametrize(
    ("number", "code", "forked"),
    [
        (signal.SIGTERM, 143, True),
        (signal.SIGINT, 130, True),
        pytest.param(signal.SIGINT, 130, False, marks=pytest.mark.soak),
    ],
)
def test_a_signal_ends_with_a_checkpoint_and_its_exit_code(
    number: signal.Signals, code: int, forked: bool, tmp_path: Path
) -> None:
    settings, log = ["model=prior", "name=p", *ENDLESS], tmp_path / "p" / "train.log"
    if forked:
        prepare(tmp_path, settings)
        process = Forked(interruptible, [*SMALL, f"output_root={tmp_path}", *settings])
        process.wait_for("step 2 of", log)
        sent = time.monotonic()
        process.signal(number)
        output, found_code, seconds = process.finish(), process.code, time.monotonic() - sent
    else:
        found_code, output, seconds = real([*COMMAND, *SMALL, f"output_root={tmp_path}", *settings], log, number)
    assert seconds < 10
    assert found_code == code, output
    assert "Traceback" not in output
    (found,) = runs(tmp_path)
    assert found.info.status == "KILLED"
    assert json.loads((tmp_path / "p" / "run.json").read_text())["status"] == "KILLED"
    assert len(list((tmp_path / "p" / "checkpoints").glob("step-*"))) == 1


def pictures(folder: Path) -> Path:
    folder.mkdir()
    for index in range(6):
        Image.new("RGB", (64, 64), (40 * index, 0, 0)).save(folder / f"{index}.png")
    rows = [json.dumps({"file_name": f"{index}.png", "text": f"red {index}"}) for index in range(6)]
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    return folder


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_goes_while_a_run_trains_fails_the_run(workers: int, tmp_path: Path) -> None:
    folder = pictures(tmp_path / "pictures")
    process = start(tmp_path, "model=prior", "name=p", "data=folder", f"data.path={folder}", "data.cache=false",
                    f"data.num_workers={workers}", "data.resolution=64", *ENDLESS)  # fmt: skip
    process.wait_for("step 2 of", tmp_path / "p" / "train.log")
    for file in folder.glob("*.png"):
        file.unlink()
    output = process.finish()
    assert process.code == 1, output
    assert "Traceback" not in output
    assert "(training stopped after step" in output
    assert {run.info.status for run in runs(tmp_path)} == {"FAILED"}
    assert json.loads((tmp_path / "p" / "run.json").read_text())["status"] == "FAILED"


@pytest.mark.slow
def test_two_processes_stop_with_one_checkpoint(tmp_path: Path) -> None:
    """Long before the next log point: a launcher kills half a minute after it has asked."""
    settings = [
        "model=prior",
        "name=p",
        *ENDLESS,
        "trainer.log_every=1000000",
        "checkpoint.every=2",
        "checkpoint.keep=1",
    ]
    prepare(tmp_path, settings)
    process = Forked(
        launch, [*SMALL, f"output_root={tmp_path}", *settings], environment={"ACCELERATE_USE_CPU": USE_CPU}
    )
    process.wait_for("step 2: checkpoint", tmp_path / "p" / "train.log")
    sent = time.monotonic()
    process.signal(signal.SIGTERM)
    output, code, seconds = process.finish(), process.code, time.monotonic() - sent
    assert code != 0
    assert seconds < 25
    assert {run.info.status for run in runs(tmp_path)} == {"KILLED"}, output
    (folder,) = (tmp_path / "p" / "checkpoints").iterdir()
    assert json.loads((tmp_path / "p" / "run.json").read_text())["step"] == int(folder.name.removeprefix("step-"))


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(tmp_path: Path) -> None:
    """One process leaves what two go on from, and one again; the samples per step stay, and what may differ is said."""
    settings = ["model=prior", "name=p", "trainer.log_every=1"]
    train(tmp_path, *settings, "trainer.max_steps=2")
    both = start_two(tmp_path, *settings, "trainer.batch_size=2", "trainer.max_steps=4")
    output = "".join(process.finish() for process in both)
    log = tmp_path / "p" / "train.log"
    assert "going on with 2 processes instead of 1: the order of the data stays the same" in log.read_text(), output
    train(tmp_path, *settings, "trainer.max_steps=5")
    assert "going on with 1 processes instead of 2: " in log.read_text()
    (found,) = runs(tmp_path)
    assert found.info.status == "FINISHED"
    assert list(history(tmp_path, found.info.run_id, "train/loss")) == [1, 2, 3, 4, 5]
    both = start_two(tmp_path, *settings, "trainer.max_steps=6")
    refused = "".join(process.finish() for process in both)
    assert "× processes: was 4, is 8; images would be left out or seen twice" in refused
    assert [process.code for process in both] == [2, 2]


@pytest.mark.slow
def test_multirun_leaves_one_parent_and_a_folder_per_job(tmp_path: Path) -> None:
    prepare(tmp_path, [], encoded=True)
    start_server()  # the process that jobs are forked from
    quick = ["trainer.max_steps=2", "validation.reconstructions=0"]
    varied = ["model=prior,decoder", "adapter=none,lora"]
    cli.main(["--multirun", *SMALL, f"output_root={tmp_path}", "name=sweep", *quick, *varied])
    jobs = {
        f"{kind},model={stage}": stage for kind in ("adapter=none", "adapter=lora") for stage in ("prior", "decoder")
    }
    made = {path.name: path for path in (tmp_path / "sweep").iterdir() if path.is_dir()}
    del made[".jobs"], made["report"]
    assert made.keys() == jobs.keys()
    assert all((path / ("adapter" if "lora" in name else "pipeline")).is_dir() for name, path in made.items())
    found = runs(tmp_path)
    (parent,) = (run for run in found if run.info.run_name == "sweep")
    children = [run for run in found if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert {run.info.run_name for run in children} == {
        f"model={stage} adapter={kind}" for kind in ("none", "lora") for stage in ("prior", "decoder")
    }
    assert {run.info.status for run in found} == {"FINISHED"}


def test_a_store_that_does_not_answer_is_found_at_once(tmp_path: Path) -> None:
    began = time.monotonic()
    process = start(tmp_path, "name=p", "tracker.uri=http://127.0.0.1:9")
    output = process.finish()
    assert process.code == 2, output
    assert "http://127.0.0.1:9" in output
    assert "Traceback" not in output
    assert time.monotonic() - began < 60
    assert not (tmp_path / "p").exists()
