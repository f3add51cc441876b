"""Validation: the fixed-noise loss on held-out rows, images for prompts, reconstructions and a labelled grid."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn

from kandinsky_exp.data.encoded.workers import collate
from kandinsky_exp.data.preprocess import Preprocess, crop_resize, to_picture
from kandinsky_exp.models.pipelines import SampleSettings
from kandinsky_exp.stages.base import DiffusionStage, Features
from kandinsky_exp.stages.compiling import is_compiled
from kandinsky_exp.system import distributed
from kandinsky_exp.system.halving import Halving
from kandinsky_exp.system.image_grid import labelled_grid
from kandinsky_exp.tracking.tracker import Tracker
from kandinsky_exp.training import ema, loop, metrics, validation_prompts
from kandinsky_exp.training.feature_reader import FeatureReader
from kandinsky_exp.training.seeding import derive_seed, validation_generator
from kandinsky_exp.training.validation_prompts import DrawnPrompt

logger = logging.getLogger(__name__)


@dataclass
class Validator:
    """Measures and draws at one step, always from the same noise, with the averaged weights where there are any.

    Args:
        folder: where `samples/` go; its subfolders are named after the step.
        reconstructions: how many held-out images a decoder redraws from their own embeddings.
        sets: further held-out rows by name, each with a curve of its own.
        drawn_metrics: measures pictures of held-out captions, which it has drawn by what it is given.
    """

    training: loop.Training
    accelerator: Accelerator
    tracker: Tracker
    folder: Path
    held_out: FeatureReader | None
    prompts: Sequence[DrawnPrompt]
    settings: SampleSettings
    draws: int
    reconstructions: int
    sets: Mapping[str, FeatureReader] = field(default_factory=dict)
    drawn_metrics: Callable[[Callable[[list[str]], list[Image.Image]]], dict[str, float]] | None = None
    loss: float | None = None
    measured: dict[str, float] = field(default_factory=dict)  # that the last one recorded, on the main process
    _losses: dict[str, float] = field(default_factory=dict)
    _rows: list[int] | None = None  # held out, that are redrawn
    _originals: Features = field(default_factory=dict)
    _measured: Halving = field(init=False)
    _drawn: Halving = field(init=False)

    def __post_init__(self) -> None:
        self._measured = Halving("validation loss", self.settings.batch_size)
        self._drawn = Halving("validation images", self.settings.batch_size)

    def __call__(self, step: int) -> None:
        with ema.averaged_weights(self.training), uncompiled(self._network):
            self._losses = {}
            if self.held_out is not None:
                self._losses = self._loss_of(self.held_out, "validation")
                self.loss = self._losses["validation/loss"]
            for name, rows in self.sets.items():
                self._losses |= self._loss_of(rows, f"validation/{name}")
            distributed.on_main_process(lambda: self._show(step))

    def _loss_of(self, rows: FeatureReader, prefix: str) -> dict[str, float]:
        loss, parts = fixed_noise_loss(
            self.training.stage,
            self._network,
            rows,
            accelerator=self.accelerator,
            seed=self.settings.seed,
            draws=self.draws,
            batches=self._measured,
        )
        return {f"{prefix}/loss": loss, **{f"{prefix}/loss_{name}": value for name, value in parts.items()}}

    @property
    def _network(self) -> nn.Module:
        bare: nn.Module = self.accelerator.unwrap_model(self.training.network)
        return bare

    def _show(self, step: int) -> None:
        if self._losses:
            self.measured = dict(self._losses)
            self.tracker.log_metrics(self.measured, step)
            told = {"": "validation/loss", **{f" of {name}": f"validation/{name}/loss" for name in self.sets}}
            said = [f"loss{name} {self._losses[key]:.5f}" for name, key in told.items() if key in self._losses]
            logger.info("step %d: validation %s", step, ", ".join(said))
        network = self._network.eval()
        drawn: list[Image.Image] = []
        if self.prompts:
            # No autocast around it: the network that trains has its own, and frozen parts are in the type they need.
            drawn = self._drawn.run(self._sample)
        held_out = self._shown()
        redrawn = self._reconstruct(held_out)
        judged = self._judge(held_out)
        if self.drawn_metrics is not None:
            judged |= {f"validation/{name}": value for name, value in self.drawn_metrics(self._of_captions).items()}
        if judged:
            self.tracker.log_metrics(judged, step)
            self.measured |= judged
        network.train()
        if not drawn and not redrawn:
            return
        folder = self.folder / f"step-{step:08d}"
        folder.mkdir(parents=True, exist_ok=True)
        for index, (image, prompt) in enumerate(zip(drawn, self.prompts, strict=True)):
            image.save(folder / f"{index:02d}.png")
            self.tracker.log_image(f"validation/{index:02d}", image, step, prompt.text)
        for index, (row, image) in enumerate(zip(self._rows or [], redrawn, strict=True) if redrawn else []):
            image.save(folder / f"reconstruction-{index:02d}.png")
            self.tracker.log_image(f"reconstruction/{index:02d}", image, step, f"held-out image {row}")
        lines = [" ".join(prompt.text.split()) for prompt in self.prompts[: len(drawn)]]
        (folder / "prompts.txt").write_text("".join(f"{line}\n" for line in lines), "utf-8", "replace")
        grid = self._grid(drawn, held_out if redrawn else {}, redrawn)
        grid.save(folder / "grid.png")
        self.tracker.log_image("validation/grid", grid, step)

    def _sample(self, size: int) -> list[Image.Image]:
        """Images of all prompts, in batches of this size."""
        network, stage, images = self._network, self.training.stage, list[Image.Image]()
        for texts, settings in validation_prompts.alike(self.prompts):
            images += stage.sample(network, texts, replace(settings, batch_size=size))
        return images

    def _of_captions(self, captions: list[str]) -> list[Image.Image]:
        stage, how = self.training.stage, self.settings
        return self._drawn.run(lambda size: stage.sample(self._network, captions, replace(how, batch_size=size)))

    def _shown(self) -> Features:
        """Features of the first held-out pictures, with their pixels and what belongs to them as they are drawn."""
        stage = self.training.stage
        if self.held_out is None or self.reconstructions == 0 or not stage.redraws:
            return {}
        if self._rows is None:  # once: a streamed source has to be walked for them
            how = replace(stage.preprocess, buckets=(), resolution=self.settings.width)
            found = _as_drawn(self.held_out, how, self.reconstructions)
            self._rows, self._originals = list(found), collate(list(found.values())) if found else {}
        return alike_features(self.held_out, self._rows) | self._originals if self._rows else {}

    def _reconstruct(self, held_out: Features) -> list[Image.Image]:
        """Those pictures, drawn from their features."""
        if not held_out:
            return []
        stage, how = self.training.stage, self._other_noise
        return self._drawn.run(lambda size: stage.reconstruct(self._network, held_out, replace(how, batch_size=size)))

    def _judge(self, held_out: Features) -> dict[str, float]:
        if not held_out:
            return {}
        stage, how = self.training.stage, self._other_noise
        found = self._drawn.run(lambda size: stage.judge(self._network, held_out, replace(how, batch_size=size)))
        return {f"validation/{name}": value for name, value in found.items()}

    @property
    def _other_noise(self) -> SampleSettings:
        """Than the prompts have, so that a shared flaw of the noise cannot pass for a success."""
        return replace(self.settings, seed=self.settings.seed + 1)

    def _grid(self, drawn: list[Image.Image], held_out: Features, redrawn: list[Image.Image]) -> Image.Image:
        """Pictures of the prompts, and below them the held-out ones, what belongs to one of them in one row."""
        images, labels, columns = list(drawn), [prompt.text for prompt in self.prompts[: len(drawn)]], None
        if redrawn:
            inputs = self.training.stage.shown_inputs(held_out, self._other_noise)
            together = 2 + len(inputs)
            columns = together * max(1, round(math.sqrt(len(drawn) + together * len(redrawn)) / together))
            empty = -len(drawn) % columns
            images, labels = [*images, *[Image.new("RGB", redrawn[0].size, "white")] * empty], labels + [""] * empty
            names = ["", *(f", {name}" for name in inputs), ", redrawn"]
            for index, (row, image) in enumerate(zip(self._rows or [], redrawn, strict=True)):
                images += [to_picture(held_out["pixels"][index]), *(shown[index] for shown in inputs.values()), image]
                labels += [f"held out {row}{name}" for name in names]
        return labelled_grid(images, labels, columns)


def _as_drawn(held_out: FeatureReader, how: Preprocess, count: int) -> dict[int, Features]:
    """Pixels of the first held-out pictures, and what belongs to them, as the network is asked to draw them, by row.

    That is their middle square. One whose hole lies outside of it is passed over, and named.
    """
    found: dict[int, Features] = {}
    for row in range(len(held_out)):
        if len(found) == count:
            break
        example = held_out.example(row)
        image = example.image()
        try:
            beside = how.beside(image, example.companions())
        except ValueError as error:
            logger.warning("%s is not redrawn in its middle square: %s", example.id, error)
            continue
        found[row] = {"pixels": crop_resize(image, *how.size(image)), **beside}
    return found


def alike_features(held_out: FeatureReader, rows: list[int]) -> Features:
    """Features of rows of whatever shape: those that differ in shape are left out, embeddings never do."""
    single = [held_out.rows([row]) for row in rows]
    alike = [name for name in single[0] if len({features[name].shape for features in single}) == 1]
    return {name: torch.cat([features[name] for features in single]) for name in alike}


def uncompiled(network: nn.Module) -> AbstractContextManager[object]:
    """The network as it is, where `trainer.compile` compiled it for the training step.

    Validation asks for other batch sizes, no gradient and evaluation mode: each would cost a compilation of its own,
    minutes long, for a few calls.
    """
    return torch.compiler.set_stance("force_eager") if is_compiled(network) else nullcontext()


@torch.no_grad()
def fixed_noise_loss(
    stage: DiffusionStage,
    network: nn.Module,
    held_out: FeatureReader,
    *,
    accelerator: Accelerator,
    seed: int,
    draws: int,
    batches: Halving,
) -> tuple[float, dict[str, float]]:
    """Mean unweighted loss over held-out rows, and means of what the stage measures, by name.

    Noise and timesteps depend on (seed, row, draw) alone, and the draws of a row fall into equal parts of the timestep
    range, so that the estimate falls smoothly. It does not depend on batch size or number of processes (beyond
    rounding), nor on a run's loss weighting or dropped conditions.
    """
    mine = list(range(accelerator.process_index, len(held_out), accelerator.num_processes))

    def summed(size: int) -> Tensor:
        """Sum of losses and their number over the rows of this process, and those of what the stage measures."""
        total = torch.zeros(2 + 2 * len(stage.measures), device=accelerator.device)
        for chunk in held_out.batches(mine, size):
            features = held_out.rows(chunk)
            for draw in range(draws):
                generators = [validation_generator(seed, row, draw) for row in chunk]
                timesteps = spread_timesteps(seed, chunk, draw, draws, stage.num_timesteps).to(accelerator.device)
                found = stage.loss(network, features, generators, timesteps)
                number = torch.tensor(float(len(chunk)), device=accelerator.device)
                measured = [found.measured.get(name, torch.zeros_like(total[:2])) for name in stage.measures]
                total += torch.cat([torch.stack([found.per_sample.sum(), number]), *measured])
        return total

    network.eval()
    total = distributed.on_all_processes(lambda: batches.run(summed))
    network.train()
    loss, number, *parts = accelerator.reduce(total, reduction="sum").tolist()
    return loss / number, metrics.means(stage.measures, parts, "")


def spread_timesteps(seed: int, rows: list[int], draw: int, draws: int, num_timesteps: int) -> Tensor:
    """One timestep per row from part `draw` of `draws` equal parts of [0, T): a row's offset is the same in each."""
    offsets = [derive_seed("timestep", seed, row) / (1 << 63) for row in rows]
    return torch.tensor([int(num_timesteps * (draw + offset) / draws) for offset in offsets])
