"""The decoder for hints: from a CLIP image embedding and a hint, such as edges, to the picture that has them."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor, nn

from kandinsky_exp.data import edges
from kandinsky_exp.data.companions import Edges, Hint
from kandinsky_exp.models import adapter_files, compatibility, hints, pipelines
from kandinsky_exp.models.decoder_kinds import HINT, PLAIN
from kandinsky_exp.models.sampling import Embeds, SampleSettings
from kandinsky_exp.models.weights import Weights
from kandinsky_exp.models.widening import widened
from kandinsky_exp.stages.base import Features
from kandinsky_exp.stages.decoder import DecoderStage


class ControlStage(DecoderStage):
    """Trains a decoder that also sees a hint: ControlNet (Zhang et al. 2023) as Kandinsky 2.2 has it, in one network.

    A plain decoder gets a block that makes a hint as large as latents, and input channels for it, whose weights are
    zero: its first answers are those that it gave before. Features: the decoder's, and `hint` (B, 3 or 1, 8h, 8w).

    Args:
        new_lr_factor: by which what a plain decoder has not learns faster.
        settings: of the decoder.
    """

    name = "control"
    part = "unet"
    requires = compatibility.starting_from(PLAIN, HINT)
    result_pipeline = HINT.result
    ragged_features = ("latents", "hint")
    judges = ("hint_f1",)
    prompt_inputs = ("hint",)
    trains_whole = (adapter_files.CONV_IN, adapter_files.HINT_BLOCK)

    def __init__(self, weights: Weights, *, new_lr_factor: float = 10.0, **settings: Any) -> None:
        super().__init__(weights, **settings)
        self.new_lr_factor = new_lr_factor
        self._begins_plain = False

    @classmethod
    def companions(cls, data: Mapping[str, Any]) -> Mapping[str, type[Hint]]:
        return {"hint": Hint if data.get("hint") == "column" else Edges}

    @classmethod
    def network_without_data(cls, weights: Weights) -> nn.Module:
        return widened(super().network_without_data(weights), HINT)

    def load_network(self) -> nn.Module:
        plain: Any = super().load_network()
        self._begins_plain = not hints.reads_hints(plain)
        return widened(plain, HINT)

    def faster(self) -> tuple[float, dict[str, int]]:
        """What is new: the hint block, and the input channels behind those of the latents."""
        if not self._begins_plain:
            return 1.0, {}
        block = self.network.get_submodule(adapter_files.HINT_BLOCK)
        whole = {name: 0 for name, _ in block.named_parameters(adapter_files.HINT_BLOCK)}
        latents = self.network.get_parameter("conv_in.weight").shape[1] // 2
        return self.new_lr_factor, {**whole, "conv_in.weight": latents}

    def predict(self, network: nn.Module, noisy: Tensor, timesteps: Tensor, features: Features) -> Tensor:
        condition = {"image_embeds": features["image_embeds"].float(), "hint": _as_read(features["hint"])}
        output: Tensor = network(noisy, timesteps, None, added_cond_kwargs=condition).sample
        return output

    def shown_inputs(self, features: Features, settings: SampleSettings) -> dict[str, list[Image.Image]]:
        size = settings.width, settings.height
        return {"hint": [hints.shown(hint).resize(size, Image.Resampling.BOX) for hint in _as_read(features["hint"])]}

    def reconstruct(self, network: nn.Module, features: Features, settings: SampleSettings) -> list[Image.Image]:
        embeds = features["image_embeds"].float()
        return self._draw(network, (embeds, self._null_like(embeds)), features["hint"], settings)

    def judge(self, network: nn.Module, features: Features, settings: SampleSettings) -> dict[str, float]:
        """`hint_f1`: how much better drawn edges agree with the hint that was given than with another one.

        Drawn from the null embedding and from another picture's: its own holds its edges, too. The hint that was not
        given is neither picture's.
        """
        given, embeds = features["hint"], features["image_embeds"].float()
        if given.shape[1] != 1 or len(given) < 3:  # only edges can be found again, and there have to be others
            return {}
        null, size = self._null_like(embeds), (given.shape[3], given.shape[2])
        wanted = [hint[0].cpu().numpy() for hint in given]
        differences = []
        for seen in (null, embeds.roll(-1, 0)):
            drawn = self._draw(network, (seen, null), given, settings)
            found = [edges.canny(np.asarray(picture.resize(size, Image.Resampling.BICUBIC))) for picture in drawn]
            for ours, own, other in zip(found, wanted, [*wanted[2:], *wanted[:2]], strict=True):
                differences.append(edges.f1(ours, own) - edges.f1(ours, other))
        return {"hint_f1": sum(differences) / len(differences)}

    def _null_like(self, embeds: Tensor) -> Tensor:
        return self.null_condition()["image_embeds"].to(embeds).expand_as(embeds)

    def _draw(self, network: nn.Module, embeds: Embeds, given: Tensor, settings: SampleSettings) -> list[Image.Image]:
        with self.weights.on_device(("movq",), next(network.parameters()).device):
            pipeline = pipelines.decoder_pipeline(self.weights, network)
            return hints.draw(pipeline, embeds, _as_read(given), settings)


def _as_read(hint: Tensor) -> Tensor:
    """Hints (B, 3, 8h, 8w) in [0, 1], of stored ones (B, 3 or 1, 8h, 8w) from 0 to 255."""
    return (hint.float() / 255).expand(-1, 3, -1, -1)
