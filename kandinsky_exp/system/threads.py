"""Calls in threads of their own, with a time limit where one is wanted; how many can work at a time."""

import os
import threading
from collections.abc import Callable
from concurrent import futures
from typing import TypeVar

Result = TypeVar("Result")


def usable_cores() -> int:
    """Those that this process may run on, which a scheduler or a container can make fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # macOS


def started(call: Callable[[], Result], name: str) -> "futures.Future[Result]":
    """Begin a call. The thread is a daemon: a call that hangs does not keep the process from its end."""
    future: futures.Future[Result] = futures.Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:  # whoever waits must hear of it
            future.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future


def within(seconds: float, call: Callable[[], Result], name: str) -> Result:
    """What a call returns or raises; name look-ups and network file systems know no time limits of their own.

    Raises:
        TimeoutError: it takes longer.
    """
    future = started(call, name)
    if not futures.wait([future], seconds).done:
        raise TimeoutError(f"no answer within {seconds:g} s")
    return future.result()
