"""The demo: a tiny Kandinsky 2.2 learns the shipped emoji, then draws them from their captions.

    python -m kandinsky_exp.verbs.demo [overrides of both trainings]

Both trainings are plain runs of the command (`experiment=demo_prior`, `experiment=demo_decoder`); what follows draws
every training caption through both results and counts how many pictures can be told apart.
"""

import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from kandinsky_exp import cli
from kandinsky_exp.data import sources
from kandinsky_exp.data.preprocess import cropped
from kandinsky_exp.models import pipelines
from kandinsky_exp.models.weights import Weights
from kandinsky_exp.runs import run_folder
from kandinsky_exp.system import files, logs
from kandinsky_exp.system.image_grid import labelled_grid
from kandinsky_exp.tracking import mlflow_names, store

EXPERIMENTS = ("demo_prior", "demo_decoder")
RESOLUTION = 64  # pixels
THREADS = 1  # at this size a second one gains little, and loses much where anything else wants the core
METRIC = "demo/retrieval"
SETTINGS = pipelines.SampleSettings(
    inference_steps=25, guidance_scale=2.0, batch_size=32, height=RESOLUTION, width=RESOLUTION
)


@dataclass(frozen=True)
class Demo:
    """What the demo made.

    Args:
        folder: the pictures, `grid.png` and `captions.txt`.
        score: part of the pictures that are nearest to their own original.
        seconds: wall-clock time of both trainings.
    """

    folder: Path
    score: float
    images: list[Image.Image]
    seconds: float


def run_demo(output_root: Path, overrides: Sequence[str] = (), captions: int | None = None) -> Demo:
    """Train both stages, draw the training captions, measure, record.

    Args:
        overrides: of both trainings, such as `trainer.max_steps=10`.
        captions: draw the first so many only.
    """
    started = time.monotonic()
    root = f"output_root='{output_root}'"  # quoted: to Hydra a comma or a bracket in a folder's name means more
    for experiment in EXPERIMENTS:
        cli.main(["train", f"experiment={experiment}", root, *overrides])
    seconds = time.monotonic() - started
    splits = sources.emoji()
    assert splits.validation is not None  # nosec B101 # narrows the type
    examples = list(splits.train.examples())[:captions]
    texts = [example.captions[0] for example in examples]
    pictures = [
        cropped(example.image(), RESOLUTION, RESOLUTION)
        for source in (splits.train, splits.validation)
        for example in source.examples()
    ]
    images = draw(output_root, texts)
    nearest = nearest_pictures(images, pictures)
    score = retrieval(nearest)
    folder = write(output_root / "generate" / "demo", images, pictures, texts, nearest)
    record(output_root, folder, score)
    return Demo(folder, score, images, seconds)


def draw(output_root: Path, captions: list[str]) -> list[Image.Image]:
    """Captions through the trained prior and the trained decoder, as the runs left them behind."""
    logs.quiet_libraries()
    weights = Weights(
        prior=str(output_root / "demo_prior"),
        decoder=str(output_root / "demo_decoder"),
        cache_folder=output_root / "cache",
    )
    embeds = pipelines.embed_prompts(pipelines.prior_pipeline(weights), captions, SETTINGS)
    return pipelines.decode(pipelines.decoder_pipeline(weights), embeds, SETTINGS)


def nearest_pictures(images: Sequence[Image.Image], pictures: Sequence[Image.Image]) -> list[int]:
    """For each image the number of the picture with the smallest mean squared difference of pixels."""
    drawn, originals = (
        np.stack([np.asarray(item, dtype=np.float32) for item in group]) for group in (images, pictures)
    )
    return [int(np.square(originals - image).mean(axis=(1, 2, 3)).argmin()) for image in drawn]


def retrieval(nearest: Sequence[int]) -> float:
    """Part of the images, in [0, 1], whose nearest picture is their own: image i was drawn for picture i."""
    return sum(own == found for own, found in enumerate(nearest)) / len(nearest)


def write(
    folder: Path, images: list[Image.Image], pictures: list[Image.Image], captions: list[str], nearest: list[int]
) -> Path:
    """The images, and a grid of each beside its original, labelled with its caption, and marked where it missed."""
    folder.mkdir(parents=True, exist_ok=True)
    pairs, labels = [], []
    for index, (image, caption) in enumerate(zip(images, captions, strict=True)):
        image.save(folder / f"{index:02d}.png")
        pair = Image.new("RGB", (2 * RESOLUTION, RESOLUTION), "white")
        pair.paste(pictures[index], (0, 0))
        pair.paste(image, (RESOLUTION, 0))
        pairs.append(pair)
        labels.append(caption if nearest[index] == index else f"(missed) {caption}")
    labelled_grid(pairs, labels).save(folder / "grid.png")
    files.write_atomically(folder / "captions.txt", "\n".join(captions) + "\n")
    return folder


def record(output_root: Path, folder: Path, score: float) -> None:
    """The score and the grid, in the decoder's MLflow run, where it has one."""
    run = run_folder.read_record(output_root / "demo_decoder")
    if run is None or run.run_id is None:
        return
    client, _ = store.connect(store.default_uri(output_root))
    client.log_metric(run.run_id, METRIC, score, step=run.step)
    with Image.open(folder / "grid.png") as grid:
        key = mlflow_names.legal_name("demo/grid")
        client.log_image(run.run_id, grid.convert("RGB"), key=key, step=run.step, synchronous=True)


def summary(demo: Demo, output_root: Path) -> str:
    """Three lines: where the pictures are, the score, how to open the UI."""
    count = len(demo.images)
    override = shlex.quote(f"output_root={output_root}")
    return "\n".join(
        [
            f"pictures: {demo.folder / 'grid.png'} (left the original, right what was drawn from its caption)",
            f"score:    {round(demo.score * count)} of {count} are nearest to their own original among all 80 "
            f"({METRIC} {demo.score:.2f}, chance 0.01), after {demo.seconds:.0f} s of training",
            f"runs:     {shlex.quote(sys.executable)} -m kandinsky_exp ui {override}",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the demo in `outputs/`, and says in three lines what came of it."""
    overrides = list(sys.argv[1:] if arguments is None else arguments)
    if any(item.startswith(("name=", "output_root=", "tracker.uri=")) for item in overrides):
        print("error: name, output_root and tracker.uri are the demo's own; leave them out", file=sys.stderr)
        sys.exit(2)
    torch.set_num_threads(THREADS)
    output_root = Path("outputs").absolute()
    print(summary(run_demo(output_root, overrides), output_root))


if __name__ == "__main__":
    main()
