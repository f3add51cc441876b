"""Does a decoder learn to fill holes, and does it heed what is kept?

    python tests/bench/inpainting.py PICTURES FOLDER [--steps 800]

The tiny decoder trains on a folder of captioned pictures; held-out ones are noised as validation does it, and the mean
squared error is taken over kept latents and over those in the hole, as a ratio to that of the decoder it began as, on
the same noisy latents and holes. `foreign` is the error in the hole with another picture's kept latents, as a ratio to
that with its own: above 1, the network heeds what is kept. FOLDER keeps the run, with its grids of filled holes.
"""

import argparse
import contextlib
import io
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from kandinsky_exp import cli
from kandinsky_exp.data import sources
from kandinsky_exp.data.encoded.workers import collate
from kandinsky_exp.data.preprocess import Preprocess
from kandinsky_exp.models.weights import Weights
from kandinsky_exp.stages import diffusion
from kandinsky_exp.stages.base import Features
from kandinsky_exp.stages.inpaint import InpaintStage

SIDE = 64  # pixels
DRAWS = 8  # timesteps, one in each part of their range
SIZE = 32  # pictures at once


@dataclass(frozen=True)
class Errors:
    """Sums of squared errors and their numbers, (2,) each; `foreign` is of the hole too."""

    hole: Tensor
    kept: Tensor
    foreign: Tensor


def train(pictures: Path, folder: Path, steps: int) -> Path:
    """The run's result."""
    words = ["model=inpaint", "weights=tiny", "data=folder", f"data.path={pictures}", f"data.resolution={SIDE}"]
    words += ["optimizer.lr=1e-3", "trainer.batch_size=32", "trainer.ema_decay=0.995"]
    words += [f"trainer.max_steps={steps}", "validation.every=200", "validation.reconstructions=8"]
    words += ["validation.guidance_scale=2.0", f"output_root={folder}", "name=inpaint", "tracker=none"]
    with contextlib.redirect_stdout(io.StringIO()):
        cli.main(words)
    return folder / "inpaint"


def encoded(stage: InpaintStage, preprocess: Preprocess, pictures: Path) -> list[Features]:
    """Features of all held-out pictures, in batches."""
    rows = [preprocess(example.image(), None) for example in sources.folder(str(pictures)).train.examples()]
    return [stage.encode(collate(rows[start : start + SIZE])) for start in range(0, len(rows), SIZE)]


@torch.no_grad()
def measure(stage: InpaintStage, network: nn.Module, batches: list[Features]) -> Errors:
    """The same noise, timesteps and holes for every network."""
    totals = [torch.zeros(2) for _ in range(3)]
    generator = torch.Generator().manual_seed(0)
    for features in batches:
        clean = stage.clean(features)
        for draw in range(DRAWS):
            given = stage.with_drawn(features, generator)
            low, high = (part * stage.num_timesteps // DRAWS for part in (draw, draw + 1))
            timesteps = torch.randint(low, high, (len(clean),), generator=generator)
            noise = torch.randn(clean.shape, generator=generator)
            noisy = diffusion.add_noise(clean, noise, timesteps, stage.alphas_cumprod)
            others = given | {"latents": features["latents"].roll(1, 0)}  # kept of another picture
            found = [
                stage.measure(
                    (stage.predict(network, noisy, timesteps, seen)[:, : clean.shape[1]] - noise).square(), given
                )
                for seen in (given, others)
            ]
            for total, pair in zip(totals, (found[0]["hole"], found[0]["kept"], found[1]["hole"]), strict=True):
                total += pair
    return Errors(*totals)


def ratio(first: Tensor, second: Tensor) -> float:
    return float(first[0] / first[1] / (second[0] / second[1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", type=Path, help="a folder with train/ and validation/")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=800)
    given = parser.parse_args()
    result = train(given.pictures, given.folder, given.steps)
    stages = [
        InpaintStage(Weights("tiny", decoder, given.folder / "cache"), resolution=SIDE)
        for decoder in ("tiny", str(result))
    ]
    batches = encoded(stages[0], stages[0].preprocess, given.pictures / "validation")
    before, after = (measure(stage, stage.network.eval(), batches) for stage in stages)
    found = {
        "kept": ratio(after.kept, before.kept),
        "hole": ratio(after.hole, before.hole),
        "foreign": ratio(after.foreign, after.hole),
    }
    (given.folder / "inpainting.json").write_text(json.dumps(found, indent=1), "utf-8")
    for name, value in found.items():
        print(f"{name:<8} {value:.3f}")


if __name__ == "__main__":
    main()
