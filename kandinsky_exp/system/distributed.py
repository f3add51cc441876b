"""What concerns a run's processes: Accelerate's state, what the first of them decides for all, and signals."""

import contextlib
import logging
import os
import signal
import sys
import threading
import time
import typing
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import broadcast_object_list, gather_object

from kandinsky_exp.errors import Interrupted, PeerFailure, RunFailure, UserError, first_line

Result = TypeVar("Result")
Failure = TypeVar("Failure", bound=BaseException)
# What gloo and NCCL say of a process that ended.
GONE = ("closed by peer", "reset by peer", "Broken pipe", "remote process exited")
logger = logging.getLogger(__name__)


@contextlib.contextmanager
def accelerated(make: Callable[[], Accelerator]) -> Iterator[Accelerator]:
    """An accelerator that leaves no state behind: the next run of this process may choose another precision.

    What goes wrong while there are several processes gets the number of the one that is to tell it (`teller`).
    """
    accelerator = None
    try:
        accelerator = make()
        with _told():
            yield accelerator
    finally:
        if accelerator is not None:
            accelerator.free_memory()
            accelerator.end_training()
        AcceleratorState._reset_state(reset_partial_state=True)


@contextlib.contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        _with_teller(error)
        if PartialState().num_processes > 1 and any(text in str(error) for text in GONE):
            told = f"another process of this run is gone; it, or what started it, says why ({first_line(error)})"
            raise _with_teller(PeerFailure(told)) from error
        raise
    except BaseException as error:
        _with_teller(error)
        raise


def _with_teller(error: Failure) -> Failure:
    """The process that tells it is this one, unless the processes have agreed on another."""
    if PartialState().num_processes > 1 and not hasattr(error, "teller"):
        error.teller = PartialState().process_index  # type: ignore[attr-defined]
    return error


def on_main_process(action: Callable[[], Result]) -> Result:
    """The main process's result, on all; whatever it raises too, so that none waits for one that is gone."""
    if PartialState().num_processes == 1:
        return action()
    outcome: list[Any] = [None, None]
    error: BaseException | None = None
    if PartialState().is_main_process:
        try:
            outcome[0] = action()
        except BaseException as caught:
            error, outcome[1] = caught, _for_others(_with_teller(caught))
    _await_main()
    broadcast_object_list(outcome)
    if error is not None or outcome[1] is not None:
        raise error or outcome[1]
    result: Result = outcome[0]
    return result


def on_all_processes(action: Callable[[], Result]) -> Result:
    """Each process's own result; what the first of those raises that fail, on all."""
    if PartialState().num_processes == 1:
        return action()
    result = error = None
    try:
        result = action()
    except BaseException as caught:
        error = _with_teller(caught)
    failed = [found for found in gather_object([error and _for_others(error)]) if found is not None]
    if failed:
        raise error if error is not None and error.teller == failed[0].teller else failed[0]  # type: ignore[attr-defined]
    return typing.cast(Result, result)


def _for_others(error: BaseException) -> BaseException:
    """What the other processes raise for it: of the same kind, for the exit code; its own process prints it."""
    if isinstance(error, UserError | RunFailure | Interrupted | KeyboardInterrupt):
        return error
    told = PeerFailure(f"process {PartialState().process_index} failed: {type(error).__name__}: {first_line(error)}")
    told.teller = error.teller  # type: ignore[attr-defined]
    return told


def _await_main() -> None:
    """Until the main process is here. Looked for in Python, for within a collective no signal is heard."""
    here = torch.distributed.broadcast(torch.zeros(1), src=0, async_op=True)
    pause = 0.0005
    while not here.is_completed():
        time.sleep(pause)
        pause = min(2 * pause, 0.05)
    here.wait()


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
