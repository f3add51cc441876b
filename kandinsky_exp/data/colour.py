"""Any pixel format as 8-bit sRGB: colour profiles, 16 bits, and what is transparent."""

import io
from functools import cache, lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms

from kandinsky_exp.errors import first_line

WIDE = ("I;16", "I;16L", "I;16B", "I;16N", "I")
NOTE = "passed over"  # key in `Image.info`: what of the file was not used, though the picture was
PIXELS = {"1": "L", "L": "L", "LA": "L", "La": "L", "CMYK": "CMYK"}  # of all other modes: RGB
SPACES = {"GRAY": "L", "RGB": "RGB", "CMYK": "CMYK"}  # of a profile
GREY_STEPS = {"L;2": 85, "L;4": 17}  # Pillow scales such pixels to 8 bits, but not the number that is transparent


def opacity(image: Image.Image, stored: str) -> Image.Image | None:
    """Alpha of a picture (mode L), None where all of it is opaque.

    Args:
        stored: how Pillow reads the pixels of the file, such as `L;4`.
    """
    if not image.has_transparency_data:
        return None
    key = image.info.get("transparency")
    if image.mode in WIDE:
        return Image.fromarray(np.where(np.asarray(image) == key, 0, 255).astype(np.uint8))
    if stored in GREY_STEPS and isinstance(key, int):
        image.info["transparency"] = key * GREY_STEPS[stored]
    elif stored.startswith("RGB;16") and isinstance(key, tuple):
        image.info["transparency"] = tuple(part >> 8 for part in key)  # Pillow keeps the upper half of each number
    return (image.convert("LA") if image.mode == "La" else image).convert("RGBA").getchannel("A")


def eight_bits(image: Image.Image) -> Image.Image:
    """Scale 16-bit grey: Pillow's own conversion clips everything above 255 to white.

    Raises:
        ValueError: for 32-bit integers, which have no one meaning.
    """
    pixels = np.asarray(image)
    if pixels.min() < 0 or pixels.max() > 65535:
        raise ValueError("32-bit pixels; save it with 8 or 16 bits per channel")
    return Image.fromarray((pixels / 257).round().astype(np.uint8))


def as_srgb(image: Image.Image, profile: bytes | None) -> tuple[Image.Image, str]:
    """The colours of a picture of up to 8 bits as sRGB (mode RGB, no alpha), and why its profile was passed over."""
    if not profile:
        return image.convert("RGBA" if "transparency" in image.info else "RGB").convert("RGB"), ""
    try:
        space = _space(profile)
        pixels = _as_pixels_of(image, space)
        if pixels is None:
            wrong = f"is for {space or 'unknown'} pixels, and the picture has others"
        else:
            transform = _to_srgb(profile, pixels.mode)
            return (pixels.convert("RGB") if transform is None else transform.apply(pixels)), ""
    except (ImageCms.PyCMSError, OSError, ValueError, ImportError) as error:
        wrong = f"cannot be read ({first_line(error)})"
    return as_srgb(image, None)[0], f"its colour profile {wrong}; the colours were taken as sRGB"


def _as_pixels_of(image: Image.Image, space: str) -> Image.Image | None:
    """The picture in the colour space of a profile, None where it is in another one."""
    mode = PIXELS.get(image.mode, "RGB")
    if mode == "RGB" and "transparency" in image.info:
        image = image.convert("RGBA")
    pixels = image.convert(mode)
    pixels.info.pop("transparency", None)
    wanted = SPACES.get(space)
    if wanted == "RGB" and mode == "L":
        return pixels.convert("RGB")
    if wanted == "L" and mode == "RGB" and _is_grey(np.asarray(pixels)):  # 16-bit grey with alpha is opened as RGBA
        return pixels.getchannel("R")
    return pixels if wanted == mode else None


def _is_grey(pixels: NDArray[np.uint8]) -> bool:
    return bool((pixels[..., :1] == pixels[..., 1:]).all())


@cache
def _srgb() -> ImageCms.ImageCmsProfile:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))


@lru_cache(16)  # the pictures of a data set come from few devices
def _space(profile: bytes) -> str:
    return str(ImageCms.ImageCmsProfile(io.BytesIO(profile)).profile.xcolor_space).strip()


@lru_cache(16)
def _to_srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """None where nothing would change but the rounding: most profiles are sRGB's, under whatever name."""
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    transform = ImageCms.buildTransform(source, _srgb(), mode, "RGB")
    if mode == "CMYK":
        return transform
    steps = np.arange(0, 256, 15, dtype=np.uint8)
    grid = np.arange(256, dtype=np.uint8)[None] if mode == "L" else np.stack(np.meshgrid(steps, steps, steps), -1)
    probe = Image.fromarray(grid if mode == "L" else grid.reshape(len(steps), -1, 3))
    change = np.asarray(transform.apply(probe)).astype(int) - np.asarray(probe.convert("RGB"))
    return transform if np.abs(change).max() > 1 else None
