"""Faults from outside, put into real processes: signals, limits, full disks, no memory, workers that die."""

import contextlib
import json
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from commands import Forked, start
from running import SMALL, client, composed, history, network, prepare, runs, same, train
from safetensors.torch import load_file

from kandinsky_exp import cli
from kandinsky_exp.data.sources import EMOJI
from kandinsky_exp.errors import Interrupted
from kandinsky_exp.memory import savings
from kandinsky_exp.run import run
from kandinsky_exp.runs import integrity
from kandinsky_exp.system import signals

ENDLESS = ["trainer.max_steps=1000000", "validation.every=1000000", "checkpoint.every=1000000"]
STARTED = "step 2 of"
DAY = 86_400  # seconds


def record(folder: Path) -> dict:
    return json.loads((folder / "run.json").read_text())


# --- signals and time


def test_the_second_signal_ends_at_once(tmp_path: Path) -> None:
    process = start(tmp_path, "model=prior", "name=p", *ENDLESS)
    process.wait_for(STARTED, tmp_path / "p" / "train.log")
    process.signal(signal.SIGSTOP)  # so that both are there before either is looked at
    process.signal(signal.SIGINT)
    process.signal(signal.SIGTERM)
    sent = time.monotonic()
    process.signal(signal.SIGCONT)
    output = process.finish()
    assert time.monotonic() - sent < 2
    assert process.code == 143
    assert "ended at once; the same command goes on" in output
    assert "Traceback" not in output
    assert record(tmp_path / "p")["status"] == "KILLED"
    assert not list((tmp_path / "p").glob("checkpoints/*"))
    train(tmp_path, "model=prior", "name=p")
    (found,) = runs(tmp_path)
    assert found.info.status == "FINISHED"


@pytest.mark.slow
def test_a_limit_on_time_stops_like_a_signal(tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(Interrupted) as caught:
        train(tmp_path, "model=prior", "name=p", *ENDLESS, "trainer.max_minutes=0.05")
    assert 3 <= time.monotonic() - began < 30
    assert caught.value.signal_number == signal.SIGTERM
    (found,) = runs(tmp_path)
    assert found.info.status == record(tmp_path / "p")["status"] == "KILLED"
    (folder,) = (tmp_path / "p" / "checkpoints").iterdir()
    assert integrity.damage(folder) is None
    assert "trainer.max_minutes is over" in (tmp_path / "p" / "train.log").read_text()


@pytest.mark.parametrize("trains", [False, True])
def test_a_limit_on_time_says_whether_anything_trained(trains: bool, caplog: pytest.LogCaptureFixture) -> None:
    with signals.stop_signals() as stop, contextlib.suppress(Interrupted), contextlib.ExitStack() as held:
        if trains:
            held.enter_context(stop.deferred())
        held.enter_context(stop.after(1e-4))
        while stop.signal_number is None:
            time.sleep(0.001)
    early = " before the first step: nothing was trained, set more (what was encoded stays)"
    assert f"trainer.max_minutes is over{'' if trains else early}: stopping as for SIGTERM" in caplog.text


def test_of_two_with_one_name_the_second_is_told(tmp_path: Path) -> None:
    both = [start(tmp_path, "model=prior", "name=p", "tracker=none", *ENDLESS) for _ in range(2)]
    deadline = time.monotonic() + 120
    while all(process.code is None for process in both):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    second, first = sorted(both, key=lambda process: process.code is None)
    output = second.finish()
    assert second.code == 2, output
    assert "error: name: another process is training in" in output
    first.wait_for(STARTED, tmp_path / "p" / "train.log")
    first.signal(signal.SIGTERM)
    output = first.finish()
    assert first.code == 143, output


# --- disks


def undisturbed(root: Path, *settings: str) -> Path:
    train(root, *settings, "name=whole")
    return root / "whole"


DECODER = ["model=decoder", "tracker=none", "trainer.max_steps=6", "checkpoint.every=2", "validation.every=6",
           "validation.reconstructions=0"]  # fmt: skip


def test_a_checkpoint_that_the_disk_has_no_room_for(tmp_path: Path) -> None:
    """A limit on the size of files comes between the first checkpoint and the second."""
    whole = undisturbed(tmp_path, *DECODER)
    process = start(tmp_path, *DECODER, "name=d", "checkpoint.behind=false")
    process.wait_until(lambda: (tmp_path / "d/checkpoints/step-00000002").is_dir())
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
    output = process.finish()
    check_full(tmp_path / "d", process, output)
    train(tmp_path, *DECODER, "name=d")
    assert same(*(network(folder / "pipeline" / "unet") for folder in (whole, tmp_path / "d")))


def check_full(folder: Path, process: Forked, output: str) -> None:
    assert process.code == 1, output
    assert "Traceback" not in output
    assert "could not be written to" in output
    assert "it needs 0.0" in output
    assert "the one before is whole: make room, and run the same command again" in output
    assert record(folder)["status"] == "FAILED"
    names = [path.name for path in (folder / "checkpoints").iterdir()]
    assert names
    assert all(name.startswith("step-") for name in names)  # nothing half-written keeps the room
    assert all(integrity.damage(folder / "checkpoints" / name) is None for name in names)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=160m", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"SKIPPED LOUDLY: no small file system can be mounted here: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_disk_that_is_full(small_disk: Path) -> None:
    whole = undisturbed(small_disk, *DECODER, "checkpoint.every=6")
    expected = network(whole / "pipeline" / "unet")
    shutil.rmtree(whole)
    process = start(small_disk, *DECODER, "name=d", "checkpoint.behind=false")
    process.wait_until(lambda: (small_disk / "d/checkpoints/step-00000002").is_dir())
    with (small_disk / "filler").open("wb") as file:
        free = shutil.disk_usage(small_disk).free
        os.posix_fallocate(file.fileno(), 0, free - (8 << 20))
    output = process.finish()
    assert "No space left on device" in output
    check_full(small_disk / "d", process, output)
    (small_disk / "filler").unlink()
    train(small_disk, *DECODER, "name=d")
    assert same(expected, network(small_disk / "d" / "pipeline" / "unet"))


# --- memory


def little_memory() -> None:
    """Some more than the libraries take, of which Arrow reserves one gibibyte at once."""
    most = psutil.Process().memory_info().vms + (5 << 29)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def test_no_memory_names_three_settings(tmp_path: Path) -> None:
    """The address space has room for the libraries, and not for the activations of 1024 images."""
    train(tmp_path, "model=decoder", "tracker=none", "trainer.max_steps=1")
    process = start(tmp_path, "model=decoder", "name=d", "tracker=none", "data.max_samples=null", *ENDLESS,
                    "trainer.batch_size=1024", limit=little_memory)  # fmt: skip
    output = process.finish()
    assert process.code == 1, output
    assert "Traceback" not in output
    message = output[output.index("error: ") :]
    assert "has no memory left" in message
    assert "What lowers it most for this run: " in message
    advice = message.partition("for this run: ")[2].strip().split("; ")
    assert len(advice) == 3
    assert any("trainer.batch_size=512 trainer.grad_accumulation=2" in line for line in advice)
    assert record(tmp_path / "d")["status"] == "FAILED"


SOURCE = """
from kandinsky_exp.data.splits import Splits

def source() -> Splits:
    {}
"""


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (
            "raise MemoryError('malloc of size 576 failed')",
            "the machine has no memory left (malloc of size 576 failed)",
        ),
        (
            "raise RuntimeError('CUDA error: out of memory')",
            "the device has no memory left (CUDA error: out of memory)",
        ),
        ("import mmap; mmap.mmap(-1, 1 << 60)", "the machine has no memory left ([Errno 12] Cannot allocate memory)"),
    ],
)
def test_no_memory_before_anything_trains_is_one_message(
    line: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = f"greedy_{tmp_path.name}"  # a module of each test
    (tmp_path / f"{name}.py").write_text(SOURCE.format(line))
    monkeypatch.syspath_prepend(str(tmp_path))
    overrides = ["model=prior", f"data._target_={name}.source", f"trusted_modules=[{name}]"]
    with pytest.raises(SystemExit) as left:
        cli.main([*SMALL, f"output_root={tmp_path}", "tracker=none", *overrides])
    printed = capsys.readouterr().err
    assert left.value.code == 1, printed
    assert f"error: {told}: leave it more, or ask for less at once" in printed
    assert "Traceback" not in printed


def use(**given: int) -> savings.Use:
    facts = {"trainable": 4, "frozen": 0, "optimizer": 8, "average": 0, "encoders": 0, "activations": 1}
    return savings.Use(**{name: value * 10**9 for name, value in {**facts, **given}.items()})


@pytest.mark.parametrize(
    ("overrides", "given", "device", "first"),
    [
        (["model=prior"], {}, "cpu", "adapter=lora"),
        (["model=prior", "adapter=lora"], {"trainable": 0, "optimizer": 0, "frozen": 4}, "cpu", "precision=bf16"),
        (["model=prior", "data.cache=false"], {"encoders": 20}, "cpu", "data.cache=true"),
        (["trainer.batch_size=8"], {"activations": 40}, "cuda", "trainer.gradient_checkpointing=true"),
        (["trainer.batch_size=8", "trainer.gradient_checkpointing=true"], {"activations": 40}, "cuda",
         "trainer.batch_size=4 trainer.grad_accumulation=2"),
        (["trainer.ema_decay=0.9", "adapter=lora"], {"average": 4}, "cpu", "optimizer=adafactor"),
        (["optimizer=sgd", "trainer.ema_decay=0.9", "adapter=lora"], {"average": 4, "optimizer": 0}, "cuda",
         "trainer.ema_decay=null"),
    ],
)  # fmt: skip
def test_what_lowers_memory_most_comes_first(
    overrides: list[str], given: dict[str, int], device: str, first: str, tmp_path: Path
) -> None:
    advice = savings.advice(composed(tmp_path, *overrides), use(**given), torch.device(device))
    assert advice[0].startswith(first), advice
    assert len(advice) == 3


def test_of_validation_the_batch_of_validation(tmp_path: Path) -> None:
    cfg = composed(tmp_path, "trainer.batch_size=8")
    (first, *_) = savings.advice(cfg, use(activations=40), torch.device("cuda"), validating=True)
    assert first.startswith("validation.batch_size=4")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("DefaultCPUAllocator: can't allocate memory: you tried to allocate 3145728 bytes. Error code 12", 3145728),
        ("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79 GiB", int(2.5 * 1024**3)),
        ("out of luck", 0),
    ],
)
def test_what_was_asked_for(text: str, expected: int) -> None:
    assert savings.size_in(RuntimeError(text)) == expected


# --- data


def pictures(folder: Path) -> Path:
    shutil.copytree(EMOJI / "train", folder)
    return folder


def online(folder: Path, *further: str) -> list[str]:
    return ["model=prior", "data=folder", f"data.path={folder}", "data.resolution=64", "data.cache=false", *further]


def test_a_picture_that_goes_between_epochs_costs_nothing(tmp_path: Path) -> None:
    """The run ends with a checkpoint of the step it came to; put back, it ends as if nothing had been."""
    folder = pictures(tmp_path / "pictures")
    settings = [*online(folder), "tracker=none", "trainer.max_steps=40", "checkpoint.every=1000",
                "validation.every=1000", "trainer.log_every=1"]  # fmt: skip
    train(tmp_path, *settings, "name=whole")
    process = start(tmp_path, *settings, "name=p")
    process.wait_for("step 3 of", tmp_path / "p" / "train.log")
    folder.rename(tmp_path / "away")
    output = process.finish()
    assert process.code == 1, output
    assert "Traceback" not in output
    assert "(training stopped after step" in output
    (checkpoint,) = (tmp_path / "p" / "checkpoints").iterdir()
    assert f"(training stopped after step {integrity.read_state(checkpoint)['step']};" in output
    (tmp_path / "away").rename(folder)
    train(tmp_path, *settings, "name=p")
    assert same(*(network(tmp_path / name / "pipeline" / "prior") for name in ("whole", "p")))


def test_a_worker_that_dies_costs_nothing(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "pictures")
    process = start(tmp_path, *online(folder, "data.num_workers=1"), "name=p", *ENDLESS)
    process.wait_for(STARTED, tmp_path / "p" / "train.log")
    for worker in psutil.Process(process.pid).children():
        worker.kill()
    output = process.finish()
    assert process.code == 1, output
    assert "Traceback" not in output
    assert "data.num_workers: the processes that read images failed" in output
    assert "set data.num_workers=0" in output
    (checkpoint,) = (tmp_path / "p" / "checkpoints").iterdir()
    reached = integrity.read_state(checkpoint)["step"]
    (found,) = runs(tmp_path)
    assert found.info.status == record(tmp_path / "p")["status"] == "FAILED"
    train(tmp_path, *online(folder), "name=p", f"trainer.max_steps={reached + 1}", "trainer.log_every=1")
    (found,) = runs(tmp_path)
    assert found.info.status == "FINISHED"


# --- numbers


def test_the_batch_of_a_step_that_is_not_finite_is_kept(tmp_path: Path) -> None:
    settings = ["model=prior", "name=p", "optimizer=sgd", "optimizer.lr=1e30", "trainer.max_grad_norm=null",
                "trainer.max_steps=20", "trainer.grad_accumulation=2", "trainer.batch_size=2"]  # fmt: skip
    with pytest.raises(Exception, match=r"The batch is kept in .*nonfinite/step-0000000\d"):
        train(tmp_path, *settings)
    (folder,) = (tmp_path / "p" / "nonfinite").iterdir()
    report, batch = json.loads((folder / "report.json").read_text()), load_file(folder / "batch.safetensors")
    assert report["step"] == int(folder.name.removeprefix("step-"))
    assert "lr 1e+30" in report["what"]
    assert [len(rows) for rows in report["samples"]] == [2, 2]
    assert all(name in report["what"] for rows in report["samples"] for name in rows)
    assert batch["0.image_embeds"].shape[0] == 2
    assert {name.partition(".")[0] for name in batch} == {"0", "1"}
    (found,) = runs(tmp_path)
    assert found.info.status == "FAILED"
    assert "nonfinite" in {file.path for file in client(tmp_path).list_artifacts(found.info.run_id)}


# --- clocks


def library() -> str | None:
    """libfaketime, where it is installed."""
    found = sorted(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))
    return str(found[0]) if found else None


CLOCK = ["model=prior", "name=p", "trainer.max_steps=60", "validation.every=30", "checkpoint.every=30"]


class Clock(logging.Handler):
    """Python's clock of the wall; it jumps when the run logs a text.

    Args:
        jumps: {text: days from the true time}.
    """

    def __init__(self, jumps: dict[str, int], patch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.jumps, self.days = jumps, 0
        seconds, nanoseconds = time.time, time.time_ns
        patch.setattr(time, "time", lambda: seconds() + self.days * DAY)
        patch.setattr(time, "time_ns", lambda: nanoseconds() + self.days * DAY * 10**9)

    def emit(self, record: logging.LogRecord) -> None:
        self.days = next((days for text, days in self.jumps.items() if text in record.getMessage()), self.days)


def check_clock(root: Path) -> None:
    """The run ended, its records are in order, and going on finds nothing to do."""
    (found,) = runs(root)
    assert found.info.status == "FINISHED"
    assert sorted(history(root, found.info.run_id, "train/loss")) == list(range(2, 61, 2))
    assert record(root / "p")["step"] == 60
    assert integrity.damage(root / "p" / "checkpoints" / "step-00000060") is None
    times = [point.timestamp for point in client(root).get_metric_history(found.info.run_id, "train/loss")]
    assert max(times) - min(times) > 5 * DAY * 1000  # it did jump, and back
    assert run(composed(root, *CLOCK)) == record(root / "p")["validation_loss"]


def test_the_clock_jumps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The wall's clock jumps by days, there and back, while a run trains: it ends, and its records are in order."""
    logger = logging.getLogger("kandinsky_exp")
    with monkeypatch.context() as patch:
        clock = Clock({"step 10 of": 3, "step 40 of": -3}, patch)
        logger.addHandler(clock)
        try:
            train(tmp_path, *CLOCK)
        finally:
            logger.removeHandler(clock)
    check_clock(tmp_path)


@pytest.mark.slow
@pytest.mark.soak
def test_the_clock_of_the_system_jumps(tmp_path: Path) -> None:
    """The same for all libraries of a process, those in C as well."""
    if library() is None:
        pytest.skip("SKIPPED LOUDLY: libfaketime is not installed (apt-get install faketime)")
    prepare(tmp_path, [])  # a store takes long to make under another clock
    clock, log = tmp_path / "clock", tmp_path / "p" / "train.log"
    clock.write_text("+0")
    environment = {"LD_PRELOAD": str(library()), "FAKETIME_TIMESTAMP_FILE": str(clock), "FAKETIME_CACHE_DURATION": "1",
                   "FAKETIME_DONT_FAKE_MONOTONIC": "1", "DONT_FAKE_MONOTONIC": "1"}  # fmt: skip
    command = [sys.executable, "-m", "kandinsky_exp", *SMALL, f"output_root={tmp_path}", *CLOCK]
    process = subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               env={**os.environ, **environment})  # fmt: skip
    for step, jump in ((10, "+3d"), (40, "-3d")):
        while not (log.is_file() and f"step {step} of" in log.read_text()):
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.02)
        clock.write_text(jump)
        process.send_signal(signal.SIGSTOP)  # the file is looked at once a second
        time.sleep(1.1)
        process.send_signal(signal.SIGCONT)
    output = process.communicate(timeout=240)[0]
    assert process.returncode == 0, output
    check_clock(tmp_path)
