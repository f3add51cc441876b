"""Several processes of one run: Accelerate's state, decisions of the main process, agreement on a stop."""

import contextlib
import logging
import time
import typing
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import broadcast_object_list, gather_object

from kandinsky_exp.errors import Interrupted, PeerFailure, RunFailure, UserError, first_line
from kandinsky_exp.system.signals import Stop

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
            message = f"another process of this run is gone; it, or what started it, says why ({first_line(error)})"
            raise _with_teller(PeerFailure(message)) from error
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
    shared: list[Any] = [None, None]  # the result, and what the others raise
    error: BaseException | None = None
    if PartialState().is_main_process:
        try:
            shared[0] = action()
        except BaseException as caught:
            error, shared[1] = caught, _for_others(_with_teller(caught))
    _await_main()
    broadcast_object_list(shared)
    if error is not None or shared[1] is not None:
        raise error or shared[1]
    result: Result = shared[0]
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


def everyones(action: Callable[[], Result]) -> list[Result]:
    """The results of all processes, by rank; the main one goes first: what it keeps on the disk serves the others."""
    first = on_main_process(action)
    if PartialState().num_processes == 1:
        return [first]
    own = on_all_processes(lambda: first if PartialState().is_main_process else action())
    return typing.cast(list[Result], gather_object([own]))


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


class Agreement:
    """Whether to stop: all processes ask at the same steps, and get the same answer.

    They ask over the CPUs: gloo's threads do it beside the step, whose answer is read one step later. A process that is
    gone is an error of the next question.

    Args:
        processes: of the run.
    """

    def __init__(self, stop: Stop, processes: int) -> None:
        self._stop, self._processes = stop, processes
        self._asked: tuple[torch.Tensor, Any] | None = None

    def ahead(self) -> int | None:
        """The answer to what was asked a step ago; asks anew."""
        if self._processes == 1:
            return self._stop.signal_number
        answer = self._answer()
        if answer is None:
            flag = torch.tensor([self._stop.signal_number or 0])
            self._asked = flag, torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX, async_op=True)
        return answer

    def now(self) -> int | None:
        """The answer as of now, once all processes are here."""
        answer = self.ahead()
        return self._answer() if answer is None and self._processes > 1 else answer

    def _answer(self) -> int | None:
        if self._asked is None:
            return None
        (flag, work), self._asked = self._asked, None
        work.wait()
        return int(flag) or None
