"""What training reads: features from an encoded table, or examples that the stage encodes on the fly."""

import torch
from torch.utils.data import Dataset

from kandinsky_exp.data.encode import Encoder, Features, cache_key, captions_of, collate, encode_table
from kandinsky_exp.data.examples import Source
from kandinsky_exp.data.preprocess import Preprocess
from kandinsky_exp.data.sampler import Visit, choose_caption
from kandinsky_exp.data.table import FeatureTable

__all__ = ["CachedFeatures", "Encoder", "FeatureTable", "OnlineExamples", "cache_key", "collate", "encode_table"]


class CachedFeatures(Dataset[Features]):
    """Features of a table by visit; a visit's caption is a function of (seed, epoch, index)."""

    def __init__(self, table: FeatureTable, seed: int) -> None:
        self.table, self.seed = table, seed

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, visit: Visit) -> Features:
        """Features of `FeatureTable.row` and `index`, an int64 scalar."""
        index, epoch = visit
        count = self.table.captions(index)
        caption = choose_caption(self.seed, epoch, index, count) if count else 0
        return self.table.row(index, caption) | {"index": torch.tensor(index)}

    def id(self, index: int) -> str:
        return self.table.id(index)


class OnlineExamples(Dataset[Features]):
    """Preprocessed images and captions by visit, for a stage that encodes them in the training loop."""

    def __init__(self, source: Source, preprocess: Preprocess, seed: int) -> None:
        self.source, self.preprocess, self.seed = source, preprocess, seed

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, visit: Visit) -> Features:
        """Tensors of `Preprocess` and `index`, an int64 scalar. Raises DataError for an unreadable image."""
        index, epoch = visit
        example = self.source[index]
        caption = None
        if self.preprocess.tokenizer is not None:
            captions = captions_of(self.source, index)
            caption = captions[choose_caption(self.seed, epoch, index, len(captions))]
        return self.preprocess(example.image(), caption) | {"index": torch.tensor(index)}

    def id(self, index: int) -> str:
        return self.source[index].id
