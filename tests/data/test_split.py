"""What trains and what is held out: rows of one picture are on one side, and a run keeps the split it began with."""

import io
import json
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from encoders import as_earlier
from PIL import Image
from running import composed, prepare, train

from kandinsky_exp import build
from kandinsky_exp.data.encoded.cache import cache_key
from kandinsky_exp.data.encoded.table import EARLIER
from kandinsky_exp.data.file_hashes import of_content
from kandinsky_exp.runs import run_folder
from kandinsky_exp.training.feature_loader import Readers, open_readers

PICTURES, TIMES = 6, 3


def rows(root: Path) -> list[tuple[bytes, str]]:
    """Pictures of several captions each, mixed as in COCO's list of captions."""
    made = []
    for number in range(PICTURES):
        file = io.BytesIO()
        Image.new("RGB", (64, 64), (40 * number, 90, 200 - 30 * number)).save(file, "PNG")
        made.append(file.getvalue())
    return [(made[row % PICTURES], f"caption {row}") for row in range(PICTURES * TIMES)]


def one_file(root: Path) -> list[str]:
    """Rows name the same file."""
    lines = []
    for row, (content, text) in enumerate(rows(root)):
        (root / f"{row % PICTURES}.png").write_bytes(content)
        lines.append(json.dumps({"image": f"{row % PICTURES}.png", "text": text}))
    (root / "list.jsonl").write_text("\n".join(lines))
    return ["data=list", f"data.path={root / 'list.jsonl'}"]


def copies(root: Path) -> list[str]:
    """Files of the same bytes."""
    for row, (content, text) in enumerate(rows(root)):
        (root / "set").mkdir(exist_ok=True)
        (root / "set" / f"{row:02d}.png").write_bytes(content)
        (root / "set" / f"{row:02d}.txt").write_text(text)
    return ["data=folder", f"data.path={root / 'set'}"]


def parquet(root: Path) -> list[str]:
    table = {"image": [{"bytes": content, "path": None} for content, _ in rows(root)]}
    (root / "set").mkdir()
    pq.write_table(pa.table(table | {"text": [text for _, text in rows(root)]}), root / "set" / "train.parquet")
    return ["data=hub", f"data.name={root / 'set'}"]


def shards(root: Path) -> list[str]:
    with tarfile.open(root / "set.tar", "w") as archive:
        for row, (content, text) in enumerate(rows(root)):
            for name, data in ((f"{row:03d}.png", content), (f"{row:03d}.txt", text.encode())):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return ["data=webdataset", f"data.path={root / 'set.tar'}"]


def opened(root: Path, *overrides: str, by_row: bool = False) -> Readers:
    prepare(root, overrides)
    cfg = composed(root, "data.max_samples=null", "data.resolution=64", *overrides)
    accelerator = build.accelerator(cfg)
    stage = build.bare_stage(cfg, build.weights(cfg))
    settings = build.read_settings(cfg, stage, accelerator.device, by_row)
    return open_readers(build.data(cfg), stage, settings, accelerator, lambda line: None)


def shown(reader) -> list[bytes]:
    """The content of each row's picture."""
    rows = [reader.dataset.source_row(index) for index in range(len(reader))]
    return [of_content(reader.source[row].read()).tobytes() for row in rows]


@pytest.mark.parametrize(
    ("form", "cached"), [(one_file, True), (one_file, False), (copies, True), (parquet, True), (shards, True)]
)
@pytest.mark.parametrize("fraction", [0.05, 0.5])
def test_held_out_rows_share_no_picture_with_those_that_train(form, cached, fraction, tmp_path):
    settings = [*form(tmp_path), f"validation.fraction={fraction}", f"data.cache={str(cached).lower()}"]
    data = opened(tmp_path, *settings)
    held, rest = shown(data.held_out), shown(data.train)
    assert not set(held) & set(rest)
    assert (len(set(held)), len(held)) == ((1, TIMES) if fraction == 0.05 else (3, 3 * TIMES))
    assert len(held) + len(rest) == PICTURES * TIMES
    assert data.notes == []
    assert str(data) == f"{len(rest)} images train, {len(held)} held out"


def make_earlier(root: Path, data: Readers, *overrides: str) -> Path:
    """Make the table of a data set what an earlier version would have written, where that would have put it."""
    cfg = composed(root, "data.max_samples=null", "data.resolution=64", *overrides)
    accelerator = build.accelerator(cfg)
    stage = build.bare_stage(cfg, build.weights(cfg))
    how = build.read_settings(cfg, stage, accelerator.device, False).how
    folder = root / "cache" / cache_key(data.source, stage.encoding_fingerprint(), stage.preprocess, how, EARLIER[0])
    as_earlier(data.train.dataset.table.folder, folder, without=["picture"])
    return folder


@pytest.mark.parametrize("form", [copies, shards])
def test_a_table_of_an_earlier_version(form, tmp_path):
    settings = [*form(tmp_path), "validation.fraction=0.5"]
    before = opened(tmp_path, *settings)
    by_row = opened(tmp_path, *settings, by_row=True)
    table = make_earlier(tmp_path, before, *settings)
    data = opened(tmp_path, *settings)
    assert data.train.dataset.table.folder == table
    if form is copies:  # the pictures can be looked at again
        assert (data.train.fingerprint, data.notes) == (before.train.fingerprint, [])
    else:
        assert data.train.fingerprint == by_row.train.fingerprint
        assert "rows of one picture may both train and be held out" in data.notes[0]


def test_a_run_goes_on_with_the_split_that_it_began_with(tmp_path, capfd):
    settings = [*copies(tmp_path), "data.max_samples=null", "data.resolution=64", "tracker=none", "validation.every=9"]
    by_row, by_picture = (opened(tmp_path, *settings, by_row=by_row).train.fingerprint for by_row in (True, False))
    assert by_row != by_picture

    def record() -> run_folder.Record:
        return run_folder.read_record(tmp_path / "a")

    train(tmp_path, *settings, "name=a", "trainer.max_steps=2")
    assert "15 images train, 3 held out" in capfd.readouterr().err
    assert (record().data, record().split) == (by_picture, "picture")
    train(tmp_path, *settings, "name=a", "trainer.max_steps=3")
    assert (record().data, record().split) == (by_picture, "picture")
    old = json.loads((tmp_path / "a" / "run.json").read_text())  # of a run that held out rows
    del old["split"]
    (tmp_path / "a" / "run.json").write_text(json.dumps(old | {"data": by_row}))
    capfd.readouterr()
    train(tmp_path, *settings, "name=a", "trainer.max_steps=4")
    assert (record().data, record().split) == (by_row, None)
    said = capfd.readouterr().err
    assert "17 images train, 1 held out" in said
    assert "training data has changed" not in said


def test_a_validation_split_that_shares_pictures_is_told(tmp_path):
    settings = copies(tmp_path)
    for name in ("00.png", "00.txt"):
        (tmp_path / "set" / "validation").mkdir(exist_ok=True)
        (tmp_path / "set" / "validation" / name).write_bytes((tmp_path / "set" / name).read_bytes())
    data = opened(tmp_path, *settings)
    assert data.notes == ["1 of the 1 held-out images train, too: the validation loss is partly theirs"]
