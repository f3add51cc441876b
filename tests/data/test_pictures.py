"""Pictures as their files have them: colour profiles, transparency, text, names; what is used of a folder or a tar."""

import hashlib
import io
import json
import re
import struct
import tarfile
import unicodedata
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms
from running import composed, train

from kandinsky_exp import build
from kandinsky_exp.data import checks, sources
from kandinsky_exp.data.buckets import notes_on_rare
from kandinsky_exp.data.encoded import catalog
from kandinsky_exp.data.examples import Source
from kandinsky_exp.data.file_hashes import FileDigests
from kandinsky_exp.data.pictures import NOTE, open_rgb
from kandinsky_exp.data.preprocess import Preprocess
from kandinsky_exp.data.sampler import StreamBatchSampler
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


# --- what is used of a folder

RED = saved(Image.new("RGB", (16, 16), "red"))
CAPTION = '{{"file_name": "{}", "text": "x"}}\n'


def write(folder: Path, **files: bytes | str | None) -> Path:
    """Files by name; None stands for a picture."""
    for name, content in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        content = RED if content is None else content
        file.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def ids(source: object) -> list[str]:
    return [example.id for example in source.examples()]  # type: ignore[attr-defined]


def left_out(splits: sources.Splits) -> list[str]:
    return list(checks.check(splits, requires_captions=False).notes)


def jpeg2000() -> bytes:
    return saved(Image.new("RGB", (16, 16), "red"), "JPEG2000")


JPEG = saved(Image.new("RGB", (16, 16), "red"), "JPEG")
CLUTTER = {
    ".hidden.png": b"",
    "._a.png": b"",
    "Thumbs.db": JPEG,
    "desktop.ini": b"",
    ".DS_Store": b"",
    "@eaDir/a.png/SYNOPHOTO_THUMB.jpg": JPEG,
    "__MACOSX/._a.png": b"",
    ".git/b.png": b"",
}


def test_what_can_be_decoded_is_used_whatever_its_name(tmp_path: Path) -> None:
    named = {"a.JPG": JPEG, "b.jfif": JPEG, "c.jpe": JPEG, "d.heic": None, "e.png": None, "f.bin": JPEG, "g": None}
    write(tmp_path, **named, **CLUTTER, **{"h.jp2": jpeg2000(), "notes.md": "no picture"})
    splits = sources.dreambooth(tmp_path, "a thing")
    assert ids(splits.train) == sorted([*named, "h.jp2"])
    assert checks.find_bad(splits.train, True) == []  # type: ignore[arg-type]
    assert left_out(splits) == ["not used, files that are no pictures: 1 (notes.md)"]


@pytest.mark.parametrize("name", ["a.heic", "a.svg", "a.CR2", "a.psd", "a.unknown", "a"])
def test_what_claims_to_be_a_picture_and_is_none_is_an_error(tmp_path: Path, name: str) -> None:
    broken = b"\0\0\0\x18ftypheic\0\0\0\0" + bytes(16) if "." not in name or "unknown" in name else b"none"
    write(tmp_path, **{name: broken, "b.png": None, "b.txt": "x", f"{Path(name).stem}.txt": "x"})
    for splits in (sources.dreambooth(tmp_path, "a thing"), sources.folder(tmp_path)):
        ((_, problem),) = checks.find_bad(splits.train, True)  # type: ignore[arg-type]
        assert f"image {name}: not an image that Pillow can read" in problem


def test_what_a_folder_with_metadata_does_not_list_is_counted(tmp_path: Path) -> None:
    rows = "".join(CAPTION.format(name) for name in ("a.png", "./in/b.png"))
    pictures = {f"more{number}.png": None for number in range(7)}
    write(tmp_path, **{"a.png": None, "in/b.png": None, "in/c.jfif": JPEG, "LICENSE": "free", "metadata.jsonl": rows})
    write(tmp_path, **pictures, **CLUTTER)
    splits = sources.folder(tmp_path)
    assert ids(splits.train) == ["a.png", "./in/b.png"]
    assert left_out(splits) == [
        "not used, files that are no pictures: 1 (LICENSE)",
        "not used, pictures that metadata.jsonl does not list: 8 "
        "(more0.png, more1.png, more2.png, more3.png, more4.png, …)",
    ]


def test_what_lies_beside_the_parts_of_a_folder_is_counted(tmp_path: Path) -> None:
    write(tmp_path, **{"train/a.png": None, "train/a.txt": "x", "validation/b.png": None, "validation/b.txt": "x"})
    write(tmp_path, **{"test/c.png": None, "README.md": "x", "train/a.json": "{}"})
    assert left_out(sources.folder(tmp_path)) == [
        "not used, files that are no pictures: 2 (a.json, README.md)",
        "not used, pictures beside train/ and validation/: 1 (test/c.png)",
    ]


def test_a_folder_named_validation_without_rows_of_its_own_is_counted(tmp_path: Path) -> None:
    write(tmp_path, **{"a.png": None, "validation/b.png": None, "metadata.jsonl": CAPTION.format("a.png")})
    splits = sources.folder(tmp_path)
    assert splits.validation is None
    assert left_out(splits) == ["not used, pictures that metadata.jsonl does not list: 1 (validation/b.png)"]


def test_what_lies_beside_class_images_is_counted(tmp_path: Path) -> None:
    write(tmp_path, **{"dog/a.png": None, "class/b.jpe": JPEG, "class/c.png": None, "class/d.txt": "x"})
    splits = sources.dreambooth(tmp_path / "dog", "my dog", tmp_path / "class", "a dog", num_class_images=1)
    assert splits.class_images is not None
    assert ids(splits.class_images.source()) == ["b.jpe"]
    assert left_out(splits) == [
        "not used, files that are no pictures: 1 (d.txt)",
        "not used, class images beyond data.num_class_images=1: 1 (c.png)",
    ]


def test_the_emoji_of_the_package_are_all_used() -> None:
    assert left_out(sources.emoji()) == []


# --- links to folders


def test_a_link_to_a_folder_is_a_folder(tmp_path: Path) -> None:
    write(tmp_path / "away", **{"b.png": None, "b.txt": "two", "in/c.png": None, "in/c.txt": "three"})
    home = write(tmp_path / "home", **{"a.png": None, "a.txt": "one", "real/d.png": None, "real/d.txt": "four"})
    (home / "linked").symlink_to(tmp_path / "away")
    (tmp_path / "away" / "back").symlink_to(home)
    (home / "again").symlink_to(home / "real")
    (home / "twice").symlink_to(tmp_path / "away" / "in")
    (home / "up").symlink_to(tmp_path)
    (home / "gone").symlink_to(tmp_path / "nowhere")
    names = ["a.png", "linked/b.png", "linked/in/c.png", "real/d.png"]
    for splits in (sources.folder(home), sources.dreambooth(home, "a thing")):
        assert ids(splits.train) == names
        assert checks.find_bad(splits.train, True) == []  # type: ignore[arg-type]
        assert any(
            line == "not used, links to folders that are read anyway: 4 (again, twice, up, linked/back)"
            for line in left_out(splits)
        )
    (home / "metadata.jsonl").write_text("".join(map(CAPTION.format, ["a.png", "linked/b.png"])))
    lines = left_out(sources.folder(home))
    assert "not used, pictures that metadata.jsonl does not list: 2 (linked/in/c.png, real/d.png)" in lines


# --- names that look the same

COMPOSED, DECOMPOSED = (unicodedata.normalize(form, "café/åé") for form in ("NFC", "NFD"))


@pytest.mark.parametrize(("listed", "stored"), [(COMPOSED, DECOMPOSED), (DECOMPOSED, COMPOSED)])
def test_accents_may_be_written_either_way(tmp_path: Path, listed: str, stored: str) -> None:
    row = CAPTION.format(f"{listed}.png")
    write(tmp_path / "set", **{f"{stored}.png": None, "metadata.jsonl": row, "b.png": None})
    write(tmp_path, **{"list.jsonl": row.replace("café", "set/café").replace("cafe", "set/cafe")})
    for splits in (sources.folder(tmp_path / "set"), sources.listing(tmp_path / "list.jsonl", "file_name")):
        assert splits.train[0].image().getpixel((3, 3)) == (255, 0, 0)
        before = splits.train.fingerprint(FileDigests(None))
        write(tmp_path / "set", **{f"{stored}.png": JPEG})
        assert splits.train.fingerprint(FileDigests(None)) != before
        write(tmp_path / "set", **{f"{stored}.png": None})
    assert left_out(sources.folder(tmp_path / "set")) == [
        "not used, pictures that metadata.jsonl does not list: 1 (b.png)"
    ]


def test_a_text_beside_an_image_may_write_accents_either_way(tmp_path: Path) -> None:
    write(tmp_path, **{f"{COMPOSED}.png": None, f"{COMPOSED[:5]}{DECOMPOSED[6:]}.txt": "x"})
    assert [example.captions for example in sources.folder(tmp_path).train.examples()] == [("x",)]


def test_a_text_is_named_with_its_folder(tmp_path: Path) -> None:
    bad = {"in/b.txt": "", "in/c.txt": b"caf\xe9", "in/d.txt": "x" * 70_000}
    write(tmp_path, **{"a.png": None, "a.txt": "x", **{name.replace("txt", "png"): None for name in bad}, **bad})
    with pytest.raises(DataError) as caught:
        checks.check(sources.folder(tmp_path), True)
    assert all(f": {name}" in str(caught.value) for name in bad)


# --- names in a tar


def tar(path: Path, *members: str) -> Path:
    """An archive of these members: pictures and texts by their endings."""
    with tarfile.open(path, "w") as archive:
        for name in members:
            content = name.encode() if name.endswith((".txt", ".json", ".cls", "README")) else RED
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def read(path: Path, **options: str) -> tuple[list[str], list[tuple[str, ...]], Source]:
    train = sources.webdataset(path, **options).train
    examples = list(train.examples())
    assert train.count == len(examples)
    for row, example in enumerate(examples):  # the walk may begin anywhere
        assert example.problem or next(iter(train.examples(row))).read() == example.read()
    list(train.examples())
    return [example.id.partition("/")[2] for example in examples], [example.captions for example in examples], train


DOTTED = ["000", "001", "shot v1.0", "shot v1.1", "IMG_2024.05.01"]


def test_names_with_dots_in_a_tar(tmp_path: Path) -> None:
    path = tar(tmp_path / "a.tar", *(f"{name}.{ending}" for name in DOTTED for ending in ("png", "txt")))
    names, captions, train = read(path)
    assert names == [f"{name}.png" for name in DOTTED]
    assert captions == [(f"{name}.txt",) for name in DOTTED]
    assert train.passed_over() == {}
    many = [f"IMG.{number:04}" for number in range(40)]
    path = tar(tmp_path / "b.tar", *(f"{name}.{ending}" for name in many for ending in ("png", "txt")))
    assert read(path)[0] == [f"{name}.png" for name in many]
    path = tar(tmp_path / "c.tar", *(f"{name}.png" for name in many), "IMG.txt")
    assert sorted(read(path)[0]) == ["IMG", *(f"{name}.png" for name in many)]  # the text alone is an error


def test_dots_as_webdataset_means_them(tmp_path: Path) -> None:
    members = ["a.cls", "a.alt.txt", "a.depth.png", "a.jpg", "a.seg.png", "a.txt", "b.jpg", "b.txt", "b.webp", "README"]
    names, captions, train = read(tar(tmp_path / "a.tar", *members))
    assert (names, captions) == (["a.jpg", "b.jpg"], [("a.txt",), ("b.txt",)])
    assert train.passed_over() == {
        "not used, members of other endings": [2, "a.cls", "README"],
        "not used, members beside the picture of an example": [3, "a.seg.png", "a.depth.png", "b.webp"],
        "not used, texts without a picture of their name": [1, "a.alt.txt"],
    }
    assert read(tmp_path / "a.tar", image_column="seg.png")[0] == ["a.seg.png", "b"]


def test_one_of_several_pictures_has_to_be_chosen(tmp_path: Path) -> None:
    for marker in ("a.txt", "a.cls"):
        path = tar(tmp_path / "a.tar", "a.input.jpg", "a.target.jpg", marker)
        (example,) = sources.webdataset(path).train.examples()
        assert example.problem.endswith("there are input.jpg, target.jpg; set data.image_column")
        assert read(path, image_column="target.jpg")[0] == ["a.target.jpg"]


def test_what_lies_beside_shards_is_counted(tmp_path: Path) -> None:
    tar(tmp_path / "B.TAR", "a.png", "a.txt")
    write(tmp_path, **{"index.json": "{}", "c.tar.part": b"", **CLUTTER})
    splits = sources.webdataset(tmp_path)
    assert [example.id for example in splits.train.examples()] == ["B.TAR/a.png"]
    assert left_out(splits) == ["not used, beside the .tar files: 2 (c.tar.part, index.json)"]


def test_pictures_of_all_endings_in_a_tar(tmp_path: Path) -> None:
    path = tar(
        tmp_path / "a.tar", "a.jfif", "a.txt", "b.heic", "b.txt", "c.bin", "c.txt", "__MACOSX/d.png", "Thumbs.db"
    )
    names, captions, train = read(path)
    assert (names, captions) == (["a.jfif", "b.heic", "c.bin"], [("a.txt",), ("b.txt",), ("c.txt",)])
    assert [example.image().size for example in train.examples()] == [(16, 16)] * 3
    assert train.passed_over() == {}
    (example, *_) = sources.webdataset(path, image_column="jpg").train.examples()
    assert "no image (jpg) has this name" in example.problem


# --- runs


def test_a_run_says_what_it_did_not_use_and_by_which_rules_it_reads(tmp_path: Path) -> None:
    rows = "".join(CAPTION.format(f"{number}.png") for number in range(4))
    broken = saved(Image.new("RGB", (16, 16), "red"), icc_profile=b"nonsense" * 30)
    home = write(tmp_path / "set", **{f"{number}.png": None for number in range(7)}, **{"metadata.jsonl": rows})
    write(home, **{"2.png": broken})
    words = ["model=prior", "data=folder", f"data.path={home}", "data.max_samples=null", "name=one"]
    words += ["validation.prompts=[]", "checkpoint.every=1", "validation.fraction=0"]
    train(tmp_path, *words, "trainer.max_steps=1")
    (recorded,) = tmp_path.glob("mlartifacts/**/skipped.txt")
    for text in ((tmp_path / "one" / "train.log").read_text("utf-8"), recorded.read_text("utf-8")):
        assert "not used, pictures that metadata.jsonl does not list: 3 (4.png, 5.png, 6.png)" in text
        assert re.search(r"colour profile cannot be read .*: 1 \(2\.png\)", text)
        assert "since this run began" not in text
    table = next((tmp_path / "cache").glob("t*/table.json"))
    forget(tmp_path / "one" / "run.json", "rules")
    forget(table, "rules", "noted")  # as an older version left it: one of another name would not be found
    assert "no longer used" in catalog.listing(tmp_path / "cache")
    train(tmp_path, *words, "trainer.max_steps=2")
    assert "since this run began, colour profiles" in (tmp_path / "one" / "train.log").read_text("utf-8")
    train(tmp_path, *words, "trainer.max_steps=3")
    assert (tmp_path / "one" / "train.log").read_text("utf-8").count("since this run began") == 1


def forget(file: Path, *keys: str) -> None:
    facts = json.loads(file.read_text("utf-8"))
    file.write_text(json.dumps({key: value for key, value in facts.items() if key not in keys}), "utf-8")


def test_the_fingerprint_of_preprocessing_has_the_version_of_the_rules() -> None:
    """That of the rules before, for these settings: tables that were made by them must not be found."""
    old = hashlib.sha256(json.dumps([None, None, 64, []]).encode()).hexdigest()
    assert Preprocess(None, None, 64).fingerprint != old


def test_shapes_that_are_rarer_than_a_batch_are_told(tmp_path: Path) -> None:
    home = tmp_path / "set"
    for number, size in enumerate([(128, 128)] * 6 + [(512, 128)] * 2 + [(128, 512)]):
        file = write(home, **{f"{number}.txt": "x"}) / f"{number}.png"
        Image.new("RGB", size, "red").save(file)
    words = ["data=folder", f"data.path={home}", "data.max_samples=null", "validation.fraction=0", "tracker=none"]
    words += ["data.resolution=128", "data.buckets=true", "trainer.batch_size=2", "trainer.grad_accumulation=2"]
    train(tmp_path, *words, "trainer.max_steps=3", "name=one", "validation.prompts=[]")
    log = (tmp_path / "one" / "train.log").read_text("utf-8")
    assert "data.buckets: 2 images come more than once in every batch of theirs, because a step takes 4" in log
    assert "there are fewer: 4:1 (2); crop" in log
    assert "data.buckets: 1 images never train in 3 steps" in log
    assert "there are fewer: 1:4 (1); crop" in log


@pytest.mark.parametrize("steps", [1, 2, 5, 9, 40])
def test_what_is_told_of_rare_shapes_is_what_the_order_does(steps: int) -> None:
    counts = [23, 9, 3, 1]
    groups = np.repeat(np.arange(4), counts)
    shapes = np.array([(16, 16), (16, 32), (64, 16), (8, 64)])[groups]
    visits = list(StreamBatchSampler(36, 0, batch_size=4, total_steps=steps, groups=groups))
    trained = {row for batch in visits for row, _ in batch}
    notes = notes_on_rare(shapes, 4, steps)
    for group, name in ((2, "1:4 (3)"), (3, "8:1 (1)")):
        seen = [batch for batch in visits if groups[batch[0][0]] == group]
        assert any(name in note and "never" in note for note in notes) <= (not seen)
        assert any(name in note for note in notes)
        assert all(len({row for row, _ in batch}) < 4 for batch in seen)
    assert not any("2:1 (9)" in note or "1:1" in note for note in notes)
    assert trained <= set(range(36))


def test_a_resolution_without_any_other_size_than_the_square_is_told(tmp_path: Path) -> None:
    for resolution, told in ((64, True), (128, False)):
        cfg = composed(tmp_path, "data.buckets=true", f"data.resolution={resolution}")
        notes = build.check_data(cfg, build.data(cfg)).notes
        assert bool(notes) == told
        assert all("there is no size but the square" in note and "data.resolution=128" in note for note in notes)
