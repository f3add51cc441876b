"""Every form of a data set through a whole run: encoded, trained from, validated and redrawn."""

import csv
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from running import client, prepare, runs, train

from kandinsky_exp.data import sources
from kandinsky_exp.errors import ConfigError

COUNT = 10


def pictures(folder: Path) -> list[tuple[str, str]]:
    """(file name, caption) of some emoji written into a folder."""
    folder.mkdir(parents=True)
    rows = []
    for index, example in enumerate(sources.emoji().train.examples()):
        if index == COUNT:
            break
        example.image().save(folder / f"{index}.png")
        rows.append((f"{index}.png", example.captions[0]))
    return rows


def metadata_csv(root: Path) -> list[str]:
    with (root / "set.part").open("w", newline="") as file:
        csv.writer(file).writerows([("file_name", "text"), *pictures(root / "set")])
    (root / "set.part").rename(root / "set" / "metadata.csv")
    return ["data=folder", f"data.path={root / 'set'}"]


def metadata_parquet(root: Path) -> list[str]:
    names, texts = zip(*pictures(root / "set"), strict=True)
    pq.write_table(pa.table({"file_name": names, "text": texts}), root / "set" / "metadata.parquet")
    return ["data=folder", f"data.path={root / 'set'}"]


def texts_beside(root: Path) -> list[str]:
    for name, text in pictures(root / "set" / "inner"):
        (root / "set" / "inner" / name).with_suffix(".txt").write_text(text)
    return ["data=folder", f"data.path={root / 'set'}"]


def list_of_paths(root: Path) -> list[str]:
    rows = [(str(root / "set" / name), text) for name, text in pictures(root / "set")]
    with (root / "list.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("image", "text"), *rows])
    return ["data=list", f"data.path={root / 'list.csv'}"]


def shards(root: Path) -> list[str]:
    rows = pictures(root / "set")
    for name, text in rows:
        (root / "set" / name).with_suffix(".txt").write_text(text)
    for number, part in enumerate((rows[:5], rows[5:])):
        with tarfile.open(root / f"{number:03d}.tar", "w") as tar:
            for name, _ in part:
                for file in (root / "set" / name, (root / "set" / name).with_suffix(".txt")):
                    tar.add(file, file.name)
    return ["data=webdataset", f'data.path="{root}/{{000..001}}.tar"']


def hub_copy(root: Path) -> list[str]:
    import datasets

    rows = pictures(root / "set")
    columns = {"image": [str(root / "set" / name) for name, _ in rows], "text": [text for _, text in rows]}
    datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image()).save_to_disk(root / "copy")
    return ["data=hub", f"data.name={root / 'copy'}"]


FORMS = [metadata_csv, metadata_parquet, texts_beside, list_of_paths, shards, hub_copy]


@pytest.mark.filterwarnings("ignore")  # of `datasets`, which none but one form reads
@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_a_run_on_every_form(form: Callable[[Path], list[str]], tmp_path: Path) -> None:
    prepare(tmp_path / "out", [])  # with no features
    settings = [*form(tmp_path), "data.resolution=64", "data.max_samples=null", "validation.fraction=0.2"]
    for _ in range(2):  # the second one finds what the first one encoded
        train(tmp_path / "out", *settings, "trainer.max_steps=2", "name=one", "trainer.max_epochs=4")
    grid = tmp_path / "out" / "one" / "samples" / "step-00000002" / "grid.png"
    assert Image.open(grid).size[0] > 64
    assert json.loads((tmp_path / "out" / "one" / "run.json").read_text())["rows"] == 8
    (recorded,) = runs(tmp_path / "out")
    contexts = {tag.value for data in recorded.inputs.dataset_inputs for tag in data.tags}
    assert contexts == {"training", "validation"}
    assert len(list((tmp_path / "out" / "cache").glob("*/table.json"))) == 1
    assert client(tmp_path / "out").get_run(recorded.info.run_id).info.status == "FINISHED"


def test_shards_need_the_cache(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.cache: shards are read in one sweep.*set it to true"):
        train(tmp_path / "out", *shards(tmp_path), "data.resolution=64", "data.max_samples=null", "data.cache=false")
