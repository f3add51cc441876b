"""Pictures that belong to pictures: how they become tensors, where they come from, and what is refused."""

import hashlib
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image, ImageOps
from running import composed, problems_of, train

from kandinsky_exp.data import edges, sources
from kandinsky_exp.data.checks import check, find_bad
from kandinsky_exp.data.companions import Edges, Hint, Hole, hole_of
from kandinsky_exp.data.file_hashes import FileDigests
from kandinsky_exp.data.preprocess import Preprocess
from kandinsky_exp.errors import DataError

# ---- edges


def waves(height: int, width: int, seed: int) -> np.ndarray:
    y, x = np.mgrid[:height, :width].astype(np.float64)
    channels = [
        np.sin(x * (0.05 + 0.03 * c + 0.01 * seed)) * np.cos(y * (0.07 + 0.02 * c))
        + ((x - width / 2) ** 2 + (y - height / 3) ** 2 < (height / 4) ** 2) * (c + 1) / 2
        + (x > y * 1.3) * 0.6
        for c in range(3)
    ]
    picture = np.stack(channels, 2)
    return ((picture - picture.min()) / (picture.max() - picture.min()) * 255).round().astype(np.uint8)


@pytest.mark.parametrize(
    ("made", "colour", "grey"),
    [
        ((64, 64, 0), ("bd901a1aa135798e", 210), ("915004bcc991a426", 209)),
        ((97, 131, 1), ("2b5bcc062f55e69d", 382), ("5acc12585b79ed45", 362)),
        ((40, 200, 2), ("4695578c9a8f0e89", 153), ("663969ce9dbb1c66", 152)),
    ],
)
def test_edges_are_those_that_opencv_finds(made, colour, grey) -> None:
    """Digests and numbers of edge pixels of `cv2.Canny` 5.0.0, in colour (100, 200) and in one channel (60, 140)."""
    picture = waves(*made)
    for found, expected in ((edges.canny(picture), colour), (edges.canny(picture[..., :1], 60, 140), grey)):
        assert (hashlib.sha256(found.tobytes()).hexdigest()[:16], int((found > 0).sum())) == expected


def test_a_pixel_beside_an_edge_is_a_hit() -> None:
    wanted, near, far = (np.zeros((20, 20), np.uint8) for _ in range(3))
    wanted[5, 2:18], near[6, 2:18], far[9, 2:18] = 255, 255, 255
    half = wanted.copy()
    half[5, 10:] = 0
    assert [edges.f1(found, wanted) for found in (wanted, near, far)] == [1, 1, 0]
    assert edges.f1(half, wanted) == pytest.approx(2 * 9 / 16 / (1 + 9 / 16))
    empty = np.zeros_like(wanted)
    assert (edges.f1(empty, wanted), edges.f1(empty, empty)) == (0, 1)


# ---- tensors


def with_hole(size: tuple[int, int] = (80, 48)) -> tuple[Image.Image, Image.Image]:
    """A picture that is red where its hole is, and blue elsewhere."""
    hole = Image.new("RGB", size)
    hole.paste("white", (8, 8, size[0] // 2, size[1] // 2))
    picture = Image.composite(Image.new("RGB", size, "red"), Image.new("RGB", size, "blue"), hole.convert("L"))
    return picture, hole


@pytest.mark.parametrize("buckets", [(), ((64, 64), (96, 64), (64, 96))])
@pytest.mark.parametrize("size", [(80, 48), (48, 80), (64, 64), (101, 67)])
def test_they_are_cut_as_their_picture_is(size, buckets) -> None:
    picture, hole = with_hole(size)
    both = Preprocess(None, None, 64, buckets, companions={"hole": Hole(4), "hint": Hint(4)})
    for one, other in ((picture, hole), (ImageOps.mirror(picture), ImageOps.mirror(hole))):
        found = both(one, None, None, {"hole": other, "hint": one})
        _, height, width = found["pixels"].shape
        assert found["hole"].shape == (1, height // 4, width // 4)
        assert found["hint"].shape == (3, 2 * height, 2 * width)
        red = found["pixels"][0].reshape(height // 4, 4, width // 4, 4).mean((1, 3)) > 0
        inner = (
            torch.nn.functional.max_pool2d(red[None].float(), 3, 1, 1)[0]
            == torch.nn.functional.avg_pool2d(red[None].float(), 3, 1, 1)[0]
        )
        assert torch.equal(red[inner], found["hole"][0].bool()[inner])  # but for the border, which is in between
        small = torch.nn.functional.avg_pool2d(found["hint"].float() / 127.5 - 1, 2)
        assert (small - found["pixels"]).abs().mean() < 0.05


def test_edges_need_no_file() -> None:
    picture, _ = with_hole()
    found = Preprocess(None, None, 64, companions={"hint": Edges(4)})(picture, None)["hint"]
    assert found.dtype == torch.uint8
    assert found.shape == (1, 128, 128)
    assert set(found.unique().tolist()) == {0, 255}


def test_a_soft_border_is_no_fault() -> None:
    hole = Image.new("L", (100, 100))
    hole.paste(255, (20, 20, 60, 60))
    soft = hole.resize((200, 200), Image.Resampling.BICUBIC)
    assert set(np.unique(hole_of(soft.convert("RGB")))) == {0, 255}


def spot(size: tuple[int, int] = (64, 64)) -> Image.Image:
    hole = Image.new("RGB", size)
    hole.putpixel((9, 9), (255, 255, 255))
    return hole


@pytest.mark.parametrize(
    ("hole", "message"),
    [
        (Image.new("RGB", (64, 64)), "its hole: it is empty"),
        (Image.new("RGB", (64, 64), "white"), "its hole: it is full"),
        (Image.linear_gradient("L").resize((64, 64)).convert("RGB"), "% of its pixels are neither black nor white"),
        (spot(), "nothing of it is left at 16 x 16 latents"),
        (spot((32, 64)), "its hole: it has 32 x 64 pixels, its picture 64 x 64; make them of one size"),
    ],
)
def test_holes_that_are_none(hole, message) -> None:
    with pytest.raises(ValueError, match=message):
        Preprocess(None, None, 64, companions={"hole": Hole(4)})(Image.new("RGB", (64, 64)), None, None, {"hole": hole})


def test_a_hint_that_shows_nothing() -> None:
    grey = Image.new("RGB", (64, 64), "grey")
    with pytest.raises(ValueError, match="its hint: it shows nothing"):
        Preprocess(None, None, 64, companions={"hint": Hint(4)})(grey, None, None, {"hint": grey})


# ---- where they come from


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four pictures with holes: in a column, and in a folder by their names."""
    root = tmp_path / "pictures"
    (root / "holes").mkdir(parents=True)
    (tmp_path / "beside").mkdir()
    lines = []
    for number in range(4):
        picture, hole = with_hole((64, 64))
        picture.putpixel((0, 0), (number, 0, 0))
        picture.save(root / f"{number}.png")
        hole.save(root / "holes" / f"h{number}.png")
        hole.save(tmp_path / "beside" / f"{number}.jpg", quality=95)
        lines.append(f"{number}.png,picture {number},holes/h{number}.png")
    (root / "metadata.csv").write_text("file_name,text,gap\n" + "\n".join(lines) + "\n")
    return root


def holes_of(source) -> list[bytes]:
    return [np.asarray(hole_of(example.companions()["hole"])).tobytes() for example in source.examples()]


def test_a_column_and_a_folder_give_the_same(folder: Path, tmp_path: Path) -> None:
    train = sources.folder(folder).train
    listed = sources.listing(folder / "metadata.csv").train
    rows = [
        {
            "image": (folder / f"{number}.png").read_bytes(),
            "text": "a",
            "gap": (folder / "holes" / f"h{number}.png").read_bytes(),
        }
        for number in range(4)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    packed = sources.listing(tmp_path / "rows.parquet").train
    found = [holes_of(source.with_companions({"hole": "gap"}, {})) for source in (train, listed, packed)]
    found += [holes_of(source.with_companions({}, {"hole": tmp_path / "beside"})) for source in (train, listed)]
    assert all(one == found[0] for one in found)
    assert len(set(found[0])) == 1


def test_what_they_hold_is_part_of_the_data(folder: Path) -> None:
    train = sources.folder(folder).train
    plain, digests = train.fingerprint(FileDigests(None)), FileDigests(None)
    with_holes = train.with_companions({"hole": "gap"}, {})
    before = with_holes.fingerprint(digests)
    assert len({plain, before}) == 2
    Image.new("RGB", (64, 64)).save(folder / "holes" / "h2.png")
    assert with_holes.fingerprint(digests) != before
    assert train.fingerprint(FileDigests(None)) == plain


def test_one_that_is_missing_is_named(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "beside" / "2.jpg").rename(tmp_path / "beside" / "other.jpg")
    (tmp_path / "beside" / "notes.md").write_text("notes")
    splits = sources.folder(folder)
    splits.train = splits.train.with_companions({}, {"hole": tmp_path / "beside"})
    with pytest.raises(DataError, match=r"line 4: it has no hole: no picture of its name lies in .*beside"):
        check(splits, False)
    summary = check(splits, False, skip=True)
    assert any("1 holes of no picture's name" in note or "other.jpg" in note for note in summary.notes)
    assert any("notes.md" in note for note in summary.notes)


def test_what_cannot_be_is_said(folder: Path, tmp_path: Path) -> None:
    train = sources.folder(folder).train
    with pytest.raises(DataError, match="it has no column 'mask', which this model reads"):
        train.with_companions({"hole": "mask"}, {})
    (folder / "metadata.csv").write_text("file_name,text,gap\n0.png,a,../beside/0.jpg\n")
    with pytest.raises(DataError, match=r"'gap' names \.\./beside/0\.jpg, which leads out of the folder"):
        sources.folder(folder).train.with_companions({"hole": "gap"}, {})
    Image.new("RGB", (8, 8)).save(tmp_path / "beside" / "1.png")
    with pytest.raises(DataError, match=r"beside holds both 1\.(png and 1\.jpg|jpg and 1\.png); keep one"):
        train.with_companions({}, {"hole": tmp_path / "beside"})
    with pytest.raises(DataError, match="cannot be read of it; take data=folder or list"):
        shards(tmp_path, folder).train.with_companions({"hole": "gap"}, {})


def test_two_pictures_have_no_hole_in_common(tmp_path: Path, folder: Path) -> None:
    """Of paths that lead elsewhere the name alone tells the hole."""
    for place in ("one", "two"):
        (tmp_path / place).mkdir()
        Image.new("RGB", (64, 64)).save(tmp_path / place / "1.png")
    (tmp_path / "list.csv").write_text(f"image,text\n{tmp_path}/one/1.png,a\n{tmp_path}/two/1.png,b\n")
    train = sources.listing(tmp_path / "list.csv").train
    with pytest.raises(
        DataError, match=r"one/1\.png and .*two/1\.png would have the same hole; name them by data\.hole"
    ):
        train.with_companions({}, {"hole": tmp_path / "beside"})


def test_a_transparent_hole_is_neither_black_nor_white(folder: Path) -> None:
    hole = Image.new("RGBA", (64, 64), (0, 0, 0, 255))
    hole.paste((0, 0, 0, 0), (0, 0, 32, 64))
    hole.save(folder / "holes" / "h0.png")
    example, other, *_ = sources.folder(folder).train.with_companions({"hole": "gap"}, {}).examples()
    with pytest.raises(DataError, match=r"hole of 0\.png: it has transparent pixels"):
        example.companions()
    assert other.companions()


def shards(tmp_path: Path, folder: Path):
    import tarfile

    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(folder / "0.png", "0.png")
    return sources.webdataset(str(tmp_path / "a.tar"))


def test_a_bad_one_is_found_without_a_cache(folder: Path) -> None:
    Image.new("RGB", (64, 64)).save(folder / "holes" / "h1.png")
    train = sources.folder(folder).train.with_companions({"hole": "gap"}, {})
    (row, problem), *others = find_bad(
        train, False, preprocess=Preprocess(None, None, 64, companions={"hole": Hole(4)})
    )
    assert not others
    assert row == 1
    assert "its hole: it is empty" in problem


# ---- runs


OWN = [
    "model=inpaint",
    "data=folder",
    "data.resolution=64",
    "tracker=none",
    "trainer.batch_size=2",
    "data.max_samples=null",
]


@pytest.mark.parametrize(
    "words",
    [
        ["data.hole_column=gap", "data.flip=true"],
        ["data.holes={root}/beside", "data.cache=false"],
        ["data.hole_column=gap", "data.buckets=true"],
    ],
    ids=["column", "folder", "buckets"],
)
def test_holes_of_the_user_train(words, folder: Path, tmp_path: Path) -> None:
    words = [word.format(root=tmp_path) for word in words]
    train(tmp_path, *OWN, f"data.path={folder}", *words, "name=own", "trainer.max_steps=2", "validation.fraction=0.5")
    with Image.open(tmp_path / "own" / "samples" / "step-00000002" / "grid.png") as grid:
        assert grid.width > 3 * 150  # original, hole, redrawn
    tables = [file.read_text() for file in (tmp_path / "cache").glob("t*/table.json")]
    assert any('"decoder with hole"' in table for table in tables) == ("data.cache=false" not in words)


DOG = ["data.instance_path=.", "data.instance_prompt=a"]


def test_pictures_of_several_shapes_have_holes_of_these(tmp_path: Path) -> None:
    """And one whose hole lies outside of the middle is not redrawn, where the others are."""
    root = tmp_path / "pictures"
    (root / "holes").mkdir(parents=True)
    lines = []
    for number in range(8):
        size = (256, 64) if number % 2 else (64, 256)
        hole = Image.new("RGB", size)
        hole.paste("white", (2, 2, 40, 40) if number < 7 else (size[0] // 2 - 20, 20, size[0] // 2 + 20, 44))
        Image.new("RGB", size, "red").save(root / f"{number}.png")
        hole.save(root / "holes" / f"{number}.png")
        lines.append(f"{number}.png,picture {number},holes/{number}.png")
    (root / "metadata.csv").write_text("file_name,text,gap\n" + "\n".join(lines) + "\n")
    words = ["data.hole_column=gap", "data.buckets=true", "data.resolution=128", "validation.reconstructions=4"]
    train(tmp_path, *OWN, f"data.path={root}", *words, "name=shapes", "trainer.max_steps=2", "validation.fraction=0.5")
    assert (tmp_path / "shapes" / "pipeline").is_dir()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["model=decoder", "data.hole_column=gap"],
            "data.hole_column: model=decoder reads no holes; take",
        ),
        (["model=prior", "data.holes=."], "data.holes: model=prior reads no holes; take model=inpaint"),
        (["model=inpaint", "data.hint=column"], "data.hint: model=inpaint reads no hints; take model=control"),
        (["model=control", "data.hints=."], "data.hints: is set, but data.hint=canny draws hints"),
        (["model=control", "data.hint_column=depth"], "data.hint_column: is set, but data.hint=canny draws hints"),
        (
            ["model=control", "data.hint=column", "data.hint_column=a", "data.hints=."],
            "data.hints: and data.hint_column",
        ),
        (["model=inpaint", "data.holes=.", "data.hole_column=gap"], "data.holes: and data.hole_column are both set"),
        (["model=inpaint", "data.holes=nowhere"], "data.holes: 'nowhere' is no folder"),
        (["data=dreambooth", *DOG, "model=control", "data.hint=column"], "data.hints: is not set; give the folder"),
    ],
)
def test_settings_that_do_not_go_together(words, message, folder: Path, tmp_path: Path) -> None:
    data = [] if "data=dreambooth" in words else ["data=folder", f"data.path={folder}"]
    found = problems_of(composed(tmp_path, *data, *words))
    assert [text for text in found if message in text], found
    assert len(found) == 1


def test_class_images_have_no_holes(folder: Path, tmp_path: Path) -> None:
    words = ["data=dreambooth", f"data.instance_path={folder}", "data.instance_prompt=a", "data.class_prompt=b"]
    with pytest.raises(DataError, match=r"data\.class_prompt: class images have no hole of their own"):
        train(tmp_path, *OWN[:1], *words, *OWN[2:], f"data.holes={tmp_path / 'beside'}", "name=dream")


def test_a_bad_hole_ends_the_run_or_is_left_out(folder: Path, tmp_path: Path, capsys) -> None:
    Image.new("RGB", (32, 64), "white").save(folder / "holes" / "h1.png")
    words = [*OWN, f"data.path={folder}", "data.hole_column=gap", "trainer.max_steps=1", "validation.fraction=0"]
    with pytest.raises(DataError, match=r"image 1\.png: its hole: it has 32 x 64 pixels, its picture 64 x 64"):
        train(tmp_path, *words, "name=stops")
    train(tmp_path, *words, "data.on_error=skip", "name=skips")
    assert "its hole: it has 32 x 64 pixels" in capsys.readouterr().err
    assert os.path.isdir(tmp_path / "skips" / "pipeline")  # noqa: PTH112
