"""The decoder: from a CLIP image embedding to the picture, as MoVQ latents."""

import logging
from dataclasses import replace
from typing import ClassVar

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from PIL import Image
from torch import Tensor, nn

from kandinsky_exp.data.preprocess import Preprocess
from kandinsky_exp.models import compatibility, pipelines
from kandinsky_exp.models.decoder_kinds import PLAIN
from kandinsky_exp.models.weights import Weights
from kandinsky_exp.stages import diffusion
from kandinsky_exp.stages.base import DiffusionStage, Features

logger = logging.getLogger(__name__)


class DecoderStage(DiffusionStage):
    """Trains `UNet2DConditionModel` to predict the noise in MoVQ latents, given the image's own embedding.

    Features: `latents` (B, 4, h, w), before quantisation and without a scaling factor; `image_embeds` (B, E).

    Args:
        resolution: side of the training images in pixels.
        vlb_weight: weight of the variational term that trains the learned variance, 0 for none.
    """

    name = "decoder"
    part = "unet"
    requires = compatibility.starting_from(PLAIN)
    encoders = ("image_encoder", "movq")
    draws_with = (("text_encoder", "prior"), ("unet", "movq"))
    stays_loaded = ("movq",)
    redraws = True
    ragged_features: ClassVar[tuple[str, ...]] = ("latents",)
    regions = (ResnetBlock2D, Attention)
    memory_format = torch.channels_last  # convolutions: 5 to 8 % of a step on the CPU

    def __init__(
        self,
        weights: Weights,
        *,
        resolution: int = 512,
        snr_gamma: float | None = None,
        condition_dropout: float = 0.1,
        vlb_weight: float = 0.001,
    ) -> None:
        super().__init__(weights, snr_gamma=snr_gamma, condition_dropout=condition_dropout)
        compatibility.check_resolution(weights, resolution)
        schedule = weights.load("decoder_scheduler")
        self.alphas_cumprod = schedule.alphas_cumprod
        self.prediction_type = schedule.config.prediction_type
        self.vlb_weight = vlb_weight
        if vlb_weight > 0 and (kind := schedule.config.get("variance_type")) != "learned_range":
            logger.warning("this noise schedule (variance_type=%s) has no learned variance: no VLB term", kind)
            self.vlb_weight = 0.0
        self.preprocess = Preprocess(weights.load("image_processor"), None, resolution, extra_inputs=self.extra_inputs)
        self._prompt_embeds: dict[tuple[object, ...], pipelines.Embeds] = {}

    @torch.no_grad()
    def encode(self, examples: dict[str, Tensor]) -> Features:
        """`clip_pixels` (B, 3, S, S) → `image_embeds`; `pixels` (B, 3, R, R) → `latents`; companions as they are."""
        features = {}
        if "clip_pixels" in examples:
            encoder = self.weights.load("image_encoder")
            features["image_embeds"] = encoder(examples["clip_pixels"].to(encoder.device, encoder.dtype)).image_embeds
        if "pixels" in examples:
            movq = self.weights.load("movq")
            features["latents"] = movq.encode(examples["pixels"].to(movq.device, movq.dtype)).latents
        return features | {name: examples[name] for name in self.preprocess.companions if name in examples}

    def encode_null(self) -> Features:
        """The embedding of the zero image, which is what the pipelines guide away from; not a zero vector."""
        size = self.weights.load("image_encoder").config.image_size
        return self.encode({"clip_pixels": torch.zeros(1, 3, size, size)})

    def clean(self, features: Features) -> Tensor:
        return features["latents"].float()

    def predict(self, network: nn.Module, noisy: Tensor, timesteps: Tensor, features: Features) -> Tensor:
        condition = {"image_embeds": features["image_embeds"].float()}
        output: Tensor = network(noisy, timesteps, None, added_cond_kwargs=condition).sample
        return output

    def variance_term(
        self, output: Tensor, clean: Tensor, noisy: Tensor, timesteps: Tensor, weights: Tensor | None
    ) -> Tensor | None:
        """λ · T · L_t with the mean detached: the hybrid loss of Nichol and Dhariwal 2021, eq. 16."""
        if self.vlb_weight == 0 or output.shape[1] != 2 * clean.shape[1]:
            return None
        prediction, variance = output.chunk(2, dim=1)
        bound = diffusion.variational_bound(
            prediction.detach(), variance, clean, noisy, timesteps, self.alphas_cumprod, self.prediction_type
        )
        return self.vlb_weight * len(self.alphas_cumprod) * diffusion.weighted_mean(bound, weights)

    def enable_gradient_checkpointing(self) -> None:
        self.network.enable_gradient_checkpointing()  # type: ignore[operator]

    def sample(self, network: nn.Module, prompts: list[str], settings: pipelines.SampleSettings) -> list[Image.Image]:
        """The base prior, asked once per prompt and settings, then the trained decoder."""
        key = (tuple(prompts), replace(settings, batch_size=1))  # whatever the batch is
        device = next(network.parameters()).device
        if key not in self._prompt_embeds:
            null = self.null_condition()["image_embeds"].to(device)
            with self.weights.lent(("prior", "text_encoder"), device):
                pipeline = pipelines.prior_pipeline(self.weights, null_embed=null)
                self._prompt_embeds[key] = pipelines.embed_prompts(pipeline, prompts, settings)
                del pipeline  # it holds the parts
        return self._decode(network, self._prompt_embeds[key], settings)

    def reconstruct(
        self, network: nn.Module, features: Features, settings: pipelines.SampleSettings
    ) -> list[Image.Image]:
        """Images from the embeddings of real images: what the decoder makes of them without any prior."""
        image_embeds = features["image_embeds"]
        null = self.null_condition()["image_embeds"].to(image_embeds)
        return self._decode(network, (image_embeds.float(), null.float().expand_as(image_embeds)), settings)

    def _decode(
        self, network: nn.Module, embeds: pipelines.Embeds, settings: pipelines.SampleSettings
    ) -> list[Image.Image]:
        with self.weights.on_device(("movq",), next(network.parameters()).device):
            return pipelines.decode(pipelines.decoder_pipeline(self.weights, network), embeds, settings)
