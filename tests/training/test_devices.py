"""Both stages on devices that are not here: without data on meta, and as far as a forward pass goes on CUDA."""

import io
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import fake_cuda
import pytest
import torch
from accelerate import Accelerator
from commands import Forked
from PIL import Image, ImageChops
from running import composed, prepare, shared

from kandinsky_exp import build, run_settings
from kandinsky_exp.data.examples import Example
from kandinsky_exp.errors import ConfigError
from kandinsky_exp.memory import device_limits
from kandinsky_exp.memory.device_limits import Facts
from kandinsky_exp.memory.dry_run import MetaWeights
from kandinsky_exp.models import adapters, pipelines
from kandinsky_exp.models.weights import Weights
from kandinsky_exp.stages.base import DiffusionStage, Features
from kandinsky_exp.stages.decoder import DecoderStage
from kandinsky_exp.stages.prior import PriorStage
from kandinsky_exp.system import distributed
from kandinsky_exp.tracking.tracker import NullTracker
from kandinsky_exp.training import checkpoint
from kandinsky_exp.training.average import Average
from kandinsky_exp.training.loop import Training
from kandinsky_exp.training.validation import Validator
from kandinsky_exp.verbs.plan import Planner, plan

STAGES = ("prior", "decoder")
KINDS = ("full", "lora", "dora")
BOTH = pytest.mark.parametrize("name", STAGES)
ALL_KINDS = pytest.mark.parametrize("kind", KINDS)
META = torch.device("meta")
CONDITION = {"prior": {"text_embeds", "text_states", "text_mask"}, "decoder": {"image_embeds"}}
ROWS = 2


def make(name: str, kind: str, folder: Path, dtype: torch.dtype = torch.float32) -> DiffusionStage:
    """A stage with all that its loss can have; its network has no data."""
    weights = MetaWeights(str(folder), str(folder), folder.parent, frozen_dtype=str(dtype).partition(".")[2])
    common: dict[str, Any] = {"resolution": 64, "snr_gamma": 5.0, "condition_dropout": 0.5}
    stage = DecoderStage(weights, vlb_weight=0.001, **common) if name == "decoder" else PriorStage(weights, **common)
    stage.network.train()  # loaded now: no weights load among fakes
    if kind != "full":
        settings: dict[str, Any] = {"rank": 4, "alpha": None, "dropout": 0.1, "target_modules": None}
        adapters.attach_lora(stage.network, **settings, use_dora=kind == "dora", dtype=dtype)
    return stage


def features_of(stage: DiffusionStage, device: torch.device, dtype: torch.dtype) -> Features:
    """What the encoders would give."""
    network: Any = stage.network
    if stage.name == "prior":
        embed = torch.ones(ROWS, network.config.embedding_dim, device=device, dtype=dtype)
        mask = torch.ones(ROWS, 77, dtype=torch.bool, device=device)
        states = torch.ones(ROWS, 77, network.config.embedding_dim, device=device, dtype=dtype)
        return {"image_embeds": embed, "text_embeds": embed, "text_states": states, "text_mask": mask}
    embed = torch.ones(ROWS, network.config.encoder_hid_dim, device=device, dtype=dtype)
    latents = torch.ones(ROWS, 4, 16, 16, device=device, dtype=dtype)
    return {"image_embeds": embed, "latents": latents}


def batch(stage: DiffusionStage, device: torch.device, dtype: torch.dtype) -> Features:
    return features_of(stage, device, dtype) | {"loss_weight": torch.ones(ROWS, device=device)}


def null_of(stage: DiffusionStage) -> Features:
    """As it comes from a cache: on the CPU."""
    found = features_of(stage, torch.device("cpu"), torch.float16)
    return {key: value[:1] for key, value in found.items() if key in CONDITION[stage.name]}


# --- the meta device: whatever needs data fails there


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    with distributed.accelerated(lambda: Accelerator(cpu=True)) as made:
        yield made


@BOTH
@ALL_KINDS
def test_a_step_and_its_checkpoint_need_no_data(
    name: str, kind: str, tiny_folder: Path, accelerator: Accelerator
) -> None:
    stage = make(name, kind, tiny_folder)
    stage.use_null_condition(null_of(stage))
    network = stage.place(META).train()
    trainable = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, fused=False)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    training = Training(stage, network, optimizer, scheduler, Average(trainable, foreach=True))
    loss = stage.loss(network, batch(stage, META, torch.float16), torch.Generator())
    loss.loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(trainable, 1.0)
    optimizer.step()
    training.ema.step(trainable)
    found = checkpoint.snapshot(training, accelerator, validated=False, validation_loss=None, total_batch=1, order={})
    assert loss.loss.device == loss.per_sample.device == loss.timesteps.device == META
    assert set(found.networks) == {stage.part, f"{stage.part}_ema"}
    assert found.size() > 4 * sum(value.nbytes for value in trainable) * 0.99  # weights, average, two moments


@BOTH
@pytest.mark.parametrize("when", ["before", "after", "never"])
def test_the_null_condition_is_where_the_stage_is_whenever_it_comes(name: str, when: str, tiny_folder: Path) -> None:
    """From a cache before or after the stage is placed, or from the encoders."""
    stage = make(name, "full", tiny_folder)
    if when == "before":
        stage.use_null_condition(null_of(stage))
    stage.place(META)
    if when == "after":
        stage.use_null_condition(null_of(stage))
    null = stage.null_condition()
    assert set(null) == CONDITION[name]
    assert {value.device for value in null.values()} == {META}


def test_weights_are_channels_last_where_that_was_measured(tiny_folder: Path) -> None:
    stage = make("decoder", "full", tiny_folder)
    for device, expected in (("cuda", False), ("mps", False), ("cpu", True)):
        weight: Any = stage.order_weights(torch.device(device)).conv_in.weight  # type: ignore[union-attr]
        assert weight.is_contiguous(memory_format=torch.channels_last) == expected, device


# --- a CUDA device that takes a forward pass


def on_fake_cuda(folder: Path) -> None:
    """In a process of its own: the loss of everything in every precision, a line each."""
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    for text, action in {**FAULTS, **{text: partial(forward, *case, folder) for text, case in CASES.items()}}.items():
        try:
            print(f"{text}: {action()}")
        except Exception as error:
            print(f"{text}: {type(error).__name__}: {error}")


def at_fault(action: Callable[[torch.Tensor], object]) -> None:
    with fake_cuda.device() as (device, _):
        action(torch.ones(2, device=device))


FAULTS = {
    "a copy": partial(at_fault, lambda value: value.cpu()),
    "a number": partial(at_fault, lambda value: value[0].item()),
    "a choice": partial(at_fault, lambda value: value[value > 0]),
    "a mix": partial(at_fault, lambda value: value * torch.ones(2)),
}
CASES = {
    f"{name} {kind} {str(dtype).partition('.')[2]}": (name, kind, dtype)
    for name, kind, dtype in product(STAGES, KINDS, (torch.float16, torch.bfloat16))
}


def forward(name: str, kind: str, dtype: torch.dtype, folder: Path) -> str:
    """The types that its products compute in."""
    stage = make(name, kind, folder, dtype)
    for part in stage.encoders if kind == "full" else ():
        stage.weights.load(part)  # now: no weights load among fakes
    with fake_cuda.device() as (device, watch):
        stage.use_null_condition(null_of(stage))
        network: Any = stage.place(device).train()
        network.forward = fake_cuda.autocast(dtype)(network.forward)
        given, rows = batch(stage, device, torch.float16), [torch.Generator() for _ in range(ROWS)]
        losses = [stage.loss(network, given, torch.Generator())]
        if kind == "full":  # also as held-out rows have it, and from the encoders
            losses.append(stage.loss(network, given, rows, torch.zeros(ROWS, dtype=torch.long, device=device)))
            losses.append(stage.loss(network, given | encoded(stage, device), torch.Generator()))
        for loss in losses:
            assert loss.loss.device == loss.per_sample.device == loss.timesteps.device == device
            assert loss.loss.dtype == torch.float32
    return " ".join(sorted(map(str, watch.products)))


def encoded(stage: DiffusionStage, device: torch.device) -> Features:
    """Features of examples that come from the host."""
    for part in stage.encoders:
        torch.nn.Module.to(stage.weights.load(part), device)
    images = {"clip_pixels": torch.ones(ROWS, 3, 64, 64)}
    if stage.name == "decoder":
        return stage.encode(images | {"pixels": torch.ones(ROWS, 3, 64, 64)})
    mask = torch.ones(ROWS, 77, dtype=torch.bool)
    return stage.encode(images | {"input_ids": mask.long(), "text_mask": mask})


@pytest.fixture(scope="module")
def printed(tiny_folder: Path) -> str:
    if reason := fake_cuda.missing():
        pytest.skip(f"LOUD: no CUDA device without a GPU: {reason}")

    def make(folder: Path) -> None:
        process = Forked(on_fake_cuda, tiny_folder)
        found = process.finish()
        assert process.code == 0, found
        folder.mkdir()
        (folder / "printed.txt").write_text(found)

    return (shared("fake-cuda", make) / "printed.txt").read_text()


@pytest.mark.parametrize("case", CASES)
def test_a_loss_on_cuda_mixes_no_devices_and_waits_for_none(case: str, printed: str) -> None:
    (line,) = (line for line in printed.splitlines() if line.startswith(f"{case}: "))
    assert line == f"{case}: {CASES[case][2]}"


@pytest.mark.parametrize(
    ("fault", "answer"),
    [
        ("a copy", "_to_copy.default waits for the device"),
        ("a number", "_local_scalar_dense.default waits for the device"),
        ("a choice", "DynamicOutputShapeException: aten.nonzero"),
        ("a mix", "FakeTensorDeviceMismatchError"),
    ],
)
def test_what_mixes_or_waits_would_be_seen(fault: str, answer: str, printed: str) -> None:
    (line,) = (line for line in printed.splitlines() if line.startswith(f"{fault}: "))
    assert answer in line


# --- what a device cannot do

CPU, MPS, OLD, NEW = Facts("cpu"), Facts("mps"), Facts("cuda", has_bf16=False), Facts("cuda")


@pytest.mark.parametrize(
    ("wanted", "device", "expected"),
    [
        (("no", "sdpa", None), CPU, []),
        (("bf16", "sdpa", None), CPU, []),
        (("fp16", "sdpa", None), CPU, ["precision: fp16 trains on a GPU"]),
        (("fp16", "sdpa", None), MPS, []),
        (("fp16", "xformers", "nf4"), OLD, []),
        (("bf16", "xformers", "nf4"), NEW, []),
        (("bf16", "sdpa", None), OLD, ["precision: this GPU only emulates bf16"]),
        (
            ("bf16", "xformers", "int8"),
            MPS,
            ["trainer.attention: xformers needs", "adapter.base_precision: int8 needs"],
        ),
    ],
)
def test_what_cannot_train_on_a_device_is_refused(
    wanted: tuple[str, str, str | None], device: Facts, expected: list[str]
) -> None:
    found = device_limits.of_training(*wanted, device)
    assert len(found) == len(expected)
    assert all(one.startswith(start) for one, start in zip(found, expected, strict=True))
    assert all("; set " in one or "; leave " in one for one in found)


@pytest.mark.parametrize(
    ("precision", "tf32", "device", "named"),
    [
        ("no", False, NEW, "precision=bf16"),
        ("no", False, OLD, "precision=fp16"),
        ("no", True, NEW, None),
        ("bf16", True, NEW, None),
        ("no", False, CPU, None),
    ],
)
def test_a_slow_precision_is_told_with_a_fast_one(precision: str, tf32: bool, device: Facts, named: str | None) -> None:
    line = device_limits.cost(precision, tf32, device)
    assert line is None if named is None else (line is not None and named in line and "\n" not in line)


def test_this_device_is_asked_for_its_own() -> None:
    assert device_limits.facts(torch.device("cpu")) == CPU
    assert device_limits.half(CPU) == device_limits.half(NEW) == "bf16"
    assert device_limits.half(OLD) == "fp16"


def test_a_plan_for_a_gpu_elsewhere_may_have_what_needs_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepare(tmp_path, ["tracker=none"])
    overrides = ["tracker=none", "precision=fp16", "adapter=lora"]
    with pytest.raises(ConfigError, match=r"fp16 trains on a GPU.*device_memory=24 plans for a GPU"):
        plan(composed(tmp_path, *overrides, verb="plan"))
    plan(composed(tmp_path, *overrides, "device_memory=24", verb="plan"))
    assert "may use 24 GB" in capsys.readouterr().out


# --- pictures


def parts_that_draw(weights: Weights, network: Any, of: str) -> dict[str, Any]:
    """A module that each part asks on its way, of the parts that draw; the network that trains is one of them."""
    found = {part: weights.load(part) for part in ("text_encoder", "prior", "unet", "movq") if part != of}
    found[of] = network
    inner = {"text_encoder": "text_projection", "prior": "proj_in", "unet": "conv_in", "movq": "post_quant_conv"}
    return {part: getattr(module, inner[part]) for part, module in found.items()}


class Redrawn:
    """Held-out rows with these embeddings."""

    def __init__(self, embeds: torch.Tensor) -> None:
        self.embeds = embeds

    def __len__(self) -> int:
        return len(self.embeds)

    def rows(self, indices: list[int]) -> Features:
        return {"image_embeds": self.embeds[indices]}

    def batches(self, indices: list[int], size: int) -> Iterator[list[int]]:
        yield indices

    def example(self, index: int) -> Example:
        content = io.BytesIO()
        Image.new("RGB", (32, 32)).save(content, "PNG")
        return Example(str(index), (), content.getvalue, "here")


@BOTH
@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_the_network_that_trains_draws_in_mixed_precision_and_frozen_parts_do_not(
    name: str, adapter: str, tmp_path: Path
) -> None:
    prepare(tmp_path, ["tracker=none"])
    overrides = [
        f"model={name}",
        f"adapter={adapter}",
        "precision=bf16",
        "data.resolution=32",
        "validation.inference_steps=2",
    ]
    cfg = composed(tmp_path, *overrides, "tracker=none", "validation.prompts=[a dog, a cat, a hat]")
    seen: dict[str, set[bool]] = {}
    with distributed.accelerated(lambda: build.accelerator(cfg)) as accelerator:
        weights = build.weights(cfg)
        training = build.training(cfg, build.stage(cfg, weights), accelerator, total_steps=1)
        for part, module in parts_that_draw(weights, training.network, training.stage.part).items():
            seen[part] = set()
            note = lambda *_, part=part: seen[part].add(torch.is_autocast_enabled("cpu"))  # noqa: E731
            module.register_forward_pre_hook(note)
        held_out, how = Redrawn(torch.ones(2, 64)), run_settings.sample_settings(cfg)
        prompts, _ = run_settings.drawn_prompts(cfg)
        Validator(training, accelerator, NullTracker(), tmp_path, held_out, prompts, how, 1, 2)._show(0)
    assert seen == {part: {part == training.stage.part} for part in seen}
    assert len(list((tmp_path / "step-00000000").glob("0*.png"))) == 3
    assert len(list((tmp_path / "step-00000000").glob("reconstruction*.png"))) == (2 if name == "decoder" else 0)


@pytest.mark.parametrize(("count", "expected"), [(1, [1]), (2, [2]), (3, [3]), (5, [3, 2]), (8, [2, 2, 2, 2])])
def test_pictures_are_decoded_a_few_at_a_time_and_stay_what_they_were(
    count: int, expected: list[int], tiny_folder: Path
) -> None:
    weights = Weights(str(tiny_folder), str(tiny_folder), tiny_folder.parent)
    pipeline, at_once = pipelines.decoder_pipeline(weights), []
    embeds = torch.randn(2, count, 64, generator=torch.Generator().manual_seed(0)).unbind()
    settings = pipelines.SampleSettings(inference_steps=1, height=64, width=64)
    note = pipeline.movq.post_quant_conv.register_forward_pre_hook(lambda _, given: at_once.append(len(given[0])))
    found = pipelines.decode(pipeline, embeds, settings)
    note.remove()
    generators = [settings.generator(index) for index in range(count)]
    whole = pipeline(*embeds, height=64, width=64, num_inference_steps=1, generator=generators).images
    assert at_once == expected
    for mine, theirs in zip(found, whole, strict=True):  # equal here; other CPUs may round other batches otherwise
        assert max(high for _, high in ImageChops.difference(mine, theirs).getextrema()) <= 1


def test_a_plan_counts_the_pictures_that_are_decoded_at_once(tmp_path: Path, accelerator: Accelerator) -> None:
    prepare(tmp_path, ["tracker=none"])
    prompts = "validation.prompts=[a, b, c, d, e, f, g, h]"
    cfg = composed(tmp_path, "tracker=none", "precision=bf16", prompts, verb="plan")
    planner = Planner(cfg, accelerator)
    *_, network, movq = planner.estimate._drawing()
    assert network["parts that draw"] == movq["parts that draw"] == planner.dry_run.part("movq")[1]
    assert network["activations"] == planner.dry_run.answering("unet", 16, True)
    assert movq["activations"] == planner.dry_run.answering("movq", 2)
