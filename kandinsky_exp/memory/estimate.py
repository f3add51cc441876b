"""What a run holds in memory, by phase and by part: while it encodes, trains, validates, draws and writes a checkpoint.

On an accelerator its memory counts; else that of the process, where networks stay once they were loaded, and where
Python and the libraries are as well.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

from omegaconf import DictConfig

from kandinsky_exp import build, run_settings
from kandinsky_exp.memory.dry_run import DryRun, Passes
from kandinsky_exp.memory.tensor_tracker import Peak
from kandinsky_exp.models import pipelines
from kandinsky_exp.stages.base import DiffusionStage
from kandinsky_exp.training import class_images

# What the process of a run grows by beyond this one's before it holds a tensor: readers, code and scratch of kernels.
GROWS = 120_000_000
# Between blocks that the C library cuts from one heap, per byte of these: measured, see «Will it fit?» in the README.
GAPS = 0.4
MLFLOW = 100_000_000  # bytes that its client takes of the process, see the benchmarks of the README
ROOM = 0.9  # of the free memory: a checkpoint's copy takes no more

MAPPED = "mapped files"
NOTHING = Peak(0, 0, 0)
READ = ("frozen encoders", "trained weights", "frozen weights")  # of what is steady: there once the network is read

Parts = dict[str, int]


@dataclass(frozen=True)
class Phase:
    """Bytes by part. Parts that are never there at once have a negative one beside them."""

    name: str
    parts: Parts

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def needed(self) -> int:
        """Bytes that there has to be room for: the system drops what it can read from a file again."""
        return self.total - self.parts.get(MAPPED, 0)


@dataclass
class Phases:
    """All phases of a run.

    Args:
        images: that train, None where nobody knows yet; of `held_out` the same.
        encodes: whether something is not encoded yet.
        draws_class: whether class images have to be drawn.
        python: bytes of the process before it makes anything.
        capacity: bytes that the run may use.
    """

    cfg: DictConfig
    rehearsal: DryRun
    images: int | None
    held_out: int | None
    encodes: bool
    draws_class: bool
    python: int
    capacity: int

    def all(self) -> Iterator[Phase]:
        """Each of them, in the order in which they come."""
        yield from self.phases()
        yield from self._saving()

    def phases(self) -> Iterator[Phase]:
        """Those that there has to be room for."""
        yield from self._drawing_class()
        yield from self._loading()
        yield from self._encoding()
        yield from self._training()
        yield from self._validating()
        yield from self._drawing()

    def needed(self) -> int:
        """Bytes of the largest that there has to be room for."""
        return max(phase.needed for phase in self.phases())

    def least(self) -> int:
        """Bytes that training needs whatever its activations are: known without a step."""
        return sum(self.steady.values()) + self.rehearsal.sizes().trained_bytes

    @cached_property
    def passes(self) -> Passes:
        return self.rehearsal.passes()

    @cached_property
    def on_host(self) -> bool:
        """Whether the device's memory is that of the process."""
        return bool(self.rehearsal.device.type == "cpu")

    @cached_property
    def steady(self) -> Parts:
        """What is there from the first step to the last."""
        cfg, sizes = self.cfg, self.rehearsal.sizes()
        steady = self._base() | {"trained weights": sizes.trained_bytes, "frozen weights": sizes.frozen_bytes}
        steady["optimizer"] = self.rehearsal.optimizer().state
        if cfg.trainer.ema_decay is not None:
            steady["average"] = sizes.trained_bytes
        if not cfg.data.cache:
            steady["frozen encoders"] = self._parts(self.stage.encoders)
        if self.on_host and self._draws():
            steady["parts that draw"] = self._parts(self.stage.stays_loaded)
        return steady

    @cached_property
    def stage(self) -> type[DiffusionStage]:
        return build.stage_class(self.cfg)

    def _base(self) -> Parts:
        """Python and its libraries, where they are in the same memory."""
        if not self.on_host:
            return {}
        return {"Python": self.python + GROWS + (MLFLOW if self.cfg.tracker.name == "mlflow" else 0)}

    def _parts(self, names: Iterable[str]) -> int:
        return sum(self.rehearsal.part(name)[1] for name in names)

    def _mapped(self, *names: str) -> Parts:
        """Pages of the files of a frozen part, while it is read in another type than theirs: of the largest."""
        if not self.on_host:
            return {}
        return {MAPPED: max(self.rehearsal.mapped(name, self.cfg.precision.frozen_dtype) for name in names)}

    # --- the phases

    def _drawing_class(self) -> Iterator[Phase]:
        """One picture at a time, of base networks that leave again: the largest of what happens one after the other."""
        if self.draws_class:
            rows = pipelines.rows_at_once(1, guided=True)
            phases = []
            for parts in class_images.DRAWS_WITH:
                there = self._base() | {"parts that draw": self._parts(parts)}
                phases += [Phase("class", there | self._mapped(*parts))]
                phases += [
                    Phase("class", there | {"activations": self.rehearsal.answering(part, rows[part]).total})
                    for part in parts
                ]
            yield max(phases, key=lambda phase: phase.total)

    def _loading(self) -> Iterator[Phase]:
        """The part at which most is in the memory of the process: its file's pages beside it, what came before it."""
        if not self.on_host:
            return
        made, base, held, phases = self.rehearsal, self._base(), 0, []
        for part in self.stage.encoders if self.encodes else ():
            held += made.part(part)[1]
            phases.append(Phase("loading", base | {"frozen encoders": held} | self._mapped(part)))
        steady = self._base() | {name: self.steady.get(name, 0) for name in READ}
        dtype = "float32" if self.cfg.adapter.name == "none" else self.cfg.precision.frozen_dtype
        phases.append(Phase("loading", steady | {MAPPED: made.mapped(self.stage.part, dtype)}))
        yield max(phases, key=lambda phase: phase.total)

    def _encoding(self) -> Iterator[Phase]:
        if not (self.encodes and self.cfg.data.cache):
            return
        made = self.rehearsal
        batch = build.encode_settings(self.cfg, made.stage, made.device).batch_size
        parts = self._base() | {"frozen encoders": self._parts(self.stage.encoders)}
        yield Phase("encoding", parts | {"activations": made.encoding(min(batch, self.images or batch)).total})

    def _training(self) -> Iterator[Phase]:
        passes, made = self.passes, self.rehearsal
        parts = self.steady | {"gradients": passes.gradients, "activations": passes.activations}
        peak = max(passes.peak.total, passes.gradients + made.optimizer().temporary)
        if not self.cfg.data.cache:
            encoding = made.encoding(run_settings.shown(self.cfg)).total
            # On the CPU batches are encoded between the steps, elsewhere beside them.
            peak = max(peak, encoding) if self.on_host else peak + encoding
        parts["not at once"] = peak - passes.gradients - passes.activations
        yield Phase("training", parts | self._gaps())

    def _validating(self) -> Iterator[Phase]:
        if self.held_out != 0:
            batch = min(self.cfg.validation.batch_size, self.held_out or self.cfg.validation.batch_size)
            yield self._between_steps("validation", {}, self.rehearsal.validation(batch))

    def _drawing(self) -> Iterator[Phase]:
        """The largest of what happens one after the other to draw images."""
        scenes = [
            self._between_steps("drawing", {"parts that draw": self._parts(parts)}, need)
            for parts, needs in self._scenes()
            for need in needs
        ]
        scenes += [
            self._between_steps("drawing", {"parts that draw": self._parts(parts)} | self._mapped(*parts), NOTHING)
            for parts, _ in self._scenes()
        ]
        if scenes:
            yield max(scenes, key=lambda phase: phase.total)

    def _between_steps(self, name: str, parts: Parts, need: Peak) -> Phase:
        """What comes after steps, in the room that they leave."""
        if not self.on_host:
            return Phase(name, self.steady | parts | {"activations": need.total})
        kept = self.passes.peak.small
        beyond = min(need.total, need.large + max(0, need.small - kept))
        return Phase(name, self.steady | parts | {"kept of steps": kept, "activations": beyond} | self._gaps())

    def _gaps(self) -> Parts:
        """Between small blocks of host memory, once a step was made."""
        if not self.on_host:
            return {}
        return {"gaps": int(GAPS * self.passes.peak.small)}

    def _saving(self) -> Iterator[Phase]:
        """A checkpoint's copy in host memory, where there is room for it."""
        copy, kept = self.snapshot_bytes(), self.passes.peak.small
        steady = sum(self.steady.values())
        if self.on_host and self.cfg.checkpoint.behind and copy <= ROOM * (self.capacity - steady - kept):
            parts = {"kept of steps": kept, "copy": max(0, copy - kept)}
            yield Phase("checkpoint", self.steady | parts | self._gaps())

    def snapshot_bytes(self) -> int:
        """Of a checkpoint's tensors."""
        state = self.steady["optimizer"]
        return self.network_bytes() * (1 + (self.cfg.trainer.ema_decay is not None)) + state

    def network_bytes(self) -> int:
        """What is saved of the network."""
        return self.rehearsal.sizes().saved

    # --- drawing

    def _draws(self) -> int:
        """Images at once."""
        prompts = len(run_settings.prompts(self.cfg.validation.prompts))
        redrawn = self.cfg.validation.reconstructions if self.stage.redraws else 0
        redrawn = min(redrawn, redrawn if self.held_out is None else self.held_out)
        return min(int(self.cfg.validation.batch_size), max(prompts, redrawn))

    def _scenes(self) -> Iterator[tuple[list[str], list[Peak]]]:
        """(frozen parts on the device, activations of what they do there one after the other)."""
        count, own = self._draws(), self.stage.part
        if not count:
            return
        rows = pipelines.rows_at_once(count, self.cfg.validation.guidance_scale > 1)
        prompts = run_settings.prompts(self.cfg.validation.prompts)
        for parts in self.stage.draws_with:
            if prompts or own in parts:  # what is redrawn needs no embedding of a prompt
                frozen = [*(self.stage.stays_loaded if self.on_host else ()), *(part for part in parts if part != own)]
                needs = [self.rehearsal.answering(part, rows[part], part == own) for part in parts]
                yield list(dict.fromkeys(frozen)), needs
