"""The datasets that training reads: features of an encoded table, or examples that the stage encodes on the fly."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from kandinsky_exp.data.encoded.columns import Array
from kandinsky_exp.data.encoded.layout import MASK
from kandinsky_exp.data.encoded.table import FeatureTable
from kandinsky_exp.data.encoded.workers import Features
from kandinsky_exp.data.examples import Indexed, Source, in_threads
from kandinsky_exp.data.file_hashes import of_content
from kandinsky_exp.data.preprocess import Preprocess, mirrored
from kandinsky_exp.data.row_numbers import AllBut, kept
from kandinsky_exp.data.sampler import Visit, choose_caption, choose_mirror
from kandinsky_exp.errors import DataError, cause_of

Rows = NDArray[np.int64]


class VisitedRows(Dataset[Features], ABC):
    """Rows by visit (index, epoch). What a visit shows of a row is a function of (seed, epoch, index).

    Args:
        rows: those that count, sorted, of the `total` of a table or a source; None = all. `index` is a place in them.
        mirrored: every other visit shows the mirrored image.
    """

    def __init__(self, seed: int, total: int, mirrored: bool, rows: Rows | None = None) -> None:
        self.seed, self.total, self.mirrored = seed, total, mirrored
        self.rows = AllBut(total, np.arange(0)) if rows is None else kept(rows, total)

    def __len__(self) -> int:
        return len(self.rows)

    def part(self, rows: Rows) -> Self:
        """Some of these rows."""
        part = copy.copy(self)
        part.rows = kept(np.asarray(self.rows)[rows], self.total)
        return part

    def __getitem__(self, visit: Visit) -> Features:
        """Tensors of a row without a batch axis, and `index`, an int64 scalar."""
        index, epoch = visit
        mirror = self.mirrored and bool(choose_mirror(self.seed, epoch, index))
        return self._read(index, epoch, mirror) | {"index": torch.tensor(index)}

    def plain(self, index: int) -> Features:
        """A row as validation sees it: its caption of epoch 0, not mirrored."""
        return self._read(index, 0, False) | {"index": torch.tensor(index)}

    @abstractmethod
    def _read(self, index: int, epoch: int, mirror: bool) -> Features: ...

    @abstractmethod
    def id(self, index: int) -> str: ...

    def source_row(self, index: int) -> int:
        return int(self.rows[index])

    def groups(self) -> Rows | None:
        """A number for each row, equal where latents have the same shape; None where all have."""
        return None

    def pictures(self, source: Source) -> Rows | None:
        """(n, 2), equal where rows show the same picture; None where only reading the whole source would tell."""
        if not isinstance(source, Indexed):
            return None

        def digest(index: int) -> Rows:
            example = source[self.source_row(index)]
            try:
                return of_content(example.read())
            except OSError as error:
                raise DataError(f"{example.where}: image {example.id}: {cause_of(error)}") from error

        return np.array(list(in_threads(digest, len(self))), np.int64).reshape(-1, 2)


class CachedFeatures(VisitedRows):
    """Features of a table, see `FeatureTable.row`; of some of its rows, or all."""

    def __init__(self, table: FeatureTable, seed: int) -> None:
        super().__init__(seed, len(table), table.views > 1)
        self.table = table

    def _read(self, index: int, epoch: int, mirror: bool) -> Features:
        return self.table.row(int(self.rows[index]), partial(choose_caption, self.seed, epoch, index), int(mirror))

    def has(self, name: str) -> bool:
        return self.table.has(name)

    def feature(self, index: int, name: str) -> Array:
        """One feature of a row's picture, not mirrored."""
        return self.table.feature(int(self.rows[index]), name)

    def tokens(self, visit: Visit) -> int:
        """Of the caption that a visit shows."""
        index, epoch = visit
        return self.table.tokens(int(self.rows[index]), partial(choose_caption, self.seed, epoch, index))

    def id(self, index: int) -> str:
        return self.table.id(int(self.rows[index]))

    def source_row(self, index: int) -> int:
        return self.table.source_row(int(self.rows[index]))

    def shapes(self) -> Rows:
        """Of the latents of each row, (n, 3); of use where they differ."""
        return np.asarray(self.table.shapes()[np.asarray(self.rows)])

    def groups(self) -> Rows | None:
        if not self.table.meta["buckets"]:
            return None
        return np.unique(self.shapes(), axis=0, return_inverse=True)[1].reshape(-1)

    def pictures(self, source: Source) -> Rows | None:
        stored = self.stored_pictures()
        return super().pictures(source) if stored is None else stored

    def stored_pictures(self) -> Rows | None:
        """As `pictures`, where the table has it."""
        stored = self.table.pictures()
        return None if stored is None else stored[np.asarray(self.rows)]


class OnlineExamples(VisitedRows):
    """Preprocessed images and captions of a source, or of some of its rows, for a stage that encodes them in training.

    Reading raises DataError for an unreadable image.
    """

    def __init__(
        self, source: Indexed, preprocess: Preprocess, seed: int, rows: Rows | None = None, mirrored: bool = False
    ) -> None:
        super().__init__(seed, len(source), mirrored, rows)
        self.source, self.preprocess = source, preprocess

    def _read(self, index: int, epoch: int, mirror: bool) -> Features:
        example = self.source[self.source_row(index)]
        caption = None
        if self.preprocess.tokenizer is not None:
            if not example.captions:
                raise DataError(f"{example.where}: {example.caption_problem}")
            caption = example.captions[choose_caption(self.seed, epoch, index, len(example.captions))]
        shown: tuple[Any, Mapping[str, Any]] = example.image(), example.companions()
        image, beside = mirrored(*shown) if mirror else shown
        return self.preprocess(image, caption, example.extra, beside)

    def id(self, index: int) -> str:
        return self.source[self.source_row(index)].id


class Paired(Dataset[Features]):
    """Rows that train, and after their numbers those of a set that trains beside them, half of every batch each.

    The mean over a batch of losses times `loss_weight` is the mean over the first half, plus `weight` times that over
    the second.

    Args:
        first, second: by visit.
    """

    def __init__(self, first: VisitedRows, second: VisitedRows, weight: float) -> None:
        self.first, self.second, self.weight = first, second, weight

    def __len__(self) -> int:
        """Of the first: what an epoch shows once."""
        return len(self.first)

    def __getitem__(self, visit: Visit) -> Features:
        """Features of the row, its `index` here, and its `loss_weight`, a float32 scalar."""
        index, epoch = visit
        dataset, row = self._owner(index)
        weight = 2.0 if dataset is self.first else 2.0 * self.weight
        return dataset[row, epoch] | {"index": torch.tensor(index), "loss_weight": torch.tensor(weight)}

    def id(self, index: int) -> str:
        dataset, row = self._owner(index)
        return dataset.id(row)

    def _owner(self, index: int) -> tuple[VisitedRows, int]:
        return (self.first, index) if index < len(self.first) else (self.second, index - len(self.first))


def without_padding(features: Features, mask: Tensor | None, ragged: Collection[str]) -> Features:
    """The features of captions cut to the longest of a batch, as a table's come.

    Args:
        mask: (B, L) bool, on the host; None where there are no captions.
        ragged: names of the features (B, L, …) that follow it.
    """
    if mask is None:
        return features
    longest = int(mask.sum(1).max())
    return {name: value[:, :longest] if name in (MASK, *ragged) else value for name, value in features.items()}


def shared_pictures(
    training: Sequence[VisitedRows],
    held_out: VisitedRows,
    what: str = "held-out images",
    loss: str = "the validation loss",
) -> list[str]:
    """A note where a validation split of the user's shows pictures that train; of tables, where it costs nothing.

    Args:
        what, loss: the split and its loss, as the note calls them.
    """
    shown = [rows.stored_pictures() if isinstance(rows, CachedFeatures) else None for rows in (held_out, *training)]
    others, *known = [None if pictures is None else list(map(bytes, pictures)) for pictures in shown]
    if others is None:
        return []
    trained = {picture for pictures in known for picture in pictures or []}
    count = sum(picture in trained for picture in others)
    note = f"{count:,} of the {len(others):,} {what} train, too: {loss} is partly theirs"
    return [note] if count else []
