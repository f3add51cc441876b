"""Metrics of pictures of held-out captions, at each validation of a run."""

import logging
from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from PIL import Image
from torch import Tensor

from kandinsky_exp.data import long_texts
from kandinsky_exp.evaluation import metrics
from kandinsky_exp.evaluation.encoders import OwnEncoder
from kandinsky_exp.evaluation.real_pictures import RealPictures, some_of
from kandinsky_exp.models.weights import Weights
from kandinsky_exp.training.feature_reader import FeatureReader

logger = logging.getLogger(__name__)
Sample = Callable[[list[str]], list[Image.Image]]


class DrawnMetrics:
    """Draws the same held-out captions from the same noise each time, and measures the pictures.

    Args:
        names: `clip_score`, `cmmd`.
        count: captions that are drawn, where so many are held out.
        seed: of the choice of captions.
    """

    def __init__(
        self,
        names: Sequence[str],
        count: int,
        weights: Weights,
        held_out: FeatureReader,
        seed: int,
        device: torch.device,
    ) -> None:
        self.names, self.encoder, self.device = names, OwnEncoder(weights), device
        self.real: RealPictures = some_of(held_out, count, seed)

    @cached_property
    def captions(self) -> list[str]:
        """Read once: a streamed source has to be walked for them."""
        found = self.real.captions()
        for note in long_texts.captions_note(self.encoder.weights.load("tokenizer"), found):
            logger.warning("validation.metrics: %s", note)
        return found

    @cached_property
    def embeds(self) -> Tensor:
        """Of the real pictures, (N, E)."""
        return self.real.embeds(self.encoder)

    @torch.no_grad()
    def __call__(self, sample: Sample) -> dict[str, float]:
        """The metrics by name.

        Args:
            sample: draws captions.
        """
        pictures, found = sample(self.captions), {}
        with self.encoder.on_device(self.device):
            drawn = self.encoder(pictures)
            if "clip_score" in self.names:
                found["clip_score"] = float(metrics.clip_scores(drawn, self.encoder.texts(self.captions)).mean())
            if "cmmd" in self.names:
                found["cmmd"] = metrics.cmmd(drawn, self.embeds)
        return found
