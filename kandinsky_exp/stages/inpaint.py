"""The inpainting decoder: from a CLIP image embedding and what is kept of a picture to the whole of it."""

from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from kandinsky_exp.data.buckets import Size
from kandinsky_exp.data.companions import Hole
from kandinsky_exp.data.preprocess import to_picture
from kandinsky_exp.models import adapter_files, compatibility, inpainting, pipelines
from kandinsky_exp.models.decoder_kinds import INPAINTING, PLAIN
from kandinsky_exp.models.sampling import SampleSettings
from kandinsky_exp.models.weights import Weights
from kandinsky_exp.models.widening import widened
from kandinsky_exp.stages import holes
from kandinsky_exp.stages.base import Features
from kandinsky_exp.stages.decoder import DecoderStage
from kandinsky_exp.stages.diffusion import Generators

SHAPES = {"full": 0.15, "box": 0.085, "blob": 0.19, "frame": 0.19, "blob_and_frame": 0.385}


class InpaintStage(DecoderStage):
    """Trains a decoder that also sees the latents outside of a hole, and where that is: 1 where they are kept.

    A plain decoder gets new input channels, whose weights are zero: its first answers are those that it gave before.
    Features: the decoder's, and `hole` (B, 1, h, w) where the user gives holes; others are drawn for each batch.

    Args:
        hole_shapes: how often each shape of `holes.SHAPES` comes, in relation to the others.
        settings: of the decoder.
    """

    name = "inpaint"
    part = "unet"
    requires = compatibility.starting_from(PLAIN, INPAINTING)
    result_pipeline = INPAINTING.result
    encodes_as = "decoder"
    measures = ("hole", "kept")
    ragged_features = ("latents", "hole")
    prompt_inputs = ("image", "mask")
    trains_whole = (adapter_files.CONV_IN,)  # what it sees more than a plain one comes in there

    def __init__(self, weights: Weights, *, hole_shapes: Mapping[str, float] = SHAPES, **settings: Any) -> None:
        super().__init__(weights, **settings)
        self.hole_shapes = dict(hole_shapes)

    @classmethod
    def setting_problems(cls, settings: Mapping[str, Any]) -> Mapping[str, str]:
        problem = holes.problem(settings.get("hole_shapes", SHAPES))
        return {} if problem is None else {"hole_shapes": problem}

    @classmethod
    def companions(cls, data: Mapping[str, Any]) -> Mapping[str, type[Hole]]:
        return {"hole": Hole} if data.get("holes") or data.get("hole_column") else {}

    @classmethod
    def network_without_data(cls, weights: Weights) -> nn.Module:
        return widened(super().network_without_data(weights), INPAINTING)

    def load_network(self) -> nn.Module:
        return widened(super().load_network(), INPAINTING)

    def with_drawn(self, features: Features, generator: Generators) -> Features:
        if "hole" in features:  # the user's
            return features | {"hole": features["hole"].float()}
        count, _, height, width = features["latents"].shape
        hole = holes.draw(self.hole_shapes, (count, height, width), generator, features["latents"].device)
        return features | {"hole": hole}

    def predict(self, network: nn.Module, noisy: Tensor, timesteps: Tensor, features: Features) -> Tensor:
        kept = 1 - features["hole"]
        return super().predict(network, torch.cat([noisy, self.clean(features) * kept, kept], 1), timesteps, features)

    def measure(self, errors: Tensor, features: Features) -> dict[str, Tensor]:
        per_place, hole = errors.mean(1, keepdim=True), features["hole"]
        parts = {"hole": hole, "kept": 1 - hole}
        return {name: torch.stack([(per_place * part).sum(), part.sum()]) for name, part in parts.items()}

    def shown_inputs(self, features: Features, settings: SampleSettings) -> dict[str, list[Image.Image]]:
        pictures, drawn = self._with_holes(features, settings)
        return {"hole": list(map(inpainting.hole_shown, pictures, drawn))}

    def reconstruct(self, network: nn.Module, features: Features, settings: SampleSettings) -> list[Image.Image]:
        """Each picture with a hole, always the same, filled by the help of its own embedding."""
        embeds = features["image_embeds"]
        null = self.null_condition()["image_embeds"].to(embeds).expand_as(embeds)
        pictures, drawn = self._with_holes(features, settings)
        with self.weights.on_device(("movq",), next(network.parameters()).device):
            pipeline = pipelines.decoder_pipeline(self.weights, network)
            return inpainting.fill(pipeline, (embeds.float(), null.float()), pictures, drawn, settings)

    def _with_holes(self, features: Features, settings: SampleSettings) -> tuple[list[Image.Image], list[Image.Image]]:
        """Held-out pictures, and for each the user's hole or one of those shapes that are not all of a picture."""
        pictures = [to_picture(pixels) for pixels in features["pixels"]]
        if "hole" in features:
            return pictures, [_enlarged(hole, pictures[0].size) for hole in features["hole"]]
        return pictures, [self._hole(picture.size, index, settings) for index, picture in enumerate(pictures)]

    def _hole(self, size: Size, index: int, settings: SampleSettings) -> Image.Image:
        scale = self.weights.latent_scale()
        some = {name: share for name, share in self.hole_shapes.items() if name != "full" and share > 0}
        hole = holes.draw(
            some or self.hole_shapes,
            (1, size[1] // scale, size[0] // scale),
            settings.generator(index),
            torch.device("cpu"),
        )
        return _enlarged(hole[0], size)


def _enlarged(hole: Tensor, size: Size) -> Image.Image:
    """A hole (1, h, w) as a picture of this size."""
    return Image.fromarray(hole[0].byte().cpu().numpy() * 255).resize(size, Image.Resampling.NEAREST)
