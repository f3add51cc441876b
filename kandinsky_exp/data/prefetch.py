"""Prefetch batches to the device, in a thread, ahead of the step that needs them."""

import contextlib
import threading
from collections.abc import Callable, Generator, Iterator
from queue import Empty, Queue
from typing import Any

import torch
from torch import Tensor

Batch = dict[str, Tensor]
ON_HOST = "index"  # row numbers, for messages: no step reads them on the device
GRACE = 10.0  # seconds that a reader gets to finish the batch it is at, once nobody wants it any more
Ready = tuple[Batch, Any]  # a batch on its way, and the CUDA event of its copy


def prefetch(batches: Iterator[Batch], device: torch.device, depth: int = 2) -> Generator[Batch]:
    """The same batches in the same order, on the device; a thread reads and copies `depth` of them ahead.

    On CUDA the copies go through pinned memory on a stream of their own, as does all that `batches` itself does there;
    the consumer's stream waits for them, the host does not. Elsewhere only the reading is done ahead. `index` stays on
    the host. Closing the generator ends the thread, which closes `batches`.

    Raises:
        whatever `batches` raises, as it is.
    """
    ready: Queue[Ready | BaseException | None] = Queue(depth)
    stop = threading.Event()
    # After what was asked of the device so far, such as the copies of frozen encoders.
    begun = torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None
    reader = threading.Thread(target=_read, args=(batches, device, ready, stop, begun), name="prefetch", daemon=True)
    reader.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield _received(*item)
            del item  # a batch that was used up is free, also while the next one is waited for
    finally:
        stop.set()
        with contextlib.suppress(Empty):  # the reader may wait for room
            while True:
                ready.get_nowait()
        reader.join(GRACE)


def changed(batches: Generator[Batch], change: Callable[[Batch], Batch]) -> Generator[Batch]:
    """`map`, which unlike that closes what it reads from when it is closed."""
    with contextlib.closing(batches):
        for batch in batches:
            yield change(batch)


def _read(
    batches: Iterator[Batch],
    device: torch.device,
    ready: "Queue[Ready | BaseException | None]",
    stop: threading.Event,
    begun: Any,
) -> None:
    """The thread: batches, then None or the exception that ended them. Puts once at most after `stop`."""
    last: BaseException | None = None
    try:
        with _own_stream(device, begun):
            while not stop.is_set():
                batch = next(batches, None)
                if batch is None:
                    break
                ready.put(_sent(batch, device))
                del batch
            if stop.is_set():
                getattr(batches, "close", lambda: None)()  # here, where its frames have run
    except BaseException as error:
        last = error
    if not stop.is_set():
        ready.put(last)


@contextlib.contextmanager
def _own_stream(device: torch.device, begun: Any) -> Iterator[None]:
    """A stream for all that this thread does, which begins when the device has passed the event `begun`."""
    if device.type != "cuda":
        yield
        return
    with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream(device)):  # type: ignore[no-untyped-call]
        torch.cuda.current_stream(device).wait_event(begun)
        yield


def _sent(batch: Batch, device: torch.device) -> Ready:
    on_cuda = device.type == "cuda"
    moved = {}
    for key, value in batch.items():
        if key == ON_HOST:
            moved[key] = value
            continue
        if on_cuda and value.device.type == "cpu" and not value.is_pinned():
            value = value.pin_memory()
        moved[key] = value.to(device, non_blocking=on_cuda)
    return moved, torch.cuda.current_stream(device).record_event() if on_cuda else None


def _received(batch: Batch, arrived: Any) -> Batch:
    if arrived is not None:
        moved = [value for key, value in batch.items() if key != ON_HOST]
        stream = torch.cuda.current_stream(moved[0].device)
        stream.wait_event(arrived)
        for value in moved:
            value.record_stream(stream)  # its memory is not given away before this stream has used it
    return batch
