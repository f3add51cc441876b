"""From pictures and captions to the tensors that the frozen encoders read."""

import hashlib
import io
import json
import re
import struct
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import IO, Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from kandinsky_exp.data.buckets import Size, nearest_bucket
from kandinsky_exp.data.colour import NOTE, WIDE, as_srgb, eight_bits, opacity
from kandinsky_exp.data.encoded.layout import MASK, PICTURE_RULES

MIN_SIDE = 8  # pixels
MAX_SHAPE = 50  # long sides per short side: CLIP scales the short side to 224, and the long one with it
# Not all that Pillow can open: of EPS, for one, it has another program run the code.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM", "JPEG2000")
PNG = b"\x89PNG\r\n\x1a\n"
TEXTS, PROFILE = (b"tEXt", b"zTXt", b"iTXt"), (b"iCCP",)
TOO_MUCH_TEXT = "MAX_TEXT"  # in what Pillow says of more than 1 MB of text or profile, or 64 MB in all
MAX_PIXELS = 178_956_970  # where Pillow suspects an attack; one channel of 32 bits would be 716 MB

# Pillow warns from here on and refuses twice as much, both before the picture can be asked for its size.
Image.MAX_IMAGE_PIXELS = MAX_PIXELS


def open_rgb(file: IO[bytes]) -> Image.Image:
    """Decode a picture, of an animation the first, as `to_rgb` does.

    Raises:
        ValueError: if it is no picture that Pillow can read, too small, too large, or has no one meaning as RGB.
        OSError: if it is damaged.
    """
    try:
        return _decoded(file)
    except ValueError as error:
        if TOO_MUCH_TEXT not in str(error):
            raise
    file.seek(0)
    file = io.BytesIO(_without_chunks(file.read(), TEXTS))
    try:
        return _decoded(file)
    except ValueError as error:
        if TOO_MUCH_TEXT not in str(error):
            raise
    image = _decoded(io.BytesIO(_without_chunks(file.getvalue(), PROFILE)))
    image.info[NOTE] = "its colour profile is larger than 1 MB; the colours were taken as sRGB"
    return image


def _without_chunks(png: bytes, kinds: Collection[bytes]) -> bytes:
    """A PNG without chunks that are no pixels. Pillow refuses a picture for too much text in it."""
    kept, start = [png[: len(PNG)]], len(PNG)
    while start < len(png):
        end = start + 12 + int.from_bytes(png[start : start + 4], "big")
        if png[start + 4 : start + 8] not in kinds:
            kept.append(png[start:end])
        start = end
    return b"".join(kept)


def _decoded(file: IO[bytes]) -> Image.Image:
    try:
        with Image.open(file, formats=_formats()) as image:
            _check_size(*image.size)
            return to_rgb(image)
    except UnidentifiedImageError:
        raise ValueError(f"not an image that Pillow can read as {', '.join(FORMATS)}") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        size = re.search(r"\d+", str(error))
        raise ValueError(_too_large(f"{int(size[0]):,} pixels" if size else "too many pixels")) from None


@cache
def _formats() -> tuple[str, ...]:
    """Those that this build of Pillow knows."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise ValueError(_too_large(f"{width:,} x {height:,} pixels"))
    if min(width, height) < MIN_SIDE:
        raise ValueError(f"{width} x {height} pixels, too small to learn from (the least is {MIN_SIDE} a side)")
    if max(width, height) > MAX_SHAPE * min(width, height):
        raise ValueError(f"{width:,} x {height:,} pixels, longer than {MAX_SHAPE} times its other side; crop it")


def _too_large(size: str) -> str:
    return f"{size}, more than the limit of {MAX_PIXELS:,}; scale it down"


def to_rgb(image: Image.Image) -> Image.Image:
    """Any picture as 8-bit sRGB the way a viewer shows it: upright, transparency over white, 16 bits scaled to 8.

    What of the file could not be used is said in `info[colour.NOTE]` of the result.

    Raises:
        ValueError: for a pixel format that has no one meaning as RGB (floating point, 32-bit integers).
    """
    tile = getattr(image, "tile", None)  # gone once the pixels are loaded
    stored = tile[0][3] if tile and isinstance(tile[0][3], str) else image.mode
    image, damaged = _upright(image)
    profile = image.info.get("icc_profile")
    alpha = opacity(image, stored)
    if image.mode in WIDE:
        image = eight_bits(image)
    if image.mode == "F":
        raise ValueError("floating-point pixels; save it with 8 bits per channel")
    image, passed_over = as_srgb(image, profile)
    if alpha is not None:
        image.putalpha(alpha)
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    notes = [note for note in (damaged, passed_over) if note]
    image.info = {NOTE: "; ".join(notes)} if notes else {}  # a profile would be wrong from now on
    return image


def _upright(image: Image.Image) -> tuple[Image.Image, str]:
    """Turned as its EXIF data says, or as it is if these are damaged: they are no pixels."""
    image.load()
    try:
        return ImageOps.exif_transpose(image), ""
    except (SyntaxError, ValueError, KeyError, TypeError, OSError, struct.error) as error:
        return image, f"its EXIF data cannot be read ({error}); it was not turned"


def center_crop_resize(image: Image.Image, resolution: int) -> Tensor:
    """The middle square of an RGB picture as a (3, R, R) float tensor in [-1, 1].

    Crop box, filter and `reducing_gap` are those of the published Kandinsky 2.2 fine-tuning guide, to the last bit.
    """
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    square = image.crop((left, top, left + side, top + side))  # Pillow rounds the box
    return _to_tensor(square.resize((resolution, resolution), Image.Resampling.BICUBIC, reducing_gap=1))


def crop_resize(image: Image.Image, width: int, height: int) -> Tensor:
    """The largest middle part of an RGB picture that has the shape asked for, as a (3, H, W) float tensor in [-1, 1].

    Nothing is stretched, not even by the part of a pixel: the box has fractions. A square is `center_crop_resize`.
    """
    if width == height:
        return center_crop_resize(image, width)
    scale = min(image.width / width, image.height / height)
    left, top = max(0.0, (image.width - width * scale) / 2), max(0.0, (image.height - height * scale) / 2)
    box = (left, top, image.width - left, image.height - top)
    return _to_tensor(image.resize((width, height), Image.Resampling.BICUBIC, box, reducing_gap=1))


def _to_tensor(image: Image.Image) -> Tensor:
    pixels = np.asarray(image, dtype=np.float32) / 127.5 - 1
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())


@dataclass(frozen=True)
class Preprocess:
    """What a stage's encoders read of one example. A part that is None leaves its keys out.

    Args:
        image_processor: CLIP's, gives `clip_pixels` (3, S, S).
        tokenizer: CLIP's, gives `input_ids` (L,) and `text_mask` (L,) bool, L = 77 for the published weights.
        resolution: side of `pixels` (3, R, R) in [-1, 1], for the image autoencoder.
        buckets: sizes (width, height) of which an image takes the nearest in shape: `pixels` (3, height, width).
        extra_inputs: further columns of the data set, as tensors of these shapes beside those of the image.
    """

    image_processor: Any | None
    tokenizer: Any | None
    resolution: int | None
    buckets: tuple[Size, ...] = ()
    extra_inputs: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def __call__(
        self, image: Image.Image | None, caption: str | None, extra: Mapping[str, Any] | None = None
    ) -> dict[str, Tensor]:
        """Tensors without a batch axis. `image` must be RGB; None for either leaves its keys out.

        Args:
            extra: cells of the columns that `extra_inputs` names; needed with an image.

        Raises:
            ValueError: a cell holds no numbers of its shape.
        """
        tensors: dict[str, Tensor] = {}
        if image is not None and self.image_processor is not None:
            tensors["clip_pixels"] = self.image_processor(images=image, return_tensors="pt").pixel_values[0]
        if image is not None and self.resolution is not None:
            tensors["pixels"] = crop_resize(image, *self.size(image))
        if image is not None:
            tensors |= {name: _numbers(name, (extra or {})[name], size) for name, size in self.extra_inputs.items()}
        if caption is not None and self.tokenizer is not None:
            tensors |= self.tokenize([caption])[0][0]
        return tensors

    @property
    def text_length(self) -> int:
        """Tokens of a caption that are read; 0 where none is."""
        return self.tokenizer.model_max_length if self.tokenizer is not None else 0

    def size(self, image: Image.Image) -> Size:
        """(width, height) of an image's `pixels`."""
        assert self.resolution is not None  # nosec B101 # narrows the type
        return nearest_bucket(*image.size, self.buckets) if self.buckets else (self.resolution, self.resolution)

    @staticmethod
    def mirror(image: Image.Image) -> Image.Image:
        return ImageOps.mirror(image)

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

    def fingerprint(self) -> str:
        """Equal for two objects that make equal tensors of equal examples."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        processor = self.image_processor.to_dict() if self.image_processor is not None else None
        tokenizer = None
        if self.tokenizer is not None:
            rules = self.tokenizer.backend_tokenizer.to_str()  # normaliser, vocabulary, merges and all
            rules = rules[rules.index('"added_tokens"') :]  # before these: truncation and padding of the last call
            tokenizer = [rules, self.tokenizer.model_max_length, self.tokenizer.pad_token_id]
        parts = [PICTURE_RULES, processor, tokenizer, self.resolution, self.buckets]
        if self.extra_inputs:  # without, as it was before there were any
            parts.append(dict(self.extra_inputs))
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _numbers(name: str, cell: Any, shape: tuple[int, ...]) -> Tensor:
    try:
        numbers = np.asarray(json.loads(cell) if isinstance(cell, str) else cell, np.float32)
    except (ValueError, TypeError):
        numbers = np.array(np.nan)
    if numbers.shape != shape or not np.isfinite(numbers).all():
        raise ValueError(f"'{name}' holds {cell!r:.60}, not {'a number' if not shape else f'numbers of shape {shape}'}")
    return torch.from_numpy(numbers.copy())
