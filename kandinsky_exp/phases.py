"""What a run holds in memory, by phase and by part: while it encodes, trains, validates, draws and writes a checkpoint.

On an accelerator its memory counts; else that of the process, where networks stay once they were loaded, and where
Python and the libraries are as well.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from kandinsky_exp import build
from kandinsky_exp.rehearsal import Passes, Rehearsal

MLFLOW = 100_000_000  # bytes that its client takes of the process, see the benchmarks of the README
ROOM = 0.9  # of the free memory: a checkpoint's copy takes no more
BASE_BYTES = {"int8": 1.0, "nf4": 0.53}  # per weight of a linear layer, scales included

Parts = dict[str, int]


@dataclass(frozen=True)
class Phase:
    """Bytes by part. Parts that are never there at once have a negative one beside them."""

    name: str
    parts: Parts

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def size_of(tensors: "list[Tensor]") -> int:
    return sum(tensor.nbytes for tensor in tensors)


@dataclass
class Phases:
    """All phases of a run.

    Args:
        images: that train, None where nobody knows yet; of `held_out` the same.
        encodes: whether something is not encoded yet.
        python: bytes of the process before it makes anything.
        capacity: bytes that the run may use.
    """

    cfg: DictConfig
    rehearsal: Rehearsal
    images: int | None
    held_out: int | None
    encodes: bool
    python: int
    capacity: int

    def all(self) -> Iterator[Phase]:
        """Each of them, in the order in which they come."""
        yield from self.phases()
        yield from self._saving()

    def phases(self) -> Iterator[Phase]:
        """Those that there has to be room for."""
        yield from self._encoding()
        yield from self._training()
        yield from self._validating()
        yield from self._drawing()

    def needed(self) -> int:
        """Bytes of the largest that there has to be room for."""
        return max(phase.total for phase in self.phases())

    def least(self) -> int:
        """Bytes that training needs whatever its activations are: known without a step."""
        return sum(self.steady.values()) + size_of(self.rehearsal.trainable)

    @cached_property
    def passes(self) -> Passes:
        return self.rehearsal.passes()

    @cached_property
    def on_host(self) -> bool:
        """Whether the device's memory is that of the process."""
        return self.rehearsal.device.type == "cpu"

    @cached_property
    def steady(self) -> Parts:
        """What is there from the first step to the last."""
        made, cfg = self.rehearsal, self.cfg
        trainable = size_of(made.trainable)
        steady = self._base() | {"trained weights": trainable, "frozen weights": frozen_bytes(cfg, made)}
        steady["optimizer"] = made.optimizer().state
        if cfg.trainer.ema_decay is not None:
            steady["average"] = trainable
        if not cfg.data.cache:
            steady["frozen encoders"] = self._parts(made.stage.encoders)
        if self.on_host and self._draws():
            steady["parts that draw"] = self._parts(self._stay())
        return steady

    def _base(self) -> Parts:
        """Python and its libraries, where they are in the same memory."""
        if not self.on_host:
            return {}
        return {"Python": self.python + (MLFLOW if self.cfg.tracker.name == "mlflow" else 0)}

    def _parts(self, names: "tuple[str, ...] | list[str]") -> int:
        return sum(size_of([*self.rehearsal.weights.load(name).parameters()]) for name in names)

    # --- the phases

    def _encoding(self) -> Iterator[Phase]:
        if not (self.encodes and self.cfg.data.cache):
            return
        made = self.rehearsal
        batch = build.encode_settings(self.cfg, made.device).batch_size
        parts = self._base() | {"frozen encoders": self._parts(made.stage.encoders)}
        if self.on_host and self.cfg.adapter.name != "none":  # it was read to be frozen
            parts["frozen weights"] = self.steady["frozen weights"]
        yield Phase("encoding", parts | {"activations": made.encoding(min(batch, self.images or batch))})

    def _training(self) -> Iterator[Phase]:
        passes, made = self.passes, self.rehearsal
        parts = self.steady | {"gradients": passes.gradients, "activations": passes.activations}
        peak = max(passes.peak, passes.gradients + made.optimizer().temporary)
        if not self.cfg.data.cache:
            encoding = made.encoding(self.cfg.trainer.batch_size)
            # On the CPU batches are encoded between the steps, elsewhere beside them.
            peak = max(peak, encoding) if self.on_host else peak + encoding
        parts["not at once"] = peak - passes.gradients - passes.activations
        yield Phase("training", parts)

    def _validating(self) -> Iterator[Phase]:
        if self.held_out == 0:
            return
        batch = min(self.cfg.validation.batch_size, self.held_out or self.cfg.validation.batch_size)
        parts = self.steady | self._stored() | {"activations": self.rehearsal.validation(batch)}
        yield Phase("validation", parts)

    def _drawing(self) -> Iterator[Phase]:
        """The largest of what happens one after the other to draw images."""
        scenes = [
            self.steady | self._stored() | {"parts that draw": self._parts(parts), "activations": max(needs)}
            for parts, needs in self._scenes()
        ]
        if scenes:
            yield Phase("drawing", max(scenes, key=lambda parts: sum(parts.values())))

    def _saving(self) -> Iterator[Phase]:
        """A checkpoint's copy in host memory, where there is room for it."""
        copy = self.snapshot_bytes()
        steady = sum(self.steady.values())
        if self.on_host and self.cfg.checkpoint.behind and copy <= ROOM * (self.capacity - steady):
            yield Phase("checkpoint", self.steady | {"copy": copy})

    def snapshot_bytes(self) -> int:
        """Of a checkpoint's tensors."""
        state = self.steady["optimizer"]
        return self.network_bytes() * (1 + (self.cfg.trainer.ema_decay is not None)) + state

    def network_bytes(self) -> int:
        """What is saved of the network."""
        made = self.rehearsal
        return size_of([*made.stage.snapshot(made.network, {}).tensors.values()])

    def _stored(self) -> Parts:
        """The raw weights, put aside in host memory while the averages are used."""
        return {"raw weights": self.steady["average"]} if self.on_host and "average" in self.steady else {}

    # --- drawing

    def _draws(self) -> int:
        """Images at once."""
        prompts = len(build.prompts(self.cfg.validation.prompts))
        redrawn = self.cfg.validation.reconstructions if self.rehearsal.stage.name == "decoder" else 0
        redrawn = min(redrawn, redrawn if self.held_out is None else self.held_out)
        return min(self.cfg.validation.batch_size, max(prompts, redrawn))

    def _stay(self) -> list[str]:
        """Frozen parts that are loaded to draw and stay loaded."""
        return ["movq"] if self.rehearsal.stage.name == "decoder" else ["text_encoder", "unet", "movq"]

    def _scenes(self) -> Iterator[tuple[list[str], list[int]]]:
        """(frozen parts on the device, activations of what they do there one after the other)."""
        count, needs = self._draws(), self.rehearsal.answering
        if not count:
            return
        pairs = count * (2 if self.cfg.validation.guidance_scale > 1 else 1)  # with the condition and without
        stay = self._stay() if self.on_host else []

        def loaded(*parts: str) -> list[str]:
            return list(dict.fromkeys([*stay, *parts]))

        if build.prompts(self.cfg.validation.prompts):
            prior = [] if self.rehearsal.stage.name == "prior" else ["prior"]
            yield loaded("text_encoder", *prior), [needs("text_encoder", count), needs("prior", pairs)]
            if not prior:
                yield loaded("image_encoder"), [needs("image_encoder", 1)]
        unet = [] if self.rehearsal.stage.name == "decoder" else ["unet"]
        yield loaded("movq", *unet), [needs("unet", pairs), needs("movq", count)]


def frozen_bytes(cfg: DictConfig, made: Rehearsal) -> int:
    """Weights of the network that do not train, and its buffers; a quantised base takes fewer bytes."""
    frozen = {name: value for name, value in made.parameters.items() if not value.requires_grad}
    each = BASE_BYTES.get(OmegaConf.select(cfg, "adapter.base_precision"))
    linear = {f"{name}.weight" for name, part in made.network.named_modules() if isinstance(part, torch.nn.Linear)}
    sizes = (value.numel() * each if each and name in linear else value.nbytes for name, value in frozen.items())
    return int(sum(sizes)) + size_of([*made.network.buffers()])

