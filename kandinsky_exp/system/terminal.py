"""Standard streams that survive a closed pipe, a closed window or a full disk: none of these ends a run."""

import io
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from kandinsky_exp.errors import cause_of

logger = logging.getLogger(__name__)
MESSAGE = "nothing more can be shown (%s): what follows is in the log alone"


class Lasting:
    """A text stream that takes whatever it is given, also when it cannot be written any more.

    Args:
        stream: what it writes to; None, as Python has it where a descriptor was closed from the start, for nothing.
    """

    lost: str | None = None  # why, once for all streams of this process

    def __init__(self, stream: Any) -> None:
        self._stream = io.StringIO() if stream is None else stream
        self._is_gone = stream is None

    def write(self, text: str) -> int:
        self._bear(lambda: self._stream.write(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        self.write("".join(lines))

    def flush(self) -> None:
        self._bear(lambda: self._stream.flush())

    def _bear(self, action: Callable[[], object]) -> None:
        if self._is_gone:
            return
        try:
            action()
        except UnicodeEncodeError as error:  # a path, say, in an encoding that lacks its letters
            self.write(error.object.encode(error.encoding, "backslashreplace").decode(error.encoding))
        except BlockingIOError:  # a reader that is slow: later there is room again
            pass
        except (OSError, ValueError) as error:  # ValueError: it is closed
            self._lose(error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _lose(self, error: Exception) -> None:
        """Write nowhere from now on, and so does all that shares the descriptor: libraries, and Python at its end."""
        self._is_gone = True
        with suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
        if Lasting.lost is None:
            Lasting.lost = cause_of(error)
            logger.warning(MESSAGE, Lasting.lost)


@contextmanager
def lasting() -> Iterator[None]:
    """While it is open, what is printed ends nothing."""
    before = sys.stdout, sys.stderr
    fresh = [stream if isinstance(stream, Lasting) else Lasting(stream) for stream in before]
    sys.stdout, sys.stderr = fresh
    try:
        yield
    finally:
        for stream in fresh:
            stream.flush()
        sys.stdout, sys.stderr = before
        if not any(isinstance(stream, Lasting) for stream in before):
            Lasting.lost = None
