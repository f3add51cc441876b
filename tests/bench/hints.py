"""Does a decoder for hints draw the hints that it is given?

    python tests/bench/hints.py PICTURES FOLDER [--decoder RUN …] [--count 64]

PICTURES is a folder of captioned pictures. Each gives a hint, its edges, and pictures are drawn for the hints: once
with the embedding of another picture, once with the null embedding, for a picture's own embedding holds its edges, too.
Edges of what is drawn are compared with those of the hint that was given and with those of one that was not. The
difference of the two F1 scores is 0 where hints are not heeded, as of the plain tiny decoder, which sees none. FOLDER
gets the pictures and `hints.json`. Without `--decoder` it is the one that ships, `tiny_control`.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from kandinsky_exp.data import edges, sources
from kandinsky_exp.data.companions import Edges
from kandinsky_exp.data.encoded.workers import collate
from kandinsky_exp.models import pipelines
from kandinsky_exp.models.sampling import SampleSettings
from kandinsky_exp.models.weights import Weights
from kandinsky_exp.stages.base import Features
from kandinsky_exp.stages.control import ControlStage
from kandinsky_exp.stages.decoder import DecoderStage
from kandinsky_exp.system.image_grid import labelled_grid

SIDE = 64  # pixels
OTHER, NOT_GIVEN = 1, 2  # how many pictures further: whose embedding, and whose hint, which is neither's
SHOWN = 8


def encoded(weights: Weights, pictures: Path, count: int) -> tuple[list[Image.Image], Features]:
    stage = ControlStage(weights, resolution=SIDE)
    how = replace(stage.preprocess, companions={"hint": Edges(weights.latent_scale())})
    stage.preprocess = how
    originals = [example.image() for example in sources.folder(str(pictures)).train.examples()][:count]
    return originals, stage.encode(collate([how(image, None) for image in originals]))


def agreement(drawn: list[Image.Image], hints: torch.Tensor) -> tuple[float, float]:
    """(F1 with the hint that was given, F1 with one that was not), means over all pictures."""
    side = hints.shape[-1]
    found = [edges.canny(np.asarray(image.resize((side, side), Image.Resampling.BICUBIC))) for image in drawn]
    wanted = [hint[0].numpy() for hint in hints]
    others = wanted[NOT_GIVEN:] + wanted[:NOT_GIVEN]
    own, other = ([edges.f1(*pair) for pair in zip(found, hints, strict=True)] for hints in (wanted, others))
    return sum(own) / len(own), sum(other) / len(other)


@torch.no_grad()
def drawn_with(decoder: str, features: Features, cache: Path) -> dict[str, list[Image.Image]]:
    """Pictures for the hints, by the embedding that they are drawn with."""
    weights = Weights("tiny", decoder, cache)
    stage = (DecoderStage if decoder == "tiny" else ControlStage)(weights, resolution=SIDE)
    network, null = stage.network.eval(), stage.null_condition()["image_embeds"]
    settings = SampleSettings(height=SIDE, width=SIDE, batch_size=16)
    null = null.expand_as(features["image_embeds"])
    found = {}
    for name, embeds in (("another", features["image_embeds"].roll(-OTHER, 0)), ("null", null)):
        if isinstance(stage, ControlStage):
            found[name] = stage.reconstruct(network, {"image_embeds": embeds, "hint": features["hint"]}, settings)
        else:
            found[name] = pipelines.decode(pipelines.decoder_pipeline(weights, network), (embeds, null), settings)
    return found


def _large(picture: Image.Image) -> Image.Image:
    return picture.resize((2 * SIDE, 2 * SIDE))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--decoder", nargs="+", default=["tiny_control"], help="what weights.decoder takes")
    parser.add_argument("--count", type=int, default=64)
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    cache = given.folder / "cache"
    originals, features = encoded(Weights("tiny", "tiny", cache), given.pictures, given.count)
    found = {}
    for number, decoder in enumerate(["tiny", *given.decoder]):
        for embedding, drawn in drawn_with(decoder, features, cache).items():
            own, other = agreement(drawn, features["hint"])
            found[f"{decoder}, {embedding}"] = {"given": own, "not given": other, "difference": own - other}
            print(f"{decoder}, {embedding} embedding: given {own:.3f}, not given {other:.3f}: {own - other:+.3f}")
            rows = zip(originals, features["hint"], drawn, strict=True)
            images = [
                shown
                for original, hint, picture in list(rows)[:SHOWN]
                for shown in (_large(original), _large(Image.fromarray(hint[0].numpy())), _large(picture))
            ]
            labels = ["picture", "hint", "drawn"] * (len(images) // 3)
            labelled_grid(images, labels, 6).save(given.folder / f"{number}-{embedding}.png")
    (given.folder / "hints.json").write_text(json.dumps(found, indent=1), "utf-8")


if __name__ == "__main__":
    main()
