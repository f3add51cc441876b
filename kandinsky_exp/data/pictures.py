"""Decode a picture's file, whatever its format and pixels, to upright 8-bit sRGB."""

import io
import re
import struct
from collections.abc import Collection
from functools import cache, lru_cache
from typing import IO

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from kandinsky_exp.errors import first_line

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

WIDE = ("I;16", "I;16L", "I;16B", "I;16N", "I")
NOTE = "passed over"  # key in `Image.info`: what of the file was not used, though the picture was
PIXELS = {"1": "L", "L": "L", "LA": "L", "La": "L", "CMYK": "CMYK"}  # of all other modes: RGB
SPACES = {"GRAY": "L", "RGB": "RGB", "CMYK": "CMYK"}  # of a profile
GREY_STEPS = {"L;2": 85, "L;4": 17}  # Pillow scales such pixels to 8 bits, but not the number that is transparent


def open_rgb(file: IO[bytes]) -> Image.Image:
    """Decode a picture, of an animation the first, as `to_rgb` does.

    Raises:
        ValueError: if it is no picture that Pillow can read, too small, too large, or has no one meaning as RGB.
        OSError: if it is damaged.
    """
    content = file.read()
    for dropped in ((), TEXTS, (*TEXTS, *PROFILE)):
        try:
            image = _decoded(io.BytesIO(_without_chunks(content, dropped) if dropped else content))
        except ValueError as error:
            if TOO_MUCH_TEXT not in str(error) or PROFILE[0] in dropped:
                raise
        else:
            break
    if PROFILE[0] in dropped:
        image.info[NOTE] = "its colour profile is larger than 1 MB; the colours were taken as sRGB"
    return image


def is_see_through(file: IO[bytes]) -> bool:
    """Whether a picture that can be read has pixels that are not opaque, behind which `open_rgb` puts white."""
    with Image.open(file, formats=_formats()) as image:
        if not image.has_transparency_data:
            return False
        lowest, _ = image.convert("RGBA").getchannel("A").getextrema()
        return lowest != 255


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


# --- pixels and colours


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
    if wanted == "L" and mode == "RGB":  # 16-bit grey with alpha is opened as RGBA
        channels = np.asarray(pixels)
        return pixels.getchannel("R") if (channels[..., :1] == channels[..., 1:]).all() else None
    return pixels if wanted == mode else None


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
