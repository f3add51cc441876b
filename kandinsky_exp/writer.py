"""A background thread that writes to a slow store, so that a training step never waits for it."""

import atexit
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from kandinsky_exp.mlflow_names import reason

log = logging.getLogger(__name__)
Point = TypeVar("Point")

INTERVAL = 2.0  # seconds in which points gather to one write; the contract says 5 s until they are visible
BATCH = 1000  # points that are written without gathering more: MLflow's own batch
MAX_PAUSE = 60.0  # seconds between tries while the store is away
MAX_POINTS = 100_000  # some 20 MB, held while the store is away
MAX_JOBS = 64  # a job may hold an image
JOB_TRIES = 2
RETRY_PAUSE = 0.5  # seconds
EXIT_TIMEOUT = 10.0


class BackgroundWriter(Generic[Point]):
    """Writes points in batches, and runs jobs in their order; a job sees all points that were added before it.

    A failed write is a warning, never an exception. Points are kept and tried again while the store is away, up to
    MAX_POINTS of them.

    Args:
        write: sends a batch of points to the store.
        interval: seconds in which points gather.
    """

    def __init__(self, write: Callable[[list[Point]], None], interval: float = INTERVAL) -> None:
        self._write = write
        self._interval = interval
        self._points: list[Point] = []
        self._jobs: deque[tuple[str, Callable[[], object], threading.Event]] = deque()
        self._changed = threading.Condition()
        self._busy = self._closed = self._warned_full = False
        self._hurry = False
        self._sending = 0  # points the thread is writing now
        self._failures = 0  # in a row
        self._thread = threading.Thread(target=self._run, name="tracking", daemon=True)
        self._thread.start()
        # A second Ctrl-C may end the wait of the caller, but what was handed over still gets its chance.
        atexit.register(self.close, EXIT_TIMEOUT)

    def add(self, points: Sequence[Point]) -> None:
        """Hand over points; returns at once."""
        with self._changed:
            self._points.extend(points)
            self._drop_excess()
            self._changed.notify_all()

    def submit(self, what: str, job: Callable[[], object], patience: float = 60.0) -> threading.Event:
        """Hand over a job; while MAX_JOBS are pending, wait up to `patience` seconds, then drop it with a warning.

        Returns:
            Set when the job is over, well or badly.
        """
        over = threading.Event()
        with self._changed:
            if self._closed:
                problem = "came after the end of the run"
            elif not self._changed.wait_for(lambda: len(self._jobs) < MAX_JOBS, timeout=patience):
                problem = "came faster than the store writes"
            else:
                self._jobs.append((what, job, over))
                self._changed.notify_all()
                return over
        log.warning("MLflow: %s %s and was not recorded", what, problem)
        over.set()
        return over

    def flush(self, timeout: float = 10.0) -> bool:
        """Wait until everything is written, a write fails, or `timeout` seconds are over; True if all is written."""
        with self._changed:
            failures = self._failures
            self._hurry = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._idle() or self._failures > failures, timeout)
            return self._idle()

    def close(self, timeout: float = 60.0) -> bool:
        """Flush and end the thread; True if everything was written."""
        end = time.monotonic() + timeout
        done = self.flush(timeout)
        with self._changed:
            # Metrics that cannot be written must not take the jobs (the status of the run, say) with them.
            self._changed.wait_for(lambda: not (self._jobs or self._busy), end - time.monotonic())
            if not self._closed and not self._idle():
                points, jobs = len(self._points) + self._sending, [what for what, *_ in self._jobs]
                log.warning("MLflow: the store did not take %s", ", ".join([f"{points} metric values", *jobs]))
            self._closed = True
            self._changed.notify_all()
        atexit.unregister(self.close)
        return done

    def _idle(self) -> bool:
        return not (self._points or self._jobs or self._busy)

    def _urgent(self) -> bool:
        full = len(self._points) >= BATCH and not self._failures
        return bool(self._jobs or self._closed or self._hurry or full)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._points or self._jobs or self._closed)
                pause = min(MAX_PAUSE, self._interval * 2 ** min(self._failures, 10))
                self._changed.wait_for(self._urgent, timeout=pause)
                if self._closed:
                    return
                points, self._points = self._points, []
                next_job = self._jobs[0] if self._jobs else None
                self._busy, self._hurry, self._sending = True, False, len(points)
            self._send(points)
            if next_job is not None:
                self._do(*next_job)
            with self._changed:
                if next_job is not None:
                    self._jobs.popleft()
                self._busy, self._sending = False, 0
                self._changed.notify_all()

    def _send(self, points: list[Point]) -> None:
        if not points:
            return
        try:
            self._write(points)
        except Exception as error:
            if not self._failures:
                log.warning("MLflow: metrics cannot be written for now (%s); training goes on", reason(error))
            with self._changed:
                self._failures += 1
                self._points[:0] = points
                self._drop_excess()
        else:
            if self._failures:
                log.warning("MLflow: the store is back; metrics are written again")
            self._failures = 0

    def _do(self, what: str, job: Callable[[], object], over: threading.Event) -> None:
        for attempt in range(JOB_TRIES):
            try:
                job()
                break
            except Exception as error:
                if attempt < JOB_TRIES - 1:
                    time.sleep(RETRY_PAUSE)
                else:
                    log.warning("MLflow: %s was not recorded (%s)", what, reason(error))
        over.set()

    def _drop_excess(self) -> None:
        excess = len(self._points) - MAX_POINTS
        if excess <= 0:
            return
        del self._points[:excess]
        if not self._warned_full:
            self._warned_full = True
            log.warning("MLflow: the store does not keep up; the oldest metric values are dropped")
