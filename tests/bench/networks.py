"""Kandinsky 2.2 at any size with random weights, from architecture files: as pipeline folders, or straight on a device.

`architecture/` beside this file holds the five networks at the `bench` size: prior 4.3 M, text encoder 10.4 M, image
encoder 6.5 M at 224 px, UNet 15.3 M over 4 levels, MoVQ 1.2 M with factor 8; `architecture/kandinsky22` at
true size: 1,026, 695, 1,845, 1,253 and 68 M. A folder with files of the same names gives any other size.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DDPMScheduler,
    KandinskyV22Pipeline,
    KandinskyV22PriorPipeline,
    PriorTransformer,
    UNet2DConditionModel,
    VQModel,
)
from transformers import (
    CLIPImageProcessorPil,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from kandinsky_exp.models.weights import Weights
from kandinsky_exp.tiny import architecture as tiny

BENCH = Path(__file__).parent / "architecture"
TRUE_SIZE = BENCH / "kandinsky22"
FROM_CONFIG = {"prior": PriorTransformer, "unet": UNet2DConditionModel, "movq": VQModel}
CLIP = {
    "image_encoder": (CLIPVisionModelWithProjection, CLIPVisionConfig),
    "text_encoder": (CLIPTextModelWithProjection, CLIPTextConfig),
}
SEED = 2022


def config(folder: Path, part: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / f"{part}.json").read_text("utf-8"))
    return found


def network(folder: Path, part: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    """One of the five networks, its random weights drawn on the device."""
    settings = config(folder, part)
    torch.manual_seed(SEED)
    with torch.device(device):
        if part in CLIP:
            cls, config_class = CLIP[part]
            made = cls(config_class(**settings))
        else:
            made = FROM_CONFIG[part].from_config(settings)
    if part == "prior":  # an untrained one has zeros there, and divides by them
        torch.nn.init.ones_(made.clip_std)
    return torch.nn.Module.to(made, dtype)


def image_processor(folder: Path) -> CLIPImageProcessorPil:
    side = config(folder, "image_encoder")["image_size"]
    return CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})


def small_part(folder: Path, part: str) -> Any:
    """What is no network: tokenizer, image processor and noise schedules."""
    if part == "image_processor":
        return image_processor(folder)
    if part == "decoder_scheduler" and (folder / "noise_scheduler.json").is_file():
        return DDPMScheduler.from_config(config(folder, "noise_scheduler"))
    return getattr(tiny, part)()


def write_pipelines(folder: Path, architecture: Path = BENCH) -> dict[str, Path]:
    """The prior's and the decoder's pipeline folders, which the runner and the published scripts both read."""
    places = {"prior": folder / "prior", "decoder": folder / "decoder"}
    if not all((place / "model_index.json").is_file() for place in places.values()):
        KandinskyV22PriorPipeline(
            **{part: network(architecture, part) for part in ("prior", "text_encoder", "image_encoder")},
            tokenizer=small_part(architecture, "tokenizer"),
            scheduler=small_part(architecture, "prior_scheduler"),
            image_processor=small_part(architecture, "image_processor"),
        ).save_pretrained(places["prior"])
        KandinskyV22Pipeline(
            **{part: network(architecture, part) for part in ("unet", "movq")},
            scheduler=small_part(architecture, "decoder_scheduler"),
        ).save_pretrained(places["decoder"])
    return places


class RandomWeights(Weights):
    """Parts made of architecture files on a device, when they are asked for: no disk, no network.

    Args:
        architecture: folder of the files.
        device: where the parts are built.
        frozen_dtype: of all that does not train.
    """

    def __init__(self, architecture: Path, device: str, frozen_dtype: str) -> None:
        super().__init__("random", "random", cache_folder=Path(), frozen_dtype=frozen_dtype)
        self.architecture, self.device = architecture, device

    def _read(self, part: str, dtype: str, bits: str | None = None) -> Any:
        if part in FROM_CONFIG or part in CLIP:
            return network(self.architecture, part, self.device, getattr(torch, dtype))
        return small_part(self.architecture, part)

    def tensors(self, part: str, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """The prior's statistics, as `network` makes them."""
        width = config(self.architecture, part)["embedding_dim"]
        return {"clip_mean": torch.zeros(1, width), "clip_std": torch.ones(1, width)}

    def size_multiple(self) -> int:
        levels = {part: len(config(self.architecture, part)["block_out_channels"]) for part in ("movq", "unet")}
        scale = 1 << levels["movq"] - 1
        return scale * max(scale, 1 << levels["unet"] - 1)
