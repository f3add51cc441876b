"""Pictures and masks to draw from: what is read of them, and what is refused."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from kandinsky_exp.data import given_pictures
from kandinsky_exp.errors import ConfigError


def mask(file: Path, box: tuple[int, int, int, int], size: tuple[int, int] = (40, 30), value: int = 255) -> str:
    drawn = Image.new("L", size)
    ImageDraw.Draw(drawn).rectangle(box, fill=value)
    drawn.save(file)
    return str(file)


def test_a_mask_is_black_and_white(tmp_path: Path) -> None:
    hole, notes = given_pictures.open_hole("mask", mask(tmp_path / "m.png", (0, 0, 9, 29)), (40, 30))
    assert (hole.mode, hole.size, notes) == ("L", (40, 30), [])
    assert np.array_equal(np.asarray(hole)[0], [255] * 10 + [0] * 30)


def test_grey_is_told_and_what_is_kept_of_nothing(tmp_path: Path) -> None:
    file = mask(tmp_path / "m.png", (0, 0, 9, 29), value=128)
    hole, (note,) = given_pictures.open_hole("mask", file, (40, 30))
    assert np.asarray(hole)[0].tolist() == [255] * 10 + [0] * 30
    assert "300 of 1,200 pixels of '" in note
    assert "neither black nor white; from half grey on they count as white" in note
    _, (note,) = given_pictures.open_hole("mask", mask(tmp_path / "all.png", (0, 0, 39, 29)), (40, 30))
    assert note.endswith("is white: nothing of the picture is kept")


def test_masks_that_are_refused(tmp_path: Path) -> None:
    see_through = Image.new("RGBA", (40, 30))
    see_through.paste("white", (0, 0, 10, 10))
    see_through.save(tmp_path / "alpha.png")
    (tmp_path / "text.png").write_text("no picture")
    mask(tmp_path / "black.png", (0, 0, 9, 9), value=100)
    mask(tmp_path / "small.png", (0, 0, 9, 9), size=(20, 30))
    for name, message in (
        ("alpha", "has transparent pixels, which are neither black nor white; save it without"),
        ("text", "not an image that Pillow can read as PNG.*; give another picture"),
        ("black", "nothing of '.*' is white, so nothing would be drawn; paint white what shall"),
        ("small", "is 20 x 30 pixels and the picture 40 x 30; give one of the same size"),
    ):
        with pytest.raises(ConfigError, match=f"mask: .*{message}"):
            given_pictures.open_hole("mask", str(tmp_path / f"{name}.png"), (40, 30))


def test_a_mask_is_cut_as_its_picture_is(tmp_path: Path) -> None:
    """The middle, and never between black and white: each pixel of the picture that is white is one of the hole."""
    hole, _ = given_pictures.open_hole("mask", mask(tmp_path / "m.png", (20, 7, 31, 20)), (40, 30))
    picture = Image.merge("RGB", [hole] * 3)
    for size in ((16, 16), (64, 32), (32, 64)):
        found = np.asarray(given_pictures.fitted_hole("mask", hole, size))
        assert found.shape == size[::-1]
        assert set(np.unique(found)) <= {0, 255}
        white = np.asarray(given_pictures.fitted(picture, size))[..., 0] >= 128
        assert np.array_equal(found == 255, white)


def test_white_that_is_cut_off_is_told(tmp_path: Path) -> None:
    hole, _ = given_pictures.open_hole("mask", mask(tmp_path / "m.png", (0, 0, 3, 29)), (40, 30))
    with pytest.raises(ConfigError, match="mask: nothing white is left of it in the middle part of 16 x 16 pixels"):
        given_pictures.fitted_hole("mask", hole, (16, 16))
    assert given_pictures.fitted_hole("mask", hole, (40, 30)).getbbox() == (0, 0, 4, 30)
