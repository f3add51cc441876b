"""Pictures as their files have them: colour profiles, transparency, text, names; what is used of a folder or a tar."""

import io
import os
import struct
import tarfile
import unicodedata
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from kandinsky_exp.data import sources
from kandinsky_exp.data.colour import NOTE
from kandinsky_exp.data.digests import FileDigests
from kandinsky_exp.data.examples import Example, given
from kandinsky_exp.data.preprocess import open_rgb
from kandinsky_exp.errors import DataError

FOUR = [(200, 60, 60), (60, 170, 70), (70, 80, 190), (128, 128, 128)]

# --- colour profiles

SRGB_CURVE, GAMMA_2_2, GAMMA_1_8 = "srgb", 563 / 256, 1.8
# Primaries and white as XYZ columns adapted to D50, as such profiles hold them; and the curve of all three channels.
SPACES = {
    "Display P3": (((0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407)), "srgb"),
    "Adobe RGB": (((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457)), GAMMA_2_2),
    "ProPhoto": (((0.79767, 0.28804, 0.0), (0.13519, 0.71188, 0.0), (0.03134, 0.00009, 0.82491)), GAMMA_1_8),
}
SRGB_COLUMNS = ((0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.71410))


def fixed(*numbers: float) -> bytes:
    return b"".join(struct.pack(">i", round(number * 65536)) for number in numbers)


def curve(gamma: float | str) -> bytes:
    if gamma == "srgb":  # parametric, type 3
        return b"para" + bytes(4) + struct.pack(">HH", 3, 0) + fixed(2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
    return b"curv" + bytes(4) + struct.pack(">IH", 1, round(float(gamma) * 256)) + bytes(2)


def icc(kind: bytes, tags: dict[bytes, bytes], device: bytes = b"mntr", target: bytes = b"XYZ ") -> bytes:
    """A profile of ICC.1:2010 with these tags."""
    tags = {b"desc": b"mluc" + bytes(4) + struct.pack(">II", 0, 12), b"wtpt": b"XYZ " + bytes(4) + D50, **tags}
    table, body, start = struct.pack(">I", len(tags)), b"", 128 + 4 + 12 * len(tags)
    for name, data in tags.items():
        data += bytes(-len(data) % 4)
        table += name + struct.pack(">II", start + len(body), len(data))
        body += data
    size = start + len(body)
    head = struct.pack(">I4sI4s4s4s", size, bytes(4), 0x04300000, device, kind, target) + bytes(12) + b"acsp"
    return (head + bytes(28) + D50).ljust(128, b"\0") + table + body


D50 = fixed(0.9642, 1.0, 0.8249)


def rgb_profile(columns: tuple[tuple[float, ...], ...], gamma: float | str) -> bytes:
    tags = {b"rXYZ gXYZ bXYZ".split()[i]: b"XYZ " + bytes(4) + fixed(*columns[i]) for i in range(3)}
    return icc(b"RGB ", tags | {name: curve(gamma) for name in (b"rTRC", b"gTRC", b"bTRC")})


def grey_profile(gamma: float) -> bytes:
    return icc(b"GRAY", {b"kTRC": curve(gamma)})


def ink_profile() -> bytes:
    """Of inks that cover nothing but lightness: L* = 100 without any, 50 with all of the black."""
    corners = [(100 - 50 * black, 0, 0) for black in (0, 1)]
    cells = [corners[number & 1] for number in range(16)]  # the black is the last of four channels, and runs fastest
    values = b"".join(struct.pack(">3H", round(light * 652.8), 32768, 32768) for light, _, _ in cells)
    identity = struct.pack(">2H", 0, 65535)
    matrix = fixed(1, 0, 0, 0, 1, 0, 0, 0, 1)
    table = b"mft2" + bytes(4) + bytes([4, 3, 2, 0]) + matrix + struct.pack(">2H", 2, 2)
    return icc(b"CMYK", {b"A2B0": table + identity * 4 + values + identity * 3}, b"prtr", b"Lab ")


def linear(colour: tuple[int, ...]) -> np.ndarray:
    part = np.array(colour) / 255
    return np.where(part <= 0.04045, part / 12.92, ((part + 0.055) / 1.055) ** 2.4)


def in_space(colour: tuple[int, ...], columns: tuple[tuple[float, ...], ...], gamma: float | str) -> tuple[int, ...]:
    """The numbers that stand for an sRGB colour in another space."""
    parts = np.linalg.solve(np.array(columns).T, np.array(SRGB_COLUMNS).T @ linear(colour)).clip(0, 1)
    if gamma == "srgb":
        parts = np.where(parts <= 0.0031308, parts * 12.92, 1.055 * parts ** (1 / 2.4) - 0.055)
    else:
        parts = parts ** (1 / float(gamma))
    return tuple(int(part) for part in (parts * 255).round())


def quarters(colours: list[tuple[int, ...]], mode: str = "RGB") -> Image.Image:
    image = Image.new(mode, (32, 32))
    for number, colour in enumerate(colours):
        image.paste(colour, (number % 2 * 16, number // 2 * 16, number % 2 * 16 + 16, number // 2 * 16 + 16))
    return image


def saved(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def colours(content: bytes) -> list[tuple[int, ...]]:
    image = open_rgb(io.BytesIO(content))
    assert image.mode == "RGB"
    return [image.getpixel((x, y)) for y in (8, 24) for x in (8, 24)]  # type: ignore[misc]


def near(found: list[tuple[int, ...]], expected: list[tuple[int, ...]], by: int = 2) -> bool:
    return bool(np.abs(np.array(found) - np.array(expected)).max() <= by)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("space", SPACES)
def test_colours_reach_the_encoders_as_srgb(space: str, kind: str) -> None:
    columns, gamma = SPACES[space]
    stored = [in_space(colour, columns, gamma) for colour in FOUR]
    lossless = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}
    content = saved(quarters(stored), kind, icc_profile=rgb_profile(columns, gamma), **lossless.get(kind, {}))
    assert not near(stored, FOUR, 8)
    assert near(colours(content), FOUR, 6 if kind == "JPEG" else 2)  # which is lossy
    image = open_rgb(io.BytesIO(content))
    assert image.info == {}  # saved again, it must not claim that profile


def test_a_profile_that_is_srgbs_changes_nothing() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8))
    for profile in (
        ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(),
        rgb_profile(SRGB_COLUMNS, "srgb"),
    ):
        found = open_rgb(io.BytesIO(saved(noise, icc_profile=profile)))
        assert np.array_equal(np.asarray(found), np.asarray(noise))


def test_profiles_of_grey_pictures() -> None:
    content = saved(quarters([(0,), (60,), (128,), (255,)], "L"), icc_profile=grey_profile(1.0))
    assert near(colours(content), [(0,) * 3, (133,) * 3, (188,) * 3, (255,) * 3])
    sixteen = Image.fromarray(np.full((32, 32), 128 * 257, np.uint16))
    assert near(colours(saved(sixteen, icc_profile=grey_profile(1.0))), [(188,) * 3] * 4)
    columns, gamma = SPACES["ProPhoto"]
    content = saved(Image.new("L", (32, 32), 112), icc_profile=rgb_profile(columns, gamma))
    assert near(colours(content), [in_grey(112, 1.8)] * 4)


def in_grey(value: int, gamma: float) -> tuple[int, ...]:
    light = (value / 255) ** gamma
    return (round(255 * (1.055 * light ** (1 / 2.4) - 0.055)),) * 3


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_a_profile_of_inks(kind: str) -> None:
    content = saved(quarters([(0, 0, 0, 0), (0, 0, 0, 255)] * 2, "CMYK"), kind, icc_profile=ink_profile())
    assert near(colours(content), [(255,) * 3, (119,) * 3] * 2, 3)  # L* = 50 is sRGB 119


def test_a_profile_counts_below_transparency_and_in_palettes() -> None:
    columns, gamma = SPACES["Display P3"]
    profile, stored = rgb_profile(columns, gamma), in_space(FOUR[0], columns, gamma)
    half = Image.new("RGBA", (32, 32), (*stored, 128))
    expected = tuple(round(255 + (part - 255) * 128 / 255) for part in FOUR[0])
    assert near(colours(saved(half, icc_profile=profile)), [expected] * 4)
    palette = Image.new("P", (32, 32), 1)
    palette.putpalette([9, 9, 9, *stored])
    assert near(colours(saved(palette, icc_profile=profile)), [FOUR[0]] * 4)
    assert colours(saved(palette, icc_profile=profile, transparency=bytes([255, 0]))) == [(255,) * 3] * 4


BROKEN = {
    "no profile": (b"nonsense" * 30, "cannot be read"),
    "cut off": (rgb_profile(*SPACES["ProPhoto"])[:200], "cannot be read"),
    "for other pixels": (grey_profile(1.0), "is for GRAY pixels"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_profile_is_passed_over_with_a_note(case: str) -> None:
    profile, reason = BROKEN[case]
    content = saved(quarters(FOUR), icc_profile=profile)
    assert colours(content) == FOUR
    assert reason in open_rgb(io.BytesIO(content)).info[NOTE]


# --- transparency


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(depth: int, colour: int, row: bytes, more: bytes = b"") -> bytes:
    """32 equal rows of 32 pixels."""
    head = struct.pack(">IIBBBBB", 32, 32, depth, colour, 0, 0, 0)
    pixels = zlib.compress((b"\0" + row) * 32)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + more + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def hidden(depth: int, *key: int) -> bytes:
    """A picture all of the colour that is transparent in it, and as much of another one."""
    other = [0 if part else 1 for part in key]
    if depth == 16:
        row = (
            struct.pack(f">{len(key)}H", *key) * 16 + struct.pack(f">{len(key)}H", *(part << 8 for part in other)) * 16
        )
    elif depth == 8:
        row = bytes(key) * 16 + bytes(other) * 16
    else:
        each = 8 // depth
        row = bytes([sum(key[0] << depth * place for place in range(each))]) * (16 // each)
        row += bytes([sum(other[0] << depth * place for place in range(each))]) * (16 // each)
    return png(depth, 2 if len(key) == 3 else 0, row, chunk(b"tRNS", struct.pack(f">{len(key)}H", *key)))


KEYS = [(16, 5000), (16, 5000, 300, 400), (8, 77), (8, 9, 8, 7), (4, 7), (2, 3), (2, 1), (1, 1), (1, 0)]


@pytest.mark.parametrize("key", KEYS, ids=str)
def test_a_colour_that_is_transparent_lies_on_white(key: tuple[int, ...]) -> None:
    left, right = colours(hidden(*key))[:2]
    assert left == (255, 255, 255)
    assert right == (255, 255, 255) if key == (1, 0) else max(right) < 128


def test_transparency_of_other_formats() -> None:
    clear = {
        "LA": saved(Image.new("LA", (32, 32), (40, 0))),
        "16-bit LA": png(16, 4, struct.pack(">2H", 5000, 0) * 32),
        "16-bit RGBA": png(16, 6, struct.pack(">4H", 5000, 1, 2, 0) * 32),
        "LA in a TIFF": saved(Image.new("LA", (32, 32), (40, 0)), "TIFF"),
        "RGBA in a TIFF": saved(Image.new("RGBA", (32, 32), (40, 0, 0, 0)), "TIFF"),
        "WebP": saved(Image.new("RGBA", (32, 32), (40, 0, 0, 0)), "WEBP", lossless=True, exact=True),
    }
    for name, content in clear.items():
        assert colours(content) == [(255, 255, 255)] * 4, name
    grey = Image.new("PA", (32, 32), (0, 0))
    grey.putpalette([90, 90, 90])
    assert colours(saved(grey, "TIFF")) == [(255, 255, 255)] * 4


# --- text and other data that are no pixels


def test_text_is_no_picture() -> None:
    long = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(2 << 20)))
    picture = png(8, 2, bytes(FOUR[0]) * 32, long)
    assert len(picture) < 20_000
    assert colours(picture) == [FOUR[0]] * 4
    behind = picture.replace(long, b"").replace(chunk(b"IEND", b""), long + chunk(b"IEND", b""))
    assert colours(behind) == [FOUR[0]] * 4
    many = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(1 << 20))) * 70
    assert colours(png(8, 2, bytes(FOUR[0]) * 32, many)) == [FOUR[0]] * 4


def test_what_turns_a_picture_is_read_where_the_text_is_of_usual_length() -> None:
    xmp = b"XML:com.adobe.xmp\0\0\0\0\0" + b'<x:xmpmeta tiff:Orientation="6"></x:xmpmeta>'
    lying = png(8, 0, bytes(range(32)), chunk(b"iTXt", xmp))
    assert colours(lying)[0] == (8, 8, 8)
    assert open_rgb(io.BytesIO(lying)).getpixel((0, 31)) == (31, 31, 31)


def test_bombs_in_the_pixels_are_refused_as_ever() -> None:
    long = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(2 << 20)))
    bomb = png(8, 2, b"", long).replace(struct.pack(">II", 32, 32), struct.pack(">II", 20000, 20000))
    bomb = bomb[:29] + struct.pack(">I", zlib.crc32(bomb[12:29])) + bomb[33:]
    with pytest.raises(ValueError, match="400,000,000 pixels, more than the limit"):
        open_rgb(io.BytesIO(bomb))


def test_a_profile_without_end_is_passed_over() -> None:
    huge = chunk(b"iCCP", b"p\0\0" + zlib.compress(bytes(2 << 20)))
    image = open_rgb(io.BytesIO(png(8, 2, bytes(FOUR[0]) * 32, huge)))
    assert image.getpixel((3, 3)) == FOUR[0]
    assert "colour profile is larger than 1 MB" in image.info[NOTE]


def test_damaged_exif_data_are_no_pixels() -> None:
    image = open_rgb(io.BytesIO(saved(quarters(FOUR), exif=b"Exif\0\0garbage")))
    assert image.getpixel((8, 8)) == FOUR[0]
    assert "EXIF" in image.info[NOTE]
