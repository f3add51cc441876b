"""Pictures and masks that a setting names to draw from: opened, and cut to the size that is drawn."""

import numpy as np
from PIL import Image

from kandinsky_exp.data.companions import GREY
from kandinsky_exp.data.edges import canny
from kandinsky_exp.data.pictures import is_see_through, open_rgb
from kandinsky_exp.data.preprocess import cropped
from kandinsky_exp.errors import ConfigError, cause_of, cut
from kandinsky_exp.system.files import expanded

HALF = 128  # of 255: what is at least as bright is white


def open_picture(key: str, path: str) -> Image.Image:
    """The picture of a file as it is trained with: upright, 8-bit sRGB.

    Args:
        key: of the setting, for messages.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        with expanded(path).open("rb") as file:
            return open_rgb(file)
    except Exception as error:  # Pillow's format plug-ins raise whatever a damaged file makes them raise
        raise ConfigError(f"{key}: '{cut(path)}': {cause_of(error)}; give another picture") from error


def open_hole(key: str, path: str, size: tuple[int, int]) -> tuple[Image.Image, list[str]]:
    """A mask as pixels (mode L) of 0 and 255, and what the user should know of it.

    Args:
        size: of the picture that it belongs to.

    Raises:
        ConfigError: it cannot be read, is of another size, or has nothing white.
    """
    grey = np.asarray(open_picture(key, path).convert("L"))
    with expanded(path).open("rb") as file:
        see_through = is_see_through(file)
    if see_through:
        raise ConfigError(
            f"{key}: '{cut(path)}' has transparent pixels, which are neither black nor white; save it without them"
        )
    if grey.shape[::-1] != size:
        found, wanted = ("{} x {}".format(*pair) for pair in (grey.shape[::-1], size))
        raise ConfigError(f"{key}: '{cut(path)}' is {found} pixels and the picture {wanted}; give one of the same size")
    white, notes = grey >= HALF, []
    if between := int(((grey > GREY[0]) & (grey < GREY[1])).sum()):
        part = f"{between:,} of {grey.size:,} pixels of '{cut(path)}' are neither black nor white"
        notes.append(f"{key}: {part}; from half grey on they count as white")
    if not white.any():
        raise ConfigError(
            f"{key}: nothing of '{cut(path)}' is white, so nothing would be drawn; paint white what shall"
        )
    if white.all():
        notes.append(f"{key}: all of '{cut(path)}' is white: nothing of the picture is kept")
    return Image.fromarray(white.astype(np.uint8) * 255), notes


def fitted(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The largest middle part of the shape that is drawn, in its size: as training takes pictures."""
    return cropped(picture, *size)


def shaped(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The largest middle part of the shape of this size, not scaled."""
    scale = min(picture.width / size[0], picture.height / size[1])
    width, height = (max(1, round(side * scale)) for side in size)
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    return picture.crop((left, top, left + width, top + height))


def edges_of(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The edges of the middle part of a picture, at this size, as training finds them."""
    return Image.fromarray(canny(np.asarray(fitted(picture, size)))).convert("RGB")


def fitted_hole(key: str, hole: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The same part of a mask, black and white again.

    Raises:
        ConfigError: all white lies outside of it, or is too small to be left of.
    """
    cut_out = fitted(hole, size).point(lambda value: 255 if value >= HALF else 0)
    if cut_out.getbbox() is None:
        shape = "{} x {}".format(*size)
        raise ConfigError(
            f"{key}: nothing white is left of it in the middle part of {shape} pixels that is drawn; set height and "
            "width in the shape of the picture, or make the white larger"
        )
    return cut_out
