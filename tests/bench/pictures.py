"""Folders of generated pictures with captions: the data of the benchmarks."""

import functools
import json
import os
import random
from importlib.resources import files
from pathlib import Path

from PIL import Image, ImageDraw

SHAPES, COLOURS = ("circle", "square", "line"), ("red", "green", "blue", "orange", "purple", "teal")
LINKS = 20_000  # hard links of one file: file systems allow 65,000 or fewer


def draw(generator: random.Random, side: tuple[int, int]) -> tuple[Image.Image, str]:
    """A picture of some shapes, and the caption of an emoji: as long as captions are that people write."""
    image = Image.effect_noise(side, 40).convert("RGB")  # as hard to decode as a photograph
    pencil = ImageDraw.Draw(image)
    for _ in range(4):
        shape, colour = generator.choice(SHAPES), generator.choice(COLOURS)
        left, top = generator.randrange(side[0] // 2), generator.randrange(side[1] // 2)
        box = (left, top, left + side[0] // 3, top + side[1] // 3)
        if shape == "circle":
            pencil.ellipse(box, fill=colour)
        elif shape == "square":
            pencil.rectangle(box, fill=colour)
        else:
            pencil.line(box, fill=colour, width=5)
    return image, generator.choice(emoji_captions())


@functools.cache
def emoji_captions() -> list[str]:
    """Of those that ship with the package."""
    lines = (
        (files("kandinsky_exp.tiny") / "assets" / "emoji" / "train" / "metadata.jsonl").read_text("utf-8").splitlines()
    )
    return [json.loads(line)["text"] for line in lines]


def write(folder: Path, count: int, sides: tuple[int, int] = (256, 400), kind: str = "jpg") -> Path:
    """`count` pictures with sides in that range, and their `metadata.jsonl`."""
    if (folder / "metadata.jsonl").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    generator = random.Random(count)
    lines = []
    for index in range(count):
        image, caption = draw(generator, (generator.randint(*sides), generator.randint(*sides)))
        image.save(folder / f"{index:06d}.{kind}")
        lines.append(json.dumps({"file_name": f"{index:06d}.{kind}", "text": caption}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    return folder


def write_many(folder: Path, count: int) -> Path:
    """A folder of `count` small pictures, most of them hard links of a few: every one has a name of its own."""
    if (folder / "metadata.jsonl").is_file():
        return folder
    different = max(64, -(-count // LINKS))
    originals = write(folder.with_name(f"{folder.name}-originals"), different, (16, 24), "png")
    captions = [json.loads(line)["text"] for line in (originals / "metadata.jsonl").read_text("utf-8").splitlines()]
    folder.mkdir(parents=True)
    with (folder / "metadata.jsonl").open("w", encoding="utf-8") as lines:
        for index in range(count):
            name = f"{index:06d}.png"
            os.link(originals / f"{index % different:06d}.png", folder / name)
            text = f"{captions[index % different]}, number {index}"
            lines.write(json.dumps({"file_name": name, "text": text}) + "\n")
    return folder
