"""DreamBooth: a subject from a few pictures, class images drawn once, and what keeps the class as it was."""

import itertools
import json
import re
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import dreambooth
import pytest
import torch
from PIL import Image
from running import composed, network, problems_of, runs, same, stopped_at, train
from safetensors.torch import load_file

from kandinsky_exp.data import sources
from kandinsky_exp.data.dreambooth import MADE, ClassImages
from kandinsky_exp.data.features import Paired
from kandinsky_exp.data.sampler import PairedBatchSampler, StreamBatchSampler
from kandinsky_exp.errors import ConfigError, DataError, Interrupted
from kandinsky_exp.models.weights import Weights
from kandinsky_exp.run import run
from kandinsky_exp.stages.decoder import DecoderStage
from kandinsky_exp.stages.prior import PriorStage
from kandinsky_exp.training import class_images
from kandinsky_exp.verbs.encode import encode

SUBJECT = "a 3d emoji of sks animal"
CLASS = "a 3d emoji of animal"
STAGES = {"prior": PriorStage, "decoder": DecoderStage}
PART = {"prior": "prior", "decoder": "unet"}
DRAWN = 3
HOW = class_images.settings(0, 32)
CPU = torch.device("cpu")


def write_pictures(folder: Path, first: int, count: int) -> Path:
    folder.mkdir(parents=True)
    for number in range(first, first + count):
        sources.emoji().train[number].image().save(folder / f"{number}.png")  # type: ignore[index]
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five pictures of a subject, and class images as the base draws them."""
    root = tmp_path_factory.mktemp("base")
    write_pictures(root / "dog", 0, 5)
    wanted = ClassImages(root / "class", CLASS, DRAWN, 1.0)
    class_images.complete(wanted, tiny(root), HOW, CPU)
    return root


@pytest.fixture
def root(base: Path, tmp_path: Path) -> Path:
    for name in ("dog", "class", "cache"):
        shutil.copytree(base / name, tmp_path / name)
    return tmp_path


def tiny(root: Path) -> Weights:
    return Weights("tiny", "tiny", cache_folder=root / "cache")


def settings(root: Path, *overrides: str, kept: bool = True) -> list[str]:
    """Of a run on five pictures, in batches of two."""
    of_class = [f"data.class_prompt={CLASS}", f"data.class_path={root / 'class'}", f"data.num_class_images={DRAWN}"]
    return [
        *("data=dreambooth", "data.max_samples=null", "data.resolution=32", "trainer.batch_size=2", "tracker=none"),
        *(f"data.instance_path={root / 'dog'}", f"data.instance_prompt={SUBJECT}", "trainer.max_steps=2"),
        *("checkpoint.every=100", "trainer.log_every=2", *(of_class if kept else []), *overrides),
    ]


def times(folder: Path) -> dict[str, int]:
    return {file.name: file.stat().st_mtime_ns for file in folder.glob("*.png")}


# --- the loss


def features(stage: PriorStage | DecoderStage, pictures: Path, caption: str) -> dict[str, torch.Tensor]:
    rows = [stage.preprocess(Image.open(file).convert("RGB"), caption) for file in sorted(pictures.glob("*.png"))[:2]]
    return stage.encode({key: torch.stack([row[key] for row in rows]) for key in rows[0]})


@pytest.mark.parametrize("name", STAGES)
def test_the_loss_is_the_subjects_mean_and_the_weighted_mean_of_the_class(name: str, base: Path) -> None:
    stage = STAGES[name](tiny(base), resolution=32, snr_gamma=5.0, condition_dropout=0.0)
    halves = [features(stage, base / "dog", SUBJECT), features(stage, base / "class", CLASS)]
    timesteps = torch.tensor([20, 400, 700, 3])

    def noise(rows: range) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(row) for row in rows]

    apart = [
        stage.loss(stage.network, half, noise(range(at, at + 2)), timesteps[at : at + 2])
        for at, half in zip((0, 2), halves, strict=True)
    ]
    both = {key: torch.cat([half[key] for half in halves]) for key in halves[0]}
    weights = torch.tensor([2.0, 2.0, 1.5, 1.5])
    whole = stage.loss(stage.network, both | {"loss_weight": weights}, noise(range(4)), timesteps)
    expected = apart[0].loss.item() + 0.75 * apart[1].loss.item()
    assert whole.loss.item() == pytest.approx(expected, rel=1e-5)
    plain = torch.cat([half.per_sample for half in apart])
    assert torch.allclose(whole.per_sample, plain, rtol=1e-4)  # what is reported of single samples has no weight


class Numbered(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Stands for the features of so many rows."""

    def __init__(self, name: str, rows: int) -> None:
        self.name, self.rows = name, rows

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, visit: tuple[int, int]) -> dict[str, torch.Tensor]:
        return {"index": torch.tensor(visit[0]), "row": torch.tensor(visit[0]), "epoch": torch.tensor(visit[1])}

    def id(self, index: int) -> str:
        return f"{self.name} {index}"


def test_rows_of_both_sets_are_told_apart() -> None:
    paired = Paired(Numbered("subject", 5), Numbered("class", 3), 0.25)  # type: ignore[arg-type]
    own, kept = paired[4, 7], paired[6, 2]
    assert [int(own[key]) for key in ("index", "row", "epoch")] == [4, 4, 7]
    assert [int(kept[key]) for key in ("index", "row", "epoch")] == [6, 1, 2]
    assert (float(own["loss_weight"]), float(kept["loss_weight"])) == (2.0, 0.5)
    assert (paired.id(4), paired.id(5), len(paired)) == ("subject 4", "class 0", 5)


# --- the order


SHAPES = [(4, 1, 1), (2, 2, 1), (1, 2, 2), (2, 1, 2)]


def pairs(batch_size: int, accumulation: int, processes: int, rank: int, start: int = 0) -> list[list[tuple[int, int]]]:
    shape = {"batch_size": batch_size, "grad_accumulation": accumulation, "num_processes": processes, "rank": rank}
    first, second = (
        StreamBatchSampler(rows, seed, total_steps=6, start_step=start, **shape) for rows, seed in ((5, 0), (7, 9))
    )
    return list(PairedBatchSampler(first, second))


@pytest.mark.parametrize(("batch_size", "accumulation", "processes"), SHAPES)
def test_class_images_come_in_one_order_however_a_step_is_divided(
    batch_size: int, accumulation: int, processes: int
) -> None:
    whole = pairs(4, 1, 1, 0)
    ranks = [pairs(batch_size, accumulation, processes, rank) for rank in range(processes)]
    for step, expected in enumerate(whole):
        micros = range(step * accumulation, (step + 1) * accumulation)
        parts = [rank[micro] for micro in micros for rank in ranks]
        own = [visit for part in parts for visit in part[:batch_size]]
        kept = [visit for part in parts for visit in part[batch_size:]]
        assert own + kept == expected
        assert all(row < 5 for row, _ in own)
        assert all(5 <= row < 12 for row, _ in kept)
    assert pairs(4, 1, 1, 0, start=4) == whole[4:]
    shown = [visit for batch in whole for visit in batch[4:]]
    assert sorted(row for row, epoch in shown if epoch == 0) == list(range(5, 12))  # every one, before any again


# --- whole runs


ROWS = [
    ("prior", "true", "lora"),
    ("prior", "false", "none"),
    ("decoder", "true", "none"),
    ("decoder", "false", "lora"),
]


@pytest.mark.parametrize(("stage", "cache", "adapter"), ROWS)
def test_stopped_and_resumed_it_ends_the_same(stage: str, cache: str, adapter: str, root: Path) -> None:
    common = [f"model={stage}", f"data.cache={cache}", f"adapter={adapter}", *settings(root)]
    train(root, *common, "name=whole")
    with stopped_at("step 1 of"):
        train(root, *common, "name=stopped", "trainer.log_every=1")
    train(root, *common, "name=stopped")
    results = [trained(root / name, stage, adapter) for name in ("whole", "stopped")]
    assert same(*results)
    assert json.loads((root / "whole" / "run.json").read_text())["rows"] == 5  # nothing held out, no class counted


def trained(folder: Path, stage: str, adapter: str) -> dict[str, torch.Tensor]:
    if adapter == "none":
        return network(folder / "pipeline" / PART[stage])
    return load_file(folder / "adapter" / "pytorch_lora_weights.safetensors")


def test_the_class_has_a_say_and_its_weight_too(root: Path) -> None:
    ways = {"half": ["data.prior_loss_weight=0.5"], "none": ["data.class_prompt=null", "data.class_path=null"]}
    for name, more in {"one": [], **ways}.items():
        train(root, "model=prior", *settings(root, "trainer.max_steps=1", *more), f"name={name}")
    results = [trained(root / name, "prior", "none") for name in ("one", *ways)]
    assert not any(same(one, other) for one, other in itertools.combinations(results, 2))


def test_what_makes_it_another_run_is_refused(root: Path) -> None:
    train(root, "model=prior", *settings(root), "name=one", "checkpoint.every=1")
    again = ["model=prior", *settings(root, "trainer.max_steps=3"), "name=one"]
    with pytest.raises(ConfigError, match=r"data\.prior_loss_weight: was 1\.0, is 2\.0"):
        train(root, *again, "data.prior_loss_weight=2.0")
    with pytest.raises(ConfigError, match="not the images and captions that it trains on"):
        train(root, *again, "data.instance_prompt=an animal")
    with pytest.raises(ConfigError, match=r"data\.num_class_images: was 3, is 4"):
        train(root, *again, "data.num_class_images=4")
    assert len(times(root / "class")) == DRAWN
    (root / "dog").rename(root / "moved")
    train(root, *again, f"data.instance_path={root / 'moved'}")  # where they lie is no matter


def test_the_store_knows_both_sets_and_the_validation_pictures(root: Path) -> None:
    write_pictures(root / "dog" / "later", 5, 1)
    settled = settings(root, f"data.validation_path={root / 'dog' / 'later'}", "data.flip=true", "data.max_samples=3")
    train(root, "model=prior", *settled, "tracker=mlflow", "trainer.max_steps=1")
    (recorded,) = runs(root)
    contexts = {tag.value: data.dataset for data in recorded.inputs.dataset_inputs for tag in data.tags}
    rows = {context: json.loads(dataset.profile)["num_rows"] for context, dataset in contexts.items()}
    assert rows == {"training": 3, "class": DRAWN, "validation": 1}
    assert recorded.data.metrics["validation/loss"] > 0


@pytest.mark.parametrize("stage", STAGES)
def test_an_experiment_is_all_that_it_takes(stage: str, root: Path) -> None:
    at_tiny_size = ["weights=tiny", "precision=fp32", "tracker=none", "trainer.max_steps=1"]
    given = [text for text in settings(root) if text.startswith("data.")]
    run(composed(root, f"experiment=dreambooth_{stage}", *at_tiny_size, *given, small=[]))
    assert (root / f"dreambooth_{stage}" / "adapter").is_dir()


# --- class images


def test_what_is_missing_is_drawn_once_and_always_the_same(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "class"
    wanted = ClassImages(folder, CLASS, DRAWN, 1.0)
    shutil.copytree(base / "class", folder)
    before = times(folder)
    assert sorted(before) == [f"drawn-{number:05d}.png" for number in range(DRAWN)]
    class_images.complete(wanted, tiny(base), HOW, CPU)
    assert times(folder) == before
    gone = folder / "drawn-00001.png"
    content = gone.read_bytes()
    gone.unlink()
    class_images.complete(wanted, tiny(base), HOW, CPU)
    assert gone.read_bytes() == content
    assert {name: time for name, time in times(folder).items() if name != gone.name} == {
        name: time for name, time in before.items() if name != gone.name
    }
    assert len({(folder / name).read_bytes() for name in before}) == DRAWN  # each from noise of its own


def test_a_folder_of_ones_own_is_filled_up(base: Path, tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "cats", 10, 2)
    wanted = ClassImages(folder, CLASS, 3, 1.0)
    assert class_images.complete(wanted, tiny(base), HOW, CPU) == wanted
    source = wanted.source()
    assert [example.id for example in source.examples()] == ["10.png", "11.png", "drawn-00000.png"]
    assert {example.captions for example in source.examples()} == {(CLASS,)}
    fewer = ClassImages(folder, CLASS, 1, 1.0)
    assert (fewer.missing(), len(fewer.source())) == ([], 1)


def stop_at(pattern: str, folder: Path) -> threading.Thread:
    """Sends this process SIGTERM once there is such a file."""

    def watch() -> None:
        while not list(folder.glob(pattern)):
            time.sleep(0.002)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def test_stopped_while_it_draws_it_goes_on_with_the_rest(base: Path, root: Path) -> None:
    """And the second stage finds what the first one drew."""
    many = settings(root, "data.class_path=null", "data.num_class_images=4", "trainer.max_steps=1")
    watch = stop_at("class-*/drawn-*.png", root / "cache")
    with pytest.raises(Interrupted):
        train(root, "model=prior", *many, "name=one")
    watch.join()
    (folder,) = (root / "cache").glob("class-*")
    drawn = times(folder)
    assert 0 < len(drawn) < 4
    train(root, "model=prior", *many, "name=one")
    complete = times(folder)
    assert len(complete) == 4
    assert drawn.items() <= complete.items()
    train(root, "model=decoder", *many, "name=two")
    assert times(folder) == complete
    assert [path.name for path in (root / "cache").glob("class-*")] == [folder.name]
    for number in range(DRAWN):
        name = f"drawn-{number:05d}.png"
        assert (folder / name).read_bytes() == (base / "class" / name).read_bytes()


def test_the_verb_encode_draws_them_too(root: Path) -> None:
    (root / "class" / "drawn-00002.png").unlink()
    typed = [text for text in settings(root) if text.startswith("data")]
    encode(composed(root, "model=prior", "weights=tiny", *typed, verb="encode", small=[]))
    assert len(times(root / "class")) == DRAWN
    assert len(list((root / "cache").glob("*/table.json"))) == 2


OTHERS = {
    "prompt": ("a dog", HOW, "prompt was 'a 3d emoji of animal', is 'a dog'"),
    "size": (CLASS, replace(HOW, height=64, width=64), "height was 32, is 64; width was 32, is 64"),
    "seed": (CLASS, class_images.settings(1, 32), "seed was 0, is 1"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_pictures_that_were_drawn_for_something_else_are_refused(case: str, base: Path) -> None:
    prompt, how, message = OTHERS[case]
    others = ClassImages(base / "class", prompt, DRAWN, 1.0)
    before = times(base / "class")
    for count in (DRAWN, DRAWN + 1):
        with pytest.raises(DataError, match=re.escape(message)):
            class_images.complete(replace(others, count=count), tiny(base), how, CPU)
    assert times(base / "class") == before
    class_images.refuse_others(ClassImages(base / "class", CLASS, DRAWN, 1.0), tiny(base), HOW)
    made = json.loads((base / "class" / MADE).read_text())
    assert (made["prompt"], made["width"], made["seed"], made["decoder_source"]) == (CLASS, 32, 0, "tiny")


def test_pictures_of_another_base_are_refused(base: Path) -> None:
    tiny(base).folder("unet")  # makes the files of the tiny weights
    (made,) = {file.parents[1] for file in base.glob("cache/**/unet/config.json")}
    other = Weights("tiny", str(shutil.copytree(made, base / "other", dirs_exist_ok=True)), cache_folder=base / "cache")
    wanted = ClassImages(base / "class", CLASS, DRAWN, 1.0)
    class_images.refuse_others(wanted, other, HOW)  # a copy is the same base
    scheduler = next((base / "other").glob("scheduler/*.json"))
    scheduler.write_text(scheduler.read_text().replace("0.012", "0.013"))
    with pytest.raises(DataError, match=r"drawn otherwise \(weights\.decoder was another\); give another folder"):
        class_images.refuse_others(wanted, other, HOW)


def test_own_pictures_are_nobodys_drawings(base: Path, tmp_path: Path) -> None:
    for number, file in enumerate((base / "class").glob("drawn-*.png")):
        shutil.copy(file, tmp_path / f"own{number}.png")
    wanted = ClassImages(tmp_path, "anything", DRAWN, 1.0)
    assert class_images.complete(wanted, tiny(base), class_images.settings(7, 64), CPU) == wanted


def test_drawn_pictures_of_before_count_for_the_run_that_trained_on_them(root: Path) -> None:
    train(root, "model=prior", *settings(root, "trainer.max_steps=1"), "name=one")
    (root / "class" / MADE).unlink()
    before = times(root / "class")
    train(root, "model=prior", *settings(root), "name=one")
    with pytest.raises(DataError, match="nothing says what the 3 drawn pictures there were drawn for; give another"):
        train(root, "model=prior", *settings(root), "name=two")
    assert not (root / "two").exists()
    write_pictures(root / "more", 20, 1)
    shutil.copy(root / "more" / "20.png", root / "class" / "drawn-00001.png")
    with pytest.raises(DataError, match="nothing says what"):
        train(root, "model=prior", *settings(root, "trainer.max_steps=3"), "name=one")
    assert times(root / "class").keys() == before.keys()


def test_class_images_that_are_all_there_need_no_decoder(root: Path) -> None:
    train(root, "model=prior", *settings(root, "weights.decoder=nobody", "trainer.max_steps=1"))


# --- what is refused


REFUSED = {
    "data.class_prompt=null": "data.class_path: is set, but without data.class_prompt no class is preserved",
    "data.buckets=true data.resolution=64": "data.buckets: pictures of subject and class share a batch",
    "data.num_class_images=0": "data.num_class_images: has to be a whole number, at least 1, not 0",
    "data.prior_loss_weight=-1": "data.prior_loss_weight: has to be a number, at least 0, not -1",
    "data.class_path={root}/dog/0.png": "data.class_path: '{root}/dog/0.png' is a file; give a folder",
    "data.instance_path=nowhere": "data.instance_path: there is no folder 'nowhere' here",
    "data.instance_path=???": "data.instance_path: is not set; give the folder with the pictures of your subject",
}


@pytest.mark.parametrize("override", REFUSED)
def test_contradictions_are_told_with_the_settings(override: str, root: Path) -> None:
    (found,) = problems_of(composed(root, *settings(root, *override.format(root=root).split())))
    assert found.startswith(REFUSED[override].format(root=root))


@pytest.fixture
def refused(root: Path) -> Iterator[Path]:
    """Nothing may be left of what is refused."""
    before = {path.name for path in root.iterdir()}
    yield root
    assert {path.name for path in root.iterdir()} - before <= {"mlflow.db"}


@pytest.mark.parametrize("key", ["data.class_path", "data.validation_path"])
def test_one_folder_cannot_be_both(key: str, refused: Path) -> None:
    with pytest.raises(DataError, match=rf"{key}: .* is data\.instance_path, too; give another folder"):
        train(refused, *settings(refused, f"{key}={refused / 'dog'}"))


# --- what comes out


def test_the_measurement_compares_what_was_trained_with_and_without_the_class(tmp_path: Path) -> None:
    """`tests/bench/dreambooth.py` with one step, at which the weight of the class is seen already."""
    overrides = ("trainer.batch_size=2", "optimizer.lr=0.1")
    outcomes = dreambooth.measure(dreambooth.Plan(tmp_path, "1f99c", 1, 2, 1, 2, overrides))
    assert outcomes["base"] == dreambooth.Outcome(0, 0)
    assert outcomes["kept"].drift > 0 < outcomes["forgotten"].drift
    assert outcomes["kept"] != outcomes["forgotten"]
    assert (tmp_path / "grid-1f99c.png").is_file()


@pytest.mark.slow
@pytest.mark.soak
def test_it_learns_the_subject_and_keeps_more_of_the_rest(tmp_path: Path) -> None:
    """`tests/bench/dreambooth.py` at its smallest."""
    overrides = ("trainer.batch_size=2", "optimizer.lr=4e-3")
    plan = dreambooth.Plan(tmp_path, "1f99c", 30, 6, 2, 6, overrides)
    outcomes = dreambooth.measure(plan)
    assert outcomes["base"].retrieval == 0
    assert outcomes["kept"].retrieval == 1
    assert 0 < outcomes["kept"].drift < outcomes["forgotten"].drift - 2
