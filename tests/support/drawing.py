"""Images that `generate` draws in this process."""

from pathlib import Path

import numpy as np
from PIL import Image
from running import composed

from kandinsky_exp.verbs.generate import generate

STEPS = ["inference_steps=2", "prior_inference_steps=2", "prompts=[a red heart, a dog]"]


def drawn(root: Path, name: str, *overrides: str) -> list[np.ndarray]:
    cfg = composed(root, f"name={name}", *STEPS, *overrides, verb="generate", small=[])
    count = generate(cfg)
    images = []
    for index in range(int(count)):
        with Image.open(root / "generate" / name / f"{index:02d}.png") as image:
            images.append(np.asarray(image))
    return images
