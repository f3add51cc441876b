"""What concerns a run's processes: Accelerate's state, what the first of them decides for all, and signals."""

import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, TypeVar

from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import broadcast_object_list, gather_object

from kandinsky_exp.errors import Interrupted, RunFailure, UserError

Result = TypeVar("Result")
logger = logging.getLogger(__name__)


@contextlib.contextmanager
def accelerated(make: Callable[[], Accelerator]) -> Iterator[Accelerator]:
    """An accelerator that leaves no state behind: the next run of this process may choose another precision."""
    accelerator = None
    try:
        accelerator = make()
        yield accelerator
    finally:
        if accelerator is not None:
            accelerator.free_memory()
            accelerator.end_training()
        AcceleratorState._reset_state(reset_partial_state=True)


def on_main_process(action: Callable[[], Result]) -> Result:
    """The main process's result, on all; its error too, so that none waits for one that is gone."""
    outcome: list[Any] = [None, None]
    if PartialState().is_main_process:
        try:
            outcome[0] = action()
        except (UserError, RunFailure) as error:
            outcome[1] = error
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    result: Result = outcome[0]
    return result


def on_all_processes(action: Callable[[], Result]) -> Result:
    """What each process makes of it; where it fails on one, it fails on all, so that none waits for one that is gone.

    The action itself must wait for no other process.
    """
    if PartialState().num_processes == 1:
        return action()
    failure: Exception | None = None
    try:
        result = action()
    except Exception as error:
        failure = error
    if on_any_process(failure is not None):
        raise failure or RunFailure("another process of the run failed; what it says is the reason")
    return result


def on_any_process(flag: bool) -> bool:
    """Whether it is so on one of the processes at least; the same answer on all."""
    return any(gather_object([flag]))


class Stop:
    """A wish to stop, from SIGINT, SIGTERM, or a limit on the run's time.

    While `deferred`, the first signal is noted, for the loop to finish its step and write a checkpoint. Elsewhere there
    is nothing to finish, and the first one interrupts. The second one ends the process at once.

    Args:
        handled: whether signals come here; outside the main thread they do not.
    """

    def __init__(self, handled: bool) -> None:
        self.signal_number: int | None = None
        self.last_words: list[Callable[[], object]] = []  # before a process is left at once: quick, and on disk alone
        self._handled = handled
        self._deferred = self._trains = False

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        self._trains = True
        with self._set(True):
            yield

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        with self._set(False):
            if self.signal_number is not None:
                raise Interrupted(self.signal_number)
            yield

    @contextlib.contextmanager
    def _set(self, deferred: bool) -> Iterator[None]:
        before, self._deferred = self._deferred, deferred
        try:
            yield
        finally:
            self._deferred = before

    @contextlib.contextmanager
    def after(self, minutes: float | None) -> Iterator[None]:
        """Stop as for SIGTERM once so many minutes are over; never, for None. The clock on the wall may jump."""
        if minutes is None:
            yield
            return
        timer = threading.Timer(minutes * 60, self._expire)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _expire(self) -> None:
        early = "" if self._trains else " before the first step: nothing was trained, set more (what was encoded stays)"
        logger.warning("trainer.max_minutes is over%s: stopping as for SIGTERM", early)
        if self._handled:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
        else:
            self.signal_number = signal.SIGTERM

    def handle(self, signal_number: int, frame: FrameType | None) -> None:
        if self.signal_number is not None and not _is_notebook():
            self._leave(signal_number)
        self.signal_number = signal_number
        if not self._deferred:
            raise Interrupted(signal_number)

    def _leave(self, signal_number: int) -> None:
        for action in self.last_words:
            with contextlib.suppress(Exception):  # whatever it is, the process ends
                action()
        with contextlib.suppress(Exception):
            sys.stderr.write("\nended at once; the same command goes on from the last checkpoint\n")
            sys.stderr.flush()
        os._exit(128 + signal_number)


def _is_notebook() -> bool:
    """Where leaving would end what the user has in memory: there a second signal interrupts once more."""
    return hasattr(sys, "ps1") or "ipykernel" in sys.modules


@contextlib.contextmanager
def stop_signals() -> Iterator[Stop]:
    """Handle SIGINT and SIGTERM for the time of a run; outside the main thread (a notebook's, say) leave them alone."""
    if threading.current_thread() is not threading.main_thread():
        yield Stop(handled=False)
        return
    stop = Stop(handled=True)
    before = {number: signal.signal(number, stop.handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def quiet_libraries() -> None:
    """Progress bars and advice of the libraries that load weights: a run says itself what it does."""
    import diffusers
    import transformers

    for library in (transformers, diffusers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
