"""Crop and resize pictures (to the nearest aspect-ratio bucket) and tokenize captions, as frozen encoders read them."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from kandinsky_exp.data.buckets import Size, nearest_bucket
from kandinsky_exp.data.encoded.layout import MASK, PICTURE_RULES


def center_crop_resize(image: Image.Image, resolution: int) -> Tensor:
    """The middle square of an RGB picture as a (3, R, R) float tensor in [-1, 1].

    Crop box, filter and `reducing_gap` are those of the published Kandinsky 2.2 fine-tuning guide, to the last bit.
    """
    return _to_tensor(cropped(image, resolution, resolution))


def crop_resize(image: Image.Image, width: int, height: int) -> Tensor:
    """The largest middle part of an RGB picture that has the shape asked for, as a (3, H, W) float tensor in [-1, 1].

    Nothing is stretched, not even by the part of a pixel: the box has fractions. A square is `center_crop_resize`.
    """
    return _to_tensor(cropped(image, width, height))


def cropped(
    image: Image.Image, width: int, height: int, filter_: Image.Resampling = Image.Resampling.BICUBIC
) -> Image.Image:
    """The largest middle part of a picture that has this shape, at this size."""
    if width == height:
        side = min(image.size)
        left, top = (image.width - side) / 2, (image.height - side) / 2
        square = image.crop((left, top, left + side, top + side))  # Pillow rounds the box
        return square.resize((width, width), filter_, reducing_gap=1)
    scale = min(image.width / width, image.height / height)
    left, top = max(0.0, (image.width - width * scale) / 2), max(0.0, (image.height - height * scale) / 2)
    box = (left, top, image.width - left, image.height - top)
    return image.resize((width, height), filter_, box, reducing_gap=1)


def _to_tensor(image: Image.Image) -> Tensor:
    pixels = np.asarray(image, dtype=np.float32) / 127.5 - 1
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())


def mirrored(image: Image.Image, beside: Mapping[str, Image.Image]) -> tuple[Image.Image, Mapping[str, Image.Image]]:
    """An image and what belongs to it, left and right exchanged."""
    return ImageOps.mirror(image), {name: ImageOps.mirror(own) for name, own in beside.items()}


def to_picture(pixels: Tensor) -> Image.Image:
    """The picture of a (3, H, W) tensor in [-1, 1]."""
    numbers = ((pixels + 1) * 127.5).round().byte()
    return Image.fromarray(numbers.permute(1, 2, 0).cpu().numpy())


class Companion(Protocol):
    """How a picture that belongs to a picture becomes a tensor, see `companions`."""

    @property
    def is_read(self) -> bool:
        """Whether it has a file of its own; it is made of the picture otherwise, and `own` is None."""

    def shape(self, size: Size) -> tuple[int, ...]: ...
    def __call__(self, own: Any, picture: Image.Image, size: Size) -> Tensor: ...


@dataclass(frozen=True)
class Preprocess:
    """What a stage's encoders read of one example. A part that is None leaves its keys out.

    Args:
        image_processor: CLIP's, gives `clip_pixels` (3, S, S).
        tokenizer: CLIP's, gives `input_ids` (L,) and `text_mask` (L,) bool, L = 77 for the published weights.
        resolution: side of `pixels` (3, R, R) in [-1, 1], for the image autoencoder.
        buckets: sizes (width, height) of which an image takes the nearest in shape: `pixels` (3, height, width).
        extra_inputs: further columns of the data set, as tensors of these shapes beside those of the image.
        companions: pictures that belong to the image, by the names of their tensors.
    """

    image_processor: Any | None
    tokenizer: Any | None
    resolution: int | None
    buckets: tuple[Size, ...] = ()
    extra_inputs: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    companions: Mapping[str, Companion] = field(default_factory=dict)

    def __call__(
        self,
        image: Image.Image | None,
        caption: str | None,
        extra: Mapping[str, Any] | None = None,
        beside: Mapping[str, Image.Image] | None = None,
    ) -> dict[str, Tensor]:
        """Tensors without a batch axis. `image` must be RGB; None for either leaves its keys out.

        Args:
            extra: cells of the columns that `extra_inputs` names; needed with an image.
            beside: those of `companions` that are read; needed with an image.

        Raises:
            ValueError: a cell holds no numbers of its shape, or what belongs to the image cannot be used.
        """
        tensors: dict[str, Tensor] = {}
        if image is not None and self.image_processor is not None:
            tensors["clip_pixels"] = self.image_processor(images=image, return_tensors="pt").pixel_values[0]
        if image is not None and self.resolution is not None:
            tensors["pixels"] = crop_resize(image, *self.size(image))
        if image is not None:
            tensors |= {name: _numbers(name, (extra or {})[name], size) for name, size in self.extra_inputs.items()}
            tensors |= self.beside(image, beside or {})
        if caption is not None and self.tokenizer is not None:
            tensors |= self.tokenize([caption])[0][0]
        return tensors

    def beside(self, image: Image.Image, read: Mapping[str, Image.Image]) -> dict[str, Tensor]:
        """What belongs to an image, by name.

        Raises:
            ValueError: it cannot be used.
        """
        tensors = {}
        for name, companion in self.companions.items():
            own = read[name] if companion.is_read else None
            try:
                if own is not None and own.size != image.size:
                    theirs, ours = (f"{width} x {height}" for width, height in (own.size, image.size))
                    raise ValueError(f"it has {theirs} pixels, its picture {ours}; make them of one size")
                tensors[name] = companion(own, image, self.size(image))
            except ValueError as error:
                raise ValueError(f"its {name}: {error}") from None
        return tensors

    @property
    def read_beside(self) -> list[str]:
        """Names of the pictures that have files beside the image's."""
        return [name for name, companion in self.companions.items() if companion.is_read]

    @property
    def text_length(self) -> int:
        """Tokens of a caption that are read; 0 where none is."""
        return self.tokenizer.model_max_length if self.tokenizer is not None else 0

    def size(self, image: Image.Image) -> Size:
        """(width, height) of an image's `pixels`."""
        assert self.resolution is not None  # nosec B101 # narrows the type
        return nearest_bucket(*image.size, self.buckets) if self.buckets else (self.resolution, self.resolution)

    def tokenize(self, captions: Sequence[str]) -> list[tuple[dict[str, Tensor], str | None]]:
        """The tensors of each caption, and the beginning of it that they stand for, None where that is all of it."""
        assert self.tokenizer is not None  # nosec B101 # narrows the type
        length = self.tokenizer.model_max_length
        tokens = self.tokenizer(
            list(captions), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        )
        rows = zip(captions, tokens.input_ids, tokens.attention_mask.bool(), tokens.encodings, strict=True)
        return [
            ({"input_ids": ids, MASK: mask}, caption[: max(text.offsets)[1]] if text.overflowing else None)
            for caption, ids, mask, text in rows
        ]

    @cached_property
    def fingerprint(self) -> str:
        """Equal for two objects that make equal tensors of equal examples."""
        processor = self.image_processor.to_dict() if self.image_processor is not None else None
        tokenizer = None
        if self.tokenizer is not None:
            rules = self.tokenizer.backend_tokenizer.to_str()  # normaliser, vocabulary, merges and all
            rules = rules[rules.index('"added_tokens"') :]  # before these: truncation and padding of the last call
            tokenizer = [rules, self.tokenizer.model_max_length, self.tokenizer.pad_token_id]
        parts = [PICTURE_RULES, processor, tokenizer, self.resolution, self.buckets]
        if self.extra_inputs:  # without, as it was before there were any
            parts.append(dict(self.extra_inputs))
        if self.companions:  # likewise
            parts.append({name: repr(companion) for name, companion in self.companions.items()})
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _numbers(name: str, cell: Any, shape: tuple[int, ...]) -> Tensor:
    try:
        numbers = np.asarray(json.loads(cell) if isinstance(cell, str) else cell, np.float32)
    except (ValueError, TypeError):
        numbers = np.array(np.nan)
    if numbers.shape != shape or not np.isfinite(numbers).all():
        raise ValueError(f"'{name}' holds {cell!r:.60}, not {'a number' if not shape else f'numbers of shape {shape}'}")
    return torch.from_numpy(numbers.copy())
