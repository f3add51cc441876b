"""Stopped anywhere and started again, a run ends as if it had never been stopped: same weights, losses and records."""

import itertools
import json
import shutil
from pathlib import Path

import pytest
from running import client, history, network, prepare, runs, same, stopped_at, train
from safetensors.torch import load_file

from kandinsky_exp.runs import integrity

PART = {"prior": "prior", "decoder": "unet"}
STEPS = 5
ORDINARY = [
    f"trainer.max_steps={STEPS}", "trainer.log_every=2", "validation.every=2", "checkpoint.every=100",
    "validation.reconstructions=0", "data.max_samples=6", "trainer.batch_size=2", "data.resolution=32",
]  # fmt: skip  # an epoch ends after three steps
BRIEF = ["tracker=none", "trainer.max_steps=3", "validation.every=100"]
MATRIX = list(itertools.product(("prior", "decoder"), ("cached", "online"), (1, 3), (False, True), ("fp32", "bf16")))


# A covering array: in these rows any two settings meet in all their values.
COVERS_PAIRS = [MATRIX[int(bits, 2)] for bits in ("00011", "00110", "01101", "10100", "11001", "11010")]


def settings(stage: str, data: str, accumulation: int, ema: bool, precision: str) -> list[str]:
    batch = {1: 2, 3: 1}[accumulation]
    return [
        *ORDINARY, f"model={stage}", f"data.cache={str(data == 'cached').lower()}", f"precision={precision}",
        f"trainer.grad_accumulation={accumulation}", f"trainer.batch_size={batch}",
        f"trainer.ema_decay={0.9 if ema else 'null'}",
        f"data.resolution={32 if precision == 'fp32' else 16}",  # few CPUs have a fast convolution in bf16
    ]  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root whose cache all runs share: the first one of its kind encodes."""
    root = tmp_path_factory.mktemp("base")
    prepare(root, ["tracker=none"])
    return root


@pytest.fixture
def root(base: Path, tmp_path: Path) -> Path:
    (tmp_path / "cache").symlink_to(base / "cache")
    return tmp_path


def checkpointed(folder: Path) -> dict[str, dict]:
    """The tensors of the last checkpoint's networks, by folder."""
    last = integrity.newest_good(folder / "checkpoints", print)
    assert last is not None
    return {path.name: network(path) for path in last.iterdir() if path.is_dir()}


def losses(folder: Path) -> list[str]:
    """What the log says of losses, without what differs by nature: times."""
    lines = (folder / "train.log").read_text().splitlines()
    found = [line.partition(" INFO ")[2].partition(", lr")[0] for line in lines if " loss " in line]
    return list(dict.fromkeys(found))


@pytest.mark.parametrize(
    ("stage", "data", "accumulation", "ema", "precision"),
    [
        pytest.param(*row, id="-".join(map(str, row)), marks=[] if row in COVERS_PAIRS else pytest.mark.soak)
        for row in MATRIX
    ],
)
def test_stopped_after_any_step_it_ends_the_same(
    stage: str, data: str, accumulation: int, ema: bool, precision: str, root: Path
) -> None:
    """Inside an epoch, or, with EMA, during a validation: the tests below stop at every other point."""
    common = [*settings(stage, data, accumulation, ema, precision), "tracker=none", "trainer.max_steps=3"]
    train(root, *common, "name=whole")
    with stopped_at("step 2: validation loss" if ema else "step 1 of"):
        train(root, *common, "name=stopped", "trainer.log_every=1")
    train(root, *common, "name=stopped")
    whole, resumed = (checkpointed(root / name) for name in ("whole", "stopped"))
    assert whole.keys() == resumed.keys() == {PART[stage], *([f"{PART[stage]}_ema"] if ema else [])}
    for name in whole:
        assert same(whole[name], resumed[name]), name
    results = [network(root / name / "pipeline" / PART[stage]) for name in ("whole", "stopped")]
    assert same(*results)


def test_stopped_after_every_single_step(root: Path) -> None:
    """Inside an epoch, at its end, and at every point between two log points."""
    common = [*settings("prior", "cached", 3, True, "fp32"), "tracker=none"]
    train(root, *common, "name=whole")
    for step in range(1, STEPS):
        with stopped_at(f"step {step} of"):
            train(root, *common, "name=stopped", "trainer.log_every=1")
        assert integrity.newest_good(root / "stopped" / "checkpoints", print).name == f"step-0000000{step}"
    train(root, *common, "name=stopped")
    whole, resumed = (checkpointed(root / name) for name in ("whole", "stopped"))
    for name in whole:
        assert same(whole[name], resumed[name]), name


@pytest.mark.parametrize(
    ("stage", "more"),
    [
        ("prior", ["adapter=lora"]),
        ("prior", ["adapter=dora", "adapter.init=pissa", "trainer.gradient_checkpointing=true"]),
        (
            "decoder",
            ["adapter=lora", "adapter.init=olora", "adapter.use_rslora=true", "adapter.target_modules=all-linear"],
        ),
    ],
    ids=["lora", "pissa", "olora"],
)
def test_an_adapter(stage: str, more: list[str], root: Path) -> None:
    common = [*settings(stage, "cached", 1, True, "bf16"), *more, "adapter.dropout=0.2", *BRIEF]
    train(root, *common, "name=whole")
    with stopped_at("step 2 of"):
        train(root, *common, "name=stopped")
    train(root, *common, "name=stopped")
    files = [root / name / "adapter" / "pytorch_lora_weights.safetensors" for name in ("whole", "stopped")]
    assert same(*map(load_file, files))


@pytest.mark.parametrize("stage", ["prior", "decoder"])
def test_with_workers_that_read_images(stage: str, root: Path) -> None:
    """They give what the run itself reads, which the matrix above stops too."""
    common = [*settings(stage, "online", 1, False, "fp32"), *BRIEF]
    train(root, *common, "data.num_workers=0", "name=whole")
    with stopped_at("step 2 of"):
        train(root, *common, "data.num_workers=2", "name=stopped")
    train(root, *common, "data.num_workers=2", "name=stopped")
    assert same(*(network(root / name / "pipeline" / PART[stage]) for name in ("whole", "stopped")))


RECORDED = [*ORDINARY, "model=prior", "validation.prompts=[a dog]", "trainer.max_steps=7", "trainer.log_every=3",
            "scheduler=cosine", "validation.every=4"]  # fmt: skip


@pytest.fixture(scope="module")
def recorded(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with a run that was not stopped."""
    root = tmp_path_factory.mktemp("recorded")
    (root / "cache").symlink_to(base / "cache")
    train(root, *RECORDED, "name=whole")
    return root


@pytest.mark.parametrize("place", ["step 3 of", "step 4: validation loss", "step 0: validation loss"])
def test_records_are_those_of_a_run_that_was_not_stopped(place: str, recorded: Path) -> None:
    """The mean loss between log points too: what was measured before the stop is part of it; nothing twice."""
    root, name = recorded, f"name={place.partition(':')[0].replace(' ', '-')}"
    with stopped_at(place):
        train(root, *RECORDED, name)
    assert runs(root)[-1].info.status == "KILLED"
    train(root, *RECORDED, name)
    whole, *_, stopped = runs(root)
    assert (whole.info.run_name, f"name={stopped.info.run_name}") == ("whole", name)
    assert stopped.info.status == "FINISHED"
    for key in (
        "train/loss",
        "train/grad_norm",
        "train/lr",
        "validation/loss",
        *(f"train/loss_t{i}" for i in range(4)),
    ):
        assert history(root, whole.info.run_id, key) == history(root, stopped.info.run_id, key), key
        points = client(root).get_metric_history(stopped.info.run_id, key)
        assert len(points) == len({point.step for point in points}), key
    names = [sorted(image_names(root, run.info.run_id)) for run in (whole, stopped)]
    assert names[0] == names[1]
    assert len(names[1]) == len(set(names[1]))


def image_names(root: Path, run_id: str) -> list[str]:
    """Key and step of each image, once per image file of a key and a step."""
    files = [file.path for file in client(root).list_artifacts(run_id, "images")]
    return ["+".join(path.split("+")[:3]) for path in files if path.endswith(".png")]


def test_a_stop_between_log_points_keeps_what_was_measured(root: Path) -> None:
    """A log point every third step, a stop after the fourth: the mean at 6 is of 4, 5 and 6."""
    common = [*ORDINARY, "model=prior", "tracker=none", "trainer.max_steps=6", "trainer.log_every=3",
              "validation.every=4"]  # fmt: skip
    train(root, *common, "name=whole")
    with stopped_at("step 4: validation loss"):
        train(root, *common, "name=stopped")
    state = integrity.read_state(root / "stopped" / "checkpoints" / "step-00000004")
    assert not state["validated"]  # broken off, it is made again
    train(root, *common, "name=stopped")
    assert losses(root / "whole") == losses(root / "stopped")


def test_a_fork_knows_its_parent_and_leaves_it_alone(root: Path) -> None:
    common = [*ORDINARY, "model=prior"]
    train(root, *common, "name=parent")
    before = {path: path.stat().st_mtime_ns for path in (root / "parent").rglob("*")}
    # Another run may have other data, another seed and another rate.
    train(root, *common, "name=fork", f"checkpoint.resume={root}/parent", "seed=5", "data.max_samples=5",
          "optimizer.lr=1e-5", "trainer.max_steps=7")  # fmt: skip
    parent, fork = runs(root)
    assert fork.data.tags["resumed_from"] == parent.info.run_id
    assert list(history(root, fork.info.run_id, "validation/loss")) == [5, 6, 7]
    assert {path: path.stat().st_mtime_ns for path in (root / "parent").rglob("*")} == before
    assert json.loads((root / "fork" / "run.json").read_text())["step"] == 7


def test_a_moved_folder_goes_on(root: Path) -> None:
    common = [*ORDINARY, "model=prior", *BRIEF]
    train(root, *common, "name=whole")
    with stopped_at("step 2 of"):
        train(root, *common, "name=first")
    shutil.move(root / "first", root / "second")
    train(root, *common, "name=second")
    assert same(*(network(root / name / "pipeline" / "prior") for name in ("whole", "second")))
