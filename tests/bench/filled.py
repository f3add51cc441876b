"""Both pipelines at any size as folders of fp16 weights: random numbers that a picture gets through."""

import json
import math
import sys
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).parents[1] / "support"))
import hollow

BLOCK = 1 << 24  # numbers that are drawn once: what is measured does not depend on them


def settings(folder: Path) -> list[str]:
    """Those of a run from these weights."""
    return [f"weights.{side}={folder / side}" for side in hollow.SIDES]


def write(architecture: Path, folder: Path) -> Path:
    """`folder/prior` and `folder/decoder`, all of it or nothing; at true size 9.8 GB."""
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside = folder.with_name(f"{folder.name}.part")
        hollow.write(architecture, aside, "F16")
        for file in sorted(aside.rglob("*.safetensors")):
            fill(file)
        aside.rename(folder)
    return folder


def fill(file: Path) -> None:
    """Norms do nothing, matrices keep the size of what they multiply."""
    random = np.random.default_rng(2022)
    with file.open("r+b") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
        block = random.standard_normal(min(BLOCK, (file.stat().st_size - 8 - length) // 2), np.float32)
        for name, entry in header.items():
            start, end = entry["data_offsets"]
            opened.seek(8 + length + start)
            count = (end - start) // 2
            if len(entry["shape"]) < 2 or name.startswith("clip_"):
                is_one = name == "clip_std" or ("norm" in name and name.endswith("weight"))
                opened.write(np.full(count, is_one, np.float16).tobytes())
                continue
            numbers = (block[:count] * math.prod(entry["shape"][1:]) ** -0.5).astype(np.float16)
            for first in range(0, count, len(numbers)):
                opened.write(numbers[: count - first].tobytes())
