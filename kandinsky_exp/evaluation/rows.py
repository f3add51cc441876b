"""From the pictures of one model to its row of the report."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from kandinsky_exp.data.preprocess import cropped
from kandinsky_exp.evaluation import drawing, measuring
from kandinsky_exp.evaluation.drawing import Plan
from kandinsky_exp.evaluation.encoders import OwnEncoder, PictureEncoder
from kandinsky_exp.evaluation.measuring import Embedded, Pair
from kandinsky_exp.evaluation.real_pictures import AT_ONCE, RealPictures, some_of
from kandinsky_exp.evaluation.report import SHOWN, Row, Shown
from kandinsky_exp.models.weights import Weights
from kandinsky_exp.training.feature_reader import FeatureReader

MOST_REAL = 5000  # held-out pictures that count: kernels grow with their square


@dataclass(frozen=True)
class Measures:
    """What a model's pictures are measured against, and by what.

    Args:
        captioned: held-out pictures of the captions that were drawn.
        train, held_out: what trained, and what did not.
        other: an encoder beside Kandinsky's own.
        seed: of what is drawn by lot.
    """

    train: FeatureReader
    held_out: FeatureReader
    captioned: RealPictures
    weights: Weights
    other: PictureEncoder | None
    seed: int
    device: torch.device


def row_of(name: str, plan: Plan, folder: Path, how: Measures, facts: Mapping[str, Any]) -> Row:
    """Measure pictures that were drawn.

    Args:
        folder: that holds them.
        facts: what they follow from.
    """
    real = some_of(how.held_out, max(len(plan.captions), MOST_REAL), how.seed)
    train, own = RealPictures(how.train, range(len(how.train))), OwnEncoder(how.weights)
    results = {}
    with torch.no_grad(), own.on_device(how.device):
        for encoder in (own, *([] if how.other is None else [how.other])):
            embedded = Embedded(
                drawn=torch.cat(list(_in_parts(encoder, folder, len(plan.texts)))),
                captioned=how.captioned.embeds(encoder),
                held_out=real.embeds(encoder),
                train=train.embeds(encoder),
                texts=own.texts(plan.captions) if encoder is own else None,
            )
            results[encoder.name] = measuring.measure(embedded, plan.groups, how.seed)
    closest = list(_closest(results[own.name].closest, plan, folder, train))
    return Row(name, results, closest, list(_beside(plan, folder, how.captioned)), facts)


def _in_parts(encoder: PictureEncoder, folder: Path, count: int) -> Iterator[Tensor]:
    for start in range(0, count, AT_ONCE):
        yield encoder(drawing.read(folder, range(start, min(count, start + AT_ONCE))))


def _closest(pairs: Sequence[Pair], plan: Plan, folder: Path, train: RealPictures) -> Iterator[Shown]:
    pictures = train.pictures([pair.train for pair in pairs])
    for pair, (drawn,), picture in zip(pairs, (drawing.read(folder, [p.drawn]) for p in pairs), pictures, strict=True):
        label = f"{pair.distance:.3f}: {plan.captions[pair.drawn]}"
        yield Shown([drawn, _shaped(picture, drawn)], label)


def _beside(plan: Plan, folder: Path, captioned: RealPictures) -> Iterator[Shown]:
    """Held-out pictures, and what was drawn from their captions."""
    shown = range(min(SHOWN, len(plan.captions)))
    pictures = captioned.pictures([captioned.rows[number] for number in shown])
    for drawn, picture, caption in zip(drawing.read(folder, shown), pictures, plan.captions, strict=False):
        yield Shown([_shaped(picture, drawn), drawn], caption)


def _shaped(picture: Image.Image, like: Image.Image) -> Image.Image:
    return cropped(picture, *like.size)
