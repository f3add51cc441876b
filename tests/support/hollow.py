"""Pipeline folders of any size that take no room: files of weights with their headers, and a hole for each tensor.

    python tests/support/hollow.py ARCHITECTURE FOLDER

ARCHITECTURE holds the five networks as JSON, like `tests/bench/architecture`. What `kandinsky-exp plan` needs is there;
whoever loads such weights finds zeros.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from diffusers import PriorTransformer, UNet2DConditionModel, VQModel
from transformers import (
    CLIPImageProcessorPil,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from kandinsky_exp.tiny import architecture

FROM_CONFIG = {"prior": PriorTransformer, "unet": UNet2DConditionModel, "movq": VQModel}
CLIP = {
    "image_encoder": (CLIPVisionModelWithProjection, CLIPVisionConfig),
    "text_encoder": (CLIPTextModelWithProjection, CLIPTextConfig),
}
SIDES = {
    "prior": ["prior", "text_encoder", "image_encoder", "tokenizer", "image_processor", "prior_scheduler"],
    "decoder": ["unet", "movq", "decoder_scheduler"],
}
PIPELINES = {"prior": "KandinskyV22PriorPipeline", "decoder": "KandinskyV22Pipeline"}


def write(architectures: Path, folder: Path, dtype: str = "F32") -> None:
    """`folder/prior` and `folder/decoder`, their weights of a type of the format's: F32, F16."""
    for side, parts in SIDES.items():
        for part in parts:
            target = folder / side / part.replace(f"{side}_scheduler", "scheduler")
            target.mkdir(parents=True)
            if part in FROM_CONFIG or part in CLIP:
                write_network(part, settings_of(architectures, part), target, dtype)
            elif part == "image_processor":
                size = settings_of(architectures, "image_encoder")["image_size"]
                crop = {"height": size, "width": size}
                CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size=crop).save_pretrained(target)
            else:
                getattr(architecture, part)().save_pretrained(target)
        (folder / side / "model_index.json").write_text(json.dumps({"_class_name": PIPELINES[side]}))


def settings_of(architectures: Path, part: str) -> dict[str, Any]:
    settings: dict[str, Any] = json.loads((architectures / f"{part}.json").read_text("utf-8"))
    return settings


def write_network(part: str, settings: dict[str, Any], folder: Path, dtype: str) -> None:
    with torch.device("meta"):
        if part in CLIP:
            cls, config_class = CLIP[part]
            network = cls(config_class(**settings))
            network.config.architectures = [cls.__name__]
            network.config.save_pretrained(folder)
        else:
            network = FROM_CONFIG[part].from_config(settings)
            network.save_config(folder)
    name = "model" if part in CLIP else "diffusion_pytorch_model"
    write_hole(network.state_dict(), folder / f"{name}.safetensors", dtype)


def write_hole(tensors: dict[str, torch.Tensor], file: Path, dtype: str) -> None:
    """A safetensors file without its data."""
    header, end = {}, 0
    for key, value in tensors.items():
        start, end = end, end + {"F32": 4, "F16": 2}[dtype] * value.numel()
        header[key] = {"dtype": dtype, "shape": list(value.shape), "data_offsets": [start, end]}
    content = json.dumps(header).encode()
    with file.open("wb") as opened:
        opened.write(len(content).to_bytes(8, "little") + content)
        opened.truncate(8 + len(content) + end)


if __name__ == "__main__":
    write(Path(sys.argv[1]), Path(sys.argv[2]))
