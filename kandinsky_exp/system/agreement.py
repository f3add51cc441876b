"""A stop on which all processes of a run agree, at every step, without waiting for a device."""

from typing import Any, Protocol

import torch
import torch.distributed as dist


class Stop(Protocol):
    """A wish to stop of this process."""

    signal_number: int | None


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
            self._ask()
        return answer

    def now(self) -> int | None:
        """The answer as of now, once all processes are here."""
        answer = self.ahead()
        return self._answer() if answer is None and self._processes > 1 else answer

    def _ask(self) -> None:
        flag = torch.tensor([self._stop.signal_number or 0])
        self._asked = flag, dist.all_reduce(flag, op=dist.ReduceOp.MAX, async_op=True)

    def _answer(self) -> int | None:
        if self._asked is None:
            return None
        (flag, work), self._asked = self._asked, None
        work.wait()
        return int(flag) or None
