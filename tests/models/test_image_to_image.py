"""Image to image against diffusers' own pipeline for it, and what that one does not do."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, KandinskyV22Img2ImgPipeline
from PIL import Image

from kandinsky_exp.models import pipelines
from kandinsky_exp.models.decoder_kinds import HINT, INPAINTING, DecoderKind
from kandinsky_exp.models.pipelines import Embeds, SampleSettings
from kandinsky_exp.models.weights import Weights
from kandinsky_exp.models.widening import widened

SETTINGS = SampleSettings(inference_steps=4, height=64, width=64, seed=3, strength=0.5)


@pytest.fixture(scope="module")
def embeds(weights: Weights) -> Embeds:
    size = weights.load("unet").config.encoder_hid_dim
    numbers = torch.Generator().manual_seed(0)
    return torch.randn(3, size, generator=numbers), torch.randn(3, size, generator=numbers)


def picture(width: int = 64, height: int = 64) -> Image.Image:
    across, down = np.linspace(0, 255, width), np.linspace(0, 255, height)[:, None]
    channels = [np.broadcast_to(one, (height, width)) for one in (across, down, 255 - across)]
    return Image.fromarray(np.stack(channels, -1).astype(np.uint8))


def apart(first: list[Image.Image], second: list[Image.Image]) -> int:
    """The largest difference of a pixel: in batches of other sizes the last bits differ."""
    return max(
        int(np.abs(np.asarray(one, int) - np.asarray(other, int)).max())
        for one, other in zip(first, second, strict=True)
    )


def theirs(weights: Weights, embeds: Embeds, settings: SampleSettings, schedule: Any = None) -> list[Image.Image]:
    schedule = schedule or weights.load("decoder_scheduler")
    pipeline = KandinskyV22Img2ImgPipeline(unet=weights.load("unet"), scheduler=schedule, movq=weights.load("movq"))
    pipeline.set_progress_bar_config(disable=True)
    count = len(embeds[0])
    asked = settings.asked(range(count))
    found: list[Image.Image] = pipeline(
        embeds[0], [settings.picture] * count, embeds[1], strength=settings.strength, **asked
    )[0]
    return found


@pytest.mark.parametrize(("strength", "solver"), [(0.25, False), (0.6, False), (1.0, False), (0.6, True)])
@pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # in the solver
def test_it_is_the_published_one(weights: Weights, embeds: Embeds, strength: float, solver: bool) -> None:
    settings = replace(SETTINGS, picture=picture(), strength=strength)
    pipeline = pipelines.decoder_pipeline(weights)
    if solver:  # one that keeps count of its steps
        config = weights.load("decoder_scheduler").config
        pipeline.scheduler = DPMSolverMultistepScheduler.from_config(
            {**config, "variance_type": None, "thresholding": False}
        )
    expected = theirs(weights, embeds, settings, pipeline.scheduler)
    before = pipeline.scheduler
    assert apart(pipelines.decode(pipeline, embeds, settings), expected) <= 1
    assert pipeline.scheduler is before
    assert len(pipelines.decode(pipeline, embeds, replace(settings, strength=None))) == 3


def test_the_published_one_swaps_the_sides(weights: Weights, embeds: Embeds) -> None:
    settings = replace(SETTINGS, picture=picture(96, 64), width=96)
    assert {one.size for one in theirs(weights, embeds, settings)} == {(64, 96)}
    assert {one.size for one in pipelines.decode(pipelines.decoder_pipeline(weights), embeds, settings)} == {(96, 64)}


def test_an_image_is_the_same_in_any_batch(weights: Weights, embeds: Embeds) -> None:
    pipeline, settings = pipelines.decoder_pipeline(weights), replace(SETTINGS, picture=picture())
    together = pipelines.decode(pipeline, embeds, settings)
    assert apart(together, pipelines.decode(pipeline, embeds, replace(settings, batch_size=1))) <= 1
    last = embeds[0][2:], embeds[1][2:]
    assert apart(together[2:], pipelines.decode(pipeline, last, replace(settings, first=2))) <= 1
    assert apart(together[:1], together[1:2]) > 10


def test_the_less_strength_the_nearer_the_picture(weights: Weights, embeds: Embeds) -> None:
    pipeline, given = pipelines.decoder_pipeline(weights), picture()

    def distance(strength: float) -> float:
        drawn = pipelines.decode(pipeline, embeds, replace(SETTINGS, picture=given, strength=strength))
        return float(np.mean([np.square(np.asarray(one, float) - np.asarray(given)).mean() for one in drawn]))

    assert distance(0.25) < distance(0.5) < distance(1.0)


@pytest.mark.parametrize("kind", [INPAINTING, HINT], ids=["inpainting", "hint"])
def test_decoders_of_other_kinds_draw_it_too(weights: Weights, embeds: Embeds, kind: DecoderKind) -> None:
    """What they see more than a plain one counts for nothing yet, so that they draw the same."""
    network = widened(weights.load_trainable("unet").eval(), kind)
    settings = replace(SETTINGS, picture=picture(), guidance_scale=2.0)
    expected = pipelines.decode(pipelines.decoder_pipeline(weights), embeds, settings)
    assert apart(pipelines.decode(pipelines.decoder_pipeline(weights, network), embeds, settings), expected) <= 1
