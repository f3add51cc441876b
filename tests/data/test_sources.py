"""Lists of images, texts beside them, bad images, and the digests that tell whether anything has changed."""

import csv
import io
import json
import os
import struct
import tarfile
import warnings
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from kandinsky_exp import run_settings
from kandinsky_exp.data import checks, sources
from kandinsky_exp.data.examples import Example
from kandinsky_exp.data.file_hashes import MISSING, FileDigests
from kandinsky_exp.data.preprocess import center_crop_resize, crop_resize
from kandinsky_exp.errors import DataError

OLD = 1_500_000_000  # a time at which nothing changes any more


def picture(path, colour=(40, 100, 200), size=(20, 12)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    os.utime(path, (OLD, OLD))
    return path


def write_list(file, rows):
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), file)
    elif file.suffix == ".jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        with file.open("w", newline="") as target:
            writer = csv.DictWriter(target, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return file


def ids(source):
    return [example.id for example in source.examples()]


def fingerprint(source, digests=None):
    return source.fingerprint(digests or FileDigests(None))


# ---- lists and Parquet


@pytest.mark.parametrize("kind", ["csv", "parquet", "jsonl"])
def test_a_list_names_files_anywhere(tmp_path, kind):
    picture(tmp_path / "pictures" / "a.png")
    far = picture(tmp_path / "elsewhere" / "b.png", (1, 2, 3))
    rows = [
        {"image": "../pictures/a.png", "text": "near"},
        {"image": str(far), "text": "far"},
    ]
    file = write_list(tmp_path / "lists" / f"list.{kind}", rows)
    splits = sources.listing(str(file), validation_path=file)
    assert ids(splits.train) == ids(splits.validation) == ["../pictures/a.png", str(far)]
    assert [example.captions for example in splits.train.examples()] == [("near",), ("far",)]
    assert splits.train[1].image().getpixel((0, 0)) == (1, 2, 3)
    assert str(checks.check(splits, True)) == "2 images + 2 held out, 4 captions"
    assert checks.find_bad(splits.train, True) == []


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet", "pictures.parquet"])
def test_further_columns_come_along(tmp_path, kind):
    """A stage may read more than picture and caption; who reads no more finds what was encoded before."""
    content = picture(tmp_path / "a.png").read_bytes() if kind.startswith("pictures") else "a.png"
    rows = [{"image": content, "text": "near", "focus": 1.5, "other": 1}]
    plain = sources.listing(write_list(picture(tmp_path / "a.png").with_name(f"list.{kind}"), rows)).train
    more = plain.with_columns(["focus"])
    assert (plain[0].extra, {name: float(cell) for name, cell in more[0].extra.items()}) == ({}, {"focus": 1.5})
    assert more[0].captions == ("near",)
    assert len({fingerprint(plain), fingerprint(more), fingerprint(plain.with_columns(["other"]))}) == 3
    with pytest.raises(DataError, match="it has no column 'lacks', which this model reads"):
        plain.with_columns(["focus", "lacks"])


def test_a_folder_with_parquet(tmp_path):
    for name in ("a.png", "b.png"):
        picture(tmp_path / name)
    rows = [{"file_name": "a.png", "text": ["one", "two"], "n": 1}, {"file_name": "b.png", "text": ["three"], "n": 2}]
    write_list(tmp_path / "metadata.parquet", rows)
    splits = sources.folder(tmp_path)
    assert [example.captions for example in splits.train.examples()] == [("one", "two"), ("three",)]
    assert splits.train[1].where.endswith("metadata.parquet, row 1")
    with pytest.raises(DataError, match=r"row 0 and every other row: no column 'x' among file_name, text, n; set"):
        checks.check(sources.folder(tmp_path, caption_column="x"), True)


def test_the_quick_way_to_read_gives_what_the_slow_one_does(tmp_path):
    texts = ["a\u2028b", "猫 🐈", 'say "so"', "tab\tand \\ backslash"]
    rows = [{"other": 1, "file_name": f"{text[0]}/ü.png", "text": text} for text in texts]
    quick = write_list(tmp_path / "quick" / "metadata.jsonl", rows)
    (tmp_path / "slow").mkdir()
    (tmp_path / "slow" / "metadata.jsonl").write_text(quick.read_text() + "\n")
    one, other = (sources.folder(tmp_path / name).train for name in ("quick", "slow"))
    assert [(e.id, e.captions) for e in one.examples()] == [(e.id, e.captions) for e in other.examples()]
    assert [e.where.rpartition(", ")[2] for e in one.examples()] == [f"line {number}" for number in range(1, 5)]
    assert fingerprint(one) == fingerprint(other)


def look_at_all(file):
    splits = sources.listing(file)
    fingerprint(splits.train)
    checks.check(splits, True)
    for _, problem in checks.find_bad(splits.train, True):
        raise DataError(problem)


IN_TEXT = "line 2: its image is no file name but the picture as text; write files, or Parquet"
LISTS = {
    "a data address": ("file_name,text\ndata:image/png;base64|iVBORw0KGgoAAAA,x\n", IN_TEXT),
    "a picture in base64": ('{"file_name": "a.png", "text": "x"}\n{"image": "/9j/4AAQSkZJRg", "text": "x"}\n', IN_TEXT),
    "a long name": ('{"file_name": "a.png", "text": "x"}\n{"image": "' + "A" * 300 + '", "text": "x"}\n', IN_TEXT),
    "bytes in JSON": ('{"file_name": "a.png", "text": "x"}\n{"image": {"bytes": "iVBO"}, "text": "x"}\n', IN_TEXT),
    "missing file": ("file_name,text\na.png,x\nnowhere.png,x\n", "line 3: image nowhere.png: No such file"),
    "number": ('{"file_name": "a.png", "text": "x"}\n{"file_name": "a.png", "text": 4}\n', "line 2: 'text' holds 4"),
    "half a letter": (
        '{"file_name": "a.png", "text": "x"}\n{"file_name": "a.png", "text": "\\ud83d"}\n',
        "line 2: not JSON",
    ),
    "a folder": ("file_name,text\n/,x\n", "line 2: image /: Is a directory"),
    "no regular file": ("file_name,text\n/dev/zero,x\n", "line 2: image /dev/zero: not a regular file"),
    "no table": ("\x00\x01\n\x02\n", "line 2: no image file in column"),
    "nothing": ("", "has no rows"),
    "other names by semicolons": ("bild;titel\na.png;x\n", "column 'file_name' (columns: bild, titel)"),
    "a semicolon too many": ("file_name;text\na.png;x; y\n", "fields do not match the header (file_name, text)"),
    "one name twice": ("file_name,text,text\na.png,x,y\n", "line 1: 'text' heads several columns"),
    "no rows of JSON": ("[1]\n7\n", "line 1: not a JSON object"),
}


@pytest.mark.parametrize("case", LISTS)
def test_bad_lists_are_refused_with_file_and_line(tmp_path, case):
    text, expected = LISTS[case]
    picture(tmp_path / "a.png")
    file = tmp_path / ("list.jsonl" if text.startswith(("{", "[")) else "list.csv")
    file.write_text(text)
    with pytest.raises(DataError) as caught:
        look_at_all(file)
    assert expected in str(caught.value).splitlines()[0]
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("list.txt", b"a.png", "has none of these endings; give a list of images as .csv, .parquet, .jsonl"),
        ("list.parquet", b"PAR1 and no more", "not a Parquet file"),
        ("nowhere.csv", None, "is no file"),
    ],
)
def test_files_that_are_no_lists(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        sources.listing(tmp_path / name)


@pytest.mark.parametrize("name", ["list.csv", "list.tsv"])
@pytest.mark.parametrize("start", ["", "\ufeff", "sep={}\r\n", "\r\n"])
@pytest.mark.parametrize("mark", [",", ";", "\t", "|"])
def test_the_first_line_says_what_separates_columns(tmp_path, mark, start, name):
    rows = [["text", "n", "file_name"], ["a cat, a dog; a|b", "1", "a.png"], ["two\nlines\tor", "2,5", "b.png"]]
    with (tmp_path / name).open("w", newline="") as file:
        file.write(start.format(mark))
        csv.writer(file, delimiter=mark).writerows(rows)
    source = sources.listing(tmp_path / name).train
    assert [(example.id, *example.captions) for example in source.examples()] == [(row[2], row[0]) for row in rows[1:]]
    first = 2 + start.count("\n")
    assert source[0].where.endswith(f"line {first}")


@pytest.mark.parametrize("code", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_texts_are_read_as_editors_save_them(tmp_path, code):
    caption, tree = "eine Füchsin 🦊", tmp_path / "beside"
    picture(tree / "a.png")
    (tree / "a.txt").write_text(f"{caption}\r\n", code)
    (tmp_path / "list.csv").write_text(f"file_name,text\nbeside/a.png,{caption}\n", code)
    row = json.dumps({"file_name": "beside/a.png", "text": caption}, ensure_ascii=False)
    (tmp_path / "list.jsonl").write_text(f"{row}\n{row}\n", code)
    with tarfile.open(tmp_path / "s.tar", "w") as archive:
        for name in ("a.png", "a.txt"):
            archive.add(tree / name, name)
    for splits in (
        sources.folder(tree),
        sources.listing(tmp_path / "list.csv"),
        sources.listing(tmp_path / "list.jsonl"),
        sources.webdataset(tmp_path / "s.tar"),
    ):
        assert {example.captions for example in splits.train.examples()} == {(caption,)}
    (tmp_path / "prompts.txt").write_text(f"{caption}\n\n\ufeffa second file\n", code)
    assert run_settings.prompts(str(tmp_path / "prompts.txt")) == [caption, "a second file"]


def test_a_folder_with_parquet_that_holds_the_pictures_is_for_another_reader(tmp_path):
    write_list(tmp_path / "metadata.parquet", [{"image": {"bytes": b"x", "path": "a.png"}, "text": "x"}])
    with pytest.raises(DataError, match=r"column 'image' holds struct.*data=list data.path=.*metadata.parquet"):
        sources.folder(tmp_path)


@pytest.mark.parametrize("name", ["../outside.png", "/etc/passwd", "a/../../outside.png", ".."])
def test_a_folder_does_not_lead_out_of_itself(tmp_path, name):
    picture(tmp_path / "outside.png")
    picture(tmp_path / "set" / "a.png")
    rows = [{"file_name": "a.png", "text": "x"}, {"file_name": name, "text": "x"}]
    write_list(tmp_path / "set" / "metadata.jsonl", rows)
    train = sources.folder(tmp_path / "set").train
    with pytest.raises(DataError, match=r"line 2: .* leads out of the folder; .* data=list"):
        train[1].image()
    with pytest.raises(OSError, match="no image"):
        train[1].read()
    with pytest.raises(DataError, match="leads out"):
        checks.check(sources.Splits(train, None), False)
    assert checks.check(sources.Splits(train, None), False, skip=True).images == 2


# ---- texts beside images


def beside(folder, **texts):
    for stem, text in texts.items():
        picture(folder / f"{stem}.png")
        if text is not None:
            (folder / f"{stem}.txt").write_text(text)
    return folder


def test_a_text_beside_each_image(tmp_path):
    beside(tmp_path, b="\ufeff two\nlines \n", a="one")
    beside(tmp_path / "more", c="three")
    (tmp_path / "more" / "d.JPG").write_bytes((tmp_path / "a.png").read_bytes())
    (tmp_path / "more" / "d.txt").write_text("four")
    (tmp_path / ".hidden").mkdir()
    picture(tmp_path / ".hidden" / "e.png")
    splits = sources.folder(tmp_path)
    assert splits.validation is None
    assert ids(splits.train) == ["a.png", "b.png", "more/c.png", "more/d.JPG"]
    assert [example.captions[0] for example in splits.train.examples()] == ["one", "two\nlines", "three", "four"]
    assert checks.find_bad(splits.train, True) == []


def test_texts_beside_images_in_train_and_validation(tmp_path):
    beside(tmp_path / "train", a="one", b="two")
    beside(tmp_path / "validation", c="three")
    for root, expected in ((tmp_path, 2), (tmp_path / "train", 2)):
        assert len(sources.folder(root).train) == expected
    assert ids(sources.folder(tmp_path).validation) == ["c.png"]
    beside(tmp_path / "flat", a="one")
    beside(tmp_path / "flat" / "validation", b="two")
    flat = sources.folder(tmp_path / "flat")
    assert (ids(flat.train), ids(flat.validation)) == (["a.png"], ["b.png"])


def test_a_file_name_that_is_not_unicode_is_listed(tmp_path):
    beside(tmp_path, a="one")
    (tmp_path / os.fsdecode(b"caf\xe9.png")).touch()
    with pytest.raises(DataError, match=r"'caf\\udce9\.png' is not UTF-8; give it another name"):
        checks.check(sources.folder(tmp_path), False)


def test_lonely_images_and_texts_are_listed(tmp_path):
    beside(tmp_path, a="one", b=None, c=" \n")
    (tmp_path / "d.txt").write_text("no picture")
    (tmp_path / "e.txt").write_bytes(b"caf\xe9")
    picture(tmp_path / "e.png")
    with pytest.raises(DataError) as caught:
        checks.check(sources.folder(tmp_path), True)
    reported = str(caught.value).splitlines()
    expected = [
        "b.png has no .txt of its name beside it",
        "c.txt is empty",
        "d.txt has no image beside it",
        "e.txt: not UTF-8 text",
    ]
    assert all(text in line for text, line in zip(expected, reported, strict=True))
    with pytest.raises(DataError) as caught:
        checks.check(sources.folder(tmp_path), False)
    assert "d.txt has no image" in str(caught.value)


@pytest.mark.parametrize("name", ["a.png", "a.txt", "a.xyz"])
def test_a_folder_of_images_or_texts_alone_is_no_data_set(tmp_path, name):
    picture(tmp_path / "a.png").rename(tmp_path / name)
    with pytest.raises(DataError, match="holds neither metadata"):
        sources.folder(tmp_path)


# ---- images


def png(width, height, depth=8, colour=0):
    """The head of a PNG, and no more of it than the first row."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(width + 1)))


def sixteen_bit_colour():
    """16 x 16, each row 16 x 3 numbers of two bytes behind the filter's."""
    row = b"\0" + struct.pack(">3H", 65535, 32896, 257) * 16
    data = zlib.compress(row * 16)
    chunk = struct.pack(">I", len(data)) + b"IDAT" + data + struct.pack(">I", zlib.crc32(b"IDAT" + data))
    whole = png(16, 16, 16, 2)
    return whole[: whole.index(b"IDAT") - 4] + chunk + b"\0\0\0\0IEND\xaeB`\x82"


def saved(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def animated(kind):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "lime", "blue")]
    return saved(
        frames[0], kind, save_all=True, append_images=frames[1:], **({"lossless": True} if kind == "WEBP" else {})
    )


def palette():
    image = Image.new("P", (16, 16), 1)
    image.putpalette([9, 9, 9, 255, 0, 0])
    return image


def noise():
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))


def example(content):
    return Example("a.png", ("x",), lambda: content, "list.csv, line 2")


RED = (255, 0, 0)
GOOD_IMAGES = {
    "CMYK": (lambda: saved(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95), RED),
    "palette": (lambda: saved(palette(), "PNG"), RED),
    "16-bit grey": (lambda: saved(Image.fromarray(np.full((16, 16), 257 * 77, np.uint16)), "PNG"), (77, 77, 77)),
    "16-bit colour": (sixteen_bit_colour, (255, 128, 1)),
    "animated GIF": (lambda: animated("GIF"), RED),
    "animated WebP": (lambda: animated("WEBP"), RED),
    "animated PNG": (lambda: animated("PNG"), RED),
    "8 px": (lambda: saved(Image.new("RGB", (8, 8), "red"), "PNG"), RED),
}


@pytest.mark.parametrize("case", GOOD_IMAGES)
def test_all_kinds_of_images_become_rgb(case):
    make, colour = GOOD_IMAGES[case]
    image = example(make()).image()
    assert image.mode == "RGB"
    assert image.getpixel((3, 3)) == pytest.approx(colour, abs=3)


BAD_IMAGES = {
    "text": (lambda: b"a red square", "not an image that Pillow can read"),
    "nothing": (lambda: b"", "not an image that Pillow can read"),
    "1 x 1": (lambda: saved(Image.new("RGB", (1, 1)), "PNG"), "1 x 1 pixels, too small to learn from"),
    "a line": (lambda: saved(Image.new("RGB", (900, 7)), "PNG"), "900 x 7 pixels, too small to learn from"),
    "20,000 x 20,000": (lambda: png(20000, 20000), "400,000,000 pixels, more than the limit of 178,956,970"),
    "just too large": (lambda: png(20000, 9000), "180,000,000 pixels, more than the limit of 178,956,970"),
    "cut off": (lambda: saved(noise(), "PNG")[:3000], "truncated"),
    "cut off JPEG": (lambda: saved(noise(), "JPEG")[:1500], "truncated"),
    "floats": (lambda: saved(Image.new("F", (16, 16)), "TIFF"), "floating-point pixels"),
}


@pytest.mark.parametrize("case", BAD_IMAGES)
def test_bad_images_are_refused_with_the_row(case):
    make, reason = BAD_IMAGES[case]
    with pytest.raises(DataError) as caught:
        example(make()).image()
    assert str(caught.value).startswith("list.csv, line 2: image a.png: ")
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_large_image_below_the_limit_brings_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = example(saved(Image.new("L", (20000, 4600), 80), "PNG", compress_level=1)).image()
        assert center_crop_resize(image, 64).shape == (3, 64, 64)
        assert crop_resize(image, 128, 64).shape == (3, 64, 128)


def ramps(width, height):
    """Red grows from left to right, green from top to bottom."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, 0 * x], -1).round().astype(np.uint8))


@pytest.mark.parametrize("size", [(640, 640), (641, 480), (479, 640)])
def test_a_square_is_cropped_as_ever(size):
    assert torch.equal(crop_resize(ramps(*size), 64, 64), center_crop_resize(ramps(*size), 64))


@pytest.mark.parametrize("size", [(640, 480), (480, 640), (1000, 333), (96, 64), (64, 97)])
@pytest.mark.parametrize("target", [(96, 64), (64, 96), (128, 64)])
def test_a_crop_is_the_largest_middle_part_of_that_shape(size, target):
    width, height = target
    made = (crop_resize(ramps(*size), width, height) + 1) * 127.5
    assert made.shape == (3, height, width)
    scale = min(size[0] / width, size[1] / height)
    for channel, axis in ((0, 0), (1, 1)):
        line = made[channel].mean(0 if channel == 0 else 1)
        seen = target[axis] * scale / size[axis]  # the part of this axis that is kept: all of it for one of them
        middle = len(line) // 4, -(len(line) // 4)
        slope = (line[middle[1]] - line[middle[0]]).item() / (len(line) + middle[1] - middle[0])
        assert slope * len(line) / 255 == pytest.approx(seen, abs=0.03)
        assert line.mean().item() == pytest.approx(127.5, abs=2)
    assert scale * width == pytest.approx(size[0]) or scale * height == pytest.approx(size[1])


def test_a_crop_of_the_right_shape_is_no_crop():
    image = noise().resize((96, 64))
    assert torch.equal(
        crop_resize(image, 96, 64), torch.from_numpy(np.asarray(image) / np.float32(127.5) - 1).permute(2, 0, 1)
    )


# ---- digests


@pytest.fixture
def train(tmp_path):
    names = [f"{number}.png" for number in range(5)]
    for number, name in enumerate(names):
        picture(tmp_path / "set" / name, (number, 0, 0))
    write_list(tmp_path / "set" / "metadata.jsonl", [{"file_name": name, "text": name} for name in names])
    return sources.folder(tmp_path / "set").train


def forge(path, content):
    """Other content under the same size and mtime: what is not read cannot tell."""
    status = path.stat()
    path.write_bytes(content.ljust(status.st_size, b"\0")[: status.st_size])
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_files_are_read_only_where_size_or_time_differ(train, tmp_path):
    digests = FileDigests(tmp_path / "cache")
    first = fingerprint(train, digests)
    assert first == fingerprint(train)
    forge(tmp_path / "set" / "1.png", b"other")
    assert fingerprint(train, digests) == first
    os.utime(tmp_path / "set" / "0.png", (OLD + 5, OLD + 5))
    assert fingerprint(train, digests) == first, "another time alone changes nothing, and 1.png was not read again"
    os.utime(tmp_path / "set" / "1.png", (OLD + 5, OLD + 5))
    changed = fingerprint(train, digests)
    assert changed == fingerprint(train) != first
    assert fingerprint(train, FileDigests(tmp_path / "cache")) == changed


def test_a_file_of_this_very_moment_is_not_trusted(train, tmp_path):
    """It may change once more within the same tick of the clock."""
    digests = FileDigests(tmp_path / "cache")
    (tmp_path / "set" / "1.png").touch()
    first = fingerprint(train, digests)
    forge(tmp_path / "set" / "1.png", b"other")
    assert fingerprint(train, digests) != first


def test_a_missing_file_has_a_digest_of_its_own(train, tmp_path):
    digests = FileDigests(tmp_path / "cache")
    first = fingerprint(train, digests)
    hidden = (tmp_path / "set" / "1.png").rename(tmp_path / "1.png")
    assert fingerprint(train, digests) != first
    paths = [str(tmp_path / name) for name in ("nowhere", "1.png", "set", "nul\0")]
    assert [digest.as_py() == MISSING for digest in digests("x", paths)] == [True, False, True, True]
    with pytest.raises(DataError, match="nowhere cannot be read"):
        digests.required("x", paths)
    hidden.rename(tmp_path / "set" / "1.png")
    assert fingerprint(train, digests) == first


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    place = content.rindex(FileDigests(None)("", [str(file.parents[1] / "set" / "1.png")])[0].as_py())
    content[place] ^= 1
    file.write_bytes(content)


DAMAGE = {
    "cut": lambda file: file.write_bytes(file.read_bytes()[:100]),
    "empty": lambda file: file.write_bytes(b""),
    "text": lambda file: file.write_text("hello"),
    "one bit": flip_a_bit,
    "a folder": lambda file: (file.unlink(), file.mkdir()),
    "other columns": lambda file: pq.write_table(pa.table({"x": [1]}), file),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_memory_only_costs_time(train, tmp_path, case):
    digests = FileDigests(tmp_path / "cache")
    first = fingerprint(train, digests)
    (file,) = (tmp_path / "cache").iterdir()
    DAMAGE[case](file)
    assert fingerprint(train, digests) == first
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [file.name], "no leftovers"


def test_a_memory_that_cannot_be_written_only_costs_time(train, tmp_path):
    (tmp_path / "file").touch()
    assert fingerprint(train, FileDigests(tmp_path / "file" / "cache")) == fingerprint(train)


def test_two_data_sets_under_one_name(tmp_path):
    digests = FileDigests(tmp_path / "cache")
    found = set()
    for number in range(3):
        picture(tmp_path / "set" / "a.png", (number, 0, 0))
        os.utime(tmp_path / "set" / "a.png", (OLD + number, OLD + number))
        write_list(tmp_path / "set" / "metadata.jsonl", [{"file_name": "a.png", "text": "x"}])
        found.add(fingerprint(sources.folder(tmp_path / "set").train, digests))
    write_list(tmp_path / "set" / "metadata.jsonl", [{"file_name": "a.png", "text": "y"}])
    found.add(fingerprint(sources.folder(tmp_path / "set").train, digests))
    assert len(found) == 4


def test_rows_take_little_memory(tmp_path):
    """10,000 rows as columns; as Python objects they would take ten times as much."""
    rows = [{"file_name": f"{number}.png", "text": f"a picture of number {number}"} for number in range(10_000)]
    quick = sources.folder(write_list(tmp_path / "a" / "metadata.jsonl", rows).parent).train
    slow = sources.folder(write_list(tmp_path / "b" / "metadata.csv", rows).parent).train
    assert quick.columns.equals(slow.columns.set_column(2, slow.columns.schema[2], quick.columns.column(2)))
    assert quick.columns.nbytes < 100 * len(quick)
    assert len(quick.problems) == 1
    assert quick.caption_counts().sum() == slow.caption_counts().sum() == len(rows)
