"""Batches of features on the device, from an encoded table or from the encoders."""

import contextlib
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from kandinsky_exp.data.encoded.encode_loop import EncodeSettings
from kandinsky_exp.data.encoded.layout import MASK
from kandinsky_exp.data.encoded.workers import collate, from_workers
from kandinsky_exp.data.examples import Example, Source
from kandinsky_exp.data.features import CachedFeatures, Paired, VisitedRows, without_padding
from kandinsky_exp.data.prefetch import changed, prefetch
from kandinsky_exp.data.sampler import Order, PairedBatchSampler, StreamBatchSampler, Visit, order_of
from kandinsky_exp.stages.base import DiffusionStage, Features
from kandinsky_exp.training.seeding import derive_seed


@dataclass(frozen=True)
class ReadSettings:
    """How a data set becomes batches.

    Args:
        cache: folder of the encoded tables.
        cached: encode once; False = the encoders run in every step.
        fraction: held-out part of a set that has no validation split.
        by_row: hold out rows, also where others show the same picture: what runs did once, and go on with.
        by_length: each optimizer step sees captions of similar length.
        order: of the visits of a run that goes on; None = as the number of rows has it.
        workers: processes that read images when nothing is cached.
        batch_size: per process.
    """

    cache: Path
    how: EncodeSettings
    seed: int
    cached: bool = True
    fraction: float = 0.0
    workers: int = 0
    batch_size: int = 1
    grad_accumulation: int = 1
    by_row: bool = False
    by_length: bool = False
    order: Order | None = None


@dataclass
class FeatureReader:
    """One part of a data set: what trains, or what is held out.

    Args:
        dataset: by visit (index, epoch).
        encode: the stage, where rows are pixels and token ids still.
        fingerprint: follows the content of exactly these rows, and of those of `class_images`.
        class_images: rows of which each batch shows as many beside these, their loss times `class_weight`.
    """

    dataset: VisitedRows
    source: Source
    fingerprint: str
    settings: ReadSettings
    device: torch.device
    encode: DiffusionStage | None
    class_images: "FeatureReader | None" = None
    class_weight: float = 1.0

    def __len__(self) -> int:
        return len(self.dataset)

    def id(self, index: int) -> str:
        """What the data set calls a row that a batch of `stream` shows: its file, or its number there."""
        return self._visited().id(index)

    def _visited(self) -> VisitedRows | Paired:
        paired = self.class_images
        return self.dataset if paired is None else Paired(self.dataset, paired.dataset, self.class_weight)

    @property
    def order(self) -> dict[str, Any]:
        """The order of visits, for `state.json`."""
        name = self.settings.order or order_of(len(self))
        return {"order": name, "group_by_length": self.settings.by_length}

    def rows(self, indices: list[int]) -> Features:
        """These rows, as validation sees them; they have to be of one shape."""
        features = self._encoded(collate([self.dataset.plain(index) for index in indices]))
        return {key: value.to(self.device) for key, value in features.items() if key != "index"}

    def batches(self, indices: list[int], size: int) -> Iterator[list[int]]:
        """`indices` in batches of one shape each."""
        groups: dict[int, list[int]] = {}
        numbers = self.dataset.groups()
        for index in indices:
            groups.setdefault(0 if numbers is None else int(numbers[index]), []).append(index)
        for members in groups.values():
            for start in range(0, len(members), size):
                yield members[start : start + size]

    def example(self, index: int) -> Example:
        """A row as its source has it."""
        return self.source[self.dataset.source_row(index)]

    def stream(self, start_step: int, steps: int, accelerator: Accelerator) -> Generator[Features]:
        """Micro-batches from the first one after `start_step` on, read ahead of the step that needs them."""
        shape = {
            "batch_size": self.settings.batch_size,
            "grad_accumulation": self.settings.grad_accumulation,
            "num_processes": accelerator.num_processes,
            "rank": accelerator.process_index,
            "start_step": start_step,
            "total_steps": steps,
        }
        own = StreamBatchSampler(len(self), self.settings.seed, **shape, **self._sorting())
        sampler: Iterable[list[Visit]] = own
        if self.class_images is not None:
            seed = derive_seed("class images", self.settings.seed)
            sampler = PairedBatchSampler(own, StreamBatchSampler(len(self.class_images), seed, **shape))
        # What has to be encoded is encoded ahead too: on CUDA beside the step, on a stream of its own. On the CPU it
        # would take the step's cores from it: two teams of threads there are slower than one after the other.
        with_step = self.device.type == "cpu"
        batches = self._read(sampler) if with_step else changed(self._read(sampler), self._encoded)
        with contextlib.closing(prefetch(batches, self.device)) as ahead:
            yield from map(self._encoded, ahead) if with_step else ahead

    def _sorting(self) -> dict[str, Any]:
        """In which order rows are visited, and which visits an optimizer step may take together."""
        if self.settings.by_length:
            assert isinstance(self.dataset, CachedFeatures)  # nosec B101 # as the config was checked
            return {"order": self.settings.order, "length": self.dataset.tokens}
        return {"order": self.settings.order, "groups": self.dataset.groups()}

    def _read(self, sampler: Iterable[list[Visit]]) -> Generator[Features]:
        dataset = self._visited()
        if self.encode is None:  # a thread is enough: nothing has to be decoded
            for visits in sampler:
                yield collate([dataset[visit] for visit in visits])
            return
        yield from from_workers(dataset, sampler, collate, self.settings.workers, "data.num_workers")

    def _encoded(self, batch: Features) -> Features:
        if self.encode is None:
            return batch
        features = without_padding(self.encode.encode(batch), batch.get(MASK), self.encode.ragged_features)
        return features | {name: batch[name] for name in ("index", "loss_weight") if name in batch}
