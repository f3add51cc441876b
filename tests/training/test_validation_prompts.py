"""Entries of `validation.prompts` with settings of their own: checked, read and drawn."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from running import client, composed, problems_of, runs, train

from kandinsky_exp import run_settings
from kandinsky_exp.config import recorded_paths
from kandinsky_exp.errors import ConfigError
from kandinsky_exp.training import validation_prompts

QUIET = ["data.resolution=64", "trainer.max_steps=1", "validation.every=9", "validation.reconstructions=0"]
STEP = Path("samples", "step-00000001")


@pytest.fixture
def files(tmp_path: Path) -> Path:
    Image.radial_gradient("L").resize((64, 64)).convert("RGB").save(tmp_path / "a.png")
    mask = Image.new("L", (64, 64))
    mask.paste(255, (32, 0, 64, 64))
    mask.save(tmp_path / "m.png")
    mask.resize((32, 32)).save(tmp_path / "small.png")
    return tmp_path


def pixels(file: Path) -> np.ndarray:
    with Image.open(file) as image:
        return np.asarray(image)


def test_entries_are_drawn_as_they_say(tmp_path: Path) -> None:
    """Beside them a text alone is drawn as it always was, by its place in the list."""
    own = "{prompt: a dog, negative: blue, seed: 7, guidance_scale: 1, inference_steps: 3, height: 96, width: 64}"
    train(tmp_path, "model=decoder", "name=some", *QUIET, f"validation.prompts=[a red heart, {own}, a dog]")
    train(tmp_path, "model=decoder", "name=plain", *QUIET, "validation.prompts=[a red heart, a cat, a dog]")
    for number, size in ((0, (64, 64)), (1, (96, 64)), (2, (64, 64))):
        found, expected = (pixels(tmp_path / run / STEP / f"0{number}.png") for run in ("some", "plain"))
        assert found.shape == (*size, 3)
        if number != 1:
            assert np.abs(np.subtract(found, expected, dtype=int)).max() <= 1
    assert (tmp_path / "some" / STEP / "prompts.txt").read_text() == "a red heart\na dog\na dog\n"
    (run,) = [one for one in runs(tmp_path) if one.info.run_name == "some"]
    assert run.data.params["validation.prompts"].startswith('["a red heart", {"prompt": "a dog", "neg')
    assert [file.path for file in client(tmp_path).list_artifacts(run.info.run_id, "prompts")]


def test_the_prior_draws_them_too(tmp_path: Path) -> None:
    words = ["model=prior", "tracker=none", *QUIET]
    entries = "{prompt: a dog, seed: 1}, {prompt: a dog, seed: 2}, {prompt: a dog, seed: 1, negative: a cat}"
    train(tmp_path, "name=p", *words, f"validation.prompts=[{entries}]")
    first, second, third = (pixels(tmp_path / "p" / STEP / f"0{number}.png") for number in range(3))
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, third)


def test_a_decoder_for_inpainting_fills_the_hole(files: Path) -> None:
    filled = f"{{prompt: a red heart, image: {files}/a.png, mask: {files}/m.png}}"
    train(files, "model=inpaint", "name=i", "tracker=none", *QUIET, f"validation.prompts=[a red heart, {filled}]")
    whole, found = (pixels(files / "i" / STEP / f"0{number}.png") for number in range(2))
    original = pixels(files / "a.png")
    assert np.array_equal(found[:, :32], original[:, :32])
    assert not np.array_equal(found[:, 32:], original[:, 32:])
    assert not np.array_equal(whole[:, :32], original[:, :32])


def test_neighbours_without_settings_of_their_own_are_drawn_together() -> None:
    settings = run_settings.SampleSettings(seed=4)
    prompts, notes = validation_prompts.read(["a", "b", {"prompt": "c", "seed": None}, "d"], settings)
    assert notes == []
    found = list(validation_prompts.alike(prompts))
    assert [(texts, how.first) for texts, how in found] == [(["a", "b"], 0), (["c"], 2), (["d"], 3)]
    assert {how.seed for _, how in found} == {4}


def test_pictures_that_cannot_be_used_are_told_before_anything_loads(files: Path) -> None:
    for words, message in (
        (f"image: {files}/a.png, mask: {files}/small.png", "entry 2: mask: '.*' is 32 x 32 pixels and the picture 64"),
        (
            f"image: {files}/a.png, mask: {files}/m.png, width: 72",
            "entry 2: width has to be a multiple of 16",
        ),
    ):
        with pytest.raises(ConfigError, match=rf"validation\.prompts: {message}"):
            train(files, "model=inpaint", "tracker=none", *QUIET, f"validation.prompts=[a, {{prompt: a, {words}}}]")
    assert not [file for file in files.iterdir() if (file / "run.json").exists()]


@pytest.mark.parametrize(
    ("stage", "entry", "problem"),
    [
        ("decoder", "{seed: 3}", "has no prompt; write {prompt: a fox, …}"),
        ("decoder", "{prompt: a, sed: 3}", "nothing reads sed; it takes prompt, negative, seed, guidance_scale,"),
        ("decoder", "{prompt: a, seed: -1}", "seed has to be a whole number, between 0 and 2^32 - 1, or null, not -1"),
        ("decoder", "{prompt: a, height: 63}", "height has to be a whole number, a multiple of 8"),
        ("decoder", "{prompt: ''}", "prompt has to be text, not ''"),
        ("decoder", "{prompt: a, image: a.png}", "image is nothing that model=decoder draws a prompt from; remove it"),
        ("prior", "{prompt: a, mask: a.png}", "mask is nothing that model=prior draws a prompt from; remove it"),
        ("decoder", "{prompt: a, hint: a.png}", "hint is nothing that model=decoder draws a prompt from; remove it"),
        ("inpaint", "{prompt: a, hint: a.png}", "hint is nothing that model=inpaint draws a prompt from; remove it"),
        ("inpaint", "{prompt: a, image: {tmp}/a.png}", "image needs mask beside it; give both"),
        ("inpaint", "{prompt: a, mask: {tmp}/m.png}", "mask needs image beside it; give both"),
        ("inpaint", "{prompt: a, image: no.png, mask: {tmp}/m.png}", "image: there is no file 'no.png' here; check"),
    ],
)
def test_entries_that_are_refused(files: Path, stage: str, entry: str, problem: str) -> None:
    entry = entry.replace("{tmp}", str(files))
    (found,) = problems_of(composed(files, f"model={stage}", f"validation.prompts=[a fox, {entry}]"))
    assert found.startswith(f"validation.prompts: entry 2: {problem}")


def test_files_of_entries_are_recorded_absolute(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(files)
    values = {"validation": {"prompts": ["a.png", {"prompt": "a.png", "image": "a.png", "mask": None}]}}
    text, entry = recorded_paths.absolute(values)["validation"]["prompts"]
    assert (text, entry) == ("a.png", {"prompt": "a.png", "image": f"{files}/a.png", "mask": None})
    before, now = ({"output_root": str(root), "validation.prompts": [{"image": f"{root}/a.png"}]}
                   for root in (files / "old", files / "new"))  # fmt: skip
    assert recorded_paths.as_before(now, before) == before
