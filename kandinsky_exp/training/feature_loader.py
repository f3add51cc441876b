"""Batches of features on the device, from encoded tables or from the encoders."""

import contextlib
import hashlib
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image

from kandinsky_exp.data import sources, tally
from kandinsky_exp.data.checks import find_bad
from kandinsky_exp.data.encoded.cache import cache_key, encode_table
from kandinsky_exp.data.encoded.encode_loop import EncodeSettings
from kandinsky_exp.data.encoded.layout import command
from kandinsky_exp.data.encoded.table import FeatureTable
from kandinsky_exp.data.encoded.workers import collate, from_workers
from kandinsky_exp.data.examples import Indexed, Source
from kandinsky_exp.data.features import CachedFeatures, OnlineExamples, Paired, Rows, VisitedRows, shared_pictures
from kandinsky_exp.data.file_hashes import FileDigests
from kandinsky_exp.data.long_texts import cut_captions
from kandinsky_exp.data.prefetch import changed, prefetch
from kandinsky_exp.data.sampler import PairedBatchSampler, StreamBatchSampler, Visit
from kandinsky_exp.data.splits import Splits, together
from kandinsky_exp.data.tally import Tally, first_few
from kandinsky_exp.errors import DataError, encoding_told
from kandinsky_exp.stages.base import DiffusionStage, Features
from kandinsky_exp.stages.null_condition import null_condition
from kandinsky_exp.system import distributed
from kandinsky_exp.system.logs import Log
from kandinsky_exp.training.seeding import derive_seed


@dataclass(frozen=True)
class ReadSettings:
    """How a data set becomes batches.

    Args:
        cache: folder of the encoded tables.
        cached: encode once; False = the encoders run in every step.
        fraction: held-out part of a set that has no validation split.
        by_row: hold out rows, also where others show the same picture: what runs did once, and go on with.
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

    def picture(self, index: int) -> Image.Image:
        """A row's image, as its file has it."""
        return self.source[self.dataset.source_row(index)].image()

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
        own = StreamBatchSampler(len(self), self.settings.seed, **shape, groups=self.dataset.groups())
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
        return self.encode.encode(batch) | {name: batch[name] for name in ("index", "loss_weight") if name in batch}


@dataclass(frozen=True)
class Readers:
    """A data set, ready to train from.

    Args:
        source: fingerprint of the set as it was given, before anything was held out.
        notes: what a user should know of it, a line each.
        skipped: what was wrong with the examples that were left out.
        cut: captions of which only the beginning is read, and up to where.
    """

    train: FeatureReader
    held_out: FeatureReader | None
    source: str
    notes: list[str]
    skipped: list[str]
    cut: list[str]

    def __str__(self) -> str:
        return f"{len(self.train):,} images train, {len(self.held_out) if self.held_out else 'none'} held out"


def open_readers(
    splits: Splits, stage: DiffusionStage, settings: ReadSettings, accelerator: Accelerator, log: Log
) -> Readers:
    """Training and held-out features. Every process calls this; the main one encodes what is not encoded yet.

    Raises:
        DataError: an image or caption cannot be used, there are too few, or the cache cannot be written.
    """
    encoders = distributed.on_main_process(lambda: stage.encoding_fingerprint())
    null = distributed.on_main_process(lambda: null_condition(stage, settings.cache, encoders, accelerator.device))
    stage.use_null_condition(null)
    opener = _Opener(stage, settings, accelerator, encoders, log)
    train = opener.open(splits.train)
    if splits.class_images is not None:
        beside = opener.open(splits.class_images.source())
        content = together(train.fingerprint, beside.fingerprint)
        train = replace(train, class_images=beside, class_weight=splits.class_images.weight, fingerprint=content)
    content = train.fingerprint
    held_out = None
    if splits.validation is not None:
        held_out = opener.open(splits.validation)
        opener.notes += shared_pictures(train.dataset, held_out.dataset)
    elif splits.dividable and settings.fraction != 0:
        rest, held = sources.held_out(len(train), settings.fraction, settings.seed, opener.pictures(train))
        train, held_out = _part(train, rest, "rest"), _part(train, held, "held out")
    return Readers(train, held_out or None, content, opener.notes, opener.skipped, opener.cut)


def _part(whole: FeatureReader, rows: Rows, name: str) -> FeatureReader:
    """Some rows of a source that was opened."""
    digest = hashlib.sha256(f"{whole.fingerprint} {name} ".encode() + rows.tobytes()).hexdigest()
    return replace(whole, dataset=whole.dataset.part(rows), fingerprint=digest)


class _Opener:
    """What the parts of a data set have in common while they are opened."""

    def __init__(
        self, stage: DiffusionStage, settings: ReadSettings, accelerator: Accelerator, encoders: str, log: Log
    ) -> None:
        self.stage, self.settings, self.accelerator = stage, settings, accelerator
        self.encoders, self.log = encoders, log
        self.digests = FileDigests(settings.cache, log)
        self.notes: list[str] = []
        self.skipped: list[str] = []
        self.cut: list[str] = []

    def open(self, source: Source) -> FeatureReader:
        """All usable rows of a source."""
        if not self.settings.cached:
            return self._online(source)
        fingerprint, folder = distributed.on_main_process(lambda: self._encode(source))
        table = opened_by_all(folder)
        self._tell(source, table.noted, table.skipped, table.meta["truncated"], table.meta.get("cut", []))
        dataset = CachedFeatures(table, self.settings.seed)
        return FeatureReader(dataset, source, fingerprint, self.settings, self.accelerator.device, None)

    def _encode(self, source: Source) -> tuple[str, Path]:
        """The source's fingerprint and the folder of its table, which is encoded if it is not there yet."""
        stage, how = self.stage, self.settings.how
        fingerprint = source.fingerprint(self.digests)
        folder = self.settings.cache / cache_key(fingerprint, self.encoders, stage.preprocess, how)
        encoders = stage.weights.on_device(stage.encoders, self.accelerator.device)
        about = {"stage": stage.name, "source": source.name}
        encode_table(source, stage, folder, how, self.log, encoders=encoders, about=about)
        return fingerprint, folder

    def _online(self, source: Source) -> FeatureReader:
        if not isinstance(source, Indexed):
            raise DataError(
                f"data.cache: {source.name} is read in one sweep, and training visits images in random order; set "
                "data.cache=true"
            )
        distributed.on_all_processes(self._place_encoders)
        reads_captions = self.stage.preprocess.tokenizer is not None
        noted: Tally = {}
        bad, noted = distributed.on_main_process(lambda: (dict(find_bad(source, reads_captions, noted)), noted))
        if bad and not self.settings.how.skip_bad:
            raise DataError(first_few(list(bad.values())))
        rows = np.setdiff1d(np.arange(len(source)), list(bad))
        cut = distributed.on_main_process(lambda: cut_captions(source, rows, self.stage.preprocess))
        self._tell(source, noted, list(bad.values()), len(cut), cut)
        settings = self.settings
        dataset = OnlineExamples(source, self.stage.preprocess, settings.seed, rows, settings.how.mirrored)
        fingerprint = distributed.on_main_process(lambda: source.fingerprint(self.digests))
        return FeatureReader(dataset, source, fingerprint, settings, self.accelerator.device, self.stage)

    def _place_encoders(self) -> None:
        with encoding_told("data.cache=true or "):
            for part in self.stage.encoders:
                self.stage.weights.load(part).to(self.accelerator.device)

    def pictures(self, whole: FeatureReader) -> Rows | None:
        """Which rows show the same picture: held out are pictures, not rows."""
        if self.settings.by_row:
            return None
        found = distributed.on_main_process(lambda: whole.dataset.pictures(whole.source))
        if found is None and isinstance(whole.dataset, CachedFeatures):
            table = whole.dataset.table.folder
            self.notes.append(
                f"{whole.source.name} was encoded by an earlier version, which did not tell pictures apart: rows of "
                "one picture may both train and be held out; to have that mended, remove its table: "
                f"{command(table, f'remove={table.name}')}"
            )
        return found

    def _tell(self, source: Source, noted: Tally, skipped: list[str], truncated: int, cut: list[str]) -> None:
        self.notes += tally.lines(noted)
        self.skipped += [*tally.lines(source.left_out()), *tally.lines(noted), *skipped]
        if skipped:
            self.notes.append(f"{len(skipped):,} examples were left out (data.on_error=skip):\n{first_few(skipped)}")
        if truncated:
            self.cut += cut
            named = f":\n{first_few(cut, truncated)}" if cut else ""
            length = self.stage.preprocess.text_length
            self.notes.append(f"{truncated:,} captions are longer than {length} tokens and were cut{named}")


def opened_by_all(folder: Path) -> FeatureTable:
    """A table that the main process has just opened.

    Raises:
        DataError: another process does not see it; on all of them, so that none waits for one that is gone.
    """
    table = None
    with contextlib.suppress(OSError, ValueError, KeyError):
        table = FeatureTable(folder)
    if distributed.on_any_process(table is None) or table is None:
        raise DataError(
            f"output_root: not every process can read {folder}; output_root has to be on a disk that all machines share"
        )
    return table
