"""The inpainting decoder: its holes, its first step, what it trains and draws, and what it refuses."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoPipelineForInpainting
from PIL import Image
from running import composed, history, network, prepare, problems_of, runs, same, train
from safetensors.torch import load_file, save_file

from kandinsky_exp import cli
from kandinsky_exp.errors import CheckpointError, ConfigError
from kandinsky_exp.models import inpainting, pipelines
from kandinsky_exp.models.decoder_kinds import INPAINTING
from kandinsky_exp.models.weights import Weights
from kandinsky_exp.stages import holes
from kandinsky_exp.stages.decoder import DecoderStage
from kandinsky_exp.stages.inpaint import SHAPES, InpaintStage

MINE = ["model=inpaint", "data.resolution=64"]
QUIET = [*MINE, "tracker=none", "validation.reconstructions=0"]


def seeded(number: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(number)


# ---- holes


@pytest.mark.parametrize("size", [(8, 8), (16, 40), (40, 16), (2, 2)])
@pytest.mark.parametrize("shape", holes.SHAPES)
def test_holes_are_what_they_are_called(shape: str, size: tuple[int, int]) -> None:
    found = holes.draw({shape: 1.0}, (400, *size), seeded(), torch.device("cpu"))
    assert found.shape == (400, 1, *size)
    assert set(found.unique().tolist()) <= {0.0, 1.0}
    assert found.flatten(1).sum(1).min() >= 1
    part = found.mean().item()
    if shape == "full":
        assert part == 1
    if shape == "box" and min(size) > 2:
        rows, columns = found[:, 0].amax(2).mean(1), found[:, 0].amax(1).mean(1)
        assert torch.equal(found[:, 0].sum((1, 2)), (rows * size[0]).round() * (columns * size[1]).round())  # filled
        step = 1 / min(size)
        for side in (rows, columns):
            assert 0.1 - step <= side.min() < 0.2 + step
            assert 0.5 - step < side.max() <= 0.62 + step
    if shape == "blob" and min(size) > 2:
        box = holes.draw({"box": 1.0}, (400, *size), seeded(), torch.device("cpu"))
        assert 0.25 * box.mean() < part < 0.95 * box.mean()
        assert ((found > box).sum((1, 2, 3)) == 0).all()  # within the box of the same numbers
    if shape == "frame" and min(size) > 2:
        middle = found[:, 0, size[0] * 2 // 5 : size[0] * 3 // 5, size[1] * 2 // 5 : size[1] * 3 // 5]
        assert middle.sum() == 0
        assert all(border.min() == 1 for border in (found[..., 0], found[..., -1], found[..., 0, :], found[..., -1, :]))


def test_shapes_come_as_often_as_they_should() -> None:
    found = holes.draw({"full": 1.0, "frame": 3.0}, (4000, 8, 8), seeded(), torch.device("cpu"))
    assert (found.flatten(1).mean(1) == 1).float().mean() == pytest.approx(0.25, abs=0.03)
    assert set(SHAPES) == set(holes.SHAPES)
    assert sum(SHAPES.values()) == pytest.approx(1)


def test_a_rows_own_generator_draws_its_hole() -> None:
    """So that validation does not hang on what a batch holds."""
    device = torch.device("cpu")
    alone = [holes.draw(SHAPES, (1, 16, 24), [seeded(number)], device) for number in range(6)]
    together = holes.draw(SHAPES, (6, 16, 24), [seeded(number) for number in range(6)], device)
    assert torch.equal(torch.cat(alone), together)
    assert len({hole.numpy().tobytes() for hole in alone}) > 3


# ---- the network


@pytest.fixture(scope="module")
def features(weights: Weights) -> dict[str, torch.Tensor]:
    return {
        "latents": torch.randn(4, 4, 16, 24, generator=seeded(1)),
        "image_embeds": torch.randn(4, weights.load("unet").config.encoder_hid_dim, generator=seeded(2)),
    }


def test_the_first_step_is_the_plain_decoders_to_the_bit_whatever_the_hole(
    weights: Weights, features: dict[str, torch.Tensor]
) -> None:
    plain, filling = (stage(weights, resolution=64) for stage in (DecoderStage, InpaintStage))
    assert filling.network.config.in_channels == 9
    steps = torch.tensor([0, 300, 700, 999])
    noisy = torch.randn(features["latents"].shape, generator=seeded(3))
    expected = plain.predict(plain.network.eval(), noisy, steps, features)
    for number in range(3):
        found = filling.predict(filling.network.eval(), noisy, steps, filling.with_drawn(features, seeded(number)))
        assert torch.equal(found, expected)
    loss = filling.loss(filling.network.train(), features, seeded(4))
    loss.loss.backward()
    assert filling.network.conv_in.weight.grad[:, 4:].abs().amax((0, 2, 3)).min() > 0


def test_errors_in_the_hole_and_outside_make_up_the_loss(weights: Weights, features: dict[str, torch.Tensor]) -> None:
    stage = InpaintStage(weights, resolution=64, hole_shapes={"box": 1})
    found = stage.loss(stage.network.eval(), features, seeded(5))
    (inside, places), (outside, others) = found.measured["hole"], found.measured["kept"]
    assert places + others == 4 * 16 * 24
    assert (inside + outside) / (places + others) == pytest.approx(found.per_sample.mean().item(), rel=1e-5)


def test_what_it_sees_of_the_picture_is_what_is_kept(weights: Weights, features: dict[str, torch.Tensor]) -> None:
    seen = []

    class Looking(torch.nn.Module):
        def forward(self, sample: torch.Tensor, *rest: object, **more: object) -> object:
            seen.append(sample)
            return type("Answer", (), {"sample": torch.zeros(4, 8, 16, 24)})

    stage = InpaintStage(weights, resolution=64)
    given = stage.with_drawn(features, seeded(6))
    noisy = torch.randn(features["latents"].shape, generator=seeded(7))
    stage.predict(Looking(), noisy, torch.zeros(4, dtype=torch.long), given)
    kept = seen[0][:, 8:]
    assert torch.equal(kept, 1 - given["hole"])
    assert torch.equal(seen[0][:, :4], noisy)
    assert torch.equal(seen[0][:, 4:8], torch.where(kept.bool(), features["latents"], 0.0))


# ---- runs


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("inpaint")
    train(root, *MINE, "name=fill", "validation.prompts=[a red heart]", "trainer.ema_decay=0.9")
    return root


def test_a_run_records_both_parts_of_the_loss_and_draws_what_it_fills(trained: Path) -> None:
    (found,) = runs(trained)
    for name in ("loss", "loss_hole", "loss_kept"):
        assert list(history(trained, found.info.run_id, f"train/{name}")) == [2, 4]
        assert list(history(trained, found.info.run_id, f"validation/{name}")) == [0, 2, 4]
    whole, hole, kept = (found.data.metrics[f"validation/loss{name}"] for name in ("", "_hole", "_kept"))
    assert min(hole, kept) < whole < max(hole, kept)
    samples = trained / "fill" / "samples" / "step-00000004"
    assert {file.name for file in samples.glob("*.png")} == {"00.png", "reconstruction-00.png", "grid.png"}
    record = json.loads((trained / "fill" / "run.json").read_text())
    assert (record["stage"], record["part"]) == ("inpaint", "unet")


def test_the_result_is_a_pipeline_for_inpainting(trained: Path) -> None:
    pipeline = AutoPipelineForInpainting.from_pretrained(trained / "fill" / "pipeline", local_files_only=True)
    assert type(pipeline).__name__ == INPAINTING.result
    pipeline.set_progress_bar_config(disable=True)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    hole = np.zeros((64, 64), np.float32)
    hole[:, 32:] = 1
    drawn = pipeline(
        "a heart", picture, hole, height=64, width=64, num_inference_steps=2, prior_num_inference_steps=2
    ).images[0]
    assert drawn.size == (64, 64)


def test_pictures_are_filled_one_by_one_and_keep_their_pixels(weights: Weights) -> None:
    """The published pipeline would keep of every picture what the first one keeps."""
    stage = InpaintStage(weights, resolution=64)
    pixels = torch.rand(3, 3, 64, 64, generator=seeded(8)) * 2 - 1
    embeds = torch.randn(3, weights.load("unet").config.encoder_hid_dim, generator=seeded(9))
    settings = pipelines.SampleSettings(inference_steps=2, height=64, width=64)
    network = stage.network.eval()
    held_out = {"pixels": pixels, "image_embeds": embeds}
    drawn, again = (stage.reconstruct(network, held_out, settings) for _ in range(2))
    assert [picture.tobytes() for picture in drawn] == [picture.tobytes() for picture in again]
    for index, (picture, with_hole) in enumerate(
        zip(drawn, stage.shown_inputs(held_out, settings)["hole"], strict=True)
    ):
        original = Image.fromarray(((pixels[index] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy())
        shown = np.asarray(with_hole)
        kept = (shown != inpainting.EMPTY).any(-1)
        assert 0 < kept.sum() < kept.size
        assert np.array_equal(np.asarray(picture)[kept], np.asarray(original)[kept])
        assert not np.array_equal(np.asarray(picture)[~kept], np.asarray(original)[~kept])


@pytest.mark.parametrize("adapter", [[], ["adapter=lora", "adapter.rank=2"]], ids=["whole", "lora"])
def test_it_goes_on_exactly(adapter: list[str], tmp_path: Path) -> None:
    words = [*QUIET, *adapter, "trainer.ema_decay=0.9"]
    train(tmp_path, *words, "name=straight")
    train(tmp_path, *words, "name=stopped", "trainer.max_steps=2")
    train(tmp_path, *words, "name=stopped")
    straight, stopped = (tmp_path / name / "checkpoints" / "step-00000004" for name in ("straight", "stopped"))
    files = sorted(file.relative_to(straight) for file in straight.rglob("*.safetensors"))
    assert any(file.name == "conv_in.safetensors" for file in files) == bool(adapter)
    for file in files:
        assert same(load_file(straight / file), load_file(stopped / file)), file


def test_an_adapter_brings_its_first_layer_along(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Onto a plain decoder, as far as its scale says; merged it draws the same."""
    train(tmp_path, *QUIET, "adapter=lora", "name=adapter", "optimizer.lr=1e-2")
    adapter = tmp_path / "adapter" / "adapter"
    trained = load_file(adapter / "conv_in.safetensors")
    assert trained["conv_in.weight"].shape[1] == 9
    assert trained["conv_in.weight"][:, 4:].abs().max() > 0
    words = ["weights=tiny", f"output_root={tmp_path}"]
    drawing = ["prompts=[a heart]", "inference_steps=2", "prior_inference_steps=2"]
    for scale, name in ((1, "full"), (0, "none")):
        scaled = [f"decoder_adapter={tmp_path / 'adapter'}", f"adapter_scale={scale}", f"name={name}"]
        cli.main(["generate", *scaled, *words, *drawing])
    cli.main(["export", f"adapter={tmp_path / 'adapter'}", "name=merged", *words])
    merged = tmp_path / "export" / "merged" / "pipeline"
    index = json.loads((merged / "model_index.json").read_text())
    assert index["_class_name"] == INPAINTING.result
    assert torch.equal(network(merged / "unet")["conv_in.weight"], trained["conv_in.weight"])
    cli.main(["generate", f"decoder={merged}", "name=merged", *words, *drawing])
    full, none, joined = (
        np.asarray(Image.open(tmp_path / "generate" / name / "00.png"), int) for name in ("full", "none", "merged")
    )
    assert np.abs(full - joined).max() <= 2 < np.abs(full - none).max()  # a merged product is rounded once less
    cli.main(["export", f"adapter={tmp_path / 'adapter'}", "merge=false", "name=alone", *words])
    assert same(load_file(tmp_path / "export" / "alone" / "adapter" / "conv_in.safetensors"), trained)
    capsys.readouterr()


def test_an_adapter_without_its_first_layer_is_refused(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path, *QUIET, "adapter=lora", "name=adapter", "trainer.max_steps=1")
    file = tmp_path / "adapter" / "adapter" / "conv_in.safetensors"
    words = ["generate", "weights=tiny", f"output_root={tmp_path}", "prompts=[a heart]"]
    for harm, message in (
        (
            lambda: save_file({"conv_in.weight": torch.zeros(8, 9, 3, 3)}, file),
            r"its conv_in\.weight is \[8, 9, 3, 3\]",
        ),
        (file.unlink, r"belongs together with conv_in\.safetensors, which is not beside it"),
    ):
        harm()
        with pytest.raises(SystemExit) as end:
            cli.main([*words, f"decoder_adapter={file.parent / 'pytorch_lora_weights.safetensors'}"])
        assert end.value.code == 2
        assert re.search(message, capsys.readouterr().err)


def test_an_adapter_of_another_task_goes_not_on(tmp_path: Path) -> None:
    lora = ["tracker=none", "validation.reconstructions=0", "adapter=lora", "adapter.rank=2", "data.resolution=64"]
    train(tmp_path, "model=decoder", *lora, "name=plain", "trainer.max_steps=1")
    with pytest.raises(
        CheckpointError,
        match=r"model: another one; layers .* are none there, conv_in here",
    ):
        train(tmp_path, "model=inpaint", *lora, "name=fill", f"checkpoint.resume={tmp_path / 'plain'}")


def test_what_trains_as_a_whole_takes_no_adapter(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"adapter\.target_modules: conv_in trains as a whole here; leave it out"):
        train(tmp_path, *QUIET, "adapter=lora", "adapter.target_modules=[to_q,conv_in]")


def test_it_starts_from_one_for_inpainting(trained: Path) -> None:
    base = Weights("tiny", str(trained / "fill"), trained / "cache")
    assert same(InpaintStage(base, resolution=64).network.state_dict(), network(trained / "fill" / "pipeline" / "unet"))


def test_its_memory_is_planned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepare(tmp_path, [])
    cli.main(["plan", *MINE, "weights=tiny", "data=emoji", "validation.prompts=[a heart]", f"output_root={tmp_path}"])
    assert "together" in capsys.readouterr().out


# ---- what it refuses


@pytest.fixture
def other_bases(trained: Path, tmp_path: Path) -> dict[str, Path]:
    """Decoders by the channels of their input, and one that reads hints."""
    found = {}
    for name, change in (("5", {"in_channels": 5}), ("hint", {"in_channels": 8, "addition_embed_type": "image_hint"})):
        found[name] = tmp_path / name
        shutil.copytree(trained / "fill" / "pipeline", found[name])
        config = found[name] / "unet" / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | change))
    return found | {"9": trained / "fill"}


@pytest.mark.parametrize(
    ("model", "base", "message"),
    [
        (
            "decoder",
            "9",
            "has in_channels=9: it is a decoder for inpainting; set model=inpaint, or give a plain",
        ),
        ("inpaint", "5", "in_channels=5, neither the 4 of a plain decoder nor the 9 of a decoder for inpainting"),
        ("inpaint", "hint", "in_channels=8: it is a decoder for hints; set model=control"),
    ],
)
def test_bases_of_other_tasks(
    model: str, base: str, message: str, other_bases: dict[str, Path], tmp_path: Path
) -> None:
    cfg = composed(tmp_path, f"model={model}", "data.resolution=64", f"weights.decoder={other_bases[base]}")
    (problem,) = problems_of(cfg)
    assert message in problem


def test_a_setting_that_no_stage_takes(tmp_path: Path) -> None:
    (problem,) = problems_of(composed(tmp_path, *MINE, "+model.foo=1"))
    assert "takes no such argument, it takes " in problem
    assert all(name in problem for name in ("hole_shapes", "condition_dropout", "snr_gamma"))


@pytest.mark.parametrize(
    "words",
    [
        ["+model.hole_shapes.circle=1"],
        ["model.hole_shapes.box=-1"],
        ["model.hole_shapes.box=much"],
        [f"model.hole_shapes.{name}=0" for name in holes.SHAPES],
    ],
)
def test_shares_that_are_none(words: list[str], tmp_path: Path) -> None:
    (problem,) = problems_of(composed(tmp_path, *MINE, *words))
    assert problem.startswith("model.hole_shapes")
    assert "not negative, one above 0, of full, box, blob, frame, blob_and_frame" in problem
