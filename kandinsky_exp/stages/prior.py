"""The prior: from a caption to the CLIP embedding of an image that it could describe."""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from diffusers.models.attention import BasicTransformerBlock
from PIL import Image
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kandinsky_exp.data.preprocess import Preprocess
from kandinsky_exp.errors import ConfigError
from kandinsky_exp.models import pipelines, unpadded_prior
from kandinsky_exp.models.weights import Weights
from kandinsky_exp.stages.base import DiffusionStage, Features

LENGTHS_APART = 8  # of text, tokens, where a network is compiled
STATISTICS = ("clip_mean", "clip_std")  # of image embeddings: what is normalised by them stays exact in any precision


class PriorStage(DiffusionStage):
    """Trains `PriorTransformer` to predict the normalised image embedding from its noised self and the caption.

    Features: `image_embeds` (B, E), `text_embeds` (B, E), `text_states` (B, L, E), `text_mask` (B, L) bool; L is 77, or
    less where no caption of the batch is as long.

    Args:
        resolution: side of the validation images in pixels; training itself sees the encoder's own size.
    """

    name = "prior"
    part = "prior"
    encoders = ("image_encoder", "text_encoder")
    stays_loaded = ("text_encoder", "unet", "movq")
    ragged_features = ("text_states",)
    regions = (BasicTransformerBlock,)
    unfit_attention: ClassVar = {
        "xformers": "the prior has causal attention, for which xformers has no faster kernel than sdpa; take sdpa"
    }

    def __init__(
        self, weights: Weights, *, resolution: int = 512, snr_gamma: float | None = None, condition_dropout: float = 0.1
    ) -> None:
        super().__init__(weights, snr_gamma=snr_gamma, condition_dropout=condition_dropout)
        config = weights.load("prior_scheduler").config
        schedule = DDPMScheduler(num_train_timesteps=config.num_train_timesteps, beta_schedule="squaredcos_cap_v2")
        self.alphas_cumprod = schedule.alphas_cumprod
        self.prediction_type = config.prediction_type
        images, captions = weights.load("image_processor"), weights.load("tokenizer")
        self.preprocess = Preprocess(images, captions, None, extra_inputs=self.extra_inputs)
        self._zero_embed: Tensor | None = None  # (1, E): what the decoder guides away from
        self._is_unpadded = False  # the network takes text of any length
        self._is_compiled = False

    @classmethod
    def check_weights(cls, weights: Weights) -> None:
        for std in weights.tensors(cls.part, STATISTICS[1:]).values():
            _refuse_zeros(std)

    def load_network(self) -> nn.Module:
        network = super().load_network()
        # No forward uses these parameters: trainable, they break distributed training.
        kept = {name: network.get_parameter(name).requires_grad_(False) for name in STATISTICS}
        exact = {name: value.detach().clone() for name, value in kept.items()}
        if exact["clip_std"].dtype != torch.float32 or exact["clip_std"].is_meta:  # rounded, or a network without data
            exact = self.weights.tensors(self.part, STATISTICS)
        _refuse_zeros(exact["clip_std"])
        self.mean, self.std = exact["clip_mean"], exact["clip_std"]
        return network

    @torch.no_grad()
    def encode(self, examples: dict[str, Tensor]) -> Features:
        """`clip_pixels` (B, 3, S, S) and/or `input_ids`, `text_mask` (B, 77) → the features they give."""
        features: Features = {}
        if "clip_pixels" in examples:
            encoder = self.weights.load("image_encoder")
            features["image_embeds"] = encoder(examples["clip_pixels"].to(encoder.device, encoder.dtype)).image_embeds
        if "input_ids" in examples:
            encoder = self.weights.load("text_encoder")
            output = encoder(examples["input_ids"].to(encoder.device))
            mask = examples["text_mask"].to(encoder.device)
            # Padding carries nothing: zeros there make cached features, stored without it, equal to fresh ones.
            states = output.last_hidden_state * mask.unsqueeze(-1)
            features |= {"text_embeds": output.text_embeds, "text_states": states, "text_mask": mask}
        return features

    def encode_null(self) -> Features:
        """The empty caption with its own mask, as the pipeline uses it."""
        tokens = {key: value.unsqueeze(0) for key, value in self.preprocess(None, "").items()}
        return self.encode(tokens)

    def clean(self, features: Features) -> Tensor:
        normalised: Tensor = (features["image_embeds"].float() - self.mean) / self.std
        return normalised

    def predict(self, network: nn.Module, noisy: Tensor, timesteps: Tensor, features: Features) -> Tensor:
        states, mask = features["text_states"], features["text_mask"]
        if missing := self._length(mask.shape[1]) - mask.shape[1]:
            states, mask = F.pad(states, (0, 0, 0, missing)), F.pad(mask, (0, missing))
        output: Tensor = network(
            noisy,
            timestep=timesteps,
            proj_embedding=features["text_embeds"].float(),
            encoder_hidden_states=states.float(),
            attention_mask=mask,
        ).predicted_image_embedding
        return output

    def _length(self, longest: int) -> int:
        """Of text, for a batch whose longest caption has so many tokens."""
        full = self.preprocess.text_length
        if not self._is_unpadded:
            return full
        if self._is_compiled:  # for each length anew: few of them
            return min(full, -(-longest // LENGTHS_APART) * LENGTHS_APART)
        return longest

    def set_attention(self, attention: str) -> None:
        """`eager` keeps the published forward, with its padding."""
        super().set_attention(attention)
        if attention != "eager":
            self._is_unpadded = unpadded_prior.remove_padding(self.network)

    def place_constants(self, device: torch.device) -> None:
        super().place_constants(device)
        self.mean, self.std = self.mean.to(device), self.std.to(device)

    def compile(self, regional: bool) -> None:
        super().compile(regional)
        self._is_compiled = True

    def enable_gradient_checkpointing(self) -> None:
        """Recompute each transformer block in the backward pass: `PriorTransformer` has no such switch of its own."""
        for block in self.network.transformer_blocks:  # type: ignore[union-attr]
            block.forward = _recomputed(block.forward)

    def sample(self, network: nn.Module, prompts: list[str], settings: pipelines.SampleSettings) -> list[Image.Image]:
        """The trained prior, then the base decoder."""
        device = next(network.parameters()).device
        if self._zero_embed is None:
            with self.weights.lent(("image_encoder",), device):
                self._zero_embed = pipelines.zero_embed(self.weights.load("image_encoder"))
        with self.weights.on_device(("text_encoder",), device):
            pipeline = pipelines.prior_pipeline(self.weights, network, self._zero_embed.to(device))
            embeds = pipelines.embed_prompts(pipeline, prompts, settings)
        with self.weights.on_device(("unet", "movq"), device):
            return pipelines.decode(pipelines.decoder_pipeline(self.weights), embeds, settings)


def _recomputed(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function, for a partial object would not be compiled."""

    def computed(*arguments: Any, **named: Any) -> Tensor:
        output: Tensor = checkpoint(forward, *arguments, use_reentrant=False, **named)
        return output

    return computed


def _refuse_zeros(std: Tensor) -> None:
    if not bool((std > 0).all()):
        raise ConfigError(
            "weights.prior: its clip_std has zeros, so embeddings cannot be normalised; a prior made from scratch "
            "needs clip_mean and clip_std set to those of its image embeddings"
        )
