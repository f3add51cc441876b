"""Draw the pictures that are measured: each once, whatever stops in between."""

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from kandinsky_exp.models import pipelines
from kandinsky_exp.models.pipelines import Embeds, SampleSettings
from kandinsky_exp.models.weights import Weights
from kandinsky_exp.system import files
from kandinsky_exp.system.halving import Halving
from kandinsky_exp.system.telling import told

VARIED, VARIANTS = 16, 4  # captions that are drawn several times, and how often, for `diversity`
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """What is drawn. Picture i is of text i, from the noise of (seed, i).

    Args:
        captions: each once; those that are drawn again come after all of them.
    """

    captions: Sequence[str]

    @property
    def texts(self) -> list[str]:
        again = [text for text in self.captions[: self.varied] for _ in range(VARIANTS - 1)]
        return [*self.captions, *again]

    @property
    def varied(self) -> int:
        """How many captions are drawn several times: few, for that takes time."""
        return max(1, min(VARIED, len(self.captions) // 8))

    @property
    def groups(self) -> list[list[int]]:
        """Numbers of the pictures of each of these captions."""
        first, more = len(self.captions), VARIANTS - 1
        return [[row, *range(first + row * more, first + (row + 1) * more)] for row in range(self.varied)]


def file_of(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.png"


def read(folder: Path, numbers: Iterable[int]) -> list[Image.Image]:
    """Pictures that were drawn."""
    found = []
    for number in numbers:
        with Image.open(file_of(folder, number)) as picture:
            found.append(picture.convert("RGB"))
    return found


@dataclass(frozen=True)
class Networks:
    """What draws.

    Args:
        prior, decoder: load a network, on the CPU.
    """

    prior: Callable[[], Any]
    decoder: Callable[[], Any]


@torch.no_grad()
def draw(
    plan: Plan,
    folder: Path,
    weights: Weights,
    networks: Networks,
    how: tuple[SampleSettings, SampleSettings],
    device: torch.device,
    share: tuple[int, int] = (0, 1),
) -> None:
    """Draw the pictures that are not there yet, every prompt through the prior first.

    Args:
        folder: where `00000.png` and so on go.
        how: of the prior and of the decoder.
        share: number of this process, and of all that draw into this folder.
    """
    size = how[1].batch_size
    # In the chunks of an undisturbed start: what draws in other company can differ in the last bits.
    chunks = [range(start, min(start + size, len(plan.texts))) for start in range(0, len(plan.texts), size)]
    rank, processes = share
    todo = [chunk for chunk in chunks[rank::processes] if not all(file_of(folder, n).is_file() for n in chunk)]
    if not todo:
        return
    there = sum(len(chunk) for chunk in chunks[rank::processes]) - sum(len(chunk) for chunk in todo)
    logger.info("drawing %d pictures%s into %s", sum(map(len, todo)), f", {there} are there" * bool(there), folder)
    embeds = _embedded(plan.texts, todo, weights, networks, how[0], device)
    network = networks.decoder().to(device)
    with weights.lent(("movq",), device):
        pipeline, halving = pipelines.decoder_pipeline(weights, network), Halving("the decoder", size)
        for chunk in told(todo, "pictures", "drew", logger.info, len):
            settings = replace(how[1], first=chunk.start)
            images = halving.run(partial(_decoded, pipeline, embeds[chunk], settings))
            for number, image in zip(chunk, images, strict=True):
                with files.replacing(file_of(folder, number)) as aside:
                    image.save(aside, "PNG")


def _decoded(pipeline: Any, embeds: Embeds, settings: SampleSettings, batch_size: int) -> list[Image.Image]:
    return pipelines.decode(pipeline, embeds, replace(settings, batch_size=batch_size))


def _embedded(
    texts: Sequence[str],
    chunks: Sequence[range],
    weights: Weights,
    networks: Networks,
    how: SampleSettings,
    device: torch.device,
) -> dict[range, Embeds]:
    network = networks.prior().to(device)
    with weights.lent(("text_encoder", "image_encoder"), device):
        pipeline, halving = pipelines.prior_pipeline(weights, network), Halving("the prior", how.batch_size)

        def embed(chunk: range) -> Embeds:
            asked = [texts[number] for number in chunk]
            made: Embeds = halving.run(
                lambda batch: pipelines.embed_prompts(
                    pipeline, asked, replace(how, first=chunk.start, batch_size=batch)
                )
            )
            return made[0].cpu(), made[1].cpu()

        found = {chunk: embed(chunk) for chunk in chunks}
    network.to("cpu")  # the decoder needs its room
    return found
