"""The decoder for hints: its first step, what learns faster, what it leaves and draws, and what it refuses."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import KandinskyV22ControlnetPipeline, KandinskyV22PriorPipeline
from PIL import Image
from running import composed, history, network, prepare, problems_of, runs, same, train
from safetensors.torch import load_file

from kandinsky_exp import cli
from kandinsky_exp.data import companions
from kandinsky_exp.errors import CheckpointError
from kandinsky_exp.models import hints, pipelines
from kandinsky_exp.models.decoder_kinds import HINT
from kandinsky_exp.models.weights import Weights
from kandinsky_exp.models.widening import widened
from kandinsky_exp.stages.control import ControlStage
from kandinsky_exp.stages.decoder import DecoderStage
from kandinsky_exp.training.new_parts import learn_faster

MINE = ["model=control", "data.resolution=64"]
QUIET = [*MINE, "tracker=none", "validation.reconstructions=0", "data.max_samples=6"]
BLOCK = "add_embedding.input_hint_block"


def seeded(number: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(number)


@pytest.fixture(scope="module")
def features(weights: Weights) -> dict[str, torch.Tensor]:
    return {
        "latents": torch.randn(4, 4, 16, 24, generator=seeded(1)),
        "image_embeds": torch.randn(4, weights.load("unet").config.encoder_hid_dim, generator=seeded(2)),
        "hint": torch.randint(0, 256, (4, 1, 128, 192), generator=seeded(3), dtype=torch.uint8),
    }


def test_the_first_step_is_the_plain_decoders_to_the_bit_whatever_the_hint(
    weights: Weights, features: dict[str, torch.Tensor]
) -> None:
    plain, other = (stage(weights, resolution=64) for stage in (DecoderStage, ControlStage))
    steps = torch.tensor([0, 300, 700, 999])
    noisy = torch.randn(features["latents"].shape, generator=seeded(4))
    expected = plain.predict(plain.network.eval(), noisy, steps, features)
    for hint in (features["hint"], torch.zeros_like(features["hint"]), features["hint"].expand(-1, 3, -1, -1)):
        assert torch.equal(other.predict(other.network.eval(), noisy, steps, features | {"hint": hint}), expected)
    other.loss(other.network.train(), features, seeded(5)).loss.backward()
    new = other.network.conv_in.weight.grad[:, 4:]
    assert new.abs().amax((0, 2, 3)).min() > 0  # and so the block learns from the second step on
    assert other.network.get_submodule(BLOCK)[0].weight.grad.abs().max() == 0


def test_a_hint_block_begins_the_same_and_passes_a_hint_on(weights: Weights) -> None:
    torch.manual_seed(1)
    first = ControlStage(weights, resolution=64).network.get_submodule(BLOCK)
    torch.manual_seed(2)
    second = ControlStage(weights, resolution=64).network.get_submodule(BLOCK)
    assert same(first.state_dict(), second.state_dict())
    drawn = first(torch.rand(4, 3, 128, 128, generator=seeded()).round())
    assert drawn.shape == (4, 4, 16, 16)
    assert 0.2 < drawn.std((2, 3)).mean() < 3  # as torch begins one: 0.01


def test_a_hint_has_one_size_wherever_it_is_named() -> None:
    assert companions.HINT_SCALE == hints.SCALE


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_what_is_new_learns_as_with_a_rate_of_its_own(optimizer: type[torch.optim.Optimizer]) -> None:
    def steps(grouped: bool) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        network = torch.nn.ModuleDict({"old": torch.nn.Conv2d(4, 3, 1), "new": torch.nn.Conv2d(2, 3, 1)})
        groups = [network["old"].parameters(), network["new"].parameters()]
        if grouped:
            found = optimizer([{"params": groups[0]}, {"params": groups[1], "lr": 0.3}], lr=0.1, weight_decay=0.1)
        else:
            found = optimizer(network.parameters(), lr=0.1, weight_decay=0.1)
            learn_faster(found, network, 3.0, {"new.weight": 0, "new.bias": 0})
        for number in range(3):
            found.zero_grad()
            x = torch.randn(5, 6, 2, 2, generator=seeded(number))
            (network["old"](x[:, :4]) + network["new"](x[:, 4:])).square().mean().backward()
            found.step()
        return network.state_dict()

    ours, theirs = steps(False), steps(True)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name])


def test_only_the_new_inputs_of_a_layer_are_faster() -> None:
    network = torch.nn.Conv2d(4, 2, 1, bias=False)
    before = network.weight.detach().clone()
    found = torch.optim.SGD(network.parameters(), lr=0.5)
    learn_faster(found, network, 4.0, {"weight": 3})
    network.weight.grad = torch.ones_like(network.weight)
    found.step()
    assert torch.allclose(before - network.weight, torch.tensor([0.5, 0.5, 0.5, 2.0]).view(1, 4, 1, 1))


def test_what_a_plain_decoder_has_is_not_new(weights: Weights) -> None:
    stage = ControlStage(weights, resolution=64, new_lr_factor=7)
    stage.network  # noqa: B018 - loads it
    factor, parts = stage.faster()
    assert factor == 7
    assert parts["conv_in.weight"] == 4
    assert {name for name in parts if name != "conv_in.weight"} == {
        f"{BLOCK}.{name}" for name in stage.network.get_submodule(BLOCK).state_dict()
    }


# ---- runs


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("control")
    words = ["name=edges", "validation.prompts=[a red heart]", "trainer.ema_decay=0.9", "validation.reconstructions=3"]
    train(root, *MINE, *words, "data.max_samples=6")
    return root


def test_a_run_records_how_far_hints_are_heeded(trained: Path) -> None:
    (found,) = runs(trained)
    values = history(trained, found.info.run_id, "validation/hint_f1")
    assert list(values) == [0, 2, 4]
    assert all(-1 <= value <= 1 for value in values.values())
    samples = trained / "edges" / "samples" / "step-00000004"
    assert {file.name for file in samples.glob("*.png")} == {
        "00.png",
        "reconstruction-00.png",
        "reconstruction-01.png",
        "reconstruction-02.png",
        "grid.png",
    }
    record = json.loads((trained / "edges" / "run.json").read_text())
    assert (record["stage"], record["part"]) == ("control", "unet")


def test_the_result_is_two_pipelines_that_diffusers_loads(trained: Path) -> None:
    place = trained / "edges" / "pipeline"
    assert json.loads((place / "model_index.json").read_text())["_class_name"] == HINT.result
    prior = KandinskyV22PriorPipeline.from_pretrained(place / "prior", local_files_only=True)
    decoder = KandinskyV22ControlnetPipeline.from_pretrained(place, local_files_only=True)
    for pipeline in (prior, decoder):
        pipeline.set_progress_bar_config(disable=True)
    embeds = prior("a heart", num_inference_steps=2)
    side = 8 * 64 // decoder.movq_scale_factor
    hint = torch.rand(1, 3, side, side, generator=seeded())
    drawn = decoder(**embeds, hint=hint, height=64, width=64, num_inference_steps=2).images[0]
    assert drawn.size == (64, 64)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_hints_are_moved_and_cast_whatever_the_guidance(guidance: float, weights: Weights) -> None:
    """The published pipeline leaves them as they are where there is no guidance."""
    half = Weights("tiny", "tiny", weights.cache_folder, frozen_dtype="bfloat16")
    decoder = pipelines.decoder_pipeline(half, widened(half.load("unet"), HINT))
    settings = pipelines.SampleSettings(inference_steps=2, height=64, width=64, batch_size=2, guidance_scale=guidance)
    embeds = tuple(torch.randn(3, 64, generator=seeded(number)) for number in range(2))
    drawn = hints.draw(decoder, embeds, hints.to_draw(decoder, 3, settings), settings)
    assert [picture.size for picture in drawn] == [(64, 64)] * 3


@pytest.mark.parametrize("adapter", [[], ["adapter=lora", "adapter.rank=2"]], ids=["whole", "lora"])
def test_it_goes_on_exactly(adapter: list[str], tmp_path: Path) -> None:
    words = [*QUIET, *adapter, "trainer.ema_decay=0.9"]
    train(tmp_path, *words, "name=straight")
    train(tmp_path, *words, "name=stopped", "trainer.max_steps=2")
    train(tmp_path, *words, "name=stopped")
    straight, stopped = (tmp_path / name / "checkpoints" / "step-00000004" for name in ("straight", "stopped"))
    files = sorted(file.relative_to(straight) for file in straight.rglob("*.safetensors"))
    names = {file.name for file in files}
    assert ({"conv_in.safetensors", "input_hint_block.safetensors"} <= names) == bool(adapter)
    for file in files:
        assert same(load_file(straight / file), load_file(stopped / file)), file


def test_an_adapter_brings_its_layers_along(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Onto a plain decoder; merged it draws the same, and an adapter of a plain one does not go onto it."""
    lora = ["adapter=lora", "adapter.rank=2", "trainer.max_steps=2"]
    train(tmp_path, *QUIET, *lora, "name=adapter", "optimizer.lr=1e-2")
    train(tmp_path, *QUIET, "model=decoder", *lora, "name=plain")
    adapter = tmp_path / "adapter" / "adapter"
    block = load_file(adapter / "input_hint_block.safetensors")
    words = ["weights=tiny", f"output_root={tmp_path}"]
    Image.linear_gradient("L").convert("RGB").save(tmp_path / "hint.png")
    drawing = ["prompts=[a heart]", "inference_steps=2", "prior_inference_steps=2"]
    drawing += ["task=control", f"hint={tmp_path / 'hint.png'}"]
    cli.main(["export", f"adapter={tmp_path / 'adapter'}", "name=merged", *words])
    merged = tmp_path / "export" / "merged" / "pipeline"
    assert json.loads((merged / "model_index.json").read_text())["_class_name"] == HINT.result
    assert same({name: network(merged / "unet")[name] for name in block}, block)
    cli.main(["generate", f"decoder_adapter={tmp_path / 'adapter'}", "name=full", *words, *drawing])
    cli.main(["generate", f"decoder={merged}", "name=merged", *words, *drawing])
    full, joined = (np.asarray(Image.open(tmp_path / "generate" / n / "00.png"), int) for n in ("full", "merged"))
    assert np.abs(full - joined).max() <= 2
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        cli.main(["generate", f"decoder={merged}", f"decoder_adapter={tmp_path / 'plain'}", *words, *drawing])
    assert end.value.code == 2
    assert re.search("it was trained on a decoder without hints; train one with model=control", capsys.readouterr().err)
    with pytest.raises(CheckpointError, match="model: another one; layers that train as a whole"):
        train(tmp_path, *QUIET, *lora, "name=other", f"checkpoint.resume={tmp_path / 'plain'}", "trainer.max_steps=4")


def test_it_starts_from_one_for_hints(trained: Path) -> None:
    base = Weights("tiny", str(trained / "edges"), trained / "cache")
    stage = ControlStage(base, resolution=64)
    assert same(stage.network.state_dict(), network(trained / "edges" / "pipeline" / "unet"))
    assert stage.faster() == (1.0, {})


def test_its_memory_is_planned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepare(tmp_path, [])
    cli.main(["plan", *MINE, "weights=tiny", "data=emoji", "validation.prompts=[a heart]", f"output_root={tmp_path}"])
    assert "together" in capsys.readouterr().out


# ---- what it refuses


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("decoder", "it is a decoder for hints; set model=control, or give a plain decoder"),
        (
            "inpaint",
            "it is a decoder for hints; set model=control, or give a plain decoder or a decoder for inpainting",
        ),
    ],
)
def test_bases_of_other_tasks(model: str, message: str, trained: Path, tmp_path: Path) -> None:
    words = [f"model={model}", "data.resolution=64", f"weights.decoder={trained / 'edges'}"]
    (problem,) = problems_of(composed(tmp_path, *words))
    assert message in problem


def test_a_schedule_free_optimizer_has_one_rate(tmp_path: Path) -> None:
    (problem,) = problems_of(composed(tmp_path, *MINE, "optimizer=schedule_free", "scheduler=constant"))
    assert "model.new_lr_factor: AdamWScheduleFree follows from what its steps have led to" in problem


def test_adapters_of_two_tasks_do_not_go_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lora = ["adapter=lora", "adapter.rank=2", "trainer.max_steps=1"]
    for model in ("control", "inpaint"):
        train(tmp_path, *QUIET, f"model={model}", *lora, f"name={model}")
    both = f"decoder_adapter=[{tmp_path / 'control'},{tmp_path / 'inpaint'}]"
    with pytest.raises(SystemExit) as end:
        cli.main(["generate", both, "prompts=[a heart]", "weights=tiny", f"output_root={tmp_path}"])
    assert end.value.code == 2
    assert "some adapters fill holes, some read hints; give one kind" in capsys.readouterr().err
