"""Whoever reads what a run prints may stop reading: the run goes on, and says why it failed where it failed."""

import io
import json
import os
import pty
import sys
import termios
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import Forked, command, start
from running import history, network, prepare, runs, same, train

from kandinsky_exp.errors import RunFailure
from kandinsky_exp.system import logs, terminal


def shown_on(descriptor: int) -> None:
    for number in (1, 2):
        os.dup2(descriptor, number)


def read_until(text: bytes, reader: int) -> None:
    """Then close, in the middle of the run."""

    def read() -> None:
        found = b""
        while text not in found:
            found += os.read(reader, 4096)
        os.close(reader)

    threading.Thread(target=read, daemon=True).start()


def piped() -> None:
    """As `2>&1 | head`."""
    reader, writer = os.pipe()
    shown_on(writer)
    read_until(b"step 2 of", reader)


def in_a_window() -> None:
    """A terminal, with a progress bar, that is closed."""
    reader, writer = pty.openpty()
    termios.tcsetwinsize(writer, (24, 80))
    shown_on(writer)
    read_until(b"0/4", reader)


def onto_a_full_disk() -> None:
    shown_on(os.open("/dev/full", os.O_WRONLY))


def without_any() -> None:
    sys.stdout = sys.stderr = None  # type: ignore[assignment]  # as Python has it after `2>&- >&-`


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run comes to that can print."""
    root = tmp_path_factory.mktemp("whole")
    train(root, "model=prior", "name=p", "tracker=none")
    return root / "p"


@pytest.mark.parametrize(
    ("how", "why"),
    [(piped, "Broken pipe"), (in_a_window, "Input/output error"), (onto_a_full_disk, "No space"), (without_any, None)],
    ids=lambda how: getattr(how, "__name__", ""),
)  # fmt: skip
def test_a_terminal_that_goes_ends_no_run(
    how: Callable[[], None], why: str | None, whole: Path, tmp_path: Path
) -> None:
    process = start(tmp_path, "model=prior", "name=p", "tracker=none", limit=how)
    process.finish()
    log = (tmp_path / "p" / "train.log").read_text()
    assert process.code == 0, log
    assert json.loads((tmp_path / "p" / "run.json").read_text())["status"] == "FINISHED"
    assert log.count("nothing more can be shown") == (why is not None)
    assert why is None or f"nothing more can be shown ({why}" in log
    assert same(*(network(folder / "pipeline" / "prior") for folder in (whole, tmp_path / "p")))


@pytest.mark.parametrize("arguments", [["encode", "list=true"], ["--help"], ["train", "trainer.max_steps=no"]])
def test_nor_any_other_verb(arguments: list[str], tmp_path: Path) -> None:
    prepare(tmp_path, [])
    process = Forked(command, [*arguments, f"output_root={tmp_path}"], onto_a_full_disk)
    process.finish()
    assert process.code == (2 if "train" in arguments else 0)


def test_a_stream_that_bears_it() -> None:
    inner = io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True)
    stream = terminal.Lasting(inner)
    assert stream.write("é") == 1
    assert inner.buffer.getvalue() == b"\\xe9"
    assert stream.encoding == "ascii"
    inner.close()
    stream.write("x")
    stream.flush()
    assert terminal.Lasting.lost == "I/O operation on closed file."
    terminal.Lasting.lost = None


# --- why a run failed


def test_a_run_that_fails_says_why_in_its_records(tmp_path: Path) -> None:
    settings = ["model=prior", "name=p", "trainer.max_steps=20"]
    with pytest.raises(RunFailure, match="is not finite"):
        train(tmp_path, *settings, "optimizer=sgd", "optimizer.lr=1e30", "trainer.max_grad_norm=null")
    (found,) = runs(tmp_path)
    assert "the loss or its gradient is not finite at step" in found.data.tags["error"]
    log = (tmp_path / "p" / "train.log").read_text()
    assert "ERROR the loss or its gradient is not finite at step" in log
    assert "Traceback" not in log
    train(tmp_path, *settings, "optimizer=sgd", "optimizer.lr=1e-3", "checkpoint.resume=auto")
    (found,) = runs(tmp_path)
    assert found.info.status == "FINISHED"
    assert "error" not in found.data.tags
    assert 20 in history(tmp_path, found.info.run_id, "train/loss")


def test_what_nobody_expected_leaves_its_traceback_in_the_log(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), logs.logging_to(tmp_path / "train.log", is_main=True):
        print(1 // 0)
    log = (tmp_path / "train.log").read_text()
    assert "ERROR ZeroDivisionError: integer division or modulo by zero\nTraceback" in log
