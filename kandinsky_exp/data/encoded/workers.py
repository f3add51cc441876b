"""DataLoader workers that read, decode and preprocess examples for the encoders, in the source's order."""

import signal
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from kandinsky_exp.data.examples import Example
from kandinsky_exp.data.file_hashes import of_content
from kandinsky_exp.data.pictures import NOTE
from kandinsky_exp.data.preprocess import Preprocess, mirrored
from kandinsky_exp.errors import DataError, first_line

Features = dict[str, Tensor]


@dataclass(frozen=True)
class Loaded:
    """One example as the encoders read it.

    Args:
        images: tensors of the image, and of its mirror where mirrors are wanted.
        captions: tensors of each caption; none where captions are not encoded.
        cut: what is read of those captions that are too long.
        problem: why it cannot be used; then there is nothing else.
        picture: (2,) of the image file's content, equal where it is the same.
        note: what of the image's file was not used, though the image was.
    """

    id: str
    images: tuple[Features, ...] = ()
    captions: tuple[Features, ...] = ()
    cut: tuple[str, ...] = ()
    problem: str = ""
    picture: NDArray[np.int64] | None = None
    note: str = ""


@dataclass(frozen=True)
class Stack:
    """Tensors of equal shapes, stacked: what a worker hands over.

    Args:
        offsets: of the examples in their batch that the rows belong to.
        views: one stack per view.
    """

    offsets: list[int]
    views: list[Features]

    def rows(self) -> Iterator[tuple[int, list[Features]]]:
        for number, offset in enumerate(self.offsets):
            yield offset, [{name: tensor[number] for name, tensor in view.items()} for view in self.views]


@dataclass(frozen=True)
class Batch:
    """Loaded examples in the source's order; their tensors apart from them, the images' by shape."""

    examples: list[Loaded]
    images: list[Stack]
    captions: list[Stack]


def collate(rows: Sequence[Features]) -> Features:
    """Rows along a new batch axis; features of captions zero up to the longest of them."""
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    return {name: _stacked(cells) for name, cells in columns.items()}


def _stacked(cells: list[Tensor]) -> Tensor:
    if len({cell.shape for cell in cells}) == 1:
        return torch.stack(cells)
    stacked = cells[0].new_zeros((len(cells), max(map(len, cells)), *cells[0].shape[1:]))
    for place, cell in zip(stacked, cells, strict=True):
        place[: len(cell)] = cell
    return stacked


@dataclass(frozen=True)
class Loader(Dataset[Loaded]):
    """Reads and preprocesses examples. Its «indices» are the examples themselves: a worker gets all that it needs.

    Args:
        mirrored: also give the mirror of each image.
    """

    preprocess: Preprocess
    mirrored: bool

    def __getitem__(self, example: Example) -> Loaded:
        try:
            return self._load(example)
        except DataError as error:
            return Loaded(example.id, problem=str(error))
        except ValueError as error:  # of what belongs to the image
            return Loaded(example.id, problem=f"{example.where}: image {example.id}: {first_line(error)}")
        except Exception as error:  # whatever a processor or tokenizer stumbles over: it must be known at what
            reason = f"{type(error).__name__}: {first_line(error)}"
            return Loaded(example.id, problem=f"{example.where}: image {example.id}: {reason}")

    def _load(self, example: Example) -> Loaded:
        example = replace(example, read=cache(example.read))  # for the pixels, and for the digest of the file
        wants_captions = self.preprocess.tokenizer is not None
        if wants_captions and example.caption_problem:
            raise DataError(f"{example.where}: {example.caption_problem}")
        image, beside = example.image(), example.companions()
        views = [(image, beside)] + [mirrored(image, beside)] * self.mirrored
        captions = self.preprocess.tokenize(example.captions) if wants_captions else []
        return Loaded(
            example.id,
            tuple(self.preprocess(view, None, example.extra, own) for view, own in views),
            tuple(tensors for tensors, _ in captions),
            tuple(beginning for _, beginning in captions if beginning is not None),
            picture=of_content(example.read()),
            note=image.info.get(NOTE, ""),
        )

    def batches(self, lists: Iterator[list[Example]], workers: int) -> Iterator[Batch]:
        """A batch of each list of examples, good and bad, in order. Worker processes read some lists ahead.

        Raises:
            DataError: the source cannot be read any further, or worker processes cannot be started, or one died.
        """
        return from_workers(self, _told(lists), _batch, workers, "data.encode_workers")


def _told(lists: Iterator[list[Example]]) -> Iterator[list[Example]]:
    try:
        yield from lists
    except OSError as error:
        raise DataError(f"data: the examples cannot be read any further ({error})") from error


def from_workers(
    dataset: Dataset[Any], indices: Iterable[list[Any]], batch: Callable[[list[Any]], Any], workers: int, key: str
) -> Iterator[Any]:
    """The batches of a data set, read by so many processes, or here where these are none.

    Args:
        batch: makes a batch of its rows.
        key: the setting that says how many processes.

    Raises:
        DataError: what a worker found wrong with the data, or that one died or cannot be started.
    """
    failed = None
    try:
        yield from DataLoader(
            dataset, batch_sampler=indices, num_workers=workers, collate_fn=batch, worker_init_fn=_leave_signals
        )
    except DataError as error:  # a worker's comes with its traceback in front
        traceback.clear_frames(error.__traceback__)
        raise DataError(str(error).rpartition("DataError: ")[2].strip()) from None
    except (EOFError, OSError, RuntimeError) as error:  # a worker that dies may leave half a message, too
        if not workers:
            raise
        # What torch raises refers to itself and to the loader's iterator, which then waits 5 s for its workers' end.
        traceback.clear_frames(error.__traceback__)
        failed = workers_failed(error, key)
    if failed is not None:  # here, where no traceback keeps the workers: torch would go on to raise their death
        raise failed


def workers_failed(error: Exception, key: str = "data.encode_workers") -> DataError:
    """What to do about worker processes that cannot be started, died, or have no shared memory left.

    Args:
        key: the setting that started them.
    """
    lines = str(error).strip().splitlines() or [type(error).__name__]
    reason = lines[-1] if lines[0].startswith("Caught") else lines[0]  # a worker's traceback ends with the reason
    return DataError(
        f"{key}: the processes that read images failed ({reason.strip()}); set {key}=0 to read them without, or fewer"
    )


def _leave_signals(worker: int) -> None:
    """To the main process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the main process ends its workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _batch(loaded: list[Loaded]) -> Batch:
    by_shape: dict[tuple[torch.Size, ...], list[int]] = {}
    for offset, example in enumerate(loaded):
        if not example.problem:
            shapes = tuple(tensor.shape for tensor in example.images[0].values())
            by_shape.setdefault(shapes, []).append(offset)
    images = [
        Stack(offsets, [collate(view) for view in zip(*(loaded[offset].images for offset in offsets), strict=True)])
        for offsets in by_shape.values()
    ]
    owners = [offset for offset, example in enumerate(loaded) for _ in example.captions]
    texts = [caption for example in loaded for caption in example.captions]
    captions = [Stack(owners, [collate(texts)])] if texts else []
    return Batch([replace(example, images=(), captions=()) for example in loaded], images, captions)
