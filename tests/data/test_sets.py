"""`validation.sets`: further held-out sets, each with its own source, its own table and its own curve."""

import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image
from running import composed, history, problems_of, runs, train
from test_split import opened, shards

from kandinsky_exp import build, cli
from kandinsky_exp.data.examples import Indexed
from kandinsky_exp.data.sources import EMOJI
from kandinsky_exp.errors import ConfigError, DataError
from kandinsky_exp.run import run
from kandinsky_exp.verbs import plan

SHORT = ["model=prior", "name=p", "trainer.max_steps=2", "validation.every=2", "checkpoint.every=2"]
VALIDATION = {"path": str(EMOJI / "validation")}


def contents(count: int) -> list[bytes]:
    return [file.read_bytes() for file in sorted((EMOJI / "train").rglob("*.png"))[:count]]


def sets(**entries: dict[str, Any]) -> str:
    text = yaml.safe_dump(entries, default_flow_style=True, width=10_000).strip()
    return f"validation.sets={text}"


def test_each_set_has_a_curve_of_its_own(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """That of the validation split, once more, is the run's own; a set that trains is told."""
    words = ["data.max_samples=null", sets(again=VALIDATION, trained={"path": str(EMOJI / "train")})]
    loss = train(tmp_path, *SHORT, *words)
    (made,) = runs(tmp_path)
    own, again, trained = (
        history(tmp_path, made.info.run_id, f"validation/{name}loss") for name in ("", "again/", "trained/")
    )
    assert own == again
    assert own.keys() == trained.keys() == {0, 2}
    assert own != trained
    assert loss == own[2]
    told = capfd.readouterr().err
    assert "64 images + 16 held out, 80 captions; again: 16 held out; trained: 64 held out" in told
    assert "64 of the 64 images of trained train, too: validation/trained/loss is partly theirs" in told
    assert f"step 2: validation loss {own[2]:.5f}, loss of again {again[2]:.5f}, loss of trained" in told


def test_a_run_without_held_out_pictures_has_the_curves_of_its_sets(tmp_path: Path) -> None:
    data = ["data=folder", f"data.path={EMOJI}/train", "data.resolution=64", "validation.fraction=0"]
    value = train(tmp_path, *SHORT, *data, sets(other=VALIDATION), "sweep.objective=validation/other/loss")
    (made,) = runs(tmp_path)
    curve = history(tmp_path, made.info.run_id, "validation/other/loss")
    assert curve.keys() == {0, 2}
    assert value == curve[2]
    assert "validation/loss" not in made.data.metrics


def test_sets_may_change_when_a_run_goes_on_and_others_rank_by_them(tmp_path: Path) -> None:
    """One that came, changed or went is told."""
    train(tmp_path, *SHORT)
    words = [*SHORT, sets(new=VALIDATION), "trainer.max_steps=4", "sweep.objective=validation/new/loss"]
    value = train(tmp_path, *words)
    (made,) = runs(tmp_path)
    curve = history(tmp_path, made.info.run_id, "validation/new/loss")
    assert curve.keys() == {4}
    assert value == curve[4]
    log = (tmp_path / "p" / "train.log").read_text()
    assert f"validation.sets.new.path None → {EMOJI}/validation" in log
    train(tmp_path, *SHORT, "trainer.max_steps=5")
    log = (tmp_path / "p" / "train.log").read_text()
    assert f"validation.sets.new.path {EMOJI}/validation → None" in log


def test_what_a_stage_measures_is_measured_of_each_set(tmp_path: Path) -> None:
    train(tmp_path, *SHORT, "model=inpaint", "validation.reconstructions=0", sets(other=VALIDATION))
    (made,) = runs(tmp_path)
    parts = {key for key in made.data.metrics if key.startswith("validation/")}
    names = ("loss", "loss_hole", "loss_kept")
    assert parts == {f"validation/{place}{name}" for place in ("", "other/") for name in names}


def test_sets_of_every_source_are_recorded(tmp_path: Path) -> None:
    picture = next((EMOJI / "train").rglob("*.png"))
    (tmp_path / "list.csv").write_text(f"image,words\n{picture},a face\n")
    shards(tmp_path)
    words = sets(
        one={"source": "list", "path": str(tmp_path / "list.csv"), "caption_column": "words"},
        streamed={"source": "webdataset", "path": [str(tmp_path / "set.tar")]},
        served={"source": "hub", "name": str(EMOJI / "validation"), "split": "train"},
    )
    train(tmp_path, *SHORT, words)
    (made,) = runs(tmp_path)
    names = ["one", "streamed", "served"]
    assert {f"validation/{name}/loss" for name in names} <= made.data.metrics.keys()
    contexts = {tag.value for data in made.inputs.dataset_inputs for tag in data.tags if tag.key.endswith("context")}
    assert contexts == {"training", "validation", *(f"validation: {name}" for name in names)}


def test_paths_of_sets_are_recorded_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(EMOJI / "validation", tmp_path / "mine" / "faces")
    monkeypatch.chdir(tmp_path)
    train(tmp_path, *SHORT, sets(faces={"path": "mine/faces"}))
    saved = yaml.safe_load((tmp_path / "p" / "config.yaml").read_text())
    assert saved["validation"]["sets"] == {"faces": {"path": str(tmp_path / "mine" / "faces")}}


@pytest.mark.parametrize(
    ("entries", "told"),
    [
        ({"a": {"path": "nowhere"}}, r"validation.sets.a.path: there is no folder 'nowhere' here; check the path"),
        ({"a": {"source": "list", "path": "."}}, r"validation.sets.a.path: there is no file '.' here; check the path"),
        (
            {"a": {"source": "emoji"}},
            r"validation.sets.a.source: has to be one of folder, list, webdataset, hub, not 'emoji'",
        ),
        ({"a": {"path": ".", "weight": 2}}, "validation.sets.a.weight: source=folder takes no such thing; it takes "),
        ({"a": {"path": ".", "caption_colum": "b"}}, "did you mean caption_column?"),
        (
            {"a": {"caption_column": "text"}},
            "validation.sets.a.path: is not set; give it, validation.sets={…: {path: …}}",
        ),
        *[
            (
                entry,
                "validation.sets: has to be a mapping, sets of pictures by name,",
            )
            for entry in ({"a": "pictures"}, {"a": {}}, {"a b": {"path": "."}}, {"a.b": {}}, {"a" * 61: {"path": "."}})
        ],
        ({"loss": {"path": "."}}, "validation.sets: 'loss' is the name of a metric; take another"),
        ({"cmmd": {"path": "."}}, "validation.sets: 'cmmd' is the name of a metric; take another"),
        ({"a": {"path": ".", "holes": "."}}, "validation.sets.a.holes: model=prior reads no holes; take model=inpaint"),
        ({"a": {"path": "."}, "b": {"path": "???"}}, "validation.sets: has to be a mapping, sets of pictures by name"),
    ],
)
def test_entries_that_cannot_be_used(entries: dict[str, Any], told: str, tmp_path: Path) -> None:
    first, *_ = problems_of(composed(tmp_path, *SHORT, sets(**entries)))
    assert told in first


def test_a_set_has_holes_and_hints_where_what_trains_has_them(tmp_path: Path) -> None:
    inpaint, folder = ["model=inpaint", "data=folder", f"data.path={EMOJI}", "data.resolution=64"], str(tmp_path)
    cases = [
        ([f"data.holes={folder}"], {}, "is not set; give the folder with a hole for each of its pictures"),
        ([], {"holes": folder}, "what trains has no holes of its own; set them in data, or leave it out"),
        ([f"data.holes={folder}"], {"holes": "nowhere"}, "'nowhere' is no folder"),
        (
            [f"data.holes={folder}"],
            {"holes": folder, "hole_column": "x"},
            "and hole_column are both set; give one of them",
        ),
    ]
    for words, entry, told in cases:
        (problem,) = problems_of(composed(tmp_path, *inpaint, *words, sets(a={**VALIDATION, **entry})))
        assert problem == f"validation.sets.a.holes: {told}"
    assert not problems_of(
        composed(tmp_path, *inpaint, f"data.holes={folder}", sets(a={**VALIDATION, "holes": folder}))
    )


def test_each_set_has_its_own_holes(tmp_path: Path) -> None:
    """Not those of what trains, whose files may have the same names."""
    pictures = sorted((EMOJI / "validation").rglob("*.png"))[:4]
    for place, grey in (("day", 0), ("night", 255)):
        (tmp_path / place).mkdir()
        (tmp_path / f"{place} holes").mkdir()
        for index, picture in enumerate(pictures):
            shutil.copy(picture, tmp_path / place / f"{index}.png")
            (tmp_path / place / f"{index}.txt").write_text("a picture")
            hole = Image.new("L", (64, 64), 0)
            hole.paste(255, (0, 0, 16 + grey // 16, 16))
            hole.save(tmp_path / f"{place} holes" / f"{index}.png")
    words = ["model=inpaint", "data=folder", f"data.path={tmp_path}/day", f"data.holes={tmp_path}/day holes"]
    night = {"path": str(tmp_path / "night"), "holes": str(tmp_path / "night holes")}
    splits = build.data(composed(tmp_path, *words, "data.resolution=64", sets(night=night)))
    found = splits.sets["night"]
    assert isinstance(found, Indexed)
    assert found[0].companions()["hole"].getbbox() == (0, 0, 31, 16)


def test_a_plan_counts_the_sets(tmp_path: Path) -> None:
    """Those of the hub are asked for, and not fetched."""
    local = {"near": VALIDATION, "copy": {"source": "hub", "name": str(EMOJI / "validation"), "split": "train"}}
    cfg = composed(tmp_path, *SHORT, "data.max_samples=null", sets(**local))
    assert [source.count for source in plan.known_sets(cfg)] == [16, 16]
    cfg = composed(tmp_path, *SHORT, sets(far={"source": "hub", "name": "nobody/nothing"}))
    with pytest.raises(DataError, match=r"^validation.sets.far.name: .*nobody/nothing"):
        plan.known_sets(cfg)


def test_class_images_train_too(tmp_path: Path) -> None:
    """What a set shares with them is told as well."""
    for place, which in (("subject", slice(0, 2)), ("class", slice(2, 6))):
        (tmp_path / place).mkdir()
        for index, picture in enumerate(contents(8)[which]):
            (tmp_path / place / f"{index}.png").write_bytes(picture)
            (tmp_path / place / f"{index}.txt").write_text("a thing")
    words = ["data=dreambooth", f"data.instance_path={tmp_path}/subject", "data.instance_prompt=a sks thing"]
    words += ["data.class_prompt=a thing", f"data.class_path={tmp_path}/class", "data.num_class_images=4"]
    notes = opened(tmp_path, *words, sets(beside={"path": str(tmp_path / "class")})).notes
    assert notes == ["4 of the 4 images of beside train, too: validation/beside/loss is partly theirs"]


def test_pictures_that_are_held_out_do_not_train(tmp_path: Path) -> None:
    shutil.copytree(EMOJI / "validation", tmp_path / "pictures")
    words = ["data=folder", f"data.path={tmp_path}/pictures", "validation.fraction=0.5"]
    notes = opened(tmp_path, *words, sets(same={"path": str(tmp_path / "pictures")})).notes
    assert notes == ["8 of the 16 images of same train, too: validation/same/loss is partly theirs"]


def test_a_part_of_an_entry_is_told_how_to_be_written(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["data=emoji", "validation.sets.night.path=pictures", f"output_root={tmp_path}"])
    assert ended.value.code == 2
    told = "error: validation.sets.night.path: write the sets in one: 'validation.sets={night: {path: night_pictures}}'"
    assert told in capfd.readouterr().err


def test_columns_that_are_null_are_those_of_the_source(tmp_path: Path) -> None:
    cfg = composed(tmp_path, *SHORT, sets(a={**VALIDATION, "image_column": None, "caption_column": None}))
    assert not problems_of(cfg)
    assert build.data(cfg).sets["a"].count == 12  # data.max_samples of the tests


def test_shards_need_a_table(tmp_path: Path) -> None:
    shards(tmp_path)
    entry = {"source": "webdataset", "path": str(tmp_path / "set.tar")}
    (problem,) = problems_of(composed(tmp_path, *SHORT, "data.cache=false", sets(a=entry)))
    assert problem == "validation.sets.a: shards are read as a stream; set data.cache=true, or leave it out"


def test_a_split_that_is_named_is_the_one(tmp_path: Path) -> None:
    for name, count in (("train", 5), ("validation", 3), ("test", 2)):
        rows = [{"image": {"bytes": picture, "path": None}, "text": "a"} for picture in contents(count)]
        (tmp_path / "set").mkdir(exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "set" / f"{name}.parquet")
    hub = {"source": "hub", "name": str(tmp_path / "set")}
    made = build.data(composed(tmp_path, *SHORT, sets(whole=hub, named={**hub, "split": "test"})))
    assert {name: source.count for name, source in made.sets.items()} == {"whole": 3, "named": 2}


def test_a_set_of_which_nothing_can_be_used(tmp_path: Path) -> None:
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (tmp_path / "torn" / "a.txt").write_text("a")
    words = ["data.cache=false", "data.on_error=skip", sets(torn={"path": str(tmp_path / "torn")})]
    with pytest.raises(DataError, match=r"validation.sets.torn: "):
        train(tmp_path, *SHORT, *words)


def test_a_set_without_pictures_or_captions_is_refused_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"^validation.sets.none.path: .*empty"):
        run(composed(tmp_path, *SHORT, sets(none={"path": str(tmp_path / "empty")})))
    with pytest.raises(DataError, match=r"validation.sets.mute.*validation.sets.mute.caption_column"):
        run(composed(tmp_path, *SHORT, sets(mute={**VALIDATION, "caption_column": "words"})))


def test_an_objective_of_a_set_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"sweep.objective: this run does not record validation/b/loss; it records .*/a/"
    ):
        run(composed(tmp_path, *SHORT, sets(a=VALIDATION), "sweep.objective=validation/b/loss"))
