"""A background thread that sends a queue to a slow store, so that a training step never waits for it."""

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable

from kandinsky_exp.tracking.disk_queue import DiskQueue, Record, Segment
from kandinsky_exp.tracking.mlflow_names import reason

log = logging.getLogger(__name__)

INTERVAL = 2.0  # seconds in which metrics gather to one write; the contract says 5 s until they are visible
BATCH = 1000  # metric values in one write: MLflow's own limit
PAUSE = 2.0  # seconds until the first retry of a store that is away
MAX_PAUSE = 30.0  # and between later ones, at most


class Refused(Exception):
    """The store answers, and will never take this."""


class Sender:
    """Delivers a queue, oldest first; a record is forgotten once it is delivered, or refused.

    While the store is away everything waits in the queue, however long, and is tried again after growing pauses. A
    problem is a warning, never an exception.

    Args:
        what: goes this way, for messages.
        send: delivers records of one kind: a batch of metrics, or one of another kind. Raises `Refused` for what will
            never be taken, and anything else where a later try may succeed.
        refuse: puts a refused record aside.
        last: is called when nothing waits any more, and may raise as `send` does.
        interval: seconds in which records gather; 0 = each is sent as it comes.
        pause: seconds until the first retry; each later pause is twice as long as the one before.
    """

    def __init__(
        self,
        what: str,
        records: DiskQueue,
        send: Callable[[list[Record]], None],
        refuse: Callable[[Record, Exception], None],
        last: Callable[[], None] = lambda: None,
        interval: float = INTERVAL,
        pause: float = PAUSE,
    ) -> None:
        self._what, self._records, self._send, self._refuse, self._last = what, records, send, refuse, last
        self._interval, self._pause = interval, pause
        self._segment: Segment | None = None
        self._rest: deque[Record] = deque()  # of the segment
        self._closed = False
        self.failures = 0  # in a row
        self.refusals = 0
        # Its `put` may be called amid another `put`, by a signal's handler: a condition's `notify` may not.
        self._news: queue.SimpleQueue[int | threading.Event] = queue.SimpleQueue()
        if records.paths():
            self._news.put(BATCH)
        self._thread = threading.Thread(target=self._run, name=f"tracking {what}", daemon=True)
        self._thread.start()

    def notify(self, points: int = 1) -> None:
        """Say that something was appended."""
        self._news.put(points)

    def hurry(self) -> threading.Event:
        """Ask for a try at once; set when it is over, well or badly."""
        over = threading.Event()
        self._news.put(over)
        return over

    def close(self) -> None:
        """End the thread after the request it is in."""
        self._closed = True
        self.hurry()

    def _run(self) -> None:
        while not self._closed:
            waiting = self._gather()
            try:
                if not self._closed:
                    self._deliver()
            except Exception as error:
                self._failed(error)
            else:
                if self.failures and not self._closed:
                    log.warning("MLflow: the store is back; %s are written again", self._what)
                    self.failures = 0
            for over in waiting:
                over.set()

    def _gather(self) -> list[threading.Event]:
        """Wait for news, and then until it is time for a try; who waits for it."""
        news = None if self.failures else self._news.get()
        pause = min(MAX_PAUSE, self._pause * 2 ** min(self.failures - 1, 10)) if self.failures else self._interval
        end, points = time.monotonic() + pause, 0
        while True:
            if isinstance(news, threading.Event):
                break
            points += news or 0
            if points >= BATCH and not self.failures:
                break
            try:
                news = self._news.get(timeout=max(0.0, end - time.monotonic()))
            except queue.Empty:
                break
        return [news] if isinstance(news, threading.Event) else []

    def _deliver(self) -> None:
        """All that waits by now; what comes meanwhile has time to gather."""
        newest = self._records.newest
        while not self._closed and self._advance(newest):
            pass
        if not self._closed:
            self._last()

    def _advance(self, newest: int) -> bool:
        """One request's worth; False where nothing is left."""
        if self._segment is None:
            self._segment = self._records.first(newest)
            if self._segment is None:
                return False
            self._rest = deque(self._segment.records)
        if self._rest:
            batch = first_batch(self._rest)
            self._hand_over(batch)
            for _ in batch:
                self._rest.popleft()
        if not self._rest:
            self._records.remove(self._segment)
            self._segment = None
        return True

    def _hand_over(self, batch: list[Record]) -> None:
        try:
            self._send(batch)
        except Refused as error:
            if len(batch) > 1:  # which one is it?
                for record in batch:
                    self._hand_over([record])
                return
            self._refuse(batch[0], error)
            if not self.refusals:
                log.warning("MLflow: %s was not recorded (%s)", name_of(batch[0]), reason(error))
            self.refusals += 1

    def _failed(self, error: Exception) -> None:
        if not self.failures:
            log.warning(
                "MLflow: %s cannot be written for now (%s); they wait in %s, and training goes on",
                self._what,
                reason(error),
                self._records.folder.parent,
            )
        self.failures += 1


def first_batch(records: "deque[Record]") -> list[Record]:
    """Metrics together, up to BATCH of them; all else alone."""
    batch: list[Record] = []
    points = 0
    for record in records:
        if batch and (record.get("kind") != "metrics" or points + len(record["values"]) > BATCH):
            break
        batch.append(record)
        if record.get("kind") != "metrics":
            break
        points += len(record["values"])
    return batch


def name_of(record: Record) -> str:
    """What a user calls a record."""
    if record.get("kind") == "metrics":
        return f"metrics of step {record['step']}"
    return str(record.get("what", "an unreadable record"))
