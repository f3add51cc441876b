"""What a run shows of itself: the fixed-noise loss, images for prompts, reconstructions and a labelled grid."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import torch
from accelerate import Accelerator
from PIL import Image

from kandinsky_exp.data.preprocess import center_crop_resize
from kandinsky_exp.models.pipelines import SampleSettings
from kandinsky_exp.stages.base import Features
from kandinsky_exp.system import distributed
from kandinsky_exp.system.halving import Halving
from kandinsky_exp.system.image_grid import labelled_grid
from kandinsky_exp.tracking.tracker import Tracker
from kandinsky_exp.training import ema, fixed_noise, loop

logger = logging.getLogger(__name__)


class HeldOut(fixed_noise.HeldOut, Protocol):
    """The held-out rows, and what they were before they were encoded."""

    def picture(self, index: int) -> Image.Image:
        """A row's image, as its file has it."""


@dataclass
class Validator:
    """Measures and draws at one step, always from the same noise, with the averaged weights where there are any.

    Args:
        folder: where `samples/` go; its subfolders are named after the step.
        reconstructions: how many held-out images a decoder redraws from their own embeddings.
    """

    training: loop.Training
    accelerator: Accelerator
    tracker: Tracker
    folder: Path
    held_out: HeldOut | None
    prompts: Sequence[str]
    settings: SampleSettings
    draws: int
    reconstructions: int
    loss: float | None = None
    loss_step: int | None = None
    _originals: list[Image.Image] | None = None
    _measured: Halving = field(init=False)
    _drawn: Halving = field(init=False)

    def __post_init__(self) -> None:
        self._measured = Halving("validation loss", self.settings.batch_size)
        self._drawn = Halving("validation images", self.settings.batch_size)

    def __call__(self, step: int) -> None:
        network = self.accelerator.unwrap_model(self.training.network)
        with ema.averaged_weights(self.training), fixed_noise.uncompiled(network):
            self._measure(step)
            distributed.on_main_process(lambda: self._show(step))

    def _measure(self, step: int) -> None:
        if self.held_out is None:
            return
        self.loss = fixed_noise.validate(
            self.training.stage,
            self.accelerator.unwrap_model(self.training.network),
            self.held_out,
            accelerator=self.accelerator,
            seed=self.settings.seed,
            draws=self.draws,
            batches=self._measured,
        )
        self.loss_step = step

    def _show(self, step: int) -> None:
        if self.held_out is not None and self.loss is not None:
            self.tracker.log_metrics({"validation/loss": self.loss}, step)
            logger.info("step %d: validation loss %.5f", step, self.loss)
        self._draw(step)

    def _draw(self, step: int) -> None:
        network = self.accelerator.unwrap_model(self.training.network)
        network.eval()
        drawn: list[Image.Image] = []
        if self.prompts:
            # No autocast around it: the network that trains has its own, and frozen parts are in the type they need.
            drawn = self._drawn.run(
                lambda size: self.training.stage.sample(
                    network, list(self.prompts), replace(self.settings, batch_size=size)
                )
            )
        redrawn = self._reconstruct()
        network.train()
        if not drawn and not redrawn:
            return
        folder = self.folder / f"step-{step:08d}"
        folder.mkdir(parents=True, exist_ok=True)
        for index, (image, prompt) in enumerate(zip(drawn, self.prompts, strict=True)):
            image.save(folder / f"{index:02d}.png")
            self.tracker.log_image(f"validation/{index:02d}", image, step, prompt)
        for index, (image, _) in enumerate(redrawn):
            image.save(folder / f"reconstruction-{index:02d}.png")
            self.tracker.log_image(f"reconstruction/{index:02d}", image, step, f"held-out image {index}")
        lines = [" ".join(prompt.split()) for prompt in self.prompts[: len(drawn)]]
        (folder / "prompts.txt").write_text("".join(f"{line}\n" for line in lines), "utf-8", "replace")
        grid = self._grid(drawn, redrawn)
        grid.save(folder / "grid.png")
        self.tracker.log_image("validation/grid", grid, step)

    def _reconstruct(self) -> list[tuple[Image.Image, Image.Image]]:
        """(redrawn, original) pairs, where the stage redraws at all."""
        if self.held_out is None or self.reconstructions == 0:
            return []
        rows = list(range(min(self.reconstructions, len(self.held_out))))
        # Other noise than the prompts have, so that a shared flaw of the noise cannot pass for a success.
        settings = replace(self.settings, seed=self.settings.seed + 1)
        network = self.accelerator.unwrap_model(self.training.network)
        features = self._features(self.held_out, rows)
        images = self._drawn.run(
            lambda size: self.training.stage.reconstruct(network, features, replace(settings, batch_size=size))
        )
        if not images:
            return []
        if self._originals is None:  # once: a streamed source has to be walked for them
            self._originals = [to_image(self.held_out.picture(row), self.settings.width) for row in rows]
        return list(zip(images, self._originals, strict=True))

    @staticmethod
    def _features(held_out: HeldOut, rows: list[int]) -> Features:
        """Features of rows of whatever shape: those that differ in shape are left out, embeddings never do."""
        single = [held_out.rows([row]) for row in rows]
        alike = [name for name in single[0] if len({features[name].shape for features in single}) == 1]
        return {name: torch.cat([features[name] for features in single]) for name in alike}

    def _grid(self, drawn: list[Image.Image], redrawn: list[tuple[Image.Image, Image.Image]]) -> Image.Image:
        images, labels = list(drawn), list(self.prompts[: len(drawn)])
        for index, (image, original) in enumerate(redrawn):
            images += [original, image]
            labels += [f"held out {index}", f"held out {index}, redrawn"]
        return labelled_grid(images, labels)


def to_image(image: Image.Image, resolution: int) -> Image.Image:
    """The picture as the decoder is trained to draw it: centre square, bicubic."""
    pixels = ((center_crop_resize(image, resolution) + 1) * 127.5).round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())
