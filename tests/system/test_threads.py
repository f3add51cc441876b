"""Calls in threads, signal handlers, and the folder that `output_root` means."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from kandinsky_exp.system import files, signals, threads


def test_a_call_with_a_limit_returns_and_raises_what_it_calls() -> None:
    assert threads.within(10, lambda: 3, "test") == 3
    with pytest.raises(KeyError):
        threads.within(10, lambda: {}["x"], "test")


def test_whatever_ends_a_call_is_heard_of() -> None:
    with pytest.raises(SystemExit):
        threads.within(10, sys.exit, "test")


def test_a_call_that_takes_too_long_is_left_behind() -> None:
    hanging = threading.Event()
    began = time.monotonic()
    with pytest.raises(TimeoutError, match=r"no answer within 0\.1 s"):
        threads.within(0.1, hanging.wait, "hangs")
    assert time.monotonic() - began < 5
    assert all(thread.daemon for thread in threading.enumerate() if thread.name == "hangs")
    hanging.set()


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="macOS has none")
def test_usable_cores_are_those_that_the_process_may_run_on() -> None:
    allowed = os.sched_getaffinity(0)
    assert threads.usable_cores() == len(allowed)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        assert threads.usable_cores() == 1
    finally:
        os.sched_setaffinity(0, allowed)


def test_signals_are_handled_for_a_while() -> None:
    before, seen = signal.getsignal(signal.SIGTERM), []
    with signals.handling(lambda number, _: seen.append(number)):
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
    assert seen == [signal.SIGTERM, signal.SIGINT]
    assert signal.getsignal(signal.SIGTERM) == before


def test_outside_the_main_thread_signals_are_left_alone() -> None:
    before = signal.getsignal(signal.SIGTERM)

    def handled() -> bool:
        with signals.handling(lambda *_: None):
            return signal.getsignal(signal.SIGTERM) != before

    assert not threads.within(10, handled, "test")


def test_output_root_is_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert files.output_root("outputs") == tmp_path / "outputs"
    assert files.output_root("~/outputs") == tmp_path / "home" / "outputs"
    assert files.output_root(str(tmp_path)) == tmp_path
    assert files.output_root("~nobody-of-that-name/a") == tmp_path / "~nobody-of-that-name" / "a"
