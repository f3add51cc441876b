"""What waits for the store: on disk, in order, delivered once, and never in the way of who records."""

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kandinsky_exp.tracking.disk_queue import DiskQueue, Record, Segment, read
from kandinsky_exp.tracking.outbox import Outbox
from kandinsky_exp.tracking.sender import BATCH, Refused, Sender, first_batch


@pytest.fixture
def queue(tmp_path: Path) -> DiskQueue:
    return opened(tmp_path)


def opened(folder: Path, limit: int = 1_000_000) -> DiskQueue:
    return DiskQueue(folder / "records", threading.Lock(), limit)


def point(step: int) -> Record:
    return {"kind": "metrics", "step": step, "time": 1_000 + step, "values": {"a": 1.0}}


def waiting(queue: DiskQueue) -> list[int]:
    return [record["step"] for record in queue.on_disk()]


def delivered(sender: Sender, seconds: float) -> bool:
    """Whether all that was appended is delivered: False where a try fails, or the time is over."""
    return sender.hurry().wait(seconds) and not sender.failures


def taken(queue: DiskQueue) -> Segment:
    segment = queue.first(queue.newest)
    assert segment is not None
    return segment


# On disk


def test_records_wait_in_order_for_another_process(queue: DiskQueue, tmp_path: Path) -> None:
    for step in range(3):
        queue.append(point(step))
    after = opened(tmp_path)
    after.append(point(3))
    assert waiting(after) == [0, 1, 2, 3]
    assert taken(after).records == [point(0), point(1), point(2)]


def test_what_is_taken_grows_no_more_and_is_forgotten_once_delivered(queue: DiskQueue) -> None:
    queue.append(point(0))
    segment = taken(queue)
    queue.append(point(1))
    assert taken(queue).records == segment.records == [point(0)]  # until it is removed
    queue.remove(segment)
    assert waiting(queue) == [1]


def test_what_came_after_the_beginning_of_a_try_is_left_to_the_next(queue: DiskQueue) -> None:
    queue.append(point(0))
    newest = queue.newest
    queue.remove(taken(queue))
    queue.append(point(1))
    assert queue.first(newest) is None
    assert taken(queue).records == [point(1)]


def test_files_are_of_a_bounded_size(tmp_path: Path) -> None:
    small = opened(tmp_path, limit=200)
    for step in range(30):
        small.append(point(step))
    assert len(small.paths()) > 5
    assert waiting(small) == list(range(30))


def test_a_killed_process_loses_nothing_that_it_handed_over(tmp_path: Path) -> None:
    code = """
import os, signal, sys
from pathlib import Path
from kandinsky_exp.tracking.outbox import Outbox
queue = Outbox(Path(sys.argv[1])).records
for step in range(1000):
    queue.append({"kind": "metrics", "step": step, "time": step, "values": {"a": 1.0}})
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "outbox")], timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert waiting(Outbox(tmp_path / "outbox").records) == list(range(1000))


def test_a_torn_last_line_was_never_handed_over(queue: DiskQueue, tmp_path: Path) -> None:
    queue.append(point(0))
    queue.append(point(1))
    (path,) = queue.paths()
    path.write_bytes(path.read_bytes()[:-5])
    after = opened(tmp_path)
    after.append(point(2))
    assert waiting(after) == [0, 2]


def test_a_damaged_line_is_not_passed_over_in_silence(queue: DiskQueue) -> None:
    queue.append(point(0))
    (path,) = queue.paths()
    path.write_bytes(b"\xff{\n[1]\n" + path.read_bytes())
    damaged, other, whole = read(path)
    assert (damaged["kind"], other["kind"], whole) == ("damaged", "damaged", point(0))


def test_any_text_can_wait(queue: DiskQueue) -> None:
    queue.append({"kind": "tags", "texts": {"a": "\udcff é \u2028 😀"}})
    assert taken(queue).records[0]["texts"]["a"] == "? é \u2028 😀"


FULL_DISK = """
import logging, resource, signal, sys, time
from pathlib import Path
from kandinsky_exp.tracking import disk_queue
from kandinsky_exp.tracking.outbox import Outbox
disk_queue.RETRY = 0.5
logging.basicConfig(format="%(message)s")
queue = Outbox(Path(sys.argv[1])).records
text = "x" * 100
def fill(steps):
    for step in steps:
        queue.append({"kind": "metrics", "step": step, "time": step, "values": {"a": 1.0}, "text": text})
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
fill(range(100))
segments = []
while segment := queue.first(queue.newest):
    segments += [record["step"] for record in segment.records]
    queue.remove(segment)
assert segments == list(range(100)), segments
fill(range(100, 200))
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
time.sleep(disk_queue.RETRY + 0.1)
fill([200])
assert not queue.held()
"""


def test_a_full_disk_ends_nothing_and_loses_nothing_while_the_process_lives(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path / "outbox")]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("they are in memory only") == 1, done.stderr
    assert waiting(Outbox(tmp_path / "outbox").records) == list(range(100, 201))  # there was room again at the end


def test_the_folder_is_there_only_while_something_waits(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path / "outbox")
    outbox.open()
    assert not outbox.folder.exists()
    outbox.records.append(point(0))
    outbox.artifacts.attach({"kind": "files"}, lambda folder: (folder / "a.txt").write_text("a"))
    outbox.tidy()
    assert outbox.waiting() == 2
    for queue in (outbox.records, outbox.artifacts):
        queue.remove(taken(queue))
    outbox.tidy()
    assert not outbox.folder.exists()
    outbox.records.append(point(1))
    outbox.set_status({"status": "KILLED", "time": 1})
    outbox.sync()
    assert outbox.waiting() == 2


def test_files_go_with_their_record(tmp_path: Path) -> None:
    queue = Outbox(tmp_path).artifacts
    queue.attach({"kind": "files"}, lambda folder: (folder / "a.txt").write_text("a"))
    segment = taken(queue)
    assert (queue.files(segment.records[0]) / "a.txt").read_text() == "a"
    queue.sync()
    queue.remove(segment)
    assert not list(tmp_path.rglob("*.*"))


def test_files_may_go_while_they_are_synced(tmp_path: Path) -> None:
    queue = Outbox(tmp_path).artifacts
    queue.attach({"kind": "files"}, lambda folder: (folder / "a.txt").write_text("a"))
    waiting = [taken(queue)]

    def delivered_just_now(event: str, arguments: tuple[object, ...]) -> None:
        if event == "os.scandir" and waiting and str(arguments[0]).startswith(str(queue.folder / "files")):
            queue.remove(waiting.pop())

    sys.addaudithook(delivered_just_now)
    queue.sync()
    assert not waiting, "nothing was listed: the test tests nothing"
    assert not list(tmp_path.rglob("*.*"))


def test_files_without_a_record_are_removed(tmp_path: Path) -> None:
    queue = Outbox(tmp_path).artifacts
    with pytest.raises(OSError, match="full"):
        queue.attach({}, fail)
    assert not list((tmp_path / "artifacts" / "files").iterdir())
    queue.attach({}, lambda folder: (folder / "a.txt").write_text("a"))
    (tmp_path / "artifacts" / "files" / "killed").mkdir()
    Outbox(tmp_path).open()
    assert [path.name for path in (tmp_path / "artifacts" / "files").iterdir()] == [taken(queue).records[0]["files"]]


def fail(_: Path) -> None:
    raise OSError("full")


def test_a_status_is_kept_by_a_signal_handler_amid_a_write(tmp_path: Path) -> None:
    """The handler runs in the thread that may hold the lock just then."""
    code = """
import os, signal, sys, threading
from pathlib import Path
from kandinsky_exp.tracking.outbox import Outbox
outbox = Outbox(Path(sys.argv[1]))
def stop(number, frame):
    outbox.set_status({"status": "KILLED", "time": 1})
    os._exit(7)
signal.signal(signal.SIGTERM, stop)
outbox.records.append({"kind": "tags"})
with outbox._lock:
    os.kill(os.getpid(), signal.SIGTERM)
    threading.Event().wait(30)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "outbox")], timeout=20)
    assert done.returncode == 7
    assert Outbox(tmp_path / "outbox").status() == {"status": "KILLED", "time": 1}
    assert Outbox(tmp_path / "outbox").waiting() == 2


# The thread that delivers


class Store:
    """A store of a few lines, which can be away, and dislikes some steps."""

    def __init__(self, *disliked: int) -> None:
        self.seen: list[int] = []
        self.writes = 0
        self.tries = 0
        self.away = False
        self.refused: list[int] = []
        self._disliked = disliked

    def write(self, batch: list[Record]) -> None:
        self.tries += 1
        if self.away:
            raise OSError("postgresql://me:secret@host is away")
        steps = [record["step"] for record in batch]
        if set(steps) & set(self._disliked):
            raise Refused(f"no {steps}")
        self.writes += 1
        self.seen += steps

    def refuse(self, record: Record, error: Exception) -> None:
        self.refused.append(record["step"])


Start = Callable[..., Sender]


@pytest.fixture
def start(queue: DiskQueue) -> Iterator[Start]:
    started: list[Sender] = []

    def sender(store: Store, interval: float = 0.01) -> Sender:
        started.append(Sender("metrics", queue, store.write, store.refuse, interval=interval, pause=interval))
        return started[-1]

    yield sender
    for each in started:
        each.close()


def add(queue: DiskQueue, sender: Sender, *steps: int) -> None:
    for step in steps:
        queue.append(point(step))
        sender.notify()


def test_metrics_gather(queue: DiskQueue, start: Start) -> None:
    store = Store()
    sender = start(store, interval=30)
    add(queue, sender, *range(100))
    assert delivered(sender, 5)
    assert store.seen == list(range(100))
    assert store.writes <= 2
    assert not queue.paths()


def test_many_metrics_do_not_wait(queue: DiskQueue, start: Start) -> None:
    store = Store()
    sender = start(store, interval=600)
    add(queue, sender, *range(BATCH))
    wait_for(lambda: len(store.seen) == BATCH)


def test_what_an_earlier_process_left_comes_first_and_unasked(queue: DiskQueue, start: Start) -> None:
    queue.append(point(0))
    store = Store()
    sender = start(store)
    wait_for(lambda: store.seen == [0])
    add(queue, sender, 1)
    assert delivered(sender, 5)
    assert store.seen == [0, 1]


def test_records_wait_while_the_store_is_away(
    queue: DiskQueue, start: Start, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = Store()
    sender = start(store)
    store.away = True
    add(queue, sender, 1)
    began = time.monotonic()
    assert not delivered(sender, 5)
    assert time.monotonic() - began < 1
    add(queue, sender, 2)
    assert waiting(opened(tmp_path)) == [1, 2]
    store.away = False
    assert delivered(sender, 5)
    assert store.seen == [1, 2]
    assert caplog.text.count("metrics cannot be written for now (postgresql://***@host is away)") == 1
    assert caplog.text.count("the store is back") == 1


def test_the_pauses_grow(queue: DiskQueue, start: Start) -> None:
    store = Store()
    store.away = True
    sender = start(store, interval=0.05)
    add(queue, sender, 1)
    time.sleep(1.2)
    assert 3 <= store.tries <= 6  # after 0.05, 0.1, 0.2, 0.4 and 0.8 s
    store.away = False
    wait_for(lambda: store.seen == [1])  # and by itself


def test_what_is_sent_at_once_is_not_tried_again_at_once(queue: DiskQueue) -> None:
    """Files are: a thread that tried all the time would take the core that trains."""
    store = Store()
    store.away = True
    sender = Sender("files", queue, store.write, store.refuse, interval=0)
    add(queue, sender, 1)
    wait_for(lambda: store.tries == 1)
    time.sleep(0.5)
    assert store.tries == 1
    sender.close()


def test_what_is_refused_is_put_aside_and_holds_up_nothing(
    queue: DiskQueue, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    store = Store(3, 5)
    sender = start(store)
    add(queue, sender, *range(8))
    assert delivered(sender, 5)
    assert store.seen == [0, 1, 2, 4, 6, 7]
    assert store.refused == [3, 5]
    assert "metrics of step 3 was not recorded (no [3])" in caplog.text
    assert not queue.paths()


def test_a_closed_sender_leaves_the_rest(queue: DiskQueue, start: Start) -> None:
    store = Store()
    sender = start(store, interval=600)
    sender.close()
    wait_for(lambda: not sender._thread.is_alive())
    add(queue, sender, 1)
    assert not delivered(sender, 0.1)
    assert waiting(queue) == [1]
    assert store.seen == []


def test_a_batch_is_what_one_request_may_hold() -> None:
    from collections import deque

    wide = {**point(0), "values": {str(index): 0.0 for index in range(400)}}
    assert len(first_batch(deque([wide, wide, wide]))) == 2
    assert len(first_batch(deque([point(0), {"kind": "tags"}, point(1)]))) == 1
    assert first_batch(deque([{"kind": "tags"}, {"kind": "tags"}])) == [{"kind": "tags"}]


def test_handing_over_is_quick_while_the_store_hangs(queue: DiskQueue, start: Start) -> None:
    gate = threading.Event()
    sender = Sender("metrics", queue, lambda _: gate.wait(30), lambda *_: None, interval=0)
    costs = []
    for step in range(300):
        began = time.perf_counter()
        add(queue, sender, step)
        costs.append(time.perf_counter() - began)
    assert sorted(costs)[150] < 1e-3
    sender.close()
    gate.set()


def test_refused_records_are_kept_with_their_files(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path / "outbox")
    outbox.artifacts.attach({"kind": "files", "what": "a"}, lambda folder: (folder / "a.txt").write_text("a"))
    segment = taken(outbox.artifacts)
    outbox.refuse(outbox.artifacts, segment.records[0], Refused("too large\nby far"))
    outbox.artifacts.remove(segment)
    Outbox(outbox.folder).open()
    (line,) = (outbox.folder / "refused.jsonl").read_text().splitlines()
    kept = json.loads(line)
    assert kept["reason"] == "too large"
    assert (outbox.folder / "refused" / kept["record"]["files"] / "a.txt").read_text() == "a"
    assert outbox.waiting() == 0


def wait_for(condition: Callable[[], bool], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.01)
