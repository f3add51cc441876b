"""Checkpoints written behind: the state at their step, whole or not there, and never in the way of training."""

import contextlib
import copy
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import start
from diffusers import PriorTransformer, UNet2DConditionModel
from running import SMALL, composed, same, train
from safetensors import safe_open
from safetensors.torch import load_file
from stepping import step
from torch.utils._python_dispatch import TorchDispatchMode

from kandinsky_exp import build, cli
from kandinsky_exp.errors import CheckpointFailure, RunFailure
from kandinsky_exp.models import adapters, weight_files
from kandinsky_exp.runs import integrity  # fmt: skip
from kandinsky_exp.system import distributed, host_memory
from kandinsky_exp.training import checkpoint, ema, state_file
from kandinsky_exp.training.async_checkpoint import CheckpointWriter

STAGES = pytest.mark.parametrize("stage", ["prior", "decoder"])
PART = {"prior": "prior", "decoder": "unet"}
MODEL = {"prior": PriorTransformer, "decoder": UNet2DConditionModel}


@pytest.fixture
def trained(tiny_folder: Path, tmp_path: Path) -> Iterator[Any]:
    """Called with a stage and overrides: (training, accelerator) as a run builds them, after one made-up step."""
    with contextlib.ExitStack() as stack:

        def make(stage: str, *overrides: str) -> Any:
            weights = [f"weights.prior={tiny_folder}", f"weights.decoder={tiny_folder}"]
            cfg = composed(tmp_path, f"model={stage}", *weights, *overrides)
            accelerator = stack.enter_context(distributed.accelerated(lambda: build.accelerator(cfg)))
            made = build.training(cfg, build.stage(cfg, build.weights(cfg)), accelerator, 100)
            step(made)
            return made, accelerator

        yield make


def snapshot(training: Any, accelerator: Any) -> checkpoint.Snapshot:
    return checkpoint.snapshot(
        training, accelerator, validated=True, validation_loss=0.5, total_batch=4, order={"order": "permutation"}
    )


def files(folder: Path) -> dict[str, Any]:
    """What is in each file; safetensors writes its header in any order, so that checksums differ."""
    found = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    content = {
        name: tensors(path) if path.suffix == ".safetensors" else path.read_bytes() for name, path in found.items()
    }
    for name in [name for name in content if name.endswith("state.json")]:
        state = json.loads(content[name])
        content[name] = {key: value for key, value in state.items() if key not in ("files", "sha256")}
    return content


def tensors(path: Path) -> tuple[dict[str, str], dict[str, tuple[str, bytes]]]:
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    return metadata, {key: (str(value.dtype), value.numpy().tobytes()) for key, value in load_file(path).items()}


# --- what is in them


@STAGES
@pytest.mark.parametrize("extras", [[], ["trainer.ema_decay=0.9"]], ids=["raw", "ema"])
def test_a_checkpoint_is_what_the_libraries_write(stage: str, extras: list[str], trained: Any, tmp_path: Path) -> None:
    training, accelerator = trained(stage, *extras)
    step(training)
    model = accelerator.unwrap_model(training.network)
    folder = snapshot(training, accelerator).on_host().write(tmp_path / "checkpoints")
    assert folder.name == "step-00000002"
    model.save_pretrained(tmp_path / "theirs")
    ours, theirs = files(folder / PART[stage]), files(tmp_path / "theirs")
    assert ours.keys() == theirs.keys() == {"config.json", "diffusion_pytorch_model.safetensors"}
    assert ours == theirs
    assert same(MODEL[stage].from_pretrained(folder / PART[stage]).state_dict(), model.state_dict())
    if training.ema is not None:
        averaged = MODEL[stage].from_pretrained(folder / f"{PART[stage]}_ema")
        names = [key for key, parameter in model.named_parameters() if parameter.requires_grad]
        expected = {**model.state_dict(), **dict(zip(names, training.ema.shadow_params, strict=True))}
        assert same(averaged.state_dict(), expected)
        assert not same(averaged.state_dict(), model.state_dict())


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_an_adapter_is_what_diffusers_saves(kind: str, trained: Any, tmp_path: Path) -> None:
    training, accelerator = trained("decoder", f"adapter={kind}", "adapter.rank=2", "adapter.alpha=3",
                                    "trainer.ema_decay=0.5")  # fmt: skip
    step(training)
    folder = snapshot(training, accelerator).on_host().write(tmp_path / "checkpoints")
    model = accelerator.unwrap_model(training.network)
    model.save_lora_adapter(tmp_path / "theirs", weight_name=adapters.WEIGHTS_NAME)
    ours, theirs = folder / "unet" / adapters.WEIGHTS_NAME, tmp_path / "theirs" / adapters.WEIGHTS_NAME
    assert same(load_file(ours), load_file(theirs))
    with safe_open(ours, "pt") as first, safe_open(theirs, "pt") as second:
        settings = [json.loads(file.metadata()["lora_adapter_metadata"]) for file in (first, second)]
    for one in settings:
        one["target_modules"] = sorted(one["target_modules"])
    assert settings[0] == settings[1]
    assert settings[0]["lora_alpha"] == 3
    averaged = load_file(folder / "unet_ema" / adapters.WEIGHTS_NAME)
    assert averaged.keys() == load_file(ours).keys()
    assert not same(averaged, load_file(ours))


@STAGES
@pytest.mark.parametrize("extras", [["trainer.ema_decay=0.9"], ["adapter=lora", "adapter.rank=2"]], ids=["ema", "lora"])
def test_a_copy_is_the_state_at_its_step(stage: str, extras: list[str], trained: Any, tmp_path: Path) -> None:
    """Written after training went on, it is what was written at once; and resumed from, it is that state again."""
    training, accelerator = trained(stage, *extras)
    view = snapshot(training, accelerator)
    held = view.on_host()
    view.write(tmp_path / "at-once")
    for _ in range(3):
        step(training)
    after = copy.deepcopy(accelerator.unwrap_model(training.network).state_dict())
    folder = held.write(tmp_path / "later")
    assert files(folder) == files(tmp_path / "at-once" / "step-00000001")
    checkpoint.load(training, folder, accelerator)
    assert training.step == 1
    assert files(snapshot(training, accelerator).write(tmp_path / "again")) == files(folder)
    for _ in range(3):
        step(training)
    assert same(accelerator.unwrap_model(training.network).state_dict(), after)


def test_a_copy_takes_what_was_said_and_shares_frozen_weights(trained: Any) -> None:
    training, accelerator = trained("prior", "trainer.ema_decay=0.9")
    view = snapshot(training, accelerator)
    held = view.on_host()
    raw, averaged = (held.networks[name].tensors for name in ("prior", "prior_ema"))
    assert raw["clip_mean"] is averaged["clip_mean"]  # does not train
    assert raw["proj_in.weight"] is not averaged["proj_in.weight"]
    trainable = sum(parameter.nbytes for parameter in training.trainable)
    frozen = raw["clip_mean"].nbytes + raw["clip_std"].nbytes
    assert 4 * trainable + frozen <= view.size() < 4.1 * trainable + frozen  # weights, averages, two moments


def test_the_state_of_another_memory_format_fits(trained: Any, tmp_path: Path) -> None:
    """A checkpoint from before the decoder trained in channels-last holds contiguous moments."""
    training, accelerator = trained("decoder")
    folder = snapshot(training, accelerator).write(tmp_path / "checkpoints")
    tensors = state_file.read(folder / state_file.NAME)
    for state in tensors["optimizer"]["state"].values():
        state.update({key: value.contiguous() for key, value in state.items()})
    state_file.write(tensors, folder / state_file.NAME)
    checkpoint.load(training, folder, accelerator)
    for parameter, state in training.optimizer.state.items():
        assert state["exp_avg"].stride() == parameter.stride()
    convolution = accelerator.unwrap_model(training.network).conv_in.weight
    assert convolution.is_contiguous(memory_format=torch.channels_last)
    step(training)


@pytest.mark.parametrize("setting", ["fused", "capturable"])
def test_step_counts_go_where_the_setting_of_now_wants_them(setting: str) -> None:
    """A checkpoint made without the setting holds them on the host; the device here is one on paper."""
    parameter = torch.nn.Parameter(torch.empty(3, device="meta"))
    optimizer = torch.optim.AdamW([parameter])
    optimizer.state[parameter] = {"step": torch.tensor(5.0), "exp_avg": torch.empty(3, device="meta")}
    (group,) = optimizer.param_groups
    checkpoint._place_steps(optimizer, group)
    assert optimizer.state[parameter]["step"] == 5
    group[setting] = True
    checkpoint._place_steps(optimizer, group)
    assert optimizer.state[parameter]["step"].device.type == "meta"


# --- the writer


def test_the_writer_writes_behind_one_after_the_other(trained: Any, tmp_path: Path) -> None:
    training, accelerator = trained("prior")
    done: list[tuple[str, int]] = []
    writer = CheckpointWriter(tmp_path, 2, True, lambda folder, step: done.append((folder.name, step)))
    for _ in range(4):
        writer.save(snapshot(training, accelerator))
        step(training)
    writer.wait()
    assert done == [(f"step-{number:08d}", number) for number in (1, 2, 3, 4)]
    assert [folder.name for folder in checkpoint.complete(tmp_path)] == [
        "step-00000001", "step-00000003", "step-00000004",
    ]  # fmt: skip  # the first of those with the same loss is the best


def test_training_goes_on_while_a_checkpoint_is_written(trained: Any, tmp_path: Path) -> None:
    """The writer is held up at a named pipe: `save` has returned, the record is not made, the folder not there."""
    training, accelerator = trained("prior")
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    done = []

    def recorded(folder: Path, number: int) -> None:
        pipe.read_text()  # until somebody writes
        done.append(number)

    writer = CheckpointWriter(tmp_path / "checkpoints", 2, True, recorded)
    writer.save(snapshot(training, accelerator))
    step(training)
    assert done == []
    pipe.write_text("go on")
    writer.wait()
    assert done == [1]


def test_what_the_writer_cannot_hold_is_written_at_once(trained: Any, tmp_path: Path) -> None:
    training, accelerator = trained("prior")
    done: list[int] = []
    writer = CheckpointWriter(tmp_path, 2, False, lambda folder, step: done.append(step))
    writer.save(snapshot(training, accelerator))
    assert done == [1]


def test_no_room_for_the_copy(trained: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "kandinsky_exp")
    training, accelerator = trained("prior")
    view = snapshot(training, accelerator)
    huge = torch.empty(1 << 42, dtype=torch.uint8, device="meta")  # 4 TB, on paper
    writer = CheckpointWriter(tmp_path, 2, True, lambda *_: None)
    assert writer._copy(checkpoint.Snapshot(1, view.networks, {"huge": huge}, {})) is None
    assert "host memory has no room for a copy of 4398" in caplog.text


class TooLarge(checkpoint.Snapshot):
    """No copy of it fits, whatever was free a moment before."""

    def on_host(self) -> checkpoint.Snapshot:
        torch.empty(1 << 60, dtype=torch.uint8)
        raise AssertionError("an exabyte")


def test_a_copy_that_fails_is_written_at_once(trained: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    training, accelerator = trained("prior")
    view = snapshot(training, accelerator)
    done: list[int] = []
    writer = CheckpointWriter(tmp_path, 2, True, lambda folder, step: done.append(step))
    writer.save(TooLarge(view.step, view.networks, view.tensors, view.state))
    assert done == [1]
    assert "training waits for it" in caplog.text


class Recorder(TorchDispatchMode):
    """Notes what is asked of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.asked.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_what_is_written_at_once_takes_no_room_on_the_device(tmp_path: Path) -> None:
    """Tensors of another order in memory go to the host first: there is no host for a tensor of the meta device."""
    weight = torch.empty(2, 3, 4, 4, device="meta").to(memory_format=torch.channels_last)
    files = adapters.NetworkFiles("a.safetensors", {"weight": weight}, {}, None)
    for write in (files.write, lambda folder: state_file.write({"state": weight[:1]}, folder / "b.safetensors")):
        with Recorder() as recorder, pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
            write(tmp_path)
        assert "clone" not in recorder.asked


def test_averages_take_the_place_of_weights_without_a_copy(trained: Any) -> None:
    training, _ = trained("decoder", "trainer.ema_decay=0.9")
    step(training)  # the first average is the weights
    weights, averages = (
        [value.detach().clone() for value in values] for values in (training.trainable, training.ema.shadow_params)
    )
    places = [value.data_ptr() for value in (*training.trainable, *training.ema.shadow_params)]
    with pytest.raises(ZeroDivisionError), Recorder() as recorder, ema.averaged_weights(training):
        raise ZeroDivisionError
    assert not {"clone", "_to_copy", "copy_", "_foreach_copy_"} & {*recorder.asked}
    assert all(map(torch.equal, training.trainable, weights))
    assert all(map(torch.equal, training.ema.shadow_params, averages))
    assert places == [value.data_ptr() for value in (*training.trainable, *training.ema.shadow_params)]
    with ema.averaged_weights(training):
        assert all(map(torch.equal, training.trainable, averages))
        assert not any(map(torch.equal, training.trainable, weights))


# --- read back


@pytest.mark.parametrize("extras", [[], ["adapter=lora"]], ids=["full", "lora"])
def test_names_of_a_wrapped_network_end_the_run(extras: list[str], trained: Any, tmp_path: Path) -> None:
    """As `torch.compile` gives them where Accelerate was told to: no checkpoint of such names is of use."""
    training, accelerator = trained("prior", *extras)
    training.network = torch.compile(training.network, backend="eager")
    with pytest.raises(RunFailure, match=r"^the checkpoint of step 1 does not hold the network as it is.*_orig_mod\."):
        snapshot(training, accelerator)


def test_every_file_is_read_back(trained: Any, tmp_path: Path) -> None:
    training, accelerator = trained("prior")
    view = snapshot(training, accelerator)
    assert weight_files.written(view.on_host().write(tmp_path) / "prior") == {*training.stage.network.state_dict()}

    class Misnamed(adapters.NetworkFiles):
        def write(self, folder: Path) -> None:
            tensors = {f"module.{name}": value for name, value in self.tensors.items()}
            replace(view.networks["prior"], tensors=tensors).write(folder)

    files = view.networks["prior"]
    other = Misnamed(files.name, files.tensors, files.metadata, files.config_of)
    writer = CheckpointWriter(tmp_path / "checkpoints", 2, False, lambda *_: None)
    with pytest.raises(RunFailure, match=r"step-00000001/prior does not hold the network as it is: .*module\."):
        writer.save(replace(view, networks={"prior": other}))
    assert not list((tmp_path / "checkpoints").iterdir())


def cgroup(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(f"{content}\n")


def test_a_containers_limit_counts(tmp_path: Path) -> None:
    stat = "anon 100\ninactive_file 50\ntotal_inactive_file 50"
    root, own = tmp_path / "cgroup", tmp_path / "own"
    cgroup(root / "user" / "job", memory__max="max", memory__current=900, memory__stat=stat)
    for name, text in (("memory.max", 1000), ("memory.current", 900), ("memory.stat", stat)):
        (root / "user" / name).write_text(f"{text}\n")  # of the group above
    own.write_text("0::/user/job\n")
    assert list(host_memory.limits(root, own)) == [150]
    cgroup(root / "memory", memory__limit_in_bytes=500, memory__usage_in_bytes=600, memory__stat=stat)
    own.write_text("5:cpu:/x\n4:memory:/not/seen/from/inside\n")
    assert list(host_memory.limits(root, own)) == [0]
    assert list(host_memory.limits(root, tmp_path / "no linux")) == []
    assert host_memory.available() > 0


def test_a_failed_write_is_raised_at_the_next_point_and_the_last_one_stays(trained: Any, tmp_path: Path) -> None:
    training, accelerator = trained("prior")
    root = tmp_path / "checkpoints"
    writer = CheckpointWriter(root, 2, True, lambda *_: None)
    writer.save(snapshot(training, accelerator))
    writer.wait()
    step(training)
    (root / "step-00000002").write_text("in the way of the folder")
    writer.save(snapshot(training, accelerator))
    with pytest.raises(CheckpointFailure, match="the checkpoint of step 2 could not be written"):
        writer.save(snapshot(training, accelerator))
    assert [folder.name for folder in checkpoint.complete(root)] == ["step-00000001"]
    writer.wait()  # said once


def test_a_failed_write_does_not_hide_another_error(trained: Any, tmp_path: Path) -> None:
    training, accelerator = trained("prior")
    (tmp_path / "file").write_text("")
    writer = CheckpointWriter(tmp_path / "file" / "checkpoints", 2, True, lambda *_: None)
    with pytest.raises(KeyError), writer.settled():
        {}[writer.save(snapshot(training, accelerator))]
    with pytest.raises(CheckpointFailure), writer.settled():
        writer.save(snapshot(training, accelerator))


# --- whole runs


def test_a_run_whose_checkpoint_fails_exits_with_1(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "p" / "checkpoints").mkdir(parents=True)
    (tmp_path / "p" / "checkpoints" / "step-00000004").write_text("in the way")
    (tmp_path / "p" / "run.json").write_text('{"run_id": null, "status": "KILLED"}')
    with pytest.raises(SystemExit) as caught:
        cli.main([*SMALL, "model=prior", f"output_root={tmp_path}", "name=p", "tracker=none", "checkpoint.every=2"])
    assert caught.value.code == 1
    assert "error: the checkpoint of step 4 could not be written" in capfd.readouterr().err
    record = json.loads((tmp_path / "p" / "run.json").read_text())
    assert (record["status"], record["step"]) == ("FAILED", 2)
    (tmp_path / "p" / "checkpoints" / "step-00000004").unlink()
    train(tmp_path, "model=prior", "name=p", "tracker=none")
    assert json.loads((tmp_path / "p" / "run.json").read_text())["step"] == 4


def test_behind_or_not_leaves_the_same(tmp_path: Path) -> None:
    for behind in ("true", "false"):
        train(tmp_path, "model=prior", f"name=behind-{behind}", "tracker=none", "trainer.ema_decay=0.9",
              f"checkpoint.behind={behind}", "checkpoint.every=1")  # fmt: skip
    roots = [tmp_path / f"behind-{behind}" / "checkpoints" for behind in ("true", "false")]
    one, other = map(files, roots)
    assert one.keys() == other.keys()
    for name in one:
        if name.endswith(state_file.NAME):  # the seconds that it took are in there, too
            states = [state_file.read(root / name) for root in roots]
            assert all(state.pop("unread") for state in states)
            torch.testing.assert_close(*states, rtol=0, atol=0)
        else:
            assert one[name] == other[name]


@pytest.mark.slow
def test_killed_while_it_writes_it_goes_on_from_the_one_before(tmp_path: Path) -> None:
    process = start(tmp_path, "model=decoder", "name=d", "tracker=none", "checkpoint.every=1",
                    "trainer.max_steps=100000", "validation.every=100000", "trainer.ema_decay=0.9")  # fmt: skip
    root = tmp_path / "d" / "checkpoints"
    process.wait_until(lambda: checkpoint.complete(root) and list(root.glob(".step-*.part/*/*.safetensors")))
    process.kill()
    assert list(root.glob(".step-*.part"))
    newest = integrity.newest_good(root, print)
    assert newest is not None
    reached = integrity.read_state(newest)["step"]
    assert json.loads((tmp_path / "d" / "run.json").read_text())["step"] <= reached
    train(tmp_path, "model=decoder", "name=d", "tracker=none", "trainer.ema_decay=0.9", "checkpoint.every=1000",
          f"trainer.max_steps={reached + 1}")  # fmt: skip
    assert f"step {reached} of {reached + 1}" in (tmp_path / "d" / "train.log").read_text()
    assert not list(root.glob(".step-*.part"))
