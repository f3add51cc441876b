"""The seam between the loop and what is trained, and the part of the objective that all stages share.

The loop prepares `stage.network` and hands the prepared network back in. A stage reads features, never pixels: they
come from a cache or from `encode` on the fly, and the loss cannot tell. What others have to know of a stage it
declares, so that a further one is one subclass and one yaml.
"""

import contextlib
import hashlib
import inspect
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor, nn

from kandinsky_exp.data.preprocess import Preprocess
from kandinsky_exp.models import adapters, compatibility
from kandinsky_exp.models.adapters import NetworkFiles
from kandinsky_exp.models.pipelines import SampleSettings
from kandinsky_exp.models.weights import Weights
from kandinsky_exp.stages import compiling, diffusion
from kandinsky_exp.stages.attention import enable_attention
from kandinsky_exp.stages.declarations import Declarations
from kandinsky_exp.stages.diffusion import Generators
from kandinsky_exp.stages.stage_loss import StageLoss as StageLoss

Features = dict[str, Tensor]


class DiffusionStage(Declarations):
    """The shared objective: noise the clean features, ask the network, weigh the squared error.

    A class declares `name`, `part`, `encoders`, and what of the rest is not as in `Declarations`.

    Args:
        weights: where the parts come from.
        snr_gamma: Min-SNR-γ, None for no weighting.
        condition_dropout: probability of the null condition per sample, for classifier-free guidance.
    """

    preprocess: Preprocess
    alphas_cumprod: Tensor
    prediction_type: diffusion.PredictionType

    def __init__(self, weights: Weights, *, snr_gamma: float | None, condition_dropout: float) -> None:
        self.weights = weights
        self.snr_gamma = snr_gamma
        self.condition_dropout = condition_dropout
        self.device = torch.device("cpu")  # of the constants, and of features
        self._null: Features | None = None

    @property
    def encoded(self) -> str:
        """What a list of tables calls its features."""
        return " with ".join([self.encodes_as, *self.preprocess.companions])

    def read_companions(self, data: Mapping[str, Any]) -> None:
        """Let `encode` get what belongs to pictures, as the settings of the data say."""
        if kinds := self.companions(data):
            companions = {name: kind(self.weights.latent_scale()) for name, kind in kinds.items()}
            self.preprocess = replace(self.preprocess, companions=companions)

    @cached_property
    def network(self) -> nn.Module:
        """What trains; loaded when first asked for, which to encode is not."""
        return self.load_network()

    @classmethod
    def check_weights(cls, weights: Weights) -> None:
        """Refuse weights that cannot train, before anything loads.

        Raises:
            ConfigError: they are none that training can begin with.
        """

    def load_network(self) -> nn.Module:
        network: nn.Module = self.weights.load_trainable(self.part)
        return network

    @classmethod
    def network_without_data(cls, weights: Weights) -> nn.Module:
        """The network on the meta device, where nothing takes memory or time."""
        network: nn.Module = compatibility.without_data(cls.part, weights.folder(cls.part))
        return network

    @property
    def num_timesteps(self) -> int:
        return len(self.alphas_cumprod)

    @abstractmethod
    def clean(self, features: Features) -> Tensor:
        """x_0, (B, …): what is noised and learned."""

    @abstractmethod
    def predict(self, network: nn.Module, noisy: Tensor, timesteps: Tensor, features: Features) -> Tensor:
        """The network's answer; channels beyond those of x_0 are a learned variance."""

    @abstractmethod
    def encode_null(self) -> Features:
        """The null condition from the frozen encoders, rows of batch size 1."""

    @abstractmethod
    def encode(self, examples: dict[str, Tensor]) -> Features:
        """Frozen encoders over preprocessed examples, no gradient; pictures and captions may come apart."""

    def encoding_fingerprint(self) -> str:
        """Follows what `encode` computes: the encoders' files, and the method's source, if it is not the package's."""
        weights, encode = self.weights.fingerprint(self.encoders), type(self).encode
        if encode.__module__.startswith("kandinsky_exp."):
            return weights
        text = f"{weights} {encode.__module__}.{encode.__qualname__}"
        with contextlib.suppress(OSError):  # of a notebook's cell, say, there is no source
            text += inspect.getsource(encode)
        return hashlib.sha256(text.encode()).hexdigest()

    def encode_batch(self, device: torch.device) -> int:
        """Pictures per call of `encode`: as many as fill an accelerator; on the CPU as many as still gain."""
        side = self.preprocess.resolution
        if device.type == "cpu":
            return 8
        return 64 if side is None else max(1, 16 * 512**2 // side**2)

    def dummy_inputs(self, batch: int) -> list[Features]:
        """What `encode` gets of `batch` examples, pictures and captions apart: tensors whose shapes alone count."""
        side, extra = self.preprocess.resolution or 64, {key: np.zeros(size) for key, size in self.extra_inputs.items()}
        bare = replace(self.preprocess, companions={})
        rows = [bare(Image.new("RGB", (side, side)), None, extra), bare(None, "")]
        for name, companion in self.preprocess.companions.items():
            rows[0][name] = torch.empty(companion.shape((side, side)), dtype=torch.uint8)
        return [{key: torch.empty((batch, *x.shape), dtype=x.dtype) for key, x in row.items()} for row in rows if row]

    def shown_inputs(self, features: Features, settings: SampleSettings) -> dict[str, list[Image.Image]]:
        """What else `reconstruct` draws these held-out pictures from, by what the grid calls it."""
        return {}

    def judge(self, network: nn.Module, features: Features, settings: SampleSettings) -> dict[str, float]:
        """Metrics of what is drawn from the features of held-out pictures, by name; as `reconstruct` gets them."""
        return {}

    @abstractmethod
    def sample(self, network: nn.Module, prompts: list[str], settings: SampleSettings) -> list[Image.Image]:
        """Images for prompts, through the whole of Kandinsky."""

    def reconstruct(self, network: nn.Module, features: Features, settings: SampleSettings) -> list[Image.Image]:
        """Images from the features of real ones; none where the network has no say in what those look like.

        Args:
            features: among them `pixels` (B, 3, H, W), the pictures themselves, in [-1, 1], and what belongs to them.
        """
        return []

    def set_attention(self, attention: str) -> None:
        """How the network computes attention, see `enable_attention`."""
        enable_attention(self.network, attention)

    def compile(self, regional: bool) -> None:
        """Have the network compiled when it is first asked: as a whole, or its blocks, those of the same shape once."""
        compiling.compile_blocks(self.network, self.regions) if regional else self.network.compile()

    @abstractmethod
    def enable_gradient_checkpointing(self) -> None:
        """Recompute activations in the backward pass instead of keeping them."""

    def faster(self) -> tuple[float, dict[str, int]]:
        """What learns faster than the rest, and by which factor: names of parameters, and their first new input."""
        return 1.0, {}

    def null_condition(self) -> Features:
        """The features that stand for «no condition», as single rows."""
        if self._null is None:
            self._null = self._placed(self.encode_null())
        return self._null

    def use_null_condition(self, features: Features) -> None:
        """Take the null condition from a cache, so that no encoder has to load."""
        self._null = self._placed(features)

    def _placed(self, features: Features) -> Features:
        return {key: value.to(self.device) for key, value in features.items()}

    def loss(
        self, network: nn.Module, features: Features, generator: Generators, timesteps: Tensor | None = None
    ) -> StageLoss:
        """The objective on one batch. Conditions are dropped only while `network.training`.

        Args:
            features: `loss_weight` (B,) among them weighs the samples in every term of the loss.
            generator: one for the batch, or one per sample (then `timesteps` must be given).
            timesteps: (B,); drawn uniformly when None.
        """
        features = self.with_drawn(features, generator)
        clean = self.clean(features)
        noise = randn_tensor(tuple(clean.shape), generator=generator, device=clean.device, dtype=clean.dtype)
        if timesteps is None:
            size = (len(clean),)
            timesteps = torch.randint(len(self.alphas_cumprod), size, generator=generator, device=clean.device)  # type: ignore[arg-type]
        if network.training and self.condition_dropout > 0:
            features = self._drop_condition(features, generator, clean)
        noisy = diffusion.add_noise(clean, noise, timesteps, self.alphas_cumprod)
        output = self.predict(network, noisy, timesteps, features).float()
        target = diffusion.training_target(clean, noise, timesteps, self.alphas_cumprod, self.prediction_type)
        errors = (output[:, : clean.shape[1]] - target).square()
        per_sample = errors.flatten(1).mean(1)
        weights = features.get("loss_weight")
        loss = diffusion.weighted_mean(self.weigh(per_sample, timesteps, features), weights)
        extra = self.variance_term(output, clean, noisy, timesteps, weights)
        measured = self.measure(errors.detach(), features)
        return StageLoss(loss if extra is None else loss + extra, per_sample.detach(), timesteps, measured)

    def with_drawn(self, features: Features, generator: Generators) -> Features:
        """The features, and what a stage draws anew for each batch beside noise and timesteps: holes, say."""
        return features

    def measure(self, errors: Tensor, features: Features) -> dict[str, Tensor]:
        """The `measured` of a `StageLoss`, from the squared errors (B, …)."""
        return {}

    def variance_term(
        self, output: Tensor, clean: Tensor, noisy: Tensor, timesteps: Tensor, weights: Tensor | None
    ) -> Tensor | None:
        """A loss for a learned variance in the output, its samples weighted by `weights` (B,); few stages have one."""
        return None

    def weigh(self, per_sample: Tensor, timesteps: Tensor, features: Features) -> Tensor:
        """The squared errors (B,) as they count in the loss."""
        if self.snr_gamma is None:
            return per_sample
        weights = diffusion.min_snr_weights(timesteps, self.alphas_cumprod, self.snr_gamma, self.prediction_type)
        return per_sample * weights

    def _drop_condition(self, features: Features, generator: Generators, like: Tensor) -> Features:
        drop = diffusion.uniform(len(like), generator, like.device) < self.condition_dropout
        replaced = {}
        for key, null in self.null_condition().items():
            given = features[key]
            # No caption is shorter than the empty one: of its padding as much as the batch has.
            row = null[:, : given.shape[1]].to(given.dtype)
            replaced[key] = torch.where(drop.view(-1, *[1] * (given.ndim - 1)), row, given)
        return {**features, **replaced}

    def place(self, device: torch.device) -> nn.Module:
        """The network on the device, its weights in the order in memory that trains fastest there; and the constants.

        Features have to be on this device from now on: no loss moves anything.
        """
        self.network.to(device)
        self.place_constants(device)
        return self.order_weights(device)

    def order_weights(self, device: torch.device) -> nn.Module:
        """The network with its weights as they are ordered in memory on a device.

        Channels-last is measured on the CPU alone. On CUDA it does not outlive GroupNorm under autocast, which returns
        contiguous memory in float32, so that each convolution would bring it back: none of it there until measured.
        """
        if device.type == "cpu":
            self.network.to(memory_format=self.memory_format)  # type: ignore[call-overload]  # missing in its types
        return self.network

    def place_constants(self, device: torch.device) -> None:
        """All that a loss needs besides network and features."""
        self.device = device
        self.alphas_cumprod = self.alphas_cumprod.to(device)
        if self._null is not None:
            self._null = self._placed(self._null)

    def snapshot(self, network: nn.Module, trained: Mapping[str, Tensor]) -> NetworkFiles:
        """The network in diffusers layout, or its adapter alone where that is what trains, to be written.

        Args:
            trained: takes the place of the parameters of these names.
        """
        return adapters.snapshot(network, trained)
