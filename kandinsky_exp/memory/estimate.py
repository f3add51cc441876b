"""Estimated memory of each phase of a run, by part: encoding, training, validation, drawing, checkpoints.

On an accelerator its memory counts; else that of the process, where networks stay once they were loaded, and where
Python and the libraries are as well.
"""

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

from omegaconf import DictConfig

from kandinsky_exp import build, run_settings
from kandinsky_exp.evaluation import encoders as judges
from kandinsky_exp.memory.dry_run import DryRun
from kandinsky_exp.models import pipelines
from kandinsky_exp.stages.base import DiffusionStage
from kandinsky_exp.system import host_memory
from kandinsky_exp.training.async_checkpoint import ROOM

# What the process of a run grows by beyond this one's before it holds a tensor: readers, code and scratch of kernels.
GROWS = 120_000_000
CONVOLUTIONS = 120_000_000  # code and scratch of theirs beyond that
# Of a step's activations on the host, holes between blocks that are kept for the next: see tests/bench/planned.py.
FRAGMENTS = 0.25
MLFLOW = 100_000_000  # bytes that its client takes of the process, see the benchmarks

MAPPED, COPY = "mapped files", "copy"
READ = ("frozen encoders", "trained weights", "frozen weights")  # of what is steady: there once the network is read

Parts = dict[str, int]


@dataclass(frozen=True)
class Phase:
    """Bytes by part at the moment at which a phase holds most."""

    name: str
    parts: Parts

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def needed(self) -> int:
        """Bytes that there has to be room for: files are read again, and no copy is made where memory is short."""
        return self.total - self.parts.get(MAPPED, 0) - self.parts.get(COPY, 0)

    @property
    def accuracy(self) -> float:
        """By which part of it the estimate may be wrong, as measured on a CPU."""
        # A decoder in fp32 leaves holes between the blocks of the pictures that it draws: a third was measured.
        return {"encoding": 0.1, "drawing": 0.35}.get(self.name, 0.15)


@dataclass
class Estimate:
    """Memory of a run.

    Args:
        images: that train, None where nobody knows yet; `held_out` likewise.
        encodes: whether something is not encoded yet.
        draws_class: whether class images have to be drawn.
        python: bytes of the process before it makes anything.
        capacity: bytes that the run may use.
    """

    cfg: DictConfig
    dry_run: DryRun
    images: int | None
    held_out: int | None
    encodes: bool
    draws_class: bool
    python: int
    capacity: int

    def phases(self) -> Iterator[Phase]:
        """In the order in which they come, each at the largest of its moments."""
        phases = {
            "class": self._class_images,
            "loading": self._loading,
            "encoding": self._encoding,
            "training": self._training,
            "validation": self._validation,
            "drawing": self._drawing,
            "checkpoint": self._checkpoint,
        }
        for name, moments in phases.items():
            if found := [Phase(name, parts) for parts in moments()]:
                yield max(found, key=lambda phase: phase.total)

    def least(self) -> int:
        """Bytes that training needs whatever its activations are: known without a step."""
        return sum(self.steady.values()) + self.dry_run.sizes().trained_bytes

    @cached_property
    def on_host(self) -> bool:
        """Whether the device's memory is that of the process."""
        return bool(self.dry_run.device.type == "cpu")

    @cached_property
    def stage(self) -> type[DiffusionStage]:
        return build.stage_class(self.cfg)

    @cached_property
    def base(self) -> Parts:
        """Python and its libraries, where they are in the same memory."""
        if not self.on_host:
            return {}
        kernels = GROWS + (CONVOLUTIONS if self.stage.reads_pixels() else 0)
        return {"Python": self.python + kernels + (MLFLOW if self.cfg.tracker.name == "mlflow" else 0)}

    @cached_property
    def steady(self) -> Parts:
        """What is there from the first step to the last."""
        cfg, sizes = self.cfg, self.dry_run.sizes()
        steady = self.base | {"trained weights": sizes.trained_bytes, "frozen weights": sizes.frozen_bytes}
        steady["optimizer"] = self.dry_run.optimizer().state
        if cfg.trainer.ema_decay is not None:
            steady["average"] = sizes.trained_bytes
        if not cfg.data.cache:
            steady["frozen encoders"] = self._size(self.stage.encoders)
        if self.on_host and self._draws():
            steady["parts that draw"] = self._size(self.stage.stays_loaded)
        return steady

    def _size(self, names: Iterable[str]) -> int:
        """Bytes of frozen parts."""
        return sum(self.dry_run.part(name)[1] for name in names)

    def _mapped(self, names: Iterable[str]) -> Parts:
        """Pages of the files of frozen parts, while they are read in another type than theirs: of the largest."""
        dtype = self.cfg.precision.frozen_dtype
        return {MAPPED: max((self.dry_run.mapped(name, dtype) for name in names), default=0)} if self.on_host else {}

    # --- the moments of each phase

    def _class_images(self) -> Iterator[Parts]:
        """One picture at a time, of base networks that leave again."""
        rows = pipelines.rows_at_once(1, guided=True)
        for parts in pipelines.WHOLE if self.draws_class else ():
            yield from self._scene(self.base, parts, *(self.dry_run.answering(part, rows[part]) for part in parts))

    def _scene(self, there: Parts, names: Collection[str], *activations: int) -> Iterator[Parts]:
        """Frozen parts are read, then answer one after the other."""
        there = there | {"parts that draw": self._size(names)}
        yield there | self._mapped(names)
        yield from (there | {"activations": size} for size in activations)

    def _loading(self) -> Iterator[Parts]:
        """A part's file beside the part, and beside those that were read before it."""
        if not self.on_host:
            return
        encoders = self.stage.encoders if self.encodes else ()
        for count, part in enumerate(encoders, 1):
            yield self.base | {"frozen encoders": self._size(encoders[:count])} | self._mapped([part])
        dtype = "float32" if self.cfg.adapter.name == "none" else self.cfg.precision.frozen_dtype
        read = {name: size for name, size in self.steady.items() if name in READ}
        yield self.base | read | {MAPPED: self.dry_run.mapped(self.stage.part, dtype)}

    def _encoding(self) -> Iterator[Parts]:
        if self.encodes and self.cfg.data.cache:
            batch = build.encode_settings(self.cfg, self.dry_run.stage, self.dry_run.device).batch_size
            activations = self.dry_run.encoding(min(batch, self.images or batch))
            yield self.base | {"frozen encoders": self._size(self.stage.encoders), "activations": activations}

    def _training(self) -> Iterator[Parts]:
        """The passes, and the optimizer's step. Online, what encodes keeps its blocks, and the steps theirs."""
        passes = self.dry_run.passes()
        steady = self.steady | {"gradients": passes.gradients}
        if not self.cfg.data.cache:
            steady["encoding"] = self.dry_run.encoding(run_settings.shown(self.cfg))
        activations = passes.peak - passes.gradients
        keeps_blocks = self.on_host and run_settings.large_blocks(self.cfg) == host_memory.FAST
        fragments = int(FRAGMENTS * activations) if keeps_blocks else 0
        yield steady | {"activations": activations, "fragments": fragments}
        yield steady | {"optimizer's step": self.dry_run.optimizer().temporary}

    def _validation(self) -> Iterator[Parts]:
        sets = run_settings.further_sets(self.cfg)
        if self.held_out != 0 or sets:
            most = self.cfg.validation.batch_size
            batch = most if sets else min(most, self.held_out or most)
            yield self.steady | {"activations": self.dry_run.validation(batch)}

    def _drawing(self) -> Iterator[Parts]:
        count, own = self._draws(), self.stage.part
        rows = pipelines.rows_at_once(count, self.cfg.validation.guidance_scale > 1)
        prompts = run_settings.texts_drawn(self.cfg)
        for parts in self.stage.draws_with if count else ():
            if prompts or own in parts:  # what is redrawn needs no embedding of a prompt
                frozen = [*(self.stage.stays_loaded if self.on_host else ()), *(part for part in parts if part != own)]
                needs = [self.dry_run.answering(part, rows[part], part == own) for part in parts]
                yield from self._scene(self.steady, dict.fromkeys(frozen), *needs)

        if self.cfg.validation.metrics:
            parts = ("text_encoder", "image_encoder")
            needs = [self.dry_run.answering(part, judges.BATCH) for part in parts]
            yield from self._scene(self.steady, dict.fromkeys(parts), *needs)

    def _draws(self) -> int:
        """Images at once."""
        prompts = run_settings.texts_drawn(self.cfg)
        redrawn = self.cfg.validation.reconstructions if self.stage.redraws else 0
        redrawn = min(redrawn, redrawn if self.held_out is None else self.held_out)
        return min(int(self.cfg.validation.batch_size), max(prompts, redrawn))

    def _checkpoint(self) -> Iterator[Parts]:
        """A copy in host memory, where there is room for it."""
        copy = self.checkpoint_bytes()
        if self.on_host and self.cfg.checkpoint.behind and copy <= ROOM * (self.capacity - sum(self.steady.values())):
            yield self.steady | {COPY: copy}

    def checkpoint_bytes(self) -> int:
        networks = 1 + (self.cfg.trainer.ema_decay is not None)
        return self.dry_run.sizes().saved * networks + self.steady["optimizer"]
