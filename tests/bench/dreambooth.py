"""Does DreamBooth teach a subject, and does prior preservation keep the rest as it was?

    python tests/bench/dreambooth.py FOLDER [--subject 1f41c]

Five pictures of one shipped emoji, shifted, turned and scaled, train adapters of the tiny prior and decoder twice: with
class images beside them, and without. Then the base pair and both trained pairs draw, from the same noise, the prompt
of the subject and others. `retrieval` is the part of the subject's pictures that are nearest (pixel MSE) to it among
all 80 shipped emoji; `drift` is how far pictures of other prompts moved from the base's (pixel RMSE, 0 to 255).
FOLDER keeps runs, pictures and a grid.
"""

import argparse
import contextlib
import io
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from kandinsky_exp import cli
from kandinsky_exp.data import sources
from kandinsky_exp.system.image_grid import labelled_grid

SIDE = 64  # pixels
PROMPT = "a 3d emoji of sks animal"
CLASS_PROMPT = "a 3d emoji of animal"
OTHERS = (
    CLASS_PROMPT,
    "a 3d emoji of hedgehog, animal, spiny",
    "a 3d emoji of bison, animal, buffalo, herd, wisent",
    "a 3d emoji of sun, bright, rays, space, sunny",
    "a 3d emoji of green heart, 143, emotion, green, heart",
    "a 3d emoji of the flag of Switzerland",
)
WAYS = {"kept": [f"data.class_prompt={CLASS_PROMPT}"], "forgotten": []}
Pixels = NDArray[np.float32]


@dataclass(frozen=True)
class Plan:
    """How the pairs are trained and drawn with.

    Args:
        subject: stem of a training emoji's file.
        draws: pictures per prompt.
        overrides: of all four trainings.
    """

    root: Path
    subject: str
    steps: int
    class_images: int
    draws: int
    inference_steps: int
    overrides: tuple[str, ...] = ()

    @property
    def pictures(self) -> Path:
        return self.root / f"subject-{self.subject}"


@dataclass(frozen=True)
class Outcome:
    """Numbers of one pair; the base has no drift."""

    retrieval: float
    drift: float


def write_subject(subject: str, folder: Path) -> None:
    """Five pictures of the subject: moved by a few pixels, turned by a few degrees, larger or smaller."""
    folder.mkdir(parents=True, exist_ok=True)
    with Image.open(sources.EMOJI / "train" / f"{subject}.png") as file:
        original = flat(file)
    views = ((0, 1.0, 0, 0), (6, 0.95, 2, 1), (-6, 0.92, -2, 2), (3, 1.05, 1, -2), (-3, 0.9, 3, -3))
    for number, (degrees, scale, right, down) in enumerate(views):
        side = round(SIDE * scale)
        turned = original.rotate(degrees, Image.Resampling.BICUBIC, fillcolor="white").resize((side, side))
        view = Image.new("RGB", (SIDE, SIDE), "white")
        view.paste(turned, ((SIDE - side) // 2 + right, (SIDE - side) // 2 + down))
        view.save(folder / f"{number}.png")


def flat(image: Image.Image) -> Image.Image:
    """Over white, at the size of training."""
    opaque = Image.new("RGBA", image.size, "white")
    opaque.alpha_composite(image.convert("RGBA"))
    return opaque.convert("RGB").resize((SIDE, SIDE))


def train(plan: Plan, way: str, stage: str) -> Path:
    settings = [
        *("train", f"model={stage}", "weights=tiny", "data=dreambooth", "adapter=lora", "tracker=none"),
        *(f"name={plan.subject}-{way}-{stage}", f"output_root={plan.root}", f"data.instance_path={plan.pictures}"),
        *(f"data.instance_prompt={PROMPT}", f"data.num_class_images={plan.class_images}"),
        *("data.resolution=64", "adapter.rank=16", "optimizer.lr=2e-3", "trainer.batch_size=5"),
        *(f"trainer.max_steps={plan.steps}", f"trainer.log_every={plan.steps}", "model.condition_dropout=0"),
        *(f"checkpoint.every={plan.steps}", "checkpoint.keep=1"),
    ]
    cli.main([*settings, *WAYS[way], *plan.overrides])
    return plan.root / f"{plan.subject}-{way}-{stage}"


def draw(plan: Plan, name: str, sides: Sequence[str]) -> Pixels:
    """(prompts, draws, 64, 64, 3), the subject's prompt first; all pairs start from the same noise."""
    file = plan.root / "prompts.txt"
    file.write_text("\n".join((PROMPT, *OTHERS)) + "\n", "utf-8")
    settings = [
        *("generate", "weights=tiny", f"prompts={file}", f"num_images={plan.draws}", f"output_root={plan.root}"),
        *(f"inference_steps={plan.inference_steps}", f"prior_inference_steps={plan.inference_steps}"),
        *("guidance_scale=2", "prior_guidance_scale=2", f"name={plan.subject}-{name}"),
    ]
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        cli.main([*settings, *sides])
    files = sorted(Path(shown.getvalue().strip().splitlines()[-1]).glob("[0-9]*.png"), key=lambda path: int(path.stem))
    images = np.stack([np.asarray(Image.open(path).convert("RGB"), np.float32) for path in files])
    return images.reshape(1 + len(OTHERS), plan.draws, SIDE, SIDE, 3)


def retrieval(images: Pixels, subject: str) -> float:
    """Part of the images (n, 64, 64, 3) that are nearest to the subject among all shipped emoji."""
    files = sorted(sources.EMOJI.glob("*/*.png"))
    originals = np.stack([np.asarray(flat(Image.open(file)), np.float32) for file in files])
    nearest = [files[int(np.square(originals - image).mean((1, 2, 3)).argmin())].stem for image in images]
    return nearest.count(subject) / len(nearest)


def drift(images: Pixels, base: Pixels) -> float:
    return math.sqrt(float(np.square(images - base).mean()))


def measure(plan: Plan) -> dict[str, Outcome]:
    """Train both ways, draw with all three pairs."""
    write_subject(plan.subject, plan.pictures)
    base = draw(plan, "base", [])
    outcomes, rows = {"base": Outcome(retrieval(base[0], plan.subject), 0.0)}, {"base": base}
    for way in WAYS:
        sides = [f"{stage}={train(plan, way, stage)}" for stage in ("prior", "decoder")]
        rows[way] = images = draw(plan, way, sides)
        outcomes[way] = Outcome(retrieval(images[0], plan.subject), drift(images[1:], base[1:]))
    pictures = [Image.fromarray(row[prompt, 0].astype(np.uint8)) for row in rows.values() for prompt in range(len(row))]
    labels = [f"{name}: {prompt}" for name in rows for prompt in (PROMPT, *OTHERS)]
    labelled_grid(pictures, labels, columns=1 + len(OTHERS)).save(plan.root / f"grid-{plan.subject}.png")
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--subject", default="1f99c", help="of the shipped emoji; default: the parrot")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--class-images", type=int, default=24)
    parser.add_argument("--draws", type=int, default=8)
    parser.add_argument("--inference-steps", type=int, default=25)
    parser.add_argument("overrides", nargs="*", help="of all four trainings")
    given = parser.parse_intermixed_args()
    torch.set_num_threads(1)
    plan = Plan(
        given.folder.absolute(),
        given.subject,
        given.steps,
        given.class_images,
        given.draws,
        given.inference_steps,
        tuple(given.overrides),
    )
    print(json.dumps({name: asdict(outcome) for name, outcome in measure(plan).items()}, indent=2))


if __name__ == "__main__":
    main()
