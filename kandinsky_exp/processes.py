"""What concerns a run's processes: Accelerate's state, what the first of them decides for all, and signals."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, TypeVar

from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import broadcast_object_list, gather_object

from kandinsky_exp.errors import Interrupted, RunFailure, UserError

Result = TypeVar("Result")


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


def on_any_process(flag: bool) -> bool:
    """Whether it is so on one of the processes at least; the same answer on all."""
    return any(gather_object([flag]))


class Stop:
    """A wish to stop, from SIGINT or SIGTERM.

    While `deferred`, the first signal is noted, for the loop to finish its step and write a checkpoint; the second one
    interrupts at once. Elsewhere there is nothing to finish, and the first one interrupts.
    """

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self._deferred = False

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def handle(self, signal_number: int, frame: FrameType | None) -> None:
        if self._deferred and self.signal_number is None:
            self.signal_number = signal_number
            return
        raise Interrupted(signal_number)


@contextlib.contextmanager
def stop_signals() -> Iterator[Stop]:
    """Handle SIGINT and SIGTERM for the time of a run; outside the main thread (a notebook's, say) leave them alone."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
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
