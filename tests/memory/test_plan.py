"""The verb `plan`: what it says of a run against what the run does."""

import json
import logging
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import hollow
import phase_peaks
import pytest
import torch
from accelerate import Accelerator
from commands import Forked, command, launched
from huggingface_hub import constants
from omegaconf import DictConfig
from phase_peaks import PhasePeaks
from running import SMALL, composed, prepare, train
from safetensors.torch import load_file

from kandinsky_exp import build
from kandinsky_exp.config import allowlist
from kandinsky_exp.data.formats import hub_rows
from kandinsky_exp.data.sources import EMOJI
from kandinsky_exp.errors import ConfigError
from kandinsky_exp.memory import optimizer_state, savings
from kandinsky_exp.memory.dry_run import DryRun
from kandinsky_exp.memory.tensor_tracker import TensorTracker
from kandinsky_exp.run import run
from kandinsky_exp.stages.prior import PriorStage
from kandinsky_exp.system import distributed
from kandinsky_exp.verbs.plan import Planner, plan

BENCH = Path(__file__).parents[1] / "bench" / "architecture"
BATCH = 3


def settings(root: Path, *overrides: str) -> DictConfig:
    prepare(root, ["tracker=none"])
    return composed(root, "tracker=none", *overrides, verb="plan")


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    with distributed.accelerated(lambda: Accelerator(cpu=True)) as made:
        yield made


def test_several_processes_plan_together(tmp_path: Path) -> None:
    """One of them says it; they share the samples of a step, and on the CPU the memory."""
    prepare(tmp_path, ["tracker=none"])
    words = ["plan", *SMALL, "tracker=none", "model=prior", f"output_root={tmp_path}"]
    first, second = [Forked(command, words, environment=told) for told in launched(2)]
    output = first.finish()
    assert first.code == 0, output
    assert (second.finish(), second.code) == ("", 0)
    assert "12 images, 8 a step" in output, output
    assert output.count("memory      ") == 1


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


# --- against a run


@pytest.mark.parametrize("model", ["prior", "decoder"])
def test_what_a_run_writes_is_what_was_planned(
    model: str, tmp_path: Path, accelerator: Accelerator, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = [f"model={model}", "trainer.ema_decay=0.9", "data.max_samples=16", "data.flip=true", "name=one"]
    planner = Planner(settings(tmp_path, *overrides), accelerator)
    train(tmp_path, "tracker=none", "trainer.max_steps=2", *overrides)
    checkpoint, part = tmp_path / "one" / "checkpoints" / "step-00000002", "unet" if model == "decoder" else "prior"
    saved = load_file(checkpoint / part / "diffusion_pytorch_model.safetensors")
    sizes = planner.dry_run.sizes()
    assert sizes.trained + sizes.frozen == sum(tensor.numel() for tensor in saved.values())
    assert sizes.saved == sum(tensor.nbytes for tensor in saved.values())
    state = sum(value.nbytes for value in load_file(checkpoint / "optimizer.safetensors").values())
    assert planner.estimate.steady["optimizer"] == pytest.approx(state, rel=0.01)
    assert planner.estimate.steady["average"] == sizes.trained_bytes
    assert planner.estimate.checkpoint_bytes() == pytest.approx(size_of(checkpoint), rel=0.02)
    tables = sum(size_of(file.parent) for file in (tmp_path / "cache").glob("*/table.json"))
    assert sum(found.bytes for found in planner.caches) == pytest.approx(tables, rel=0.05)
    assert capsys.readouterr().out == ""
    plan(settings(tmp_path, *overrides))
    text = capsys.readouterr().out
    assert "encoding" in {phase.name for phase in planner.phases}
    assert "encoding" not in text
    assert "encoded features are there already" in text
    assert "4 an epoch (16 images, 4 a step); 4 in all, 1 epochs" in text


RUNS = [
    ("model=decoder", "trainer.gradient_checkpointing=true", "trainer.grad_accumulation=2"),
    ("model=decoder", "adapter=dora", "precision=bf16"),
    ("model=prior",),
    ("model=prior", "adapter=lora", "trainer.gradient_checkpointing=true"),
]


@pytest.mark.parametrize("overrides", RUNS, ids="-".join)
def test_a_step_without_data_holds_what_one_with_data_holds(
    overrides: tuple[str, ...], tmp_path: Path, accelerator: Accelerator
) -> None:
    cfg = settings(tmp_path, f"trainer.batch_size={BATCH}", *overrides)
    planned = DryRun(cfg, accelerator).passes()
    stage = build.stage(cfg, build.weights(cfg))
    network: Any = stage.place(torch.device("cpu")).train()
    features = features_of(stage, cfg.data.resolution)
    bf16 = cfg.precision.name == "bf16"
    with TensorTracker([*network.parameters(), *network.buffers(), *features.values(), stage.alphas_cumprod]) as live:
        for _ in range(cfg.trainer.grad_accumulation):
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss = stage.loss(network, features, torch.Generator()).loss
            loss.backward()
            del loss
    assert planned.gradients == live.now
    assert planned.peak == pytest.approx(live.peak, rel=0.01)


def features_of(stage: Any, side: int) -> dict[str, torch.Tensor]:
    examples = {"clip_pixels": torch.randn(BATCH, 3, 64, 64)}
    if stage.name == "decoder":
        examples["pixels"] = torch.randn(BATCH, 3, side, side)
    else:
        examples |= {"input_ids": torch.zeros(BATCH, 77, dtype=torch.long), "text_mask": torch.ones(BATCH, 77).bool()}
    stage.null_condition()
    return dict(stage.encode(examples))


def measured(overrides: list[str], root: Path) -> None:
    """In a process of its own: what a plan says of each phase, and what the run takes."""
    cfg = composed(root, *overrides, verb="plan")
    with distributed.accelerated(lambda: build.accelerator(cfg)) as accelerator:
        planner = Planner(cfg, accelerator)
    peaks = PhasePeaks()
    logging.getLogger("kandinsky_exp").addHandler(peaks)
    train(root, *overrides)
    said = {phase.name: (phase.total, phase.accuracy) for phase in planner.phases}
    print(json.dumps([planner.python, said, peaks.found]))


def test_the_peaks_of_a_real_run_are_near_the_planned_ones(tmp_path: Path) -> None:
    """With captions of full length, which it reckons with."""
    prepare(tmp_path, ["tracker=none"])
    shutil.copytree(EMOJI / "train", tmp_path / "pictures")
    lines = (tmp_path / "pictures" / "metadata.jsonl").read_text().splitlines()
    rows = [json.loads(line) | {"text": "heart " * 80} for line in lines]
    (tmp_path / "pictures" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = ["data=folder", f"data.path={tmp_path}/pictures"]
    overrides = ["tracker=none", "model=prior", "trainer.batch_size=640", "trainer.max_steps=1", *data]
    # Not forked: such a process has pages of the libraries in memory only once it has used them.
    code = f"import sys; sys.path[:0] = {sys.path!r}; import test_plan; test_plan.measured({overrides!r}, {tmp_path!r})"
    code = f"from pathlib import PosixPath; {code}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    printed = done.stdout
    python, said, found = json.loads(printed.splitlines()[-1])
    assert found["training"] > 2 * python  # else it says nothing of tensors
    assert found.keys() == phase_peaks.ENDS.keys()
    for phase, peak in found.items():
        planned, accuracy = max(said[name] for name in phase_peaks.ENDS[phase][1] if name in said)
        assert planned == pytest.approx(peak, rel=accuracy), phase


# --- what loading holds


class Watched(PriorStage):
    """Encodes, and knows whether what trains was in memory by then."""

    loaded_before: ClassVar[list[bool]] = []

    def encode(self, examples: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        self.loaded_before.append("network" in vars(self))
        return super().encode(examples)


def test_what_trains_loads_once_all_is_encoded(tmp_path: Path) -> None:
    cfg = composed(tmp_path, "tracker=none", "model=prior", f"model._target_={__name__}.Watched", "adapter=lora")
    Watched.loaded_before.clear()
    run(cfg, [__name__])
    assert Watched.loaded_before
    assert not any(Watched.loaded_before)


def test_a_frozen_network_is_read_as_it_will_be_and_its_statistics_exactly(tmp_path: Path) -> None:
    def prior(*overrides: str) -> Any:
        cfg = settings(tmp_path, "model=prior", *overrides)
        return build.stage(cfg, build.weights(cfg))

    whole, adapted = prior(), prior("adapter=lora", "precision=bf16")
    for name in ("mean", "std"):
        assert torch.equal(getattr(adapted, name), getattr(whole, name))
    assert not torch.equal(whole.mean, whole.mean.bfloat16().float()), "else it says nothing"
    assert adapted.weights.load_trainable("prior").dtype == torch.bfloat16
    frozen = dict(adapted.network.named_parameters())
    for name, value in whole.network.named_parameters():
        name = name if name in frozen else re.sub(r"\.(weight|bias)$", r".base_layer.\1", name)
        assert torch.equal(frozen[name], value.bfloat16())


def test_files_that_are_cast_lie_beside_what_is_read_from_them(tmp_path: Path, accelerator: Accelerator) -> None:
    hollow.write(BENCH, tmp_path / "weights", "F16")
    weights = [f"weights.{side}={tmp_path / 'weights' / side}" for side in ("prior", "decoder")]
    overrides = ["model=prior", "precision=bf16", "adapter=lora"]
    planner = Planner(settings(tmp_path, *overrides, *weights), accelerator)
    counts = {part: planner.dry_run.part(part)[0] for part in ("image_encoder", "text_encoder")}
    loading = next(phase for phase in planner.phases if phase.name == "loading")
    assert loading.parts["frozen encoders"] == 2 * sum(counts.values())
    assert loading.parts["mapped files"] == 2 * counts["text_encoder"]
    assert loading.needed == loading.total - loading.parts["mapped files"]
    encoding = next(phase for phase in planner.phases if phase.name == "encoding")
    assert "frozen weights" not in encoding.parts
    assert planner.dry_run.mapped("text_encoder", "float16") == 0, "what has the type of its file stays in it"
    assert planner.dry_run.mapped("text_encoder", "float32") == 2 * counts["text_encoder"]


# --- parts of a plan

OPTIMIZERS = [
    ("optimizer=adamw",),
    ("optimizer=sgd",),
    ("optimizer=adafactor",),
    ("optimizer=adafactor", "optimizer.beta1=0.9"),
    ("optimizer=adamw", "optimizer._target_=torch.optim.Adamax"),
]


@pytest.mark.parametrize("overrides", OPTIMIZERS, ids="-".join)
def test_the_state_of_an_optimizer_is_known_without_making_it(
    overrides: tuple[str, ...], tmp_path: Path, accelerator: Accelerator
) -> None:
    cfg = settings(tmp_path, *overrides)
    shapes = ((320, 64), (640,), (32, 64, 3, 3), (7, 1280), ())
    weights = [torch.nn.Parameter(torch.ones(shape)) for shape in shapes]
    optimizer = build.make_optimizer(cfg, weights, accelerator.device)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    kept = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)]
    need = optimizer_state.measure(cfg, weights, torch.device("cpu"))
    assert need.state == pytest.approx(sum(value.nbytes for value in kept), abs=32)


def test_a_state_that_is_not_of_the_weights_does_no_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some optimizers count their steps in `state["step"]`."""
    (tmp_path / "counting.py").write_text(
        "import torch\nclass Counting(torch.optim.SGD):\n    def step(self, closure=None):\n"
        "        self.state['step'] = 1\n        return super().step(closure)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    cfg = settings(tmp_path, "optimizer=sgd", "optimizer._target_=counting.Counting")
    allowlist.remember(cfg, ["counting"])
    assert optimizer_state.measure(cfg, [torch.nn.Parameter(torch.ones(8, 8))], torch.device("cpu")).state >= 0


def test_activations_follow_batch_checkpointing_and_resolution(tmp_path: Path, accelerator: Accelerator) -> None:
    def activations(*overrides: str) -> int:
        passes = DryRun(settings(tmp_path, *overrides), accelerator).passes()
        return passes.peak - passes.gradients

    whole = activations("model=prior", "trainer.batch_size=64")
    assert activations("model=prior", "trainer.batch_size=32") == pytest.approx(whole / 2, rel=0.15)
    assert activations("model=prior", "trainer.batch_size=64", "trainer.gradient_checkpointing=true") < 0.8 * whole
    small, large = (DryRun(settings(tmp_path, f"data.resolution={side}"), accelerator) for side in (64, 128))
    assert large.answering("unet", 2) > 3 * small.answering("unet", 2)


def test_pictures_that_are_measured_are_planned(tmp_path: Path, accelerator: Accelerator) -> None:
    """They are drawn in full batches, and then judged by encoders that a run of features has let go."""
    words = ["model=prior", "data.max_samples=null", "validation.batch_size=8"]
    nothing, measures = (
        Planner(settings(tmp_path, *words, *more), accelerator) for more in ([], ["validation.metrics=[cmmd]"])
    )
    drawn = [{phase.name: phase for phase in planner.phases} for planner in (nothing, measures)]
    (new,) = drawn[1].keys() - drawn[0].keys()
    assert drawn[1][new].parts["parts that draw"] > 0
    image_encoder = measures.estimate._size(["image_encoder"])
    assert max(sum(parts.values()) for parts in measures.estimate._drawing()) >= image_encoder


@pytest.mark.parametrize("model", ["prior", pytest.param("decoder", marks=pytest.mark.soak)])
def test_class_images_are_drawn_encoded_and_shown(model: str, tmp_path: Path, accelerator: Accelerator) -> None:
    pictures = ["data=dreambooth", f"data.instance_path={EMOJI / 'validation'}", "data.instance_prompt=a sks thing"]
    common = [f"model={model}", *pictures, "data.max_samples=null", "data.resolution=64", "trainer.batch_size=2"]
    alone = Planner(settings(tmp_path, *common), accelerator)
    assert (alone.train, alone.held_out, len(alone.caches)) == (16, 0, 1), "of so few none is held out"
    both = Planner(settings(tmp_path, *common, "data.class_prompt=a thing", "data.num_class_images=5"), accelerator)
    assert [found.images for found in both.caches] == [16, 5]
    assert {phase.name for phase in both.phases} - {phase.name for phase in alone.phases} == {"class"}
    twice = DryRun(settings(tmp_path, *common, "trainer.batch_size=4"), accelerator)
    assert both.dry_run.passes() == twice.passes()
    assert both.dry_run.passes().peak > alone.dry_run.passes().peak
    assert all(size >= 0 for phase in both.phases for size in phase.parts.values())


def test_a_storage_counts_once_and_as_long_as_it_lives() -> None:
    held = torch.ones(250)
    with TensorTracker([held]) as live:
        first = torch.ones(1000)
        second = first.view(10, 100)[2:] + held.sum()
        assert live.now == 4000 + 3200 + live.now % 100
        del first, second
        torch.ones(10)
    assert live.now == 0
    assert 7200 <= live.peak <= 7210


# --- too small


def test_too_little_memory_is_told_with_the_cheapest_setting_that_fits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["model=prior", "trainer.batch_size=512", "checkpoint.behind=false"]
    enough = plan(settings(tmp_path, *base))
    assert "warning" not in capsys.readouterr().out
    plan(settings(tmp_path, *base, f"device_memory={enough - 0.05}"))
    text = capsys.readouterr().out
    assert re.search(r"warning: \S+ GB are needed, and there are \S+ GB", text)
    named = re.search(r"the cheapest setting that fits: (.*) \(", text)
    assert named is not None
    assert "trainer.gradient_checkpointing=true" in named[1]
    assert plan(settings(tmp_path, *base, *named[1].split())) <= enough - 0.05


def test_settings_are_added_up_and_the_dear_ones_left_out_again(tmp_path: Path) -> None:
    cfg = settings(tmp_path, "trainer.batch_size=4", "trainer.ema_decay=0.9")
    device = torch.device("cpu")

    def fits(changed: DictConfig) -> bool:
        return bool(changed.trainer.gradient_checkpointing and changed.adapter.name == "lora")

    assert savings.cheapest(cfg, device, fits) == ("trainer.gradient_checkpointing=true", "adapter=lora")
    assert savings.cheapest(cfg, device, lambda changed: changed.trainer.batch_size == 1) == (
        "trainer.batch_size=1",
        "trainer.grad_accumulation=4",
    )
    assert savings.cheapest(cfg, device, lambda changed: False) is None


def test_nothing_fits_into_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan(settings(tmp_path, "model=prior", "device_memory=0.001"))
    assert "none of the settings that save memory makes it fit" in capsys.readouterr().out


# --- nothing is loaded


def test_weights_without_data_are_enough(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hollow.write(BENCH, tmp_path / "weights")
    weights = [f"weights.{side}={tmp_path / 'weights' / side}" for side in ("prior", "decoder")]
    overrides = [
        *weights,
        "model=prior",
        "precision=bf16",
        "adapter=lora",
        "adapter.init=pissa",
        "validation.prompts=[a fox]",
    ]
    assert plan(settings(tmp_path, *overrides)) > 0.3
    assert "drawing" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="clip_std has zeros"):  # what loading makes of them
        train(tmp_path, "tracker=none", *overrides)
    assert not list((tmp_path / "cache").rglob("images.arrow")), "told before anything is encoded"


def from_hub(cache: Path, words: list[str]) -> None:
    """The command, in a process of its own, with another cache of the hub: what HF_HUB_CACHE sets before imports."""
    constants.HF_HUB_CACHE = str(cache)
    command(words)


def test_of_a_hub_repository_only_the_configs_are_needed(tmp_path: Path, tiny_folder: Path) -> None:
    for side, parts in hollow.SIDES.items():
        snapshot = tmp_path / f"models--someone--{side}" / "snapshots" / "0"
        for part in parts:
            name = "scheduler" if part.endswith("scheduler") else part
            source = tiny_folder / (f"prior_{name}" if side == "prior" else name)
            shutil.copytree(source, snapshot / name, ignore=shutil.ignore_patterns("*.safetensors"))
        (snapshot / "model_index.json").write_text("{}")
        (snapshot.parents[1] / "refs").mkdir()
        (snapshot.parents[1] / "refs" / "main").write_text("0")
    sources = ["weights.prior=someone/prior", "weights.decoder=someone/decoder"]
    words = ["plan", *SMALL, "weights=kandinsky22", *sources, "model=prior", "tracker=none"]
    process = Forked(from_hub, tmp_path, [*words, f"output_root={tmp_path / 'out'}"])
    printed = process.finish()
    assert process.code == 0, printed
    assert "parameters  " in printed
    assert not (tmp_path / "out").exists()


# --- the command


def test_a_sweep_of_plans_leaves_no_run_behind(tmp_path: Path) -> None:
    prepare(tmp_path, ["tracker=none"])
    given = [f"output_root={tmp_path}", "tracker=none", "model=prior", "adapter=none,lora"]
    process = Forked(command, ["plan", "--multirun", *SMALL, *given])
    printed = process.finish()
    assert process.code == 0, printed
    jobs = [line.split(",")[1].split()[0] for line in printed.splitlines() if line.startswith("prior, ")]
    assert jobs == ["all", "lora"], printed
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_a_bad_config_is_refused_as_by_a_run(tmp_path: Path) -> None:
    process = Forked(command, ["plan", *SMALL, f"output_root={tmp_path}", "trainer.batch_size=0", "device_memory=-1"])
    printed = process.finish()
    assert process.code == 2
    assert "trainer.batch_size: has to be a whole number, at least 1, not 0" in printed
    assert "device_memory: has to be a number, above 0, or null, not -1" in printed
    assert list(tmp_path.iterdir()) == []


def test_of_a_set_on_the_hub_the_page_is_enough(tmp_path: Path) -> None:
    sizes = "  - name: train\n    num_examples: 1221\n  - name: test\n    num_examples: 12\n"
    (tmp_path / "README.md").write_text(f"---\ndataset_info:\n  features: []\n  splits:\n{sizes}---\n")
    (tmp_path / "data.csv").write_text("a\n1\n")
    found = hub_rows.announced(str(tmp_path), "train", "test", None, limit=500)
    assert found.train.count == 500
    assert found.validation is not None
    assert found.validation.count == 12
    assert hub_rows.announced(str(tmp_path), "train", "validation", None).validation is None
