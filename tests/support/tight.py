"""A stage that has memory for little: trained through `model._target_=tight.TightPrior`."""

from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from kandinsky_exp.models.pipelines import SampleSettings
from kandinsky_exp.stages.base import StageLoss
from kandinsky_exp.stages.prior import PriorStage

ABSURD = 1 << 50  # bytes: no address space has as many


class TightPrior(PriorStage):
    """Validates two rows at a time and draws one prompt at a time; asked for more, it asks for absurd memory."""

    def loss(self, network: Any, features: Any, generator: Any, timesteps: Any = None) -> StageLoss:
        if not network.training and len(features["image_embeds"]) > 2:
            torch.empty(ABSURD, dtype=torch.uint8)
        return super().loss(network, features, generator, timesteps)

    def sample(self, network: Any, prompts: list[str], settings: SampleSettings) -> list[Image.Image]:
        if settings.batch_size > 1:
            torch.empty(ABSURD, dtype=torch.uint8)
        return super().sample(network, prompts, settings)


class SpentPrior(PriorStage):
    """Has memory for some training steps only."""

    steps = 0

    def loss(self, network: Any, features: Any, generator: Any, timesteps: Any = None) -> StageLoss:
        if network.training:
            SpentPrior.steps -= 1
            if SpentPrior.steps < 0:
                torch.empty(ABSURD, dtype=torch.uint8)
        return super().loss(network, features, generator, timesteps)


@dataclass
class Failing:
    """Enters nothing: as encoders do that find no room on their device."""

    error: Exception

    def __enter__(self) -> None:
        raise self.error

    def __exit__(self, *_: object) -> None: ...
