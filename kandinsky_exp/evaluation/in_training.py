"""Metrics of pictures of held-out captions, at each validation of a run."""

from collections.abc import Callable, Sequence

import torch
from PIL import Image

from kandinsky_exp.errors import ConfigError
from kandinsky_exp.evaluation import metrics
from kandinsky_exp.evaluation.encoders import OwnEncoder
from kandinsky_exp.evaluation.measuring import FEWEST
from kandinsky_exp.evaluation.real_pictures import RealPictures, some_of
from kandinsky_exp.models.weights import Weights
from kandinsky_exp.training.feature_reader import FeatureReader

Sample = Callable[[list[str]], list[Image.Image]]


class DrawnMetrics:
    """Draws the same held-out captions from the same noise each time, and measures the pictures.

    Args:
        names: `clip_score`, `cmmd`.
        count: captions that are drawn, where so many are held out.
        seed: of the choice of captions.

    Raises:
        ConfigError: there are too few held-out pictures.
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
        if len(held_out) < FEWEST:
            raise ConfigError(
                f"validation.metrics: {len(held_out)} pictures are held out, and it takes {FEWEST} to measure; raise "
                "validation.fraction, or leave it out"
            )
        self.names, self.encoder, self.device = names, OwnEncoder(weights), device
        self.real: RealPictures = some_of(held_out, count, seed)
        self._captions: list[str] | None = None  # read once: a streamed source has to be walked for them

    def __call__(self, sample: Sample) -> dict[str, float]:
        """The metrics by name.

        Args:
            sample: draws captions.
        """
        if self._captions is None:
            self._captions = self.real.captions()
        pictures, found = sample(self._captions), {}
        with torch.no_grad(), self.encoder.on_device(self.device):
            drawn = self.encoder(pictures)
            if "clip_score" in self.names:
                found["clip_score"] = float(metrics.clip_scores(drawn, self.encoder.texts(self._captions)).mean())
            if "cmmd" in self.names:
                found["cmmd"] = metrics.cmmd(drawn, self.real.embeds(self.encoder))
        return found
