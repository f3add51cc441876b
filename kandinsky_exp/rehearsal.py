"""A run's networks and what it does with them, on tensors that have shapes and no data: how much memory it needs.

The real code runs – the stage's loss, its adapter, checkpointing, mixed precision, the backward pass – and takes the
kernels that it would take with data; `LiveBytes` follows what is alive. What a kernel takes inside itself is not seen.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from omegaconf import DictConfig
from PIL import Image
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from kandinsky_exp import build, optimizer_state
from kandinsky_exp.described import DescribedWeights, give_fakes
from kandinsky_exp.live_bytes import LiveBytes
from kandinsky_exp.optimizer_state import StepNeed
from kandinsky_exp.stages.base import Features

OF_IMAGES, OF_CAPTIONS = ("clip_pixels", "pixels"), ("input_ids", "text_mask")


@dataclass(frozen=True)
class Passes:
    """Bytes that the passes of one optimizer step need beyond weights, optimizer and average.

    Args:
        gradients: what is left after the last one.
        activations: what the forward pass leaves, or the peak holds beside all gradients.
        peak: of both together: gradients come while activations go.
    """

    gradients: int
    activations: int
    peak: int


class Mixed(nn.Module):
    """A network with a run's mixed precision around it, as Accelerate puts it there."""

    def __init__(self, network: nn.Module, autocast: Callable[[], torch.autocast]) -> None:
        super().__init__()
        self.network, self.autocast = network, autocast

    def forward(self, *arguments: Any, **options: Any) -> Any:
        with self.autocast():
            return self.network(*arguments, **options)


class Rehearsal:
    """The stage of a run, built as the run builds it.

    Args:
        cfg: settings of a run.
        accelerator: of the device that would train.
    """

    def __init__(self, cfg: DictConfig, accelerator: Accelerator) -> None:
        self.cfg, self.accelerator, self.device = cfg, accelerator, accelerator.device
        self.weights = build.weights(cfg, DescribedWeights)
        self.stage = build.stage(cfg, self.weights)
        mixed = cfg.precision.mixed_precision != "no"
        self.network: Any = self.stage.place(torch.device("meta"), mixed_precision=mixed)
        self.mixed = Mixed(self.network, self._autocast)
        self.parameters = dict(self.network.named_parameters())  # on the meta device, as they stay here
        side = cfg.data.resolution  # a blank picture and an empty caption have the shapes of all others
        self.example = self.stage.preprocess(Image.new("RGB", (side, side)), "")
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._faked: set[int] = set()

    @property
    def trainable(self) -> list[Tensor]:
        return [value for value in self.parameters.values() if value.requires_grad]

    def optimizer(self) -> StepNeed:
        def make(weights: list[nn.Parameter]) -> torch.optim.Optimizer:
            return build.make_optimizer(self.cfg, weights, self.accelerator)

        return optimizer_state.measure(make, self.trainable, self.device)

    def passes(self) -> Passes:
        """Forward and backward, of two batches where gradients accumulate: the second one finds them there."""
        with self._faked_networks(self.network, *self._encoders()):
            features = self._features(self.cfg.trainer.batch_size)
            network = self.mixed.train()
            with LiveBytes(self._held(network, features)) as live:
                before, forward = live.now, 0
                for _ in range(min(2, self.cfg.trainer.grad_accumulation)):
                    loss = self.stage.loss(network, features, torch.Generator(self.device)).loss
                    forward = forward or live.peak - before
                    loss.backward()
                    del loss
                gradients, peak = live.now - before, live.peak - before
            network.zero_grad()
        return Passes(gradients, max(forward, peak - gradients), peak)

    def encoding(self, batch: int) -> int:
        """Activations of the encoders, which see images and captions apart."""
        with self._faked_networks(*self._encoders()):
            batches = [self._examples(batch, keys) for keys in (OF_IMAGES, OF_CAPTIONS)]
            return max(self._need(lambda b=some: self.stage.encode(b), *self._encoders()) for some in batches if some)

    def encoded(self) -> Features:
        """One picture and one caption as the encoders answer them: shapes, no data."""
        with self._faked_networks(*self._encoders()), torch.no_grad():
            return self.stage.encode(self._examples(1))

    def validation(self, batch: int) -> int:
        """Activations of the fixed-noise loss."""
        with self._faked_networks(self.network, *self._encoders()):
            features = self._features(batch)
            network, steps = self.mixed.eval(), torch.zeros(batch, dtype=torch.long, device=self.device)
            generator = torch.Generator(self.device)
            action = lambda: self.stage.loss(network, features, generator, steps)  # noqa: E731
            return self._need(action, network, held=features.values())

    def answering(self, part: str, batch: int) -> int:
        """Activations of a network that answers a batch while images are drawn."""
        network = self.network if part == self.stage.part else self.weights.load(part)
        with self._faked_networks(network), self._autocast():
            return self._need(lambda: self._ask(part, network.eval(), batch), network)

    def _ask(self, part: str, network: Any, batch: int) -> object:
        config, dtype = network.config, next(network.parameters()).dtype

        def some(*sides: int) -> Tensor:
            return torch.empty(batch, *sides, device=self.device, dtype=dtype)

        if part == "image_encoder":
            return network(some(3, config.image_size, config.image_size))
        if part == "text_encoder":
            return network(torch.zeros(batch, config.max_position_embeddings, device=self.device, dtype=torch.long))
        if part == "prior":
            embed, length = config.embedding_dim, config.num_embeddings
            return network(some(embed), 0, some(embed), some(length, embed), some(length).bool())
        side = self.cfg.data.resolution // self.weights.latent_scale()
        if part == "movq":
            return network.decode(some(config.latent_channels, side, side), force_not_quantize=True)
        condition = {"image_embeds": some(config.encoder_hid_dim)}
        return network(some(config.in_channels, side, side), 0, None, added_cond_kwargs=condition)

    # --- tensors without data

    def _encoders(self) -> list[Any]:
        return [self.weights.load(part) for part in self.stage.encoders]

    @contextlib.contextmanager
    def _faked_networks(self, *networks: Any) -> Iterator[None]:
        """Tensors without data are made inside; the networks have theirs, on the device of the run."""
        with self._mode:
            for network in networks:
                if id(network) not in self._faked:
                    give_fakes(network, self.device)
                    self._faked.add(id(network))
            yield

    def _autocast(self) -> torch.autocast:
        """Mixed precision of these settings; the accelerator may have another."""
        name = self.cfg.precision.mixed_precision
        dtype = torch.float16 if name == "fp16" else torch.bfloat16
        return torch.autocast(self.device.type, dtype=dtype, enabled=name != "no")

    def _examples(self, batch: int, keys: Iterable[str] = OF_IMAGES + OF_CAPTIONS) -> Features:
        chosen = {key: self.example[key] for key in keys if key in self.example}
        return {key: torch.empty((batch, *row.shape), dtype=row.dtype) for key, row in chosen.items()}

    def _features(self, batch: int) -> Features:
        with torch.no_grad():
            self.stage.use_null_condition(self.stage.encode_null())
            return {key: value.to(self.device) for key, value in self.stage.encode(self._examples(batch)).items()}

    @staticmethod
    def _held(network: nn.Module, features: Features) -> list[Tensor]:
        return [*network.parameters(), *network.buffers(), *features.values()]

    def _need(self, action: Callable[[], object], *networks: nn.Module, held: Iterable[Tensor] = ()) -> int:
        """Bytes beyond what is there, at most, without gradients."""
        weights = [value for network in networks for value in (*network.parameters(), *network.buffers())]
        with torch.no_grad(), LiveBytes([*weights, *held]) as live:
            before = live.now
            action()
        return live.peak - before
