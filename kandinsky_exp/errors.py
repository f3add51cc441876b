"""What can go wrong, by whose hand. `cli` turns these into one short message and an exit code."""

import errno
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

# CUDA, HIP, XPU and NCCL have the words, cuBLAS, cuDNN and their kin a status; MPS has words of its own as well.
OF_DEVICE = re.compile(
    r"out[ _]of[ _](\w+[ _])?memory|cudaErrorMemoryAllocation|ALLOC(ATION)?_FAILED|Invalid buffer size|MTLBuffer", re.I
)
OF_HOST = re.compile(r"can(no|')t allocate memory|not enough memory", re.I)


class UserError(Exception):
    """Something the user can put right; nothing was trained. Exit code 2."""


@dataclass(frozen=True)
class Problem:
    """A wrong setting.

    Args:
        text: what is wrong; what to do.
    """

    key: str
    text: str

    def __str__(self) -> str:
        return f"{self.key}: {self.text}"


class ConfigError(UserError):
    """One or more wrong settings, listed together.

    Args:
        problems: each as `key: what is wrong; what to do`.
    """

    def __init__(self, problems: str | Problem | Sequence[str | Problem]) -> None:
        self.problems = [str(item) for item in ([problems] if isinstance(problems, str | Problem) else problems)]
        super().__init__("\n".join(self.problems))


class DataError(UserError):
    """The data set cannot be read as configured."""


class CheckpointError(UserError):
    """No good checkpoint to resume from, or weights that do not fit."""


class TrackingError(UserError):
    """The tracking store does not answer or cannot be used."""


class RunFailure(Exception):
    """The run failed while it trained. Exit code 1."""


class NonFiniteLoss(RunFailure):
    """Training produced NaN or infinity.

    Args:
        step: the optimizer step, where it happened on this process.
    """

    def __init__(self, message: str, step: int | None = None) -> None:
        self.step = step
        super().__init__(message)


class OutOfMemory(RunFailure):
    """The device or the host has no memory left."""


class CheckpointFailure(RunFailure):
    """A checkpoint could not be written; the ones before it are whole."""


class PeerFailure(RunFailure):
    """Another process of the run failed, and tells what it was."""


class Interrupted(BaseException):
    """A signal ended the run after a checkpoint was written. Exit code 128 + signal number.

    Derives from BaseException, like KeyboardInterrupt, so that no `except Exception` takes it for a failure.
    """

    def __init__(self, signal_number: int) -> None:
        self.signal_number = signal_number
        super().__init__(signal_number)

    def __str__(self) -> str:
        return f"stopped by signal {self.signal_number}"


class Pruned(BaseException):
    """A sweeper gave a job up for its validation losses so far. No failure, as `Interrupted` is none."""

    def __init__(self, step: int, loss: float) -> None:
        super().__init__(step, loss)
        self.step, self.loss = step, loss

    def __str__(self) -> str:
        return f"pruned at step {self.step}: validation loss {self.loss:.5g} is worse than that of other jobs by then"


def reason_of(error: BaseException) -> str:
    """Why a run failed, for its records: what the user was told, or what a library's exception is."""
    text = str(error).strip()
    if isinstance(error, (UserError, RunFailure)):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a library says that the device, or the host, has no memory left: few have an exception of its own."""
    if isinstance(error, (UserError, RunFailure)):
        return False
    return is_of_host(error) or (not isinstance(error, OSError) and bool(OF_DEVICE.search(str(error))))


def first_cause(error: BaseException) -> BaseException:
    """What an exception was raised from in the first place: Hydra wraps what goes wrong in what it builds."""
    return error if error.__cause__ is None else first_cause(error.__cause__)


def is_of_host(error: BaseException) -> bool:
    """Whether it is the host's memory."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, MemoryError) or bool(OF_HOST.search(str(error)))


def first_line(error: BaseException, limit: int = 300) -> str:
    """What an exception of a library says, in one line that fits a message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:limit]


def cause_of(error: BaseException) -> str:
    """`first_line`, but of an error of the system its plain text, without number and path."""
    return getattr(error, "strerror", None) or first_line(error)


@contextmanager
def memory_told(kind: type[Exception], message: str) -> Iterator[None]:
    """Around what may need more memory than there is.

    Args:
        kind: raised in place of what the libraries raise.
        message: with `{}` for what they say.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise kind(message.format(first_line(error))) from error


def is_own_mistake(error: Exception) -> bool:
    """Whether this package's own code went wrong, and no library that it called: nobody else is to be blamed for it."""
    if not isinstance(error, LookupError | TypeError | AttributeError | NameError | AssertionError):
        return False
    names = [
        str(frame.f_globals.get("__name__")).partition(".")[0] for frame, _ in traceback.walk_tb(error.__traceback__)
    ]
    called = [name for name in names if name not in sys.stdlib_module_names]
    return called[-1:] == [__name__.partition(".")[0]]


def cut(text: str) -> str:
    """What was typed, short enough for a message: its beginning and its end."""
    return text if len(text) <= 200 else f"{text[:100]}…{text[-50:]}"
