"""Signal handlers: stop a run after a checkpoint."""

import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from types import FrameType

from kandinsky_exp.errors import Interrupted

logger = logging.getLogger(__name__)


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
        # In a notebook leaving would end what the user has in memory: there a second signal interrupts once more.
        if self.signal_number is not None and not (hasattr(sys, "ps1") or "ipykernel" in sys.modules):
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


@contextlib.contextmanager
def handling(
    handle: Callable[[int, FrameType | None], object], numbers: Iterable[int] = (signal.SIGINT, signal.SIGTERM)
) -> Iterator[None]:
    """Answer signals by `handle` for a while; outside the main thread (a notebook's, say) they are left alone."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def stop_signals() -> Iterator[Stop]:
    """Turn SIGINT and SIGTERM into the wish to stop for the time of a run."""
    stop = Stop(handled=threading.current_thread() is threading.main_thread())
    with handling(stop.handle):
        yield stop
