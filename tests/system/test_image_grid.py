"""Grids of labelled pictures."""

import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from kandinsky_exp.system import image_grid
from kandinsky_exp.system.image_grid import labelled_grid


def red(size: tuple[int, int] = (64, 64), mode: str = "RGB") -> Image.Image:
    return Image.new("RGB", size, "red").convert(mode)


def count(image: Image.Image, colour: tuple[int, int, int]) -> int:
    return int((np.asarray(image) == colour).all(axis=-1).sum())


def test_small_pictures_are_enlarged_by_a_whole_factor_and_their_pixels_kept() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 200, (64, 64, 3), dtype=np.uint8))
    sheet = labelled_grid([noise], [""])
    part = sheet.crop((image_grid.GAP, image_grid.GAP, image_grid.GAP + 192, image_grid.GAP + 192))
    assert np.array_equal(np.asarray(part)[1::3, 1::3], np.asarray(noise))


def test_every_picture_is_there_in_full() -> None:
    sheet = labelled_grid([red() for _ in range(5)], ["a"] * 5)
    assert sheet.mode == "RGB"
    assert count(sheet, (255, 0, 0)) == 5 * 192 * 192


@pytest.mark.parametrize(("columns", "across"), [(None, 3), (1, 1), (2, 2), (7, 7), (99, 7)])
def test_columns(columns: int | None, across: int) -> None:
    sheet = labelled_grid([red() for _ in range(7)], ["a cat"] * 7, columns)
    assert sheet.width == across * (192 + image_grid.GAP) + image_grid.GAP
    assert count(sheet, (255, 0, 0)) == 7 * 192 * 192


def test_large_pictures_are_reduced() -> None:
    assert (
        labelled_grid([red((1024, 1024)), red((512, 256))], ["a", "b"]).width
        == 2 * (512 + image_grid.GAP) + image_grid.GAP
    )


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "LA", "1", "CMYK", "I;16"])
def test_modes(mode: str) -> None:
    picture = Image.new("I;16", (64, 64), 7) if mode == "I;16" else red(mode=mode)
    assert labelled_grid([picture], ["a"]).mode == "RGB"


def test_what_is_transparent_is_white() -> None:
    assert labelled_grid([Image.new("RGBA", (64, 64), (0, 0, 0, 0))], [""]).getextrema() == ((255, 255),) * 3


def test_labels_are_drawn_below() -> None:
    sheet = labelled_grid([red()], ["a cat"])
    assert np.asarray(sheet.crop((0, image_grid.GAP + 192, sheet.width, sheet.height))).min() < 100


def test_labels_wrap_and_end_in_an_ellipsis() -> None:
    font = image_grid.label_font()
    lines = image_grid._wrapped("a very long caption about nothing at all " * 9, 192)
    assert len(lines) == image_grid.LINES
    assert lines[-1].endswith("…")
    assert all(font.getlength(line) <= 192 for line in lines)
    assert image_grid._wrapped("a cat", 192) == ["a cat"]
    assert image_grid._wrapped("  \n ", 192) == []
    broken = image_grid._wrapped("x" * 60, 192)
    assert "".join(broken) == "x" * 60
    assert all(font.getlength(line) <= 192 for line in broken)


def test_any_script() -> None:
    labelled_grid([red()] * 3, ["кот", "猫 と 犬", "🐈"])


def test_wrong_arguments() -> None:
    for images, labels, columns in [([], [], None), ([red()], [], None), ([red()], ["a"], 0)]:
        with pytest.raises(ValueError, match="labelled_grid"):
            labelled_grid(images, labels, columns)


def test_headings_stand_above_the_columns_and_left_of_the_rows() -> None:
    plain = labelled_grid([red()] * 6, ["step 1"] * 6, 3)
    sheet = labelled_grid([red()] * 6, ["step 1"] * 6, 3, heads=["", "one", "two", "three"], sides=["a cat", "собака"])
    side = image_grid.MIN_SIDE + image_grid.GAP
    assert sheet.size == (plain.width + side, plain.height + image_grid.LINE_HEIGHT)
    assert np.asarray(sheet.crop((side, 0, sheet.width, image_grid.LINE_HEIGHT))).min() < 100, "the runs' names"
    below = (side, image_grid.LINE_HEIGHT + image_grid.GAP)
    assert sheet.crop((*below, *sheet.size)).tobytes() == plain.crop((0, image_grid.GAP, *plain.size)).tobytes()
    for number in range(2):
        top = below[1] + number * (192 + image_grid.LINE_HEIGHT + 2 * image_grid.GAP)
        beside = np.asarray(sheet.crop((0, top, side, top + 100)))
        assert beside.min() < 100, "the prompt of each row"


def test_letters_with_accents_are_in_the_font() -> None:
    font = image_grid.label_font()
    missing = bytes(font.getmask("\uffff"))
    assert all(bytes(font.getmask(letter)) != missing for letter in "éäк–…")


@pytest.mark.parametrize(("how", "is_found"), [("sys.modules['matplotlib'] = None", False), ("pass", True)])
def test_labels_take_the_font_of_a_matplotlib_that_is_not_imported(how: str, is_found: bool) -> None:
    """It reads settings of notebooks and of the home folder, which it may refuse; and there may be none."""
    code = f"""import sys
{how}
from kandinsky_exp.system.image_grid import label_font
print(label_font().getname()[0], "matplotlib.colors" in sys.modules)"""
    environment = os.environ | {"MPLBACKEND": "not_there"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.endswith("False\n"), done.stderr
    assert done.stdout.startswith("DejaVu Sans Mono") == is_found
    assert ("no font of Matplotlib" in done.stderr) != is_found
