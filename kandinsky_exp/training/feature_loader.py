"""Data sets opened for training: encoded where they are not yet, and divided into what trains and what is held out."""

import contextlib
import hashlib
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
from accelerate import Accelerator

from kandinsky_exp.data import sources, tally
from kandinsky_exp.data.checks import find_bad
from kandinsky_exp.data.encoded.cache import encode_table, parts_of, table_folder
from kandinsky_exp.data.encoded.layout import command
from kandinsky_exp.data.encoded.table import FeatureTable
from kandinsky_exp.data.examples import Indexed, Source
from kandinsky_exp.data.features import CachedFeatures, OnlineExamples, Rows, VisitedRows, shared_pictures
from kandinsky_exp.data.file_hashes import FileDigests
from kandinsky_exp.data.long_texts import cut_captions
from kandinsky_exp.data.splits import Splits, together
from kandinsky_exp.data.tally import Tally, first_few
from kandinsky_exp.errors import ConfigError, DataError, memory_told
from kandinsky_exp.stages.base import DiffusionStage
from kandinsky_exp.system import distributed
from kandinsky_exp.system.logs import Log
from kandinsky_exp.training.feature_reader import FeatureReader, ReadSettings
from kandinsky_exp.training.null_condition import null_condition


@dataclass(frozen=True)
class Readers:
    """A data set, ready to train from.

    Args:
        sets: further ones that are held out, by name.
        source: fingerprint of the set as it was given, before anything was held out.
        notes: what a user should know of it, a line each.
        skipped: what was wrong with the examples that were left out.
        cut: captions of which only the beginning is read, and up to where.
    """

    train: FeatureReader
    held_out: FeatureReader | None
    sets: dict[str, FeatureReader]
    source: str
    notes: list[str]
    skipped: list[str]
    cut: list[str]

    def __str__(self) -> str:
        sets = "".join(f", {len(reader):,} of {name}" for name, reader in self.sets.items())
        return f"{len(self.train):,} images train, {len(self.held_out) if self.held_out else 'none'} held out{sets}"


def open_readers(
    splits: Splits, stage: DiffusionStage, settings: ReadSettings, accelerator: Accelerator, log: Log
) -> Readers:
    """Training and held-out features. Every process calls this, and all of them encode what is not encoded yet.

    Raises:
        DataError: an image or caption cannot be used, there are too few, or the cache cannot be written.
    """
    encoders = distributed.on_main_process(lambda: stage.encoding_fingerprint())
    null = distributed.on_main_process(lambda: null_condition(stage, settings.cache, encoders, accelerator.device))
    stage.use_null_condition(null)
    opener = _Opener(stage, settings, accelerator, encoders, log)
    train = opener.open(splits.train)
    if splits.class_images is not None:
        kept = opener.open(splits.class_images.source())
        content = together(train.fingerprint, kept.fingerprint)
        train = replace(train, class_images=kept, class_weight=splits.class_images.weight, fingerprint=content)
    content = train.fingerprint
    held_out = None
    if splits.validation is not None:
        held_out = opener.open(splits.validation)
        opener.notes += shared_pictures(_shown(train), held_out.dataset)
    elif splits.dividable and settings.fraction != 0:
        rest, held = sources.held_out(len(train), settings.fraction, settings.seed, opener.pictures(train))
        train, held_out = _part(train, rest, "rest"), _part(train, held, "held out")
    beside = {name: opener.open(source) for name, source in splits.sets.items()}
    for name, reader in beside.items():
        if not len(reader):
            raise DataError(f"validation.sets.{name}: none of its pictures can be used; mend them, or leave it out")
        opener.notes += shared_pictures(_shown(train), reader.dataset, f"images of {name}", f"validation/{name}/loss")
    return Readers(train, held_out or None, beside, content, opener.notes, opener.skipped, opener.cut)


def encode_part(
    splits: Splits, stage: DiffusionStage, settings: ReadSettings, accelerator: Accelerator, log: Log, number: int
) -> None:
    """Encode one part of a data set, which counts the parts of all that `open_readers` would encode.

    Raises:
        ConfigError: there is no such part, or no parts; or several processes were started for one.
        DataError: see `open_readers`.
    """
    if accelerator.num_processes > 1:
        raise ConfigError("data.part: is one job's; the processes of a launcher share the parts: leave it out")
    encoders = stage.encoding_fingerprint()
    null_condition(stage, settings.cache, encoders, accelerator.device)
    opener = _Opener(stage, settings, accelerator, encoders, log)
    beside = [] if splits.class_images is None else [splits.class_images.source()]
    before, said = 0, []
    for source in (*splits.both, *beside):
        parts = opener.parts(source)
        if number < before + parts:
            opener.encode(source, source.fingerprint(opener.digests), number - before)
            return
        said.append(f"{parts:,} of {source.name}")
        before += parts
    raise ConfigError(
        f"data.part: {number} is beyond the {before:,} parts of this data ({', '.join(said)}), which begin with 0; "
        f"'data.part=range({before})' with --multirun makes all of them"
    )


def _shown(train: FeatureReader) -> list[VisitedRows]:
    """All that trains."""
    return [train.dataset, *([] if train.class_images is None else [train.class_images.dataset])]


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
        fingerprint = self._fingerprint(source)
        self.encode(source, fingerprint)
        table = opened_by_all(self._folder(source, fingerprint))
        self._tell(source, table.noted, table.skipped, table.meta["truncated"], table.meta.get("cut", []))
        dataset = CachedFeatures(table, self.settings.seed)
        return FeatureReader(dataset, source, fingerprint, self.settings, self.accelerator.device, None)

    def _fingerprint(self, source: Source) -> str:
        """Of a source that all processes see alike.

        Raises:
            DataError: they do not; on all.
        """
        seen = distributed.everyones(
            lambda: (version("kandinsky_exp"), source.fingerprint(self.digests), self.stage.encoding_fingerprint())
        )
        distributed.on_main_process(lambda: _refuse_difference(source.name, seen))
        return seen[0][1]

    def encode(self, source: Source, fingerprint: str, only: int | None = None) -> None:
        """Make the parts of its table that are not there, or one; processes meet in files alone."""
        stage, how = self.stage, self.settings.how
        encoders = stage.weights.on_device(stage.encoders, self.accelerator.device)
        about = {"stage": stage.encoded, "source": source.name}
        folder = self._folder(source, fingerprint)
        encode_table(source, stage, folder, how, self.log, only=only, encoders=encoders, about=about)

    def parts(self, source: Source) -> int:
        """How many its table has.

        Raises:
            ConfigError: it is read in one sweep, and not divided.
        """
        folder = self._folder(source, source.fingerprint(self.digests))
        if (found := parts_of(source, folder, self.settings.how)) is None:
            raise ConfigError(f"data.part: {source.name} is read in one sweep and not divided; leave it out")
        return found

    def _folder(self, source: Source, fingerprint: str) -> Path:
        facts = fingerprint, self.encoders, self.stage.preprocess, self.settings.how
        return table_folder(self.settings.cache, *facts, self.log)

    def _online(self, source: Source) -> FeatureReader:
        if not isinstance(source, Indexed):
            raise DataError(
                f"data.cache: {source.name} is read in one sweep, and training visits images in random order; set "
                "data.cache=true"
            )
        distributed.on_all_processes(self._place_encoders)
        preprocess = self.stage.preprocess
        reads_captions, noted = preprocess.tokenizer is not None, Tally()
        bad, noted = distributed.on_main_process(
            lambda: (dict(find_bad(source, reads_captions, noted, preprocess)), noted)
        )
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
        with memory_told(DataError, "the encoders ran out of memory ({}); set data.cache=true or precision=bf16"):
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


def _refuse_difference(name: str, seen: list[tuple[str, str, str]]) -> None:
    """Of (version, fingerprint of the data, that of the encoders) of each process."""
    for rank, (release, fingerprint, encoders) in enumerate(seen):
        if release != seen[0][0]:
            raise DataError(
                f"process {rank} has version {release} of kandinsky_exp, process 0 has {seen[0][0]}; install the same "
                "for all"
            )
        if fingerprint != seen[0][1]:
            raise DataError(
                f"data: process {rank} finds other data in {name} than process 0; all machines have to read the same "
                "files"
            )
        if encoders != seen[0][2]:
            raise DataError(
                f"weights: process {rank} would encode with other weights, or in another precision, than process 0; "
                "all machines have to read the same"
            )


def opened_by_all(folder: Path) -> FeatureTable:
    """A table that the main process has opened or made.

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
