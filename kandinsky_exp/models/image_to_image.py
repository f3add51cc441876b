"""Image to image: a decoder's pipeline that begins with a noised picture, in the middle of its noise schedule.

Diffusers has a pipeline for it, which gives the same answers; but it swaps width and height, encodes the picture anew
for each image, and takes no decoder for inpainting.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor

from kandinsky_exp.models.sampling import SampleSettings


class _LateSchedule:
    """A noise schedule of which a pipeline sees the last steps alone."""

    def __init__(self, schedule: Any, skipped: int) -> None:
        self._schedule, self._skipped = schedule, skipped

    def __getattr__(self, name: str) -> Any:
        return getattr(self._schedule, name)

    @property
    def timesteps(self) -> Tensor:
        steps: Tensor = self._schedule.timesteps[self._skipped :]
        return steps


@contextmanager
def begun(pipeline: Any, settings: SampleSettings) -> Iterator[SampleSettings]:
    """The settings by which the pipeline draws, and for as long the pipeline with its last steps alone.

    Without a `strength` both are as they were.
    """
    if settings.strength is None or settings.picture is None:
        yield settings
        return
    whole, steps = pipeline.scheduler, settings.inference_steps
    late = _LateSchedule(whole, steps - int(steps * settings.strength))
    late.set_timesteps(steps)
    clean, first, network = encode(pipeline.movq, settings.picture), late.timesteps[:1], pipeline.unet

    def begin(generators: list[torch.Generator]) -> Tensor:
        count = len(generators)
        latents = clean.to(network.device, network.dtype).repeat(count, 1, 1, 1)
        noise = randn_tensor(tuple(latents.shape), generator=generators, device=network.device, dtype=network.dtype)
        noised: Tensor = whole.add_noise(latents, noise, first.to(network.device).repeat(count))
        return noised

    pipeline.scheduler = late
    try:
        yield replace(settings, begin=begin)
    finally:
        pipeline.scheduler = whole


@torch.no_grad()
def encode(movq: Any, picture: Image.Image) -> Tensor:
    """An RGB picture as latents (1, 4, h, w), before quantisation."""
    pixels = torch.from_numpy(np.asarray(picture, np.float32) / 127.5 - 1).permute(2, 0, 1).unsqueeze(0)
    latents: Tensor = movq.encode(pixels.to(movq.device, movq.dtype)).latents
    return latents
