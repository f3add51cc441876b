"""`kandinsky-exp generate task=…`: from pictures, masks and mixtures, with every kind of source."""

import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from drawing import drawn
from PIL import Image, ImageDraw
from running import client, composed, problems_of, runs, train

from kandinsky_exp.config import drawing_tasks
from kandinsky_exp.data import edges, given_pictures
from kandinsky_exp.data.given_pictures import fitted, open_picture
from kandinsky_exp.errors import ConfigError

PROMPT = "prompts=[a red heart]"
FOUR = "inference_steps=4"
NO_PROMPTS = "prompts=[]"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Decoders of both kinds as runs and as adapters; a picture, and masks of its size."""
    folder = tmp_path_factory.mktemp("tasks")
    unwatched = ["validation.every=100", "validation.reconstructions=0", "data.resolution=64", "optimizer.lr=1e-2"]
    train(folder, "model=inpaint", "name=fill", *unwatched, "trainer.max_steps=2")
    train(folder, "model=inpaint", "name=lora", "adapter=lora", *unwatched, "trainer.max_steps=2")
    pixels = np.random.default_rng(0).integers(0, 255, (80, 100, 3), np.uint8)
    Image.fromarray(pixels).resize((100, 80), Image.Resampling.BILINEAR).save(folder / "a.png")
    Image.radial_gradient("L").resize((64, 64)).convert("RGB").save(folder / "b.png")
    mask = np.zeros((80, 100), np.uint8)
    mask[:, 50:] = 255
    Image.fromarray(mask).save(folder / "right.png")
    mask[:] = 0
    mask[:, 43] = 255
    Image.fromarray(mask).save(folder / "line.png")
    return folder


def picture(root: Path, *overrides: str) -> list[str]:
    return [f"image={root}/a.png", *overrides]


def cut(root: Path, width: int = 64, height: int = 64) -> np.ndarray:
    """The picture as it is drawn from: its middle."""
    return np.asarray(fitted(open_picture("image", f"{root}/a.png"), (width, height)))


# --- image


def test_image_to_image(root: Path) -> None:
    words = ["weights=tiny", "task=image", *picture(root), FOUR]
    first, second, other = drawn(root, "image", *words, "prompts=[a red heart, a dog, a dog]", "strength=0.5")
    assert first.shape == (64, 64, 3)
    assert not np.array_equal(second, other), "two images start from other noise"
    again = drawn(root, "default", *words, PROMPT)
    assert np.abs(np.subtract(first, again[0], dtype=int)).max() <= 1, "0.5 is the default"
    assert not np.array_equal(first, drawn(root, "text", "weights=tiny", PROMPT, FOUR)[0])
    with Image.open(root / "generate" / "default" / "grid.png") as grid:
        assert grid.width > 2 * grid.height * 0.8, "original | result"
    saved = yaml.safe_load((root / "generate" / "image" / "config.yaml").read_text())
    assert saved["image"] == str(root / "a.png")


def test_a_size_in_another_shape(root: Path) -> None:
    words = ["weights=tiny", "task=image", *picture(root), PROMPT, FOUR]
    (wide,) = drawn(root, "wide", *words, "width=96", "height=64")
    assert wide.shape == (64, 96, 3)


@pytest.mark.parametrize("source", ["decoder={root}/fill", "decoder_adapter={root}/lora"])
def test_image_to_image_with_a_decoder_for_inpainting(root: Path, source: str) -> None:
    words = ["weights=tiny", "task=image", *picture(root), PROMPT, FOUR]
    (image,) = drawn(root, source.partition("=")[0], *words, source.format(root=root))
    assert image.shape == (64, 64, 3)


def test_the_least_strength_leaves_a_step() -> None:
    for steps in range(1, 1001):
        ((key, text),) = drawing_tasks.problems({"task": "image", "strength": 0.9 / steps, "inference_steps": steps})
        least = float(re.search(r"give at least ([\d.]+)", text)[1])  # type: ignore[index]
        assert key == "strength"
        assert 1 <= int(steps * least) <= 1 + steps / 10_000
        assert not list(drawing_tasks.problems({"task": "image", "strength": least, "inference_steps": steps}))


# --- inpaint


@pytest.mark.parametrize(
    "source",
    [
        "decoder={root}/fill",
        "decoder={root}/fill/checkpoints/step-00000002",
        "weights.decoder={root}/fill",
        "decoder_adapter={root}/lora",
    ],
)
def test_inpainting_keeps_what_is_black(root: Path, source: str, request: pytest.FixtureRequest) -> None:
    name = f"filled-{request.node.callspec.indices['source']}"
    words = ["weights=tiny", "task=inpaint", *picture(root), f"mask={root}/right.png", PROMPT, FOUR, "num_images=2"]
    first, second = drawn(root, name, *words, source.format(root=root))
    original = cut(root)
    assert np.array_equal(first[:, :31], original[:, :31])
    assert np.array_equal(second[:, :31], original[:, :31])
    assert not np.array_equal(first[:, 34:], original[:, 34:])
    assert not np.array_equal(first[:, 34:], second[:, 34:])


def test_a_line_is_drawn_anew_all_of_it(root: Path) -> None:
    """Though the pipeline looks at one pixel of each latent, which may lie beside it."""
    words = [f"decoder={root}/fill", "task=inpaint", *picture(root, "width=96", "height=80"), PROMPT, FOUR]
    (image,) = drawn(root, "line", *words, f"mask={root}/line.png")
    original = cut(root, 96, 80)
    changed = (image != original).any((0, 2)).nonzero()[0]
    assert changed.tolist() == [41]
    assert (image[:, 41] != original[:, 41]).any(1).mean() > 0.9


def test_a_full_mask_is_drawn_with_a_note(root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    Image.new("L", (100, 80), 255).save(root / "full.png")
    words = [f"decoder={root}/fill", "task=inpaint", *picture(root), f"mask={root}/full.png", PROMPT, FOUR]
    image = drawn(root, "full", *words)
    assert "nothing of the picture is kept" in capfd.readouterr().err
    assert np.array_equal(image, drawn(root, "as-text", f"decoder={root}/fill", PROMPT, FOUR))


def test_a_plain_decoder_fills_nothing(root: Path) -> None:
    words = ["weights=tiny", "task=inpaint", *picture(root), f"mask={root}/right.png", PROMPT]
    with pytest.raises(
        ConfigError, match=r"decoder: tiny is not a decoder for inpainting, .* model=inpaint>, or the pub"
    ):
        drawn(root, "plain", *words)
    Image.new("L", (100, 80)).save(root / "black.png")
    with pytest.raises(ConfigError, match=r"mask: nothing of '.*black\.png' is white"):
        drawn(root, "black", *words, f"mask={root}/black.png", f"decoder={root}/fill")


def test_it_is_logged_to_the_run_of_its_decoder(root: Path) -> None:
    words = [f"decoder={root}/fill", "task=inpaint", *picture(root), f"mask={root}/right.png", PROMPT]
    drawn(root, "logged", *words, "log_to_run=true")
    run_id = next(run.info.run_id for run in runs(root) if run.info.run_name == "fill")
    assert "generate/logged/grid.png" in {file.path for file in client(root).list_artifacts(run_id, "generate/logged")}


# --- mix


def test_a_mix_of_pictures_and_texts(root: Path) -> None:
    words = ["weights=tiny", "task=mix", NO_PROMPTS]
    mix = f"mix=[{root}/a.png, a red heart]"
    first, second = drawn(root, "mix", *words, mix, "mix_weights=[1,3]", "num_images=2")
    assert not np.array_equal(first, second)
    lines = (root / "generate" / "mix" / "prompts.txt").read_text().splitlines()
    assert lines == [f"{number:02}.png\t0.25 a.png + 0.75 a red heart" for number in range(2)]
    again = drawn(root, "same", *words, mix, "mix_weights=[2,6]", "num_images=2")
    assert np.array_equal(again, [first, second])
    assert not np.array_equal(drawn(root, "equal", *words, mix, "num_images=2"), [first, second])


def test_the_mix_of_one_text_is_what_the_text_is(root: Path) -> None:
    words = ["weights=tiny", "num_images=2", "negative_prompt=blue"]
    mixed = drawn(root, "one", *words, "task=mix", NO_PROMPTS, "mix=[a red heart]")
    assert np.array_equal(mixed, drawn(root, "itself", *words, PROMPT))


def test_a_mix_is_drawn_with_a_decoder_for_inpainting(root: Path) -> None:
    words = [f"decoder={root}/fill", "task=mix", NO_PROMPTS, f"mix=[{root}/a.png,{root}/b.png]"]
    (image,) = drawn(root, "mixed-and-filled", *words)
    assert image.shape == (64, 64, 3)
    with Image.open(root / "generate" / "mixed-and-filled" / "grid.png") as grid:
        assert grid.width > 2 * grid.height, "two pictures | result"


def test_long_texts_of_a_mix_are_named(root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    drawn(root, "long", "weights=tiny", "task=mix", NO_PROMPTS, f"mix=[{'a cat and a dog ' * 30}, short]")
    assert "mix: 'a cat and a dog" in capfd.readouterr().err


# --- what contradicts the task

MIX = ["task=mix", NO_PROMPTS]


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["image={root}/a.png"], "image: task=text does not draw from it; remove it, or set task=image, task=inpaint"),
        (["mask={root}/right.png"], "mask: task=text does not draw from it; remove it, or set task=inpaint"),
        (["strength=0.5"], "strength: task=text does not draw from it; remove it, or set task=image"),
        (["mix=[a]"], "mix: task=text does not draw from it; remove it, or set task=mix"),
        (["mix_weights=[1]"], "mix_weights: task=text does not draw from it"),
        (["task=image"], "image: is not set; give the file of a picture"),
        (["task=image", "image={root}/no.png"], "image: there is no file '.*no.png' here; check the path"),
        (["task=image", "image={root}/a.png", NO_PROMPTS], "prompts: is empty"),
        (["task=image", "image={root}/a.png", "mask={root}/right.png"], "mask: task=image does not draw from it"),
        (["task=image", "image={root}/a.png", "strength=0"], "strength: has to be a number, above 0 and at most 1"),
        (["task=image", "image={root}/a.png", "strength=1.2"], "strength: has to be a number, above 0 and at most 1"),
        (["task=image", "image={root}/a.png", "strength=0.03"], "strength: 0.03, leaves none of 25 .* at least 0.04,"),
        (["task=image", "image={root}/a.png", "inference_steps=1"], "strength: the default, 0.5, leaves none of 1 "),
        (["task=inpaint", "image={root}/a.png"], "mask: is not set; give a picture of the size of image, white where"),
        (["task=inpaint", "image={root}/a.png", "mask={root}"], "mask: there is no file"),
        (["task=inpaint", "image={root}/a.png", "mask={root}/right.png", "strength=1"], "strength: task=inpaint does"),
        (["task=inpaint", "image={root}/a.png", "mask={root}/right.png", "mix=[a]"], "mix: task=inpaint does not"),
        ([*MIX], "mix: is empty; give pictures and texts, such as"),
        (["task=mix", "mix=[a]"], "prompts: task=mix does not draw from it; remove it, or set task=text"),
        ([*MIX, "mix=[no.PNG, a cat]"], "mix: there is no file 'no.PNG' here; check the path"),
        ([*MIX, "mix=[./no, a cat]"], "mix: there is no file './no' here"),
        ([*MIX, "mix=[a, b]", "mix_weights=[1]"], "mix_weights: 1 for 2 entries of mix; give one for each"),
        ([*MIX, "mix=[a, b]", "mix_weights=[1, -1]"], "mix_weights: they add up to 0; give numbers whose sum is above"),
        ([*MIX, "mix=[a, b]", "mix_weights=[1, .nan]"], "mix_weights: has to be"),
        ([*MIX, "mix=[a, b]", "mix_weights=[1e308, 1e308]"], "mix_weights: they add up to inf; give numbers"),
        ([*MIX, "mix=[a, b]", "strength=0.5"], "strength: task=mix does not draw from it; remove it, or set"),
        (["task=outpaint"], "task: has to be one of text, image, inpaint, mix, control, not 'outpaint'"),
    ],
)
def test_settings_that_contradict_the_task(root: Path, words: list[str], problem: str) -> None:
    cfg = composed(root, "weights=tiny", PROMPT, *(word.format(root=root) for word in words), verb="generate", small=[])
    (found,) = problems_of(cfg, "generate")
    assert re.match(problem, found), found


def test_a_text_is_no_picture(root: Path) -> None:
    for text in ("a cat", "a cat. A dog", "1.5 cats", "black and/or white", "e.g. a dog"):
        cfg = composed(root, "weights=tiny", *MIX, f"mix=['{text}']", verb="generate", small=[])
        assert problems_of(cfg, "generate") == []


# --- control


@pytest.fixture(scope="module")
def hint(root: Path) -> Path:
    """A circle, in the shape of the picture and larger."""
    file = root / "hint.png"
    drawn_on = Image.new("RGB", (200, 160))
    ImageDraw.Draw(drawn_on).ellipse((40, 20, 160, 140), outline="white", width=2)
    drawn_on.save(file)
    return file


CONTROL = ["weights=tiny_control", "task=control", PROMPT]


def test_a_hint_is_drawn_and_another_one_otherwise(root: Path, hint: Path) -> None:
    """By the decoder that ships, without guidance of the prompt: it knows no circle."""
    words = [*CONTROL, "inference_steps=15", "guidance_scale=1"]
    first, second = drawn(root, "circle", *words, f"hint={hint}", "prompts=[a dog, a car]")
    edges_of_photo, _ = drawn(root, "photo", *words, f"image={root}/b.png", "prompts=[a dog, a car]")
    assert first.shape == (64, 64, 3)
    wanted = np.asarray(given_pictures.shaped(Image.open(hint), (64, 64)).convert("L").resize((128, 128))) // 200 * 255
    scores = [
        edges.f1(edges.canny(np.asarray(Image.fromarray(image).resize((128, 128)))), wanted.astype(np.uint8))
        for image in (first, second, edges_of_photo)
    ]
    assert min(scores[:2]) > scores[2] + 0.1
    saved = yaml.safe_load((root / "generate" / "circle" / "config.yaml").read_text())
    assert saved["hint"] == str(hint)


def test_a_prompt_of_validation_may_have_a_hint(root: Path, hint: Path) -> None:
    entry = f"{{prompt: a dog, hint: {hint}}}"
    words = ["model=control", "data.resolution=64", "data.max_samples=6", "trainer.max_steps=1", "tracker=none"]
    train(root, *words, "weights=tiny_control", f"validation.prompts=[a dog, {entry}]", "name=hinted")
    one, two = ((root / "hinted" / "samples" / "step-00000001" / f"0{n}.png").read_bytes() for n in (0, 1))
    assert one != two


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["weights=tiny", "task=control", PROMPT, "hint={root}/a.png"], "tiny is not a decoder for hints, which"),
        (
            ["weights=tiny_control", "task=inpaint", PROMPT, "image={root}/a.png", "mask={root}/right.png"],
            "tiny_control is not a decoder for inpainting",
        ),
        ([*CONTROL], "hint: is not set; give the file of a hint, or image="),
        ([*CONTROL, "hint={root}/a.png", "image={root}/a.png"], "hint: and image are both set; give one of them"),
        ([*CONTROL, "hint={root}/nowhere.png"], "hint: there is no file"),
        (["task=text", PROMPT, "hint={root}/a.png"], "hint: task=text does not draw from it; remove it, or set task="),
        (["weights.prior=tiny_control", "weights.decoder=tiny", PROMPT], "'tiny_control' is a decoder alone; give"),
    ],
)
def test_hints_that_cannot_be_drawn(root: Path, words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        drawn(root, "none", *(word.format(root=root) for word in words))
