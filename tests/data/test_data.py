"""Reading pictures and captions: folders, hub data sets, splits, checks, and what preprocessing makes of them."""

import csv
import io
import json
import os
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from kandinsky_exp.data import checks, sources
from kandinsky_exp.data.file_hashes import FileDigests
from kandinsky_exp.data.formats.hub_rows import announced, hub_rows
from kandinsky_exp.data.pictures import to_rgb
from kandinsky_exp.data.preprocess import Preprocess, center_crop_resize
from kandinsky_exp.data.tally import first_few
from kandinsky_exp.errors import DataError
from kandinsky_exp.tiny import architecture

ROWS = [{"file_name": "a.png", "text": "a red square"}, {"file_name": "b.png", "text": "a blue square"}]


def write_folder(folder, rows=ROWS, kind="jsonl"):
    """Pictures for every named file, and their metadata."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, row in enumerate(rows):
        Image.new("RGB", (20, 12), (40 * number, 100, 200)).save(folder / next(iter(row.values())))
    if kind == "jsonl":
        (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    else:
        with (folder / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return folder


def many(count):
    return [{"file_name": f"{number:03}.png", "text": f"picture {number}"} for number in range(count)]


def fingerprint(source):
    return source.fingerprint(FileDigests(None))


def look_at_all(splits):
    """As a run does that encodes on the fly: rows first, then every image."""
    checks.check(splits, requires_captions=True)
    problems = [problem for source in splits.both for _, problem in checks.find_bad(source, requires_captions=True)]
    if problems:
        raise DataError(first_few(problems))


def ids(source):
    return [source[index].id for index in range(len(source))]


# ---- sources


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_folder_reads_rows_in_order(tmp_path, kind):
    splits = sources.folder(write_folder(tmp_path, kind=kind))
    assert splits.validation is None
    assert ids(splits.train) == ["a.png", "b.png"]
    assert splits.train[1].captions == ("a blue square",)
    assert splits.train[1].image().getpixel((0, 0)) == (40, 100, 200)
    assert str(checks.check(splits, requires_captions=True)) == "2 images, 2 captions"


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_folder_with_train_and_validation_inside(tmp_path, kind):
    write_folder(tmp_path / "train", many(5), kind)
    write_folder(tmp_path / "validation", ROWS, kind)
    splits = sources.folder(str(tmp_path))
    assert (len(splits.train), len(splits.validation)) == (5, 2)
    assert str(checks.check(splits, True)) == "5 images + 2 held out, 7 captions"


def test_folder_with_metadata_above_the_pictures(tmp_path):
    write_folder(tmp_path / "train")
    shutil.move(tmp_path / "train" / "metadata.jsonl", tmp_path)
    rows = [{**row, "file_name": f"train/{row['file_name']}"} for row in ROWS]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    splits = sources.folder(tmp_path)
    assert ids(splits.train) == ["train/a.png", "train/b.png"]
    assert checks.check(splits, True).images == 2


def test_columns_by_name(tmp_path):
    write_folder(tmp_path, [{"picture": "a.png", "caption": "one"}])
    splits = sources.folder(tmp_path, image_column="picture", caption_column="caption")
    assert (ids(splits.train), splits.train[0].captions) == (["a.png"], ("one",))


def test_the_default_image_column_is_accepted_for_file_name(tmp_path):
    assert ids(sources.folder(write_folder(tmp_path, [{"image": "a.png", "text": "one"}])).train) == ["a.png"]


def test_a_list_of_captions(tmp_path):
    splits = sources.folder(write_folder(tmp_path, [{"file_name": "a.png", "text": ["one", "two"]}]))
    assert splits.train[0].captions == ("one", "two")
    assert checks.check(splits, True).captions == 2


def test_blank_lines_byte_order_mark_and_other_scripts(tmp_path):
    write_folder(tmp_path)
    text = '\ufeff{"file_name": "a.png", "text": "кошка\u2028猫 🐈"}\n\n{"file_name": "b.png", "text": "x"}\r\n'
    (tmp_path / "metadata.jsonl").write_bytes(text.encode())
    train = sources.folder(tmp_path).train
    assert train[0].captions == ("кошка\u2028猫 🐈",)
    assert train[1].where.endswith("line 3")


def test_csv_captions_with_commas_quotes_and_line_ends(tmp_path):
    rows = [{"file_name": "a.png", "text": 'a "cat", asleep'}, {"file_name": "b.png", "text": "two\nlines"}]
    train = sources.folder(write_folder(tmp_path, rows, "csv")).train
    assert [example.captions for example in train] == [('a "cat", asleep',), ("two\nlines",)]


def test_emoji_ship_with_captions_and_a_validation_split():
    splits = sources.emoji()
    assert str(checks.check(splits, True)) == "64 images + 16 held out, 80 captions"
    assert checks.find_bad(splits.validation, True) == []
    assert splits.train[0].image().size == (64, 64)


def test_the_fingerprint_follows_the_content_wherever_it_lies(tmp_path):
    first = fingerprint(sources.folder(write_folder(tmp_path / "one")).train)
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    assert fingerprint(sources.folder(tmp_path / "two").train) == first
    Image.new("RGB", (20, 12), "white").save(tmp_path / "two" / "b.png")
    second = fingerprint(sources.folder(tmp_path / "two").train)
    write_folder(tmp_path / "three", [ROWS[0], ROWS[1] | {"text": "another caption"}])
    third = fingerprint(sources.folder(tmp_path / "three").train)
    write_folder(tmp_path / "four", ROWS[::-1])
    fourth = fingerprint(sources.folder(tmp_path / "four").train)
    write_folder(tmp_path / "five", [ROWS[0] | {"text": ["a red", "square"]}, ROWS[1]])
    fifth = fingerprint(sources.folder(tmp_path / "five").train)
    assert len({first, second, third, fourth, fifth}) == 5
    assert len(first) == 64


def test_sources_travel_to_workers(tmp_path):
    splits = sources.subset(sources.folder(write_folder(tmp_path, many(6))), 4, 0)
    again = pickle.loads(pickle.dumps(splits))
    assert ids(again.train) == ids(splits.train)
    assert fingerprint(again.train) == fingerprint(splits.train)
    assert again.train[0].image().size == (20, 12)
    assert pickle.loads(pickle.dumps(splits.train[1])).image().size == (20, 12)


def test_examples_are_walked_from_any_row(tmp_path):
    train = sources.folder(write_folder(tmp_path, many(6))).train
    assert (isinstance(train, sources.Indexed), train.count) == (True, 6)
    assert [example.id for example in train.examples(4)] == ["004.png", "005.png"]
    with pytest.raises(IndexError):
        train[6]


# ---- subset and split


def test_subset_is_drawn_by_seed_and_nested(tmp_path):
    splits = sources.folder(write_folder(tmp_path, many(30)))
    few, more, other = (sources.subset(splits, count, seed).train for count, seed in ((5, 0), (9, 0), (5, 1)))
    assert len(few) == 5
    assert set(ids(few)) < set(ids(more))
    assert ids(few) != ids(other)
    assert ids(few) == sorted(ids(few))
    assert len({fingerprint(few), fingerprint(more), fingerprint(other)}) == 3
    assert few.caption_counts().tolist() == [1] * 5


def test_subset_takes_no_more_than_there_is(tmp_path):
    splits = sources.folder(write_folder(tmp_path))
    assert sources.subset(splits, None, 0) is splits
    assert len(sources.subset(splits, 100, 0).train) == 2
    with pytest.raises(DataError, match=r"data\.max_samples: 0"):
        sources.subset(splits, 0, 0)


def test_subset_bounds_the_validation_split_too():
    few = sources.subset(sources.emoji(), 4, 0)
    assert (len(few.train), len(few.validation)) == (4, 4)


@pytest.mark.parametrize(("rows", "fraction", "held_out"), [(2, 0.05, 1), (2, 1.0, 1), (40, 0.05, 2), (10, 1.0, 9)])
def test_at_least_one_row_is_held_out_and_never_all(rows, fraction, held_out):
    train, validation = sources.held_out(rows, fraction, 0)
    assert (len(train), len(validation)) == (rows - held_out, held_out)
    assert sorted([*train, *validation]) == list(range(rows))
    assert (train.dtype, validation.dtype) == (np.int64, np.int64)
    assert train.tolist() == sorted(train)


def test_what_is_held_out_follows_the_seed():
    first, again, other = (sources.held_out(9, 0.4, seed)[1].tolist() for seed in (0, 0, 1))
    assert first == again != other
    train, validation = sources.held_out(9, 0, 0)
    assert (train.tolist(), validation.tolist()) == (list(range(9)), [])


def test_rows_of_one_picture_stay_together():
    rng = np.random.default_rng(3)
    different = rng.integers(-(2**63), 2**63, (40, 2))
    for fraction in (0.01, 0.05, 0.4, 1.0):  # where none repeats, nothing is divided in another way than ever
        plain, grouped = (sources.held_out(40, fraction, 7, pictures) for pictures in (None, different))
        assert [part.tolist() for part in plain] == [part.tolist() for part in grouped]
    owners = rng.permutation(np.repeat(np.arange(8), 5))
    train, held = sources.held_out(40, 0.25, 7, different[owners])
    assert (len(set(owners[held])), len(held), len(train)) == (2, 10, 30)
    assert not set(owners[held]) & set(owners[train])
    for fraction, count in ((0.01, 1), (1.0, 7)):
        assert len(set(owners[sources.held_out(40, fraction, 7, different[owners])[1]])) == count
    with pytest.raises(DataError, match=r"validation\.fraction=0"):
        sources.held_out(5, 0.5, 0, different[[1] * 5])


def test_one_image_and_odd_fractions_are_not_divided():
    with pytest.raises(DataError, match=r"validation\.fraction=0"):
        sources.held_out(1, 0.05, 0)
    with pytest.raises(DataError, match=r"1\.5 is not between"):
        sources.held_out(9, 1.5, 0)


# ---- what is wrong with a folder


def lines(*texts):
    def break_it(folder):
        (folder / "metadata.jsonl").write_text("\n".join(texts) + "\n")

    return break_it


def table(text):
    def break_it(folder):
        (folder / "metadata.jsonl").unlink()
        (folder / "metadata.csv").write_text(text)

    return break_it


def content(name, data):
    return lambda folder: (folder / name).write_bytes(data)


def truncate(folder):
    data = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    Image.fromarray(data).save(folder / "b.png")
    (folder / "b.png").write_bytes((folder / "b.png").read_bytes()[:3000])


def swap_for_folder(folder):
    (folder / "b.png").unlink()
    (folder / "b.png").mkdir()


GOOD = '{"file_name": "a.png", "text": "fine"}'
BAD_FOLDERS = {
    "no folder": (shutil.rmtree, ["data.path", "is not a folder"]),
    "no metadata": (lambda folder: (folder / "metadata.jsonl").unlink(), ["data.path", "neither metadata.jsonl nor"]),
    "both kinds": (content("metadata.csv", b"file_name,text\n"), ["holds both", "keep one"]),
    "empty file": (lines(""), ["metadata.jsonl: it has no rows"]),
    "empty table": (table("file_name,text\n"), ["metadata.csv: it has no rows"]),
    "empty csv": (table(""), ["metadata.csv: it has no rows"]),
    "broken json": (lines(GOOD, '{"file_name": "b.png"'), ["metadata.jsonl, line 2", "not JSON"]),
    "json list": (lines(GOOD, "", '["b.png", "x"]'), ["metadata.jsonl, line 3", "not a JSON object"]),
    "not utf-8": (
        content("metadata.jsonl", b'{"file_name": "a.png", "text": "caf\xe9"}'),
        ["metadata.jsonl, line 1: not UTF-8"],
    ),
    "ragged csv": (table("file_name,text\na.png,one, two\n"), ["metadata.csv, line 2", "do not match the header"]),
    "short csv": (table("file_name,text\na.png,one\nb.png\n"), ["metadata.csv, line 3", "do not match the header"]),
    "csv quotes": (table('file_name,text\na.png,"one"x\n'), ["metadata.csv, line 2", "not CSV"]),
    "no image column": (lines(GOOD, '{"text": "x"}'), ["line 2: no image file in column 'file_name' (columns: text)"]),
    "empty file name": (lines('{"file_name": "", "text": "x"}'), ["line 1: no image file in column 'file_name'"]),
    "number as file": (lines('{"file_name": 7, "text": "x"}'), ["line 1: no image file in column 'file_name'"]),
    "missing file": (lambda folder: (folder / "b.png").unlink(), ["line 2: image b.png: No such file"]),
    "folder as image": (swap_for_folder, ["line 2: image b.png: Is a directory"]),
    "text as image": (content("b.png", b"a red square"), ["line 2: image b.png: not an image that Pillow can read"]),
    "empty image": (content("b.png", b""), ["line 2: image b.png: not an image that Pillow can read"]),
    "half an image": (truncate, ["line 2: image b.png: ", "truncated"]),
    "empty caption": (lines(GOOD, '{"file_name": "b.png", "text": "  "}'), ["line 2: an empty caption in 'text'"]),
    "no captions": (lines(GOOD, '{"file_name": "b.png", "text": []}'), ["line 2: an empty caption in 'text'"]),
    "one empty of two": (lines('{"file_name": "b.png", "text": ["x", ""]}'), ["line 1: an empty caption in 'text'"]),
    "null caption": (lines(GOOD, '{"file_name": "b.png", "text": null}'), ["line 2: 'text' holds None"]),
    "number caption": (lines(GOOD, '{"file_name": "b.png", "text": 3}'), ["line 2: 'text' holds 3; a caption is"]),
    "mixed captions": (lines('{"file_name": "b.png", "text": ["x", 3]}'), ["line 1: 'text' holds ['x', 3]"]),
    "other column": (
        lines('{"file_name": "a.png", "caption": "x"}', '{"file_name": "b.png", "caption": "y"}'),
        ["line 1 and every other row: no column 'text' among file_name, caption; set data.caption_column"],
    ),
    "no caption in one": (lines(GOOD, '{"file_name": "b.png"}'), ["line 2: no column 'text' among file_name"]),
    "nul in the name": (lines('{"file_name": "b\\u0000.png", "text": "x"}'), ["line 1: image b", "null"]),
}


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_bad_folders_are_refused_with_file_and_line(tmp_path, case):
    break_it, expected = BAD_FOLDERS[case]
    folder = write_folder(tmp_path / "pictures")
    break_it(folder)
    with pytest.raises(DataError) as caught:
        look_at_all(sources.folder(folder))
    message = str(caught.value)
    for part in expected:
        assert part in message
    assert message.count("\n") == 0
    assert len(message) < 400
    assert "pictures" in message


def test_an_image_column_that_was_asked_for_counts_alone(tmp_path):
    with pytest.raises(DataError, match=r"line 1: no image file in column 'img' \(columns: file_name, text\)"):
        sources.folder(write_folder(tmp_path), image_column="img")


def test_only_the_first_problems_are_listed(tmp_path):
    write_folder(tmp_path, many(3) + [{"file_name": f"{number}.png", "text": number} for number in range(17)])
    with pytest.raises(DataError) as caught:
        checks.check(sources.folder(tmp_path), True)
    reported = str(caught.value).splitlines()
    assert len(reported) == 6
    assert "line 4: 'text' holds 0; a caption" in reported[0]
    assert reported[-1] == "… and 12 more"


def test_a_validation_split_without_metadata_is_an_error(tmp_path):
    write_folder(tmp_path / "train")
    (tmp_path / "validation").mkdir()
    with pytest.raises(DataError, match="validation holds neither"):
        sources.folder(tmp_path)


def test_metadata_on_two_levels_is_an_error(tmp_path):
    write_folder(tmp_path)
    write_folder(tmp_path / "train")
    with pytest.raises(DataError, match="and its train/ hold metadata; keep one"):
        sources.folder(tmp_path)


def test_problems_of_the_validation_split_are_found(tmp_path):
    write_folder(tmp_path / "train")
    write_folder(tmp_path / "validation")
    (tmp_path / "validation" / "metadata.jsonl").write_text(
        '{"file_name": "a.png"}\n{"file_name": "b.png", "text": "x"}'
    )
    with pytest.raises(DataError, match=r"validation.metadata\.jsonl, line 1: no column 'text'"):
        checks.check(sources.folder(tmp_path), True)


def test_captions_may_be_missing_where_none_are_needed(tmp_path):
    splits = sources.folder(write_folder(tmp_path, [{"file_name": "a.png"}, {"file_name": "b.png"}]))
    assert checks.check(splits, requires_captions=False).captions == 0


def test_bad_rows_can_pass_unless_all_are_bad(tmp_path):
    write_folder(tmp_path, [*ROWS, {"file_name": "c.png", "text": 3}])
    splits = sources.folder(tmp_path)
    assert str(checks.check(splits, True, skip=True)) == "3 images, 2 captions"
    (tmp_path / "b.png").unlink()
    assert [row for row, _ in checks.find_bad(splits.train, True)] == [1, 2]
    assert [row for row, _ in checks.find_bad(splits.train, False)] == [1]
    assert checks.problem_of(splits.train[2], True).endswith(
        "line 3: 'text' holds 3; a caption is a string or a list of strings"
    )
    assert checks.problem_of(splits.train[2], False) is None
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png"}')
    with pytest.raises(DataError, match="no column 'text'"):
        checks.check(sources.folder(tmp_path), True, skip=True)


# ---- hub


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    os.environ.setdefault("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
    import datasets

    datasets.disable_progress_bars()
    return datasets


@pytest.fixture
def rows(datasets, tmp_path):
    write_folder(tmp_path / "pictures", many(6))
    files = [str(tmp_path / "pictures" / row["file_name"]) for row in many(6)]
    texts = [[row["text"], "again"] for row in many(6)]
    made = datasets.Dataset.from_dict({"image": files, "text": texts, "other": list(range(6))})
    return made.cast_column("image", datasets.Image())


def test_hub_reads_parquet(rows, tmp_path):
    (tmp_path / "set" / "data").mkdir(parents=True)
    rows.to_parquet(tmp_path / "set" / "data" / "train-00000-of-00001.parquet")
    splits = sources.hub(str(tmp_path / "set"))
    assert splits.validation is None
    assert str(checks.check(splits, True)) == "6 images, 12 captions"
    example = splits.train[3]
    assert (example.id, example.captions) == ("row 3", ("picture 3", "again"))
    assert example.image().getpixel((0, 0)) == (120, 100, 200)
    assert len(sources.subset(splits, 2, 0).train) == 2


def contents(count):
    """Files of pictures in several colours."""
    for number in range(count):
        file = io.BytesIO()
        Image.new("RGB", (20, 12), (40 * number, 100, 200)).save(file, "PNG")
        yield file.getvalue()


KINDS = {
    "pandas": (lambda data: {"bytes": data, "path": None}, pa.struct({"bytes": pa.binary(), "path": pa.null()})),
    "bytes alone": (lambda data: {"bytes": data}, pa.struct({"bytes": pa.large_binary()})),
    "raw": (lambda data: data, pa.binary()),
    "raw and large": (lambda data: data, pa.large_binary()),
}


@pytest.mark.filterwarnings("ignore")  # of `datasets`
@pytest.mark.parametrize("kind", KINDS)
def test_pictures_in_a_column_are_read_as_hub_and_as_list(datasets, tmp_path, kind):
    form, type_ = KINDS[kind]
    made = list(contents(5))
    for name, part in (("train-0.parquet", made[:3]), ("train-1.parquet", made[3:])):
        images = pa.array([form(content) for content in part], type_)
        table = pa.table({"image": images, "text": [f"picture {number}" for number in range(len(part))]})
        (tmp_path / "set").mkdir(exist_ok=True)
        pq.write_table(table, tmp_path / "set" / name)
    for splits, some in (
        (sources.hub(str(tmp_path / "set")), made),
        (
            sources.listing(tmp_path / "set" / "train-1.parquet", validation_path=tmp_path / "set/train-0.parquet"),
            made[3:],
        ),
    ):
        source = pickle.loads(pickle.dumps(splits.train))
        assert [example.read() for example in source.examples()] == some
        assert source[1].captions == ("picture 1",)
        assert source[1].image().size == (20, 12)
        assert checks.find_bad(source, True) == []
    assert len(splits.validation) == 3
    before = fingerprint(splits.train)
    pq.write_table(table.set_column(0, "image", images.take(pa.array([1, 0]))), tmp_path / "set" / "train-1.parquet")
    assert fingerprint(sources.listing(tmp_path / "set" / "train-1.parquet").train) != before


@pytest.mark.filterwarnings("ignore")
def test_a_picture_beside_its_table(datasets, tmp_path):
    (inside,) = contents(1)
    Image.new("RGB", (9, 9)).save(tmp_path / "outside.png")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.png").write_bytes(inside)
    rows = [
        {"bytes": inside, "path": "gone.png"},
        {"bytes": None, "path": "a.png"},
        {"bytes": None, "path": "../outside.png"},
        {"bytes": None, "path": None},
        None,
        {"bytes": b"no picture", "path": None},
    ]
    pq.write_table(pa.table({"image": rows, "text": ["x"] * len(rows)}), tmp_path / "set" / "train.parquet")
    named = [f"row {row}: image row {row}: " for row in range(len(rows))]
    for source, out in (
        (sources.hub(str(tmp_path / "set")).train, "../outside.png leads out of the data set's folder"),
        (sources.listing(tmp_path / "set" / "train.parquet").train, None),
    ):
        expected = {
            2: out,
            3: "the row has no image",
            4: "the row has no image",
            5: "not an image that Pillow can read",
        }
        bad = dict(checks.find_bad(source, True))
        assert set(bad) == {row for row, reason in expected.items() if reason}
        assert all(named[row] + expected[row] in problem for row, problem in bad.items())
        before = fingerprint(source)
        (tmp_path / "set" / "a.png").write_bytes(inside + b" ")
        assert fingerprint(source) != before
        (tmp_path / "set" / "a.png").write_bytes(inside)


@pytest.mark.filterwarnings("ignore")
def test_a_hub_data_set_of_several_configurations(datasets, tmp_path):
    for subset, count in (("a", 4), ("b", 2)):
        (tmp_path / subset).mkdir()
        images = pa.array([{"bytes": content} for content in contents(count)])
        pq.write_table(pa.table({"image": images, "text": ["x"] * count}), tmp_path / subset / "train.parquet")
    listed = "\n".join(f"- config_name: {subset}\n  data_files: {subset}/*.parquet" for subset in "ab")
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{listed}\n---\n")
    name = str(tmp_path)
    found = {subset: sources.hub(name, subset=subset).train for subset in "ab"}
    assert {subset: len(source) for subset, source in found.items()} == {"a": 4, "b": 2}
    assert fingerprint(found["a"]) != fingerprint(found["b"])
    assert announced(name, "train", None, None, "a").train.name == found["a"].name
    for wrong in (None, "c"):
        told = r"data\.subset: .* has (several configurations|no configuration 'c'); give one of a, b"
        with pytest.raises(DataError, match=told):
            sources.hub(name, subset=wrong)
        with pytest.raises(DataError, match=told):
            announced(name, "train", None, None, wrong)


def test_hub_reads_what_was_saved_to_disk(datasets, rows, tmp_path):
    both = datasets.DatasetDict({"train": rows, "test": rows.select([0, 1])})
    both.save_to_disk(str(tmp_path / "both"))
    rows.save_to_disk(str(tmp_path / "one"))
    splits = sources.hub(str(tmp_path / "both"), validation_split="test")
    assert (len(splits.train), len(splits.validation)) == (6, 2)
    again = pickle.loads(pickle.dumps(splits))
    assert fingerprint(again.validation) == fingerprint(splits.validation) != fingerprint(splits.train)
    assert len(sources.hub(str(tmp_path / "one")).train) == 6
    with pytest.raises(DataError, match=r"data\.subset: .* was saved to disk as one configuration"):
        sources.hub(str(tmp_path / "one"), subset="a")
    assert sources.hub(str(tmp_path / "both"), validation_split=None).validation is None


def hub_fingerprint(path, digests=None, **arguments):
    return sources.hub(str(path), **arguments).train.fingerprint(digests or FileDigests(None))


def test_the_fingerprint_of_a_hub_data_set_follows_its_files(datasets, rows, tmp_path):
    embedded = rows.map(lambda row: row, features=rows.features)
    embedded = embedded.with_format("arrow").map(datasets.table.embed_table_storage, batched=True).with_format(None)
    embedded.save_to_disk(str(tmp_path / "one"))
    first = hub_fingerprint(tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    shutil.rmtree(tmp_path / "pictures")
    assert hub_fingerprint(tmp_path / "two") == first, "the files hold the pictures"
    loaded = datasets.load_from_disk(str(tmp_path / "one"))
    part, other = (hub_rows("x", "train", loaded.select(some), "image", "text") for some in ([4, 1, 2], [4, 1, 3]))
    found = {first, hub_fingerprint(tmp_path / "two", caption_column="other"), fingerprint(part), fingerprint(other)}
    assert len(found) == 4
    memory = FileDigests(tmp_path / "cache")
    assert hub_fingerprint(tmp_path / "one", memory) == hub_fingerprint(tmp_path / "one", memory) == first


def test_the_fingerprint_of_a_hub_data_set_follows_the_files_that_it_names(datasets, rows, tmp_path):
    rows.save_to_disk(str(tmp_path / "set"))
    in_memory = hub_rows("x", "train", rows, "image", "text")
    first = fingerprint(in_memory)
    assert fingerprint(in_memory) == first
    Image.new("RGB", (20, 12), "white").save(tmp_path / "pictures" / "003.png")
    second = fingerprint(in_memory)
    (tmp_path / "pictures" / "003.png").unlink()
    assert len({first, second, fingerprint(in_memory)}) == 3
    assert [row for row, _ in checks.find_bad(in_memory, True)] == [3]


def test_hub_names_what_is_wrong(datasets, rows, tmp_path):
    name = str(tmp_path / "set")
    (tmp_path / "set").mkdir()
    rows.to_parquet(tmp_path / "set" / "train.parquet")
    for arguments, message in [
        ({"split": "training"}, "data.split: .* has no split 'training'; it has train"),
        ({"validation_split": "val"}, "data.validation_split: .* has no split 'val'; it has train"),
        ({"image_column": "img"}, r"data.image_column: 'img' is no column of images .* it has image \(Image\), text"),
        ({"image_column": "text"}, "data.image_column: 'text' is no column of images"),
    ]:
        with pytest.raises(DataError, match=message):
            sources.hub(name, **arguments)
    with pytest.raises(DataError, match="row 0 and every other row: no column 'caption' among image; set"):
        checks.check(sources.hub(name, caption_column="caption"), True)
    with pytest.raises(DataError, match="row 0: 'other' holds 0; a caption is"):
        checks.check(sources.hub(name, caption_column="other"), True)


def test_hub_rows_without_an_image_are_found(datasets, tmp_path):
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    made = datasets.Dataset.from_dict({"image": [None], "text": ["a caption"]}, features)
    made.save_to_disk(str(tmp_path / "set"))
    with pytest.raises(DataError, match="row 0: image row 0: the row has no image"):
        look_at_all(sources.hub(str(tmp_path / "set")))
    assert fingerprint(sources.hub(str(tmp_path / "set")).train)


def test_a_data_set_that_cannot_be_loaded(datasets, tmp_path):
    with pytest.raises(DataError, match=r"data\.name: .* cannot be loaded: ") as caught:
        sources.hub(str(tmp_path / "nowhere"))
    assert "\n" not in str(caught.value)


def test_reading_a_folder_imports_neither_datasets_nor_transformers():
    code = (
        "import sys; from kandinsky_exp.data import checks, sources; "
        "checks.check(sources.emoji(), True); print(*sys.modules)"
    )
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert not {"datasets", "transformers", "diffusers", "accelerate", "mlflow", "hydra", "omegaconf"} & set(loaded)


# ---- preprocessing


@pytest.mark.parametrize("size", [(64, 64), (100, 64), (63, 120), (64, 33), (7, 5), (901, 640)])
def test_center_crop_resize_is_the_published_guides(size):
    image = Image.fromarray(np.random.default_rng(1).integers(0, 255, (size[1], size[0], 3), np.uint8))
    side = min(size)
    box = ((size[0] - side) / 2, (size[1] - side) / 2, (size[0] + side) / 2, (size[1] + side) / 2)
    expected = image.crop(box).resize((64, 64), resample=Image.BICUBIC, reducing_gap=1)
    expected = torch.from_numpy(np.transpose(np.array(expected).astype(np.float32) / 127.5 - 1, [2, 0, 1]))
    assert torch.equal(center_crop_resize(image, 64), expected)


def test_preprocess_gives_the_keys_of_its_parts():
    processor, tokenizer = architecture.image_processor(), architecture.tokenizer()
    image = sources.emoji().train[0].image()
    both = Preprocess(processor, tokenizer, 32)(image, "a photo of a cat")
    assert set(both) == {"clip_pixels", "pixels", "input_ids", "text_mask"}
    assert both["clip_pixels"].shape == (3, 64, 64)
    assert torch.equal(both["clip_pixels"], processor([image], return_tensors="pt").pixel_values[0])
    assert (both["pixels"].shape, both["pixels"].min() >= -1, both["pixels"].max() <= 1) == ((3, 32, 32), True, True)
    assert both["input_ids"][:7].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert (both["input_ids"].shape, both["text_mask"].dtype) == ((77,), torch.bool)
    assert both["text_mask"].tolist() == [True] * 7 + [False] * 70
    assert set(Preprocess(processor, None, 32)(image, "a caption")) == {"clip_pixels", "pixels"}
    assert set(Preprocess(processor, tokenizer, None)(image, None)) == {"clip_pixels"}
    assert set(Preprocess(processor, tokenizer, None)(None, "")) == {"input_ids", "text_mask"}


def test_a_long_caption_is_cut_at_77_tokens():
    tokens = Preprocess(None, architecture.tokenizer(), None)(None, "cat " * 300)
    assert tokens["input_ids"].shape == (77,)
    assert tokens["input_ids"][-1] == 49407
    assert tokens["text_mask"].all()
    short, long = "a Cat, é", "é Cat 🐈 " * 60 + "the end"
    (_, whole), (_, kept) = Preprocess(None, architecture.tokenizer(), None).tokenize([short, long])
    assert whole is None
    assert long.startswith(kept)
    ids = architecture.tokenizer()([long, kept], truncation=True, max_length=77).input_ids
    assert ids[0] == ids[1], "what is read up to there is all that is read"


def test_the_fingerprint_of_preprocessing_follows_its_parts():
    processor, tokenizer = architecture.image_processor(), architecture.tokenizer()
    made = [
        Preprocess(processor, tokenizer, None),
        Preprocess(processor, None, None),
        Preprocess(processor, None, 64),
        Preprocess(processor, None, 32),
        Preprocess(type(processor)(size={"shortest_edge": 32}, crop_size=32), None, 32),
    ]
    assert len({preprocess.fingerprint for preprocess in made}) == len(made)
    again = Preprocess(architecture.image_processor(), architecture.tokenizer(), None)
    assert again.fingerprint == made[0].fingerprint
    assert pickle.loads(pickle.dumps(made[0])).fingerprint == made[0].fingerprint


def colour(path, xy=(0, 0)):
    with Image.open(path) as image:
        return to_rgb(image).getpixel(xy)


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path):
    ramp = np.array([[0, 257, 128 * 257, 65535]], np.uint16)
    for name in ("ramp.png", "ramp.tiff"):
        Image.fromarray(ramp).save(tmp_path / name)
        assert [colour(tmp_path / name, (x, 0))[0] for x in range(4)] == [0, 1, 128, 255]
    Image.fromarray(ramp.astype(np.int32)).save(tmp_path / "wide.tiff")
    assert [colour(tmp_path / "wide.tiff", (x, 0))[0] for x in range(4)] == [0, 1, 128, 255]


def test_transparency_lies_on_white(tmp_path):
    Image.new("RGBA", (2, 2), (255, 0, 0, 0)).save(tmp_path / "rgba.png")
    Image.new("LA", (2, 2), (0, 0)).save(tmp_path / "la.png")
    palette = Image.new("P", (2, 2), 1)
    palette.putpalette([9, 9, 9, 200, 0, 0])
    palette.save(tmp_path / "palette.png", transparency=1)
    palette.save(tmp_path / "palette.gif", transparency=1)
    palette.save(tmp_path / "bytes.png", transparency=bytes([255, 0]))
    Image.new("RGB", (2, 2), (1, 2, 3)).save(tmp_path / "key.png", transparency=(1, 2, 3))
    for name in ("rgba.png", "la.png", "palette.png", "palette.gif", "bytes.png", "key.png"):
        assert colour(tmp_path / name) == (255, 255, 255), name
    Image.new("RGBA", (2, 2), (255, 0, 0, 128)).save(tmp_path / "half.png")
    assert colour(tmp_path / "half.png") == pytest.approx((255, 127, 127), abs=1)


def test_other_colour_models_become_rgb(tmp_path):
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "cmyk.jpg", quality=95)
    assert colour(tmp_path / "cmyk.jpg") == pytest.approx((255, 0, 0), abs=3)
    palette = Image.new("P", (2, 2), 1)
    palette.putpalette([9, 9, 9, 200, 0, 0])
    palette.save(tmp_path / "palette.png")
    assert colour(tmp_path / "palette.png") == (200, 0, 0)
    Image.new("1", (2, 2), 1).save(tmp_path / "bits.png")
    Image.new("L", (2, 2), 77).save(tmp_path / "grey.png")
    assert (colour(tmp_path / "bits.png"), colour(tmp_path / "grey.png")) == ((255,) * 3, (77,) * 3)


def test_pictures_stand_upright(tmp_path):
    image = Image.new("RGB", (8, 4), "black")
    image.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise
    image.save(tmp_path / "turned.png", exif=exif)
    with Image.open(tmp_path / "turned.png") as turned:
        upright = to_rgb(turned)
    assert (upright.size, upright.getpixel((3, 0))) == ((4, 8), (255, 255, 255))


@pytest.mark.parametrize(("pixels", "reason"), [(np.float32(0.5), "floating-point"), (np.int32(1 << 20), "32-bit")])
def test_pixel_formats_without_one_meaning_are_refused(tmp_path, pixels, reason):
    write_folder(tmp_path)
    Image.fromarray(np.full((16, 16), pixels)).save(tmp_path / "b.tiff")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "b.tiff", "text": "x"}')
    with pytest.raises(DataError, match=f"line 1: image b.tiff: {reason} pixels; save it with 8"):
        look_at_all(sources.folder(tmp_path))
