"""An encoded table of random features, written and read by the runner's own classes: no encoder has to be there."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from networks import config

from kandinsky_exp.data.encoded.encode_loop import EncodeSettings
from kandinsky_exp.data.encoded.layout import CAPTION_ROWS, CAPTIONS, IMAGES
from kandinsky_exp.data.encoded.making import Making, Plan
from kandinsky_exp.data.encoded.parts import PartFacts, PartWriter
from kandinsky_exp.data.encoded.table import FeatureTable
from kandinsky_exp.data.features import CachedFeatures
from kandinsky_exp.stages.base import Features
from kandinsky_exp.training.feature_reader import FeatureReader, ReadSettings

TOKENS = range(10, 26)  # of a caption, as those of the emoji have
LENGTH = 77
CHUNK = 256  # rows


def latents(architecture: Path, resolution: int) -> tuple[int, int, int]:
    side = resolution >> len(config(architecture, "movq")["block_out_channels"]) - 1
    return config(architecture, "movq")["latent_channels"], side, side


def batch(stage: str, architecture: Path, resolution: int, size: int) -> Features:
    """What a table gives, without its numbers."""
    width = config(architecture, "prior")["embedding_dim"]
    features = {"image_embeds": torch.zeros(size, width)}
    if stage == "decoder":
        return features | {"latents": torch.zeros(size, *latents(architecture, resolution))}
    tokens = TOKENS[len(TOKENS) // 2]
    states, mask = torch.zeros(size, tokens, width), torch.ones(size, tokens, dtype=torch.bool)
    return features | {"text_embeds": torch.zeros(size, width), "text_states": states, "text_mask": mask}


def null(stage: str, architecture: Path) -> Features:
    """What stands for «no condition»: of the right shapes, the caption padded."""
    found = batch(stage, architecture, 8, 1)
    if stage == "prior":
        found["text_states"] = torch.zeros(1, LENGTH, found["text_states"].shape[2])
        found["text_mask"] = torch.arange(LENGTH)[None] < 2
    return {name: value for name, value in found.items() if (name == "image_embeds") == (stage == "decoder")}


def write(folder: Path, stage: str, architecture: Path, resolution: int, rows: int) -> FeatureTable:
    """The table in `folder`, made when it is not there."""
    if not folder.is_dir():
        making, random = Making(folder, Plan(folder.name, "", rows, 1, CHUNK), print), np.random.default_rng(0)
        for number in range(-(-rows // CHUNK)):
            part = PartWriter(making.folder, PartFacts(folder.name, number, 1), "made")
            _append(part, random, stage, architecture, resolution, np.array(making.plan.rows_of(number)))
        length = LENGTH if stage == "prior" else 0
        making.join("random", {"views": 1, "text_length": length, "dtype": "fp16", "buckets": False})
    return FeatureTable(folder)


def _append(part: PartWriter, random: Any, stage: str, architecture: Path, resolution: int, rows: Any) -> None:
    def numbers(*shape: int) -> Any:
        return random.standard_normal(shape, np.float32).astype(np.float16)

    width, count, texts = config(architecture, "prior")["embedding_dim"], len(rows), int(stage == "prior")
    images = {"source_row": rows, "id": [str(row) for row in rows], "image_embeds": numbers(count, width)}
    if not texts:
        images["latents"] = numbers(count, *latents(architecture, resolution))
    else:
        states = [numbers(tokens, width) for tokens in random.choice(TOKENS, count)]
        part.append(CAPTIONS, {"text_embeds": numbers(count, width), "text_states": states})
        images[CAPTION_ROWS] = list(np.arange(count)[:, None])
        part.facts.captions = count
    part.append(IMAGES, images)
    part.facts.images = part.facts.source_rows = count
    part.finish()


def reader(table: FeatureTable, device: torch.device, batch_size: int) -> FeatureReader:
    source: Any = None  # nobody asks for a picture
    return FeatureReader(CachedFeatures(table, 0), source, "random", settings(batch_size), device, None)


def settings(batch_size: int) -> ReadSettings:
    """Of a run with the default ones, except where it keeps its tables."""
    return ReadSettings(
        cache=Path(),
        cached=True,
        how=EncodeSettings(),
        seed=0,
        fraction=0.0,
        workers=0,
        batch_size=batch_size,
        grad_accumulation=1,
    )
