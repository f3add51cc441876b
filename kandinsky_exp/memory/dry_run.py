"""A dry run: what a run does with its networks, on tensors that have shapes and no data, to measure their memory.

The real code runs: the stage's loss, its adapter, checkpointing, mixed precision, the backward pass. It takes the
kernels that it would take with data; `TensorTracker` follows what is alive. What a kernel takes inside is not seen.
"""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from accelerate import Accelerator
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from kandinsky_exp import build, run_settings
from kandinsky_exp.memory import optimizer_state
from kandinsky_exp.memory.optimizer_state import StepNeed
from kandinsky_exp.memory.tensor_tracker import TensorTracker
from kandinsky_exp.models import adapters, compatibility, pipelines, weight_files
from kandinsky_exp.models.components import MODELS
from kandinsky_exp.models.weights import Weights
from kandinsky_exp.stages.base import DiffusionStage, Features

Method = TypeVar("Method", bound=Callable[..., Any])

NETWORK = ("adapter", "precision.name", "model")  # the settings that decide what the network is
BASE = "adapter.base_precision"
BASE_BYTES = {"int8": 1.0, "nf4": 0.53}  # per frozen weight of a linear layer, scales included


def once(*settings: str) -> Callable[[Method], Method]:
    """One answer for all dry runs that share their answers and agree in these settings."""

    def remembered(method: Method) -> Method:
        @functools.wraps(method)
        def ask(self: "DryRun", *arguments: Any) -> Any:
            values = [str(OmegaConf.select(self.cfg, setting)) for setting in settings]
            key = (method.__name__, arguments, *values)
            if key not in self.answers:
                self.answers[key] = method(self, *arguments)
            return self.answers[key]

        return cast(Method, ask)

    return remembered


@dataclass(frozen=True)
class Sizes:
    """Numbers of weights, and bytes: `saved` is what a checkpoint holds of the network."""

    trained: int
    frozen: int
    trained_bytes: int
    frozen_bytes: int
    saved: int


@dataclass(frozen=True)
class Passes:
    """Bytes beyond weights, optimizer and average: left after the passes of a step, and at most during them."""

    gradients: int
    peak: int


class MetaWeights(Weights):
    """Networks as their configs describe them, on the meta device: shapes and types, no data; no tensor is fetched."""

    def _tensors(self, name: str) -> list[str]:
        return []

    def _made(self, part: str, folder: Path, dtype: str, bits: str | None) -> Any:
        if part not in MODELS:
            return super()._made(part, folder, dtype, bits)
        network = compatibility.without_data(part, folder)
        return nn.Module.to(network, getattr(torch, dtype))  # diffusers' own warns of modules to keep in float32

    def tensors(self, part: str, names: Iterable[str]) -> dict[str, Tensor]:
        """Ones: a stage looks at them, and refuses what cannot be."""
        shapes = compatibility.expected_shapes(part, self.folder(part))
        return {name: torch.ones(shapes[name]) for name in names}


class DryRun:
    """The stage of a run, built as the run builds it once something is asked that is not known.

    Args:
        cfg: settings of a run.
        accelerator: of the device that would train.
        answers: shared by the dry runs of several settings.
    """

    def __init__(self, cfg: DictConfig, accelerator: Accelerator, answers: dict[Any, Any] | None = None) -> None:
        self.cfg = cfg
        is_cpu = accelerator.device.type == "cpu"  # with a number where processes are several: fakes take it seriously
        self.device = torch.device("cpu") if is_cpu else accelerator.device
        self.answers = {} if answers is None else answers
        self.weights = build.weights(cfg, MetaWeights)
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._faked: set[int] = set()

    @cached_property
    def stage(self) -> DiffusionStage:
        cfg = self.cfg.copy()
        OmegaConf.update(cfg, BASE, None)  # there is nothing to quantise: `sizes` counts what it would come to
        OmegaConf.update(cfg, "adapter.init", "default")  # nor weights to begin with: `sizes` counts these too
        if cfg.trainer.attention == "xformers":  # it has kernels for data alone; fused attention keeps as little
            OmegaConf.update(cfg, "trainer.attention", "sdpa")
        return build.stage(cfg, self.weights)

    @cached_property
    def network(self) -> Any:
        """As Accelerate prepares it: in mixed precision of these settings, the accelerator may have another."""
        network: Any = self.stage.order_weights(self.device)  # it has no data to be placed
        self.stage.place_constants(self.device)
        name = self.cfg.precision.mixed_precision
        dtype = torch.float16 if name == "fp16" else torch.bfloat16
        network.forward = torch.autocast(self.device.type, dtype=dtype, enabled=name != "no")(network.forward)
        return network

    # --- sizes

    @once(*NETWORK)
    def sizes(self) -> Sizes:
        """Of the network that trains, its buffers among what is frozen; a quantised base takes fewer bytes."""
        trained = self._trainable()
        frozen = {name: value for name, value in self.network.named_parameters() if not value.requires_grad}
        each = BASE_BYTES.get(self.cfg.adapter.base_precision)
        linear = {f"{name}.weight" for name, part in self.network.named_modules() if isinstance(part, nn.Linear)}
        sizes = [value.numel() * each if each and name in linear else value.nbytes for name, value in frozen.items()]
        return Sizes(
            sum(value.numel() for value in trained),
            sum(value.numel() for value in frozen.values()),
            sum(value.nbytes for value in trained),
            int(sum(sizes)) + sum(value.nbytes for value in self.network.buffers()),
            sum(value.nbytes for value in self.stage.snapshot(self.network, {}).tensors.values())
            * (2 if self.cfg.adapter.init in adapters.TAKEN_FROM_WEIGHTS else 1),  # both go into the file
        )

    @once("precision.name")
    def part(self, name: str) -> tuple[int, int]:
        """(weights, bytes) of a frozen part."""
        weights = [*self.weights.load(name).parameters()]
        return sum(value.numel() for value in weights), sum(value.nbytes for value in weights)

    @once("weights")
    def mapped(self, name: str, dtype: str) -> int:
        """Bytes of a part's files that lie in memory beside it while it is read: what has its type stays in them."""
        files = [file for file in self.weights.files(name) if file.suffix == ".safetensors"]
        if files:
            return weight_files.bytes_to_cast(files, dtype)
        return self.part(name)[0] * (2 if dtype == "float32" else 4)  # not fetched yet: of the other type

    @once(*NETWORK, "optimizer")
    def optimizer(self) -> StepNeed:
        return optimizer_state.measure(self.cfg, self._trainable(), self.device)

    def _trainable(self) -> list[Tensor]:
        return [value for value in self.network.parameters() if value.requires_grad]

    # --- what happens in a run

    @once(*NETWORK, "trainer", "data")
    def passes(self) -> Passes:
        """Forward and backward, of two batches where gradients accumulate: the second one finds them there."""
        with self._fakes(self.network, *self._encoders()):
            features = self._features(run_settings.shown(self.cfg))
            network = self.network.train()
            with TensorTracker(self._held([network], features.values())) as live:
                for _ in range(min(2, self.cfg.trainer.grad_accumulation)):
                    loss = self.stage.loss(network, features, torch.Generator(self.device)).loss
                    loss.backward()  # type: ignore[no-untyped-call]  # untyped
                    del loss
                passes = Passes(live.now, live.peak)
            network.zero_grad()
        return passes

    @once("precision.name", "data.resolution", "model")
    def encoding(self, batch: int) -> int:
        """Activations of the encoders, which see images and captions apart."""
        with self._fakes(*self._encoders()):
            batches = self.stage.dummy_inputs(batch)
            return max(self._need(partial(self.stage.encode, some), *self._encoders()) for some in batches)

    @once("precision.name", "data.resolution", "model")
    def encoded(self) -> list[dict[str, torch.Size]]:
        """The shapes of what the encoders make of a picture, and of a caption."""
        with self._fakes(*self._encoders()), torch.no_grad():
            batches = [self.stage.encode(some) for some in self.stage.dummy_inputs(1)]
        return [{name: value.shape[1:] for name, value in features.items()} for features in batches]

    @once(*NETWORK, "trainer.gradient_checkpointing", "data.resolution")
    def validation(self, batch: int) -> int:
        """Activations of the fixed-noise loss."""
        with self._fakes(self.network, *self._encoders()):
            features = self._features(batch)
            network, steps = self.network.eval(), torch.zeros(batch, dtype=torch.long, device=self.device)
            action = partial(self.stage.loss, network, features, torch.Generator(self.device), steps)
            return self._need(action, network, held=features.values())

    @once(*NETWORK, "trainer.gradient_checkpointing", "data.resolution")
    def answering(self, part: str, batch: int, trains: bool = False) -> int:
        """Activations of a network asked while images are drawn: a frozen one, or the one that trains."""
        if trains:
            with self._fakes(self.network, *self._encoders()):
                features, steps = self._features(batch), torch.zeros(batch, dtype=torch.long, device=self.device)
                features = self.stage.with_drawn(features, torch.Generator(self.device))
                noisy = self.stage.clean(features)
                action = partial(self.stage.predict, self.network.eval(), noisy, steps, features)
                return self._need(action, self.network, held=[*features.values(), noisy])
        network, side = self.weights.load(part), self.cfg.data.resolution // self.weights.latent_scale()
        with self._fakes(network):
            return self._need(partial(pipelines.ask, part, network.eval(), batch, side, self.device), network)

    # --- tensors without data

    def _encoders(self) -> list[Any]:
        return [self.weights.load(part) for part in self.stage.encoders]

    @contextlib.contextmanager
    def _fakes(self, *networks: Any) -> Iterator[None]:
        """Tensors without data are made inside; the networks have theirs, on the device of the run."""
        with self._mode:
            for network in networks:
                if id(network) not in self._faked:
                    network.to_empty(device=self.device)
                    self._faked.add(id(network))
            yield

    def _features(self, batch: int) -> Features:
        with torch.no_grad():
            self.stage.use_null_condition(self.stage.encode_null())
            encoded = [self.stage.encode(some) for some in self.stage.dummy_inputs(batch)]
            return {key: value.to(self.device) for features in encoded for key, value in features.items()}

    @staticmethod
    def _held(networks: Iterable[nn.Module], features: Iterable[Tensor]) -> list[Tensor]:
        return [value for one in networks for value in (*one.parameters(), *one.buffers())] + [*features]

    def _need(self, action: Callable[[], object], *networks: nn.Module, held: Iterable[Tensor] = ()) -> int:
        """Bytes beyond what is there, without gradients."""
        live = TensorTracker(self._held(networks, held))
        with torch.no_grad(), live:
            action()
        return live.peak
