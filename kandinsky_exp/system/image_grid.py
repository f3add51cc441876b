"""A grid of pictures, with a label under each and headings around them."""

import functools
import logging
import math
import textwrap
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

from kandinsky_exp.errors import first_line

MIN_SIDE = 160  # pixels: below, a caption under the picture would be a few letters wide
MAX_SIDE = 512  # pixels: above, a grid of many would be too large to open
FONT = "mpl-data/fonts/ttf/DejaVuSansMono.ttf"  # of Matplotlib
FONT_SIZE = 11
LETTER = 7  # pixels, the width of each
LINE_HEIGHT = 16
LINES = 3
GAP = 8
logger = logging.getLogger(__name__)


def labelled_grid(
    images: Sequence[Image.Image],
    labels: Sequence[str],
    columns: int | None = None,
    *,
    heads: Sequence[str] = (),
    sides: Sequence[str] = (),
) -> Image.Image:
    """One RGB picture of all `images` in rows, on white, each with its label below, in up to three lines.

    Small pictures are enlarged by a whole factor without smoothing, so that their pixels stay what they are; large ones
    are reduced.

    Args:
        images: at least one, of any sizes and modes.
        labels: one for each image.
        columns: pictures in a row; None makes the grid about square.
        heads: headings of the columns; where there are `sides`, the first is that of the column of `sides`.
        sides: headings of the rows.

    Raises:
        ValueError: no images, another number of labels, or no columns.
    """
    if not images or len(images) != len(labels):
        raise ValueError(f"labelled_grid: {len(images)} images and {len(labels)} labels; one label for each image")
    columns = math.ceil(math.sqrt(len(images))) if columns is None else min(columns, len(images))
    if columns < 1:
        raise ValueError(f"labelled_grid: columns must be at least 1, not {columns}")
    cells = _scaled([_on_white(image) for image in images])
    width, height = max(cell.width for cell in cells), max(cell.height for cell in cells)
    font = label_font()
    texts = [_wrapped(label, width) for label in labels]
    lefts = [GAP + column * (width + GAP) + (MIN_SIDE + GAP if sides else 0) for column in range(columns + 1)]
    head_lefts = [GAP, *lefts] if sides else lefts
    head_texts = [_wrapped(text, right - left - GAP)
                  for text, left, right in zip(heads, head_lefts, head_lefts[1:], strict=False)]  # fmt: skip
    rows = [range(start, min(start + columns, len(cells))) for start in range(0, len(cells), columns)]
    tops = [GAP + LINE_HEIGHT * max(map(len, head_texts), default=0)]
    for row in rows:
        tops.append(tops[-1] + height + LINE_HEIGHT * max(1, *(len(texts[i]) for i in row)) + 2 * GAP)
    sheet = Image.new("RGB", (lefts[-1], tops[-1]), "white")
    draw = ImageDraw.Draw(sheet)

    def write(lines: Sequence[str], left: int, top: int) -> None:
        for number, line in enumerate(lines):
            draw.text((left, top + number * LINE_HEIGHT), line, fill="black", font=font)

    for lines, left in zip(head_texts, head_lefts, strict=False):
        write(lines, left, GAP // 2)
    for text, top in zip(sides, tops, strict=False):
        write(_wrapped(text, MIN_SIDE, height // LINE_HEIGHT), GAP, top)
    for top, row in zip(tops, rows, strict=False):
        for left, i in zip(lefts, row, strict=False):
            sheet.paste(cells[i], (left + (width - cells[i].width) // 2, top + (height - cells[i].height) // 2))
            write(texts[i], left, top + height + GAP // 2)
    return sheet


@functools.cache
def label_font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Matplotlib's, for Pillow's own has no é and no Cyrillic; Pillow's where that is not to be had."""
    try:
        package = find_spec("matplotlib")  # found alone: to import it takes longer than to draw
        if package is None or package.origin is None:
            raise FileNotFoundError("it is not installed")
        return ImageFont.truetype(str(Path(package.origin).parent / FONT), FONT_SIZE)
    except OSError as error:
        logger.warning("labels of images lack letters such as é and ж: no font of Matplotlib (%s)", first_line(error))
        return ImageFont.load_default(FONT_SIZE)


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _scaled(images: list[Image.Image]) -> list[Image.Image]:
    """All images by one factor, so that they stay comparable."""
    side = max(max(image.size) for image in images)
    if side < MIN_SIDE:
        return [ImageOps.scale(image, math.ceil(MIN_SIDE / side), Image.Resampling.NEAREST) for image in images]
    if side <= MAX_SIDE:
        return images
    sizes = [(max(1, image.width * MAX_SIDE // side), max(1, image.height * MAX_SIDE // side)) for image in images]
    return [image.resize(size, Image.Resampling.LANCZOS) for image, size in zip(images, sizes, strict=True)]


def _wrapped(text: str, width: int, limit: int = LINES) -> list[str]:
    """`text` in at most `limit` lines of at most `width` pixels, with an ellipsis where it is cut."""
    return textwrap.wrap(text, width // LETTER, max_lines=limit, placeholder="…")
