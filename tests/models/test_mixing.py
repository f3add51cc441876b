"""Mixed embeddings against diffusers' own, and what the other pipeline's would be."""

from pathlib import Path

import torch
from diffusers import KandinskyV22PriorEmb2EmbPipeline
from PIL import Image

from kandinsky_exp.models import mixing, pipelines
from kandinsky_exp.models.pipelines import SampleSettings
from kandinsky_exp.models.weights import Weights

SETTINGS = SampleSettings(inference_steps=3, seed=5)
PICTURE = Image.radial_gradient("L").convert("RGB")


def test_it_is_the_published_mean(weights: Weights) -> None:
    pipeline = pipelines.prior_pipeline(weights)
    found, away = mixing.embed_mix(pipeline, ["a red heart", PICTURE], [3, 1], 1, SETTINGS)
    theirs = pipeline.interpolate(
        ["a red heart", PICTURE], [0.75, 0.25], num_inference_steps=3, generator=SETTINGS.generator(0)
    )
    assert torch.allclose(found, theirs.image_embeds, atol=1e-5)
    assert torch.allclose(away, theirs.negative_image_embeds, atol=1e-6)


def test_the_mix_of_one_text_is_the_text(weights: Weights) -> None:
    pipeline = pipelines.prior_pipeline(weights)
    for negative in (None, "blue"):
        settings = SampleSettings(inference_steps=3, seed=5, negative_prompt=negative)
        expected = pipelines.embed_prompts(pipeline, ["a dog"] * 3, settings)
        for mix, shares in ((["a dog"], [7.0]), (["a dog", "a dog"], [0.25, 0.75]), (["a dog", "a cat"], [1.0, 0.0])):
            found = mixing.embed_mix(pipeline, mix, shares, 3, settings)
            assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(found, expected, strict=True))


def test_pictures_alone_have_no_noise(weights: Weights) -> None:
    pipeline = pipelines.prior_pipeline(weights)
    mixed, away = mixing.embed_mix(pipeline, [PICTURE, PICTURE.rotate(90)], [1, 1], 2, SETTINGS)
    assert torch.equal(mixed[0], mixed[1])
    assert torch.allclose(away, pipelines.zero_embed(weights.load("image_encoder")).expand(2, -1), atol=1e-6)


def test_what_the_pipeline_for_image_to_image_would_guide_away_from_is_random(weights: Weights, tmp_path: Path) -> None:
    """Why it is not used."""
    own = pipelines.prior_pipeline(weights)
    other = KandinskyV22PriorEmb2EmbPipeline(**own.components)
    other.set_progress_bar_config(disable=True)
    away = [
        other.interpolate([PICTURE], [1.0], num_inference_steps=2, generator=SETTINGS.generator(seed))[1]
        for seed in range(2)
    ]
    assert not torch.allclose(away[0], away[1])
