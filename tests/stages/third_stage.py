"""A stage of a user's own: a decoder whose error counts in x_0, each picture as much as a column of the data says.

Nothing of the package knows it: it is chosen by a yaml beside it and `trusted_modules=[third_stage]`.
"""

from typing import Any, ClassVar

from torch import Tensor

from kandinsky_exp.models.weights import Weights
from kandinsky_exp.stages.base import Features
from kandinsky_exp.stages.decoder import DecoderStage


class FocusStage(DecoderStage):
    """Features: those of the decoder, and `focus` (B,), the weight of each picture.

    Args:
        max_weight: of an error at a timestep: at the noisiest ones x_0 hangs on ε without bound.
        settings: of the decoder.
    """

    name = "focus"
    extra_inputs: ClassVar = {"focus": ()}  # one number a picture

    def __init__(self, weights: Weights, *, max_weight: float = 5.0, **settings: Any) -> None:
        super().__init__(weights, **settings)
        self.max_weight = max_weight

    def encode(self, examples: Features) -> Features:
        given = {"focus": examples["focus"]} if "focus" in examples else {}  # the null condition has none
        return super().encode(examples) | given

    def weigh(self, per_sample: Tensor, timesteps: Tensor, features: Features) -> Tensor:
        """The squared error of x_0 is that of ε times (1 − ᾱ)/ᾱ (Salimans and Ho 2022, section 4)."""
        alpha = self.alphas_cumprod[timesteps]
        return per_sample * ((1 - alpha) / alpha).clamp(max=self.max_weight) * features["focus"].float()
