"""The demo: its way from training to the score, at a few steps; and that the score is honest."""

import shlex
from pathlib import Path

import mlflow
import numpy as np
import pytest
from PIL import Image

from kandinsky_exp.data import sources
from kandinsky_exp.errors import ConfigError
from kandinsky_exp.runs import run_folder
from kandinsky_exp.tracking import store
from kandinsky_exp.verbs import demo

CAPTIONS = 3
FEW_STEPS = (
    "trainer.max_steps=2",
    "trainer.batch_size=2",
    "scheduler.warmup_steps=0",
    "validation.prompts=['a cactus']",
    "validation.inference_steps=2",
    "validation.reconstructions=1",
    "validation.draws=1",
)


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> demo.Demo:
    return demo.run_demo(tmp_path_factory.mktemp("a demo, (copied)") / "outputs", FEW_STEPS, CAPTIONS)


@pytest.fixture
def root(outcome: demo.Demo) -> Path:
    return outcome.folder.parents[1]


def pictures(count: int) -> list[Image.Image]:
    random = np.random.default_rng(0)
    return [Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8)) for _ in range(count)]


def test_the_pictures_themselves_score_one() -> None:
    originals = pictures(6)
    nearest = demo.nearest_pictures(originals[:4], originals)
    assert nearest == [0, 1, 2, 3]
    assert demo.retrieval(nearest) == 1.0


def test_shuffled_pictures_score_what_stayed_in_place() -> None:
    originals = pictures(6)
    shuffled = [originals[index] for index in (1, 0, 2, 5)]  # the last one is nearest to a picture never drawn
    nearest = demo.nearest_pictures(shuffled, originals)
    assert nearest == [1, 0, 2, 5]
    assert demo.retrieval(nearest) == 0.25


def test_nearness_is_the_squared_difference_of_pixels() -> None:
    gray, dark, spotted = (Image.new("L", (4, 4), level) for level in (100, 80, 100))
    spotted.putpixel((0, 0), 200)  # mean absolute difference 6.25, mean squared 625
    image = Image.new("RGB", (4, 4), (100, 100, 100))
    candidates = [item.convert("RGB") for item in (spotted, dark)]  # dark: 20 and 400
    assert demo.nearest_pictures([image], candidates) == [1]
    assert demo.nearest_pictures([image], [*candidates, gray.convert("RGB")]) == [2]


def test_the_score_is_that_of_the_pictures_it_shows(outcome: demo.Demo) -> None:
    files = sorted(outcome.folder.glob("[0-9]*.png"))
    shown = [np.asarray(Image.open(file), dtype=np.float64) for file in files]
    splits = sources.emoji()
    assert splits.validation is not None
    every = [*splits.train, *splits.validation]
    originals = [np.asarray(example.image(), dtype=np.float64) for example in every]
    assert len(shown) == CAPTIONS
    assert len(originals) == 80
    hits = 0
    for own, image in enumerate(shown):
        errors = [((image - original) ** 2).mean() for original in originals]
        hits += errors.index(min(errors)) == own
    assert outcome.score == hits / CAPTIONS
    captions = (outcome.folder / "captions.txt").read_text("utf-8").splitlines()
    assert captions == [splits.train[row].captions[0] for row in range(CAPTIONS)]
    assert (outcome.folder / "grid.png").is_file()


def test_pictures_come_through_both_trained_stages(outcome: demo.Demo, root: Path) -> None:
    captions = (outcome.folder / "captions.txt").read_text("utf-8").splitlines()
    again = demo.draw(root, captions)
    assert [image.tobytes() for image in again] == [image.tobytes() for image in outcome.images]
    for experiment in demo.EXPERIMENTS:
        trained = root / experiment / "pipeline"
        trained.rename(trained.with_name("away"))
        with pytest.raises((ConfigError, FileNotFoundError), match="model_index"):
            demo.draw(root, captions)
        trained.with_name("away").rename(trained)


def test_both_runs_and_the_score_are_recorded(outcome: demo.Demo, root: Path) -> None:
    client = mlflow.MlflowClient(store.default_uri(root))
    for experiment in demo.EXPERIMENTS:
        record = run_folder.read_record(root / experiment)
        assert record is not None
        assert record.run_id is not None
        run = client.get_run(record.run_id)
        images = [item.path for item in client.list_artifacts(record.run_id, "images")]
        assert run.info.status == "FINISHED"
        assert any("validation" in path for path in images)
        has_score = experiment == "demo_decoder"
        assert run.data.metrics.get("demo/retrieval") == (outcome.score if has_score else None)
        assert any("grid" in path and "demo" in path for path in images) == has_score


def test_three_lines_say_what_came_of_it(outcome: demo.Demo, root: Path) -> None:
    where, score, runs = demo.summary(outcome, root).splitlines()
    assert str(outcome.folder / "grid.png") in where
    assert f"{outcome.score:.2f}" in score
    assert shlex.split(runs)[-4:] == ["-m", "kandinsky_exp", "ui", f"output_root={root}"]


@pytest.mark.parametrize("override", ["name=mine", "output_root=there"])
def test_the_demo_keeps_its_own_names(override: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        demo.main([override])
    assert stopped.value.code == 2
    assert "leave them out" in capsys.readouterr().err
