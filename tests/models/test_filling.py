"""Pictures and masks that settings give to a decoder for inpainting."""

from dataclasses import replace

import numpy as np
import torch
from PIL import Image, ImageDraw

from kandinsky_exp.models import inpainting, pipelines
from kandinsky_exp.models.decoder_kinds import INPAINTING
from kandinsky_exp.models.pipelines import SampleSettings
from kandinsky_exp.models.weights import Weights
from kandinsky_exp.models.widening import widened

SETTINGS = SampleSettings(inference_steps=2, height=64, width=64, seed=1)


def test_masks_are_changed_in_place_and_ours_are_not(weights: Weights) -> None:
    """A mask as a tensor comes back with another hole, in which the next picture would be drawn."""
    network = widened(weights.load_trainable("unet").eval(), INPAINTING)
    pipeline = pipelines.decoder_pipeline(weights, network)
    numbers = torch.Generator().manual_seed(0)
    embeds = tuple(torch.randn(2, network.config.encoder_hid_dim, generator=numbers) for _ in range(2))
    grey = torch.full((1, 1, 64, 64), 0.6)
    pipeline(embeds[0][:1], torch.zeros(1, 3, 64, 64), grey, embeds[1][:1], **SETTINGS.asked([0]))
    assert not torch.equal(grey, torch.full_like(grey, 0.6))
    hole = Image.new("L", (64, 64))
    ImageDraw.Draw(hole).rectangle((20, 20, 40, 50), fill=255)
    settings = replace(SETTINGS, picture=Image.radial_gradient("L").resize((64, 64)).convert("RGB"), hole=hole.copy())
    first, second = pipelines.decode(pipeline, embeds, settings)
    assert np.array_equal(settings.hole, hole)
    last = embeds[0][1:], embeds[1][1:]
    assert second == pipelines.decode(pipeline, last, replace(settings, first=1))[0] != first


def test_a_hole_grows_to_whole_latents() -> None:
    hole = Image.new("L", (16, 8))
    hole.putpixel((5, 7), 255)
    hole.putpixel((12, 3), 200)
    found = np.asarray(inpainting.whole_cells(hole, 4))
    expected = np.zeros((8, 16), np.uint8)
    expected[4:, 4:8] = expected[:4, 12:] = 255
    assert np.array_equal(found, expected)
    assert np.array_equal(inpainting.whole_cells(Image.fromarray(found), 4), found)
