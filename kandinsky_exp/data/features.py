"""What training reads: features from an encoded table, or examples that the stage encodes on the fly."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from kandinsky_exp.data.encoded.table import FeatureTable
from kandinsky_exp.data.encoded.workers import Features
from kandinsky_exp.data.encoded.workers import collate as collate
from kandinsky_exp.data.examples import Indexed, Source, picture_digests
from kandinsky_exp.data.preprocess import Preprocess
from kandinsky_exp.data.sampler import Visit, choose_caption, choose_mirror
from kandinsky_exp.errors import DataError

Rows = NDArray[np.int64]


class CachedFeatures(Dataset[Features]):
    """Features of a table by visit; a visit's caption and mirroring are functions of (seed, epoch, index).

    Args:
        rows: the part of the table that counts, (n,), sorted; None = all of it. `index` is a place among them.
    """

    def __init__(self, table: FeatureTable, seed: int, rows: Rows | None = None) -> None:
        self.table, self.seed, self.rows = table, seed, rows

    def __len__(self) -> int:
        return len(self.table) if self.rows is None else len(self.rows)

    def row(self, index: int) -> int:
        """The row of the table."""
        return index if self.rows is None else int(self.rows[index])

    def __getitem__(self, visit: Visit) -> Features:
        """Features of `FeatureTable.row` and `index`, an int64 scalar."""
        index, epoch = visit
        view = choose_mirror(self.seed, epoch, index) if self.table.views > 1 else 0
        features = self.table.visit(self.row(index), lambda count: choose_caption(self.seed, epoch, index, count), view)
        return features | {"index": torch.tensor(index)}

    def plain(self, index: int) -> Features:
        """A row as validation sees it: its first caption of epoch 0, not mirrored."""
        features = self.table.visit(self.row(index), lambda count: choose_caption(self.seed, 0, index, count))
        return features | {"index": torch.tensor(index)}

    def groups(self) -> Rows:
        """A number for each row, equal where latents have the same shape."""
        found: Rows = np.unique(self.shapes(), axis=0, return_inverse=True)[1]
        return found.reshape(-1)

    def pictures(self, source: Source) -> Rows | None:
        """(n, 2), equal where rows show the same picture; None where only reading the whole source would tell."""
        stored = self.table.pictures()
        if stored is None:
            rows = np.array([self.source_row(index) for index in range(len(self))])
            return picture_digests(source, rows) if isinstance(source, Indexed) else None
        return stored if self.rows is None else stored[self.rows]

    def shapes(self) -> Rows:
        """Of the latents of each row, (n, 3); of use where they differ."""
        shapes: Rows = self.table.shapes()
        return shapes if self.rows is None else shapes[self.rows]

    def id(self, index: int) -> str:
        return self.table.id(self.row(index))

    def source_row(self, index: int) -> int:
        return self.table.source_row(self.row(index))


class OnlineExamples(Dataset[Features]):
    """Preprocessed images and captions by visit, for a stage that encodes them in the training loop.

    Args:
        rows: as in `CachedFeatures`, of the source.
        mirrored: show every other visit's image mirrored.
    """

    def __init__(
        self, source: Source, preprocess: Preprocess, seed: int, rows: Rows | None = None, mirrored: bool = False
    ) -> None:
        self.source, self.preprocess, self.seed = source, preprocess, seed
        self.rows, self.mirrored = rows, mirrored

    def __len__(self) -> int:
        if self.rows is not None:
            return len(self.rows)
        assert self.source.count is not None  # nosec B101 # narrows the type
        return self.source.count

    def __getitem__(self, visit: Visit) -> Features:
        """Tensors of `Preprocess` and `index`, an int64 scalar. Raises DataError for an unreadable image."""
        index, epoch = visit
        return self._read(index, epoch, self.mirrored and bool(choose_mirror(self.seed, epoch, index)))

    def plain(self, index: int) -> Features:
        """A row as validation sees it: its caption of epoch 0, not mirrored."""
        return self._read(index, 0, False)

    def _read(self, index: int, epoch: int, mirror: bool) -> Features:
        example = self.source[self.source_row(index)]
        caption = None
        if self.preprocess.tokenizer is not None:
            if not example.captions:
                raise DataError(f"{example.where}: {example.caption_problem}")
            caption = example.captions[choose_caption(self.seed, epoch, index, len(example.captions))]
        image = example.image()
        features = self.preprocess(self.preprocess.mirror(image) if mirror else image, caption, example.extra)
        return features | {"index": torch.tensor(index)}

    def pictures(self, source: Source) -> Rows | None:
        rows = np.arange(len(self)) if self.rows is None else self.rows
        return picture_digests(source, rows) if isinstance(source, Indexed) else None

    def id(self, index: int) -> str:
        return self.source[self.source_row(index)].id

    def source_row(self, index: int) -> int:
        return index if self.rows is None else int(self.rows[index])


class Paired(Dataset[Features]):
    """Rows that train, and after their numbers those of a set that trains beside them, half of every batch each.

    The mean over a batch of losses times `loss_weight` is the mean over the first half, plus `weight` times that over
    the second.

    Args:
        first, second: by visit.
    """

    def __init__(
        self, first: CachedFeatures | OnlineExamples, second: CachedFeatures | OnlineExamples, weight: float
    ) -> None:
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

    def _owner(self, index: int) -> tuple[CachedFeatures | OnlineExamples, int]:
        return (self.first, index) if index < len(self.first) else (self.second, index - len(self.first))


def shared_pictures(train: CachedFeatures | OnlineExamples, held_out: CachedFeatures | OnlineExamples) -> list[str]:
    """A note where a validation split of the user's shows pictures that train; of tables, where it costs nothing."""
    tables = [part.table.pictures() for part in (train, held_out) if isinstance(part, CachedFeatures)]
    if len(tables) < 2 or tables[0] is None or tables[1] is None:
        return []
    trained = set(map(bytes, tables[0]))
    count = sum(bytes(picture) in trained for picture in tables[1])
    note = f"{count:,} of the {len(tables[1]):,} held-out images train, too: the validation loss is partly theirs"
    return [note] if count else []
