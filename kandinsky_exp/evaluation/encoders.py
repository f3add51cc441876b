"""What turns pictures into the embeddings that are measured: Kandinsky's own encoders, or another one from a folder."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from kandinsky_exp.data.preprocess import Preprocess
from kandinsky_exp.errors import ConfigError, first_line, is_out_of_memory
from kandinsky_exp.models.components import read_object
from kandinsky_exp.models.weights import Weights

BATCH = 16  # pictures, or captions, at once
OWN = "Kandinsky's own image encoder"


class PictureEncoder(Protocol):
    """Gives embeddings of pictures.

    Args:
        name: of its part of the report and of the metrics.
    """

    name: str

    def __call__(self, pictures: Sequence[Image.Image]) -> Tensor:
        """RGB pictures → (N, E) float32 on the CPU."""


class OwnEncoder:
    """The CLIP image encoder that the decoder is conditioned on, and the text encoder that shares its space."""

    name = OWN

    def __init__(self, weights: Weights) -> None:
        self.weights = weights

    def __call__(self, pictures: Sequence[Image.Image]) -> Tensor:
        model, process = self.weights.load("image_encoder"), self.weights.load("image_processor")
        return _embedded(pictures, process, lambda pixels: model(pixels.to(model.device, model.dtype)).image_embeds)

    @torch.no_grad()
    def texts(self, captions: Sequence[str]) -> Tensor:
        """Captions → (N, E) float32 on the CPU; of long ones the beginning is read."""
        model, read = self.weights.load("text_encoder"), Preprocess(None, self.weights.load("tokenizer"), None)
        found = []
        for start in range(0, len(captions), BATCH):
            tokens = read.tokenize(captions[start : start + BATCH])
            ids = torch.stack([tensors["input_ids"] for tensors, _ in tokens])
            found.append(model(ids.to(model.device)).text_embeds.float().cpu())
        return torch.cat(found)

    @contextlib.contextmanager
    def on_device(self, device: torch.device) -> Iterator[None]:
        with self.weights.lent(("image_encoder", "text_encoder"), device):
            yield


class FolderEncoder:
    """A vision model in a folder of transformers (DINOv2, CLIP, SigLIP, …) or of timm.

    Raises:
        ConfigError: the folder holds none.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.name, self._device = folder.name, device
        about = read_object(folder / "config.json") if (folder / "config.json").is_file() else {}
        if not {"model_type", "architecture"} & about.keys():
            raise ConfigError(
                f"encoder: {folder} has no config.json of a vision model of transformers (model_type) or timm "
                "(architecture); give another folder, or leave it out"
            )
        try:
            load = _of_transformers if "model_type" in about else _of_timm
            self._model, self._process, self._embed = load(folder)
            self._model.to(device)
            self(2 * [Image.new("RGB", (64, 48))])
        except ImportError as error:
            raise ConfigError(
                f"encoder: {folder} needs a package that is not installed: {first_line(error)}"
            ) from error
        except Exception as error:  # whatever a library makes of a model of another kind
            if is_out_of_memory(error):
                raise
            raise ConfigError(
                f"encoder: {folder} cannot embed pictures ({first_line(error)}); give a vision model with its "
                "preprocessor_config.json"
            ) from error

    def __call__(self, pictures: Sequence[Image.Image]) -> Tensor:
        return _embedded(pictures, self._process, lambda pixels: self._embed(pixels.to(self._device)))


@torch.no_grad()
def _embedded(pictures: Sequence[Image.Image], process: Any, embed: Any) -> Tensor:
    found = []
    for start in range(0, len(pictures), BATCH):
        some = [picture.convert("RGB") for picture in pictures[start : start + BATCH]]
        found.append(embed(process(images=some, return_tensors="pt").pixel_values).float().cpu())
    return torch.cat(found)


def _of_transformers(folder: Path) -> tuple[Any, Any, Any]:
    import transformers

    # `AutoModel` knows none with a projection, and its embeddings are the projected ones.
    name = str((read_object(folder / "config.json").get("architectures") or [""])[0])
    cls = getattr(transformers, name) if name.endswith("WithProjection") else transformers.AutoModel
    local = {"local_files_only": True, "trust_remote_code": False}  # else a terminal is asked whether code may run
    model, info = cls.from_pretrained(folder, use_safetensors=True, output_loading_info=True, **local)
    process = transformers.AutoImageProcessor.from_pretrained(folder, **local)  # nosec B615 # a folder
    # What is missing is filled with random numbers; a classifier has no pooler, and its first token does as well.
    is_pooled = not (missing := sorted(info["missing_keys"]))
    if others := [key for key in missing if "pooler" not in key]:
        raise ValueError(f"it lacks {len(others)} tensors such as {others[0]}")

    @torch.no_grad()
    def embed(pixels: Tensor) -> Tensor:
        if hasattr(model, "get_image_features"):  # of text and pictures
            return _vector(model.get_image_features(pixel_values=pixels), is_pooled)
        return _vector(model(pixel_values=pixels), is_pooled)

    return model.eval(), process, embed


def _vector(output: Any, is_pooled: bool) -> Tensor:
    """One for each picture: the projected one, the pooled one, or else that of the first token."""
    if isinstance(output, Tensor):
        return output
    for name in ("image_embeds", "pooler_output") if is_pooled else ():
        if (found := getattr(output, name, None)) is not None:
            return torch.as_tensor(found).flatten(1)
    return torch.as_tensor(output.last_hidden_state)[:, 0].flatten(1)


def _of_timm(folder: Path) -> tuple[Any, Any, Any]:
    import timm  # type: ignore[import-not-found, unused-ignore]

    if not (folder / "model.safetensors").is_file():  # it would take a pickle
        raise ValueError("it has no model.safetensors")

    class Processed:
        """What a processor of transformers gives."""

        def __init__(self, pixel_values: Tensor) -> None:
            self.pixel_values = pixel_values

    model = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)

    def process(images: Sequence[Image.Image], return_tensors: str) -> Processed:
        return Processed(torch.stack([transform(image) for image in images]))

    return model, process, model
