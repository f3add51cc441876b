"""A step without waste: batches read ahead, no wait for the device, metrics for nothing, compiled once."""

import threading
import time
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from kandinsky_exp.data.prefetch import prefetch
from kandinsky_exp.errors import DataError

CPU = torch.device("cpu")


# --- batches ahead


def numbered(count: int, read: list[int] | None = None, closed: threading.Event | None = None) -> Iterator[dict]:
    """`count` batches; `read` notes which ones were asked for, `closed` that the iterator was."""
    try:
        for number in range(count):
            if read is not None:
                read.append(number)
            yield {"x": torch.full((2, 3), float(number)), "index": torch.tensor([number, number + 1])}
    finally:
        if closed is not None:
            closed.set()


def threads() -> set[str]:
    return {thread.name for thread in threading.enumerate() if thread.name == "prefetch"}


def wait_for(condition: object) -> None:
    deadline = time.monotonic() + 10
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.005)


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_every_batch_comes_once_and_in_order(depth: int) -> None:
    batches = list(prefetch(numbered(50), CPU, depth))
    assert [int(batch["x"][0, 0]) for batch in batches] == list(range(50))
    assert [batch["index"].tolist() for batch in batches] == [[n, n + 1] for n in range(50)]
    assert not threads()


def test_an_empty_stream_ends(tmp_path: object) -> None:
    assert list(prefetch(numbered(0), CPU)) == []
    assert not threads()


def test_the_next_batches_are_read_before_they_are_asked_for() -> None:
    read: list[int] = []
    stream = prefetch(numbered(50, read), CPU, depth=2)
    assert read == []  # nothing happens before the first one is wanted
    next(stream)
    wait_for(lambda: len(read) == 4)  # one used, two ready, one in hand
    time.sleep(0.05)
    assert len(read) == 4
    stream.close()


def test_reading_happens_while_the_consumer_works() -> None:
    def slow() -> Iterator[dict[str, Tensor]]:
        for batch in numbered(10):
            time.sleep(0.03)
            yield batch

    began = time.monotonic()
    for _ in prefetch(slow(), CPU):
        time.sleep(0.03)
    assert time.monotonic() - began < 0.5  # 0.6 s one after the other


@pytest.mark.parametrize("used", [1, 3])
def test_closing_ends_the_thread_and_the_reader(used: int) -> None:
    closed = threading.Event()
    stream = prefetch(numbered(1000, closed=closed), CPU)
    for _ in range(used):
        next(stream)
    stream.close()
    assert closed.is_set()
    assert not threads()


def test_an_exception_in_the_training_loop_ends_the_thread() -> None:
    def train() -> None:
        for batch in prefetch(numbered(1000), CPU):
            raise ValueError(f"at {int(batch['x'][0, 0])}")

    with pytest.raises(ValueError, match="at 0"):
        train()
    assert not threads()


def test_an_exception_of_the_reader_comes_as_it_is_after_the_good_batches() -> None:
    error = DataError("a.png is no image")

    def broken() -> Iterator[dict[str, Tensor]]:
        yield from numbered(3)
        raise error

    stream = prefetch(broken(), CPU)
    assert len([next(stream) for _ in range(3)]) == 3
    with pytest.raises(DataError) as caught:
        next(stream)
    assert caught.value is error
    assert not threads()


def test_a_used_batch_is_free() -> None:
    import weakref

    stream = prefetch(numbered(10), CPU)
    first = next(stream)
    seen = weakref.ref(first["x"])
    del first
    next(stream)
    assert seen() is None
    stream.close()
