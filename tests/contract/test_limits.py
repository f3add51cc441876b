"""Data that was made to fill the memory, the disk or the day, or to run something: refused, in little room and time."""

import functools
import gzip
import io
import json
import os
import struct
import sys
import tarfile
import tracemalloc
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, PngImagePlugin

from kandinsky_exp.data import checks, examples, pictures, sources
from kandinsky_exp.data.examples import Example
from kandinsky_exp.data.formats import metadata, shards, sidecar
from kandinsky_exp.errors import DataError

MEGABYTE = 1 << 20


@contextmanager
def at_most(size: int) -> Iterator[None]:
    """Python's own memory, which a bomb would go through."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < size
    finally:
        tracemalloc.stop()


def picture(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 16), "red").save(path)
    return path


def example(content: bytes) -> Example:
    return Example("a.png", ("x",), lambda: content, "list.csv, line 2")


def png(*chunks: tuple[bytes, bytes]) -> bytes:
    """A good picture of 16 x 16 with more chunks in front of its pixels."""
    file = io.BytesIO()
    Image.new("RGB", (16, 16), "red").save(file, "PNG")
    whole = file.getvalue()
    more = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    place = whole.index(b"IDAT") - 4
    return whole[:place] + more + whole[place:]


@functools.cache
def packed(megabytes: int) -> bytes:
    """So many megabytes of zeros, in a thousandth of the room."""
    packer = zlib.compressobj(6)
    return b"".join(packer.compress(bytes(MEGABYTE)) for _ in range(megabytes)) + packer.flush()


BOMBS = {
    "a compressed text": lambda: png((b"zTXt", b"x\0\0" + packed(200))),
    "a compressed international text": lambda: png((b"iTXt", b"x\0\1\0\0\0" + packed(200))),
    "a thousand texts": lambda: png(*[(b"zTXt", b"x%d\0\0" % number + packed(1)) for number in range(1000)]),
    "a colour profile": lambda: png((b"iCCP", b"x\0\0" + packed(200))),
}


@pytest.mark.parametrize("case", BOMBS)
def test_what_is_packed_into_a_png_does_not_fill_the_memory(case: str) -> None:
    """Refused, or left out: as long as it takes no room."""
    bomb = BOMBS[case]()
    assert len(bomb) < 2 * MEGABYTE
    with at_most(100 * MEGABYTE):
        try:
            assert example(bomb).image().getpixel((3, 3)) == (255, 0, 0)
        except DataError as error:
            assert str(error).startswith("list.csv, line 2: image a.png: ")  # noqa: PT017 - either will do
    assert PngImagePlugin.MAX_TEXT_MEMORY <= 64 * MEGABYTE  # what bounds it; nobody has raised that


@pytest.mark.parametrize("kind", ["GIF", "PNG", "TIFF", "WEBP"])
def test_of_many_frames_one_is_decoded(kind: str) -> None:
    """A hundred of them would take 75 MB."""
    frames = [Image.new("RGB", (500, 500), (number, 0, 0)) for number in range(100)]
    options = {"compression": "tiff_deflate"} if kind == "TIFF" else {}
    file = io.BytesIO()
    frames[0].save(file, kind, save_all=True, append_images=frames[1:], **options)
    assert len(file.getvalue()) < MEGABYTE
    with at_most(10 * MEGABYTE):
        assert example(file.getvalue()).image().getpixel((3, 3)) == pytest.approx((0, 0, 0), abs=3)


def test_a_picture_that_is_a_program_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow has Ghostscript run an EPS, whatever the file is called."""
    marker = tmp_path / "ran"
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {marker}\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n%%EOF\n"
    with pytest.raises(DataError, match="not an image that Pillow can read as PNG, JPEG"):
        example(eps).image()
    assert not marker.exists()
    with Image.open(io.BytesIO(eps)) as image, pytest.raises(OSError):  # noqa: PT011 - it was asked, and gave nothing
        image.load()
    assert marker.exists()
    assert {"PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"} <= set(pictures._formats())


def test_a_file_of_absurd_size_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "a.png").open("wb") as file:
        file.truncate(examples.MAX_BYTES + 1)
    with pytest.raises(OSError, match="larger than the limit of 262,144 KB"):
        examples.read_file(str(tmp_path / "a.png"))
    (tmp_path / "b.png").write_bytes(b"x" * 2048)
    assert len(examples.read_file(str(tmp_path / "b.png"), 2048)) == 2048
    with pytest.raises(OSError, match="larger than the limit of 1 KB"):
        examples.read_file(str(tmp_path / "b.png"), 2047)


# --- captions and metadata


def problems(folder: Path) -> str:
    with pytest.raises(DataError) as caught:
        checks.check(sources.folder(folder), True)
    return str(caught.value)


def test_a_giant_text_beside_an_image(tmp_path: Path) -> None:
    picture(tmp_path / "a.png").with_suffix(".txt").write_text("a")
    picture(tmp_path / "b.png")
    with (tmp_path / "b.txt").open("wb") as file:
        file.truncate(1 << 33)
    with at_most(60 * MEGABYTE):
        assert "b.txt cannot be read: larger than the limit of 1,024 KB" in problems(tmp_path)
    (tmp_path / "b.txt").write_text("x" * (metadata.MAX_CAPTION + 1))
    assert "b.txt: a caption of 65,537 characters, more than 65,536; cut it" in problems(tmp_path)
    (tmp_path / "b.txt").write_text("x" * metadata.MAX_CAPTION)
    assert checks.check(sources.folder(tmp_path), True).captions == 2
    assert sidecar.MAX_TEXT >= metadata.MAX_CAPTION * 4


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_a_pipe_beside_an_image_does_not_wait(tmp_path: Path) -> None:
    picture(tmp_path / "a.png").with_suffix(".txt").write_text("a")
    picture(tmp_path / "b.png")
    os.mkfifo(tmp_path / "b.txt")
    assert "b.txt cannot be read: not a regular file" in problems(tmp_path)


LONG, MANY = "x" * (metadata.MAX_CAPTION + 1), ["x"] * (metadata.MAX_CAPTIONS + 1)
LISTED = [("jsonl", LONG), ("jsonl", MANY), ("csv", LONG), ("parquet", LONG), ("parquet", MANY)]


@pytest.mark.parametrize(("kind", "captions"), LISTED, ids=range(5))
def test_giant_captions_of_a_list(kind: str, captions: str | list[str], tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    rows = [{"file_name": "a.png", "text": captions}]
    file = tmp_path / f"metadata.{kind}"
    if kind == "jsonl":
        file.write_text(json.dumps(rows[0]) + "\n")
    elif kind == "csv":
        file.write_text(f"file_name,text\na.png,{captions}\n")
    else:
        pq.write_table(pa.Table.from_pylist(rows), file)
    assert "more than" in problems(tmp_path)


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
@pytest.mark.parametrize("filling", [b"x", b","])
def test_a_line_without_an_end(name: str, filling: bytes, tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    with (tmp_path / name).open("wb") as file:
        file.write(b"file_name,text\n" if name.endswith("csv") else b'{"file_name": "a.png", "text": "x"}\n')
        for _ in range(100):
            file.write(filling * MEGABYTE)
    with at_most(60 * MEGABYTE), pytest.raises(DataError, match="line 2: longer than 16 MB"):
        sources.folder(tmp_path)


def test_a_field_without_an_end(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_text('file_name,text\na.png,"' + "x\n" * MEGABYTE)
    with pytest.raises(DataError, match="not CSV: field larger than field limit"):
        sources.folder(tmp_path)


def test_a_billion_rows_in_a_few_bytes(tmp_path: Path) -> None:
    file = picture(tmp_path / "a.png").with_name("metadata.parquet")
    column = pa.array(["a.png"]).dictionary_encode()
    rows = pa.DictionaryArray.from_arrays(pa.array(bytes(5 * MEGABYTE), pa.int8()), column.dictionary)
    with pq.ParquetWriter(file, pa.schema([("file_name", rows.type), ("text", rows.type)])) as writer:
        writer.write_table(pa.table({"file_name": rows, "text": rows}))
    assert file.stat().st_size < 100_000
    with pytest.raises(DataError, match=r"5,242,880 rows in [\d,]+ bytes cannot be a list of images"):
        sources.folder(tmp_path)


# --- archives


END = bytes(1024)


def header(name: str, size: int) -> bytes:
    member = tarfile.TarInfo(name)
    member.size = size
    return member.tobuf(tarfile.GNU_FORMAT)


def members(*pairs: tuple[str, bytes]) -> bytes:
    return b"".join(header(name, len(content)) + content + bytes(-len(content) % 512) for name, content in pairs)


def bomb(path: Path, name: str) -> Path:
    """A good pair, then 320 MB of zeros under a name that may be wanted or not, and a pair again."""
    with gzip.open(path, "wb", 6) as file:
        file.write(members(("1.png", png()), ("1.txt", b"one")) + header(name, 320 * MEGABYTE))
        for _ in range(20):
            file.write(bytes(16 * MEGABYTE))
        file.write(members(("3.png", png()), ("3.txt", b"three")) + END)
    return path


@pytest.mark.parametrize("name", ["big.bin", "2.png", "2.txt"])
def test_an_archive_that_unpacks_to_anything(name: str, tmp_path: Path) -> None:
    path = bomb(tmp_path / "a.tar.gz", name)
    assert path.stat().st_size < 2 * MEGABYTE
    train = sources.webdataset(path).train
    with at_most(20 * MEGABYTE), pytest.raises(DataError, match=r"unpack to more than 100 times as many"):
        list(train.examples())


def test_an_archive_of_many_small_files_that_shrink(tmp_path: Path) -> None:
    """A limit for bombs, not for flat pictures and the empty room of tar's blocks."""
    pairs = [pair for number in range(300) for pair in ((f"{number}.png", png()), (f"{number}.txt", b"x"))]
    content = members(*pairs) + END
    path = tmp_path / "a.tar.gz"
    path.write_bytes(gzip.compress(content, 9))
    assert len(content) > 20 * path.stat().st_size
    assert sum(1 for _ in sources.webdataset(path).train.examples()) == 300


def test_a_giant_caption_of_an_archive(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    texts = {"1.txt": b"x" * (shards.MAX_TEXT + 1), "2.txt": b"x" * (metadata.MAX_CAPTION + 1)}
    pairs = [("1.png", png()), ("1.txt", texts["1.txt"]), ("2.png", png()), ("2.txt", texts["2.txt"])]
    path.write_bytes(members(*pairs) + END)
    first, second = sources.webdataset(path).train.examples()
    assert first.caption_problem == "1.txt has 4 MB; the limit is 4 MB"
    assert second.caption_problem == "'txt': a caption of 65,537 characters, more than 65,536; cut it"
    assert sys.getsizeof(first) < MEGABYTE
