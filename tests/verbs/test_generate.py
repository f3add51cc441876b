"""`kandinsky-exp generate`: every kind of source on either side."""

import json
import os
import re
import shlex
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import Forked
from drawing import STEPS, drawn
from running import client, composed, runs, shared, train
from safetensors.torch import load_file, save_file

from kandinsky_exp.errors import ConfigError
from kandinsky_exp.models.adapter_files import WEIGHTS_NAME
from kandinsky_exp.models.components import PipelineHalf
from kandinsky_exp.runs.model_sources import ModelSource, find_origins
from kandinsky_exp.system.files import occupied

BAD = f"bad-{os.getpid()}"  # the workers share the folder


@pytest.fixture(scope="module")
def root() -> Path:
    """Four runs. A test draws there under names that no other test takes."""

    def make(folder: Path) -> None:
        unwatched = ["validation.every=100", "validation.reconstructions=0"]
        for stage in ("prior", "decoder"):
            train(folder, f"model={stage}", f"name={stage}", "trainer.ema_decay=0.5", *unwatched)
        train(folder, "model=prior", "name=lora", "adapter=lora", "optimizer.lr=1", *unwatched)
        train(folder, "model=decoder", "name=dora", "adapter=dora", "optimizer.lr=1", *unwatched)

    return shared("generate", make)


def test_tiny_pair(root: Path) -> None:
    images = drawn(root, "tiny", "weights=tiny", "num_images=2")
    assert len(images) == 4
    assert images[0].shape == (64, 64, 3)
    assert not np.array_equal(images[0], images[1]), "two images of one prompt start from other noise"
    folder = root / "generate" / "tiny"
    assert (folder / "prompts.txt").read_text().splitlines()[2] == "02.png\ta dog"
    assert (folder / "grid.png").is_file()


def test_prompts_that_are_too_long_are_named(root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words, more = "a cat and a dog " * 30, "blurry and dark " * 30
    drawn(root, "long", "weights=tiny", f"prompts=[{words}the end, short]", f"negative_prompt={more}", "num_images=2")
    said = [
        line for line in capfd.readouterr().err.splitlines() if " is longer than 77 tokens: it is read up to" in line
    ]
    assert [line[:25] for line in said] == ["prompts: 'a cat and a dog", "negative_prompt: 'blurry "]


def test_same_seed_same_images(root: Path) -> None:
    first, second, third = (
        drawn(root, name, "weights=tiny", f"seed={seed}") for name, seed in (("s0", 1), ("s1", 1), ("s2", 2))
    )
    assert np.array_equal(first, second)
    assert not np.array_equal(first, third)


def test_run_folder_checkpoint_run_id_and_pipeline_agree(root: Path) -> None:
    run_id = next(run.info.run_id for run in runs(root) if run.info.run_name == "decoder")
    sources = {
        "run": root / "decoder",
        "checkpoint": root / "decoder" / "checkpoints" / "step-00000004",
        "id": run_id,
        "pipeline": root / "decoder" / "pipeline",
    }
    images = {
        name: drawn(root, f"from-{name}", "weights=tiny", f"decoder={source}") for name, source in sources.items()
    }
    assert all(np.array_equal(images["run"], other) for other in images.values())
    earlier = drawn(root, "early", "weights=tiny", f"decoder={root}/decoder/checkpoints/step-00000002")
    assert not np.array_equal(images["run"], earlier)


def test_the_other_side_defaults_to_what_the_run_started_from(root: Path) -> None:
    assert np.array_equal(
        drawn(root, "implied", f"prior={root}/prior"), drawn(root, "explicit", f"prior={root}/prior", "decoder=tiny")
    )


def test_the_revision_of_the_base_is_the_runs_own(root: Path, tmp_path: Path) -> None:
    """A checkpoint goes into the very base that it was trained on, not into what `main` holds by now."""
    run_folder = tmp_path / "elsewhere"
    shutil.copytree(root / "decoder", run_folder, symlinks=True)
    saved = (run_folder / "config.yaml").read_text()
    saved = saved.replace("decoder: tiny", "decoder: nobody/nothing").replace("prior: tiny", "prior: nobody/nothing")
    saved = saved.replace("prior_revision: null", "prior_revision: p1").replace(
        "decoder_revision: null", "decoder_revision: d1"
    )
    (run_folder / "config.yaml").write_text(saved)
    checkpoint = run_folder / "checkpoints" / "step-00000004"
    origins = find_origins(composed(root, *STEPS, f"decoder={checkpoint}", verb="generate", small=[]))
    assert (origins["decoder"].base, origins["decoder"].revision) == ("nobody/nothing", "d1")
    assert (origins["prior"].base, origins["prior"].revision) == ("nobody/nothing", "p1")


def origins(root: Path, *overrides: str) -> dict[PipelineHalf, ModelSource]:
    return find_origins(composed(root, *STEPS, *overrides, verb="generate", small=[]))


def test_adapter_run(root: Path) -> None:
    """By its folder as a side, or as an adapter; by a checkpoint, by its run's id."""
    as_side, base = drawn(root, "lora", f"prior={root}/lora"), drawn(root, "base", "weights=tiny")
    assert not np.array_equal(as_side, base)
    assert np.array_equal(drawn(root, "as-adapter", f"prior_adapter={root}/lora"), as_side)
    run_id = next(run.info.run_id for run in runs(root) if run.info.run_name == "lora")
    expected, step = root / "lora" / "adapter", root / "lora" / "checkpoints" / "step-00000004"
    for source, folder in ((expected, expected), (run_id, expected), (step, step / "prior"), (step / "prior",) * 2):
        (found,) = origins(root, f"prior_adapter={source}")["prior"].adapters
        assert (found.folder, found.run_id, found.run_folder) == (folder, run_id, root / "lora")


def test_adapters_have_scales(root: Path) -> None:
    """0 is the base; one number for all, or one for each; what both change together is neither of them alone."""
    lora, dora = f"prior_adapter={root}/lora", f"decoder_adapter={root}/dora"
    assert np.array_equal(drawn(root, "none", lora, dora, "adapter_scale=0"), drawn(root, "unscaled", "weights=tiny"))
    first, alone = drawn(root, "first", lora, dora, "adapter_scale=[1,0]"), drawn(root, "alone", lora)
    assert np.array_equal(first, alone)
    assert not np.array_equal(drawn(root, "both", lora, dora), first)
    halves = drawn(root, "halves", f"prior_adapter=[{root}/lora,{root}/lora]", "adapter_scale=[0.25,0.75]")
    assert np.abs(np.subtract(halves, alone, dtype=int)).max() <= 2  # their sum is rounded elsewhere


def test_an_adapter_goes_onto_another_base_and_brings_its_own(root: Path) -> None:
    trained = drawn(root, "on-trained", f"prior={root}/prior", f"prior_adapter={root}/lora")
    assert not np.array_equal(trained, drawn(root, "only-trained", f"prior={root}/prior"))
    found = origins(root, f"decoder_adapter={root}/dora")  # not the hub's, which is what `weights` says
    assert (found["prior"].base, found["decoder"].base) == ("tiny", "tiny")
    assert found["decoder"].adapters[0].folder == root / "dora" / "adapter"


def test_both_stages_of_a_sweep_are_found_by_its_folder(root: Path, tmp_path: Path) -> None:
    sweep = tmp_path / "both"
    for job, run in (("model=prior", "lora"), ("model=decoder", "dora")):
        shutil.copytree(root / run, sweep / job, symlinks=True)
    (sweep / "run.json").write_text('{"stage": "sweep"}')
    by_side = origins(root, f"prior={sweep}", f"decoder={sweep}")
    loose = origins(root, f"prior_adapter={sweep}", f"decoder_adapter={sweep}")
    for found in (by_side, loose):
        assert found["prior"].adapters[0].folder == sweep / "model=prior" / "adapter"
        assert found["decoder"].adapters[0].folder == sweep / "model=decoder" / "adapter"
    shutil.copytree(root / "lora", sweep / "again", symlinks=True)
    with pytest.raises(ConfigError, match=r"prior: .* is a sweep with 2 such jobs \('again', 'model=prior'\)"):
        origins(root, f"prior={sweep}")


def test_an_adapter_of_another_base_is_refused(root: Path, tmp_path: Path) -> None:
    tensors = load_file(root / "dora" / "adapter" / WEIGHTS_NAME)
    wide = {name: torch.cat([value, value], dim=1) if "lora_A" in name else value for name, value in tensors.items()}
    strange = {name.replace("attentions.0", "attentions.9"): value for name, value in tensors.items()}
    for content, message in ((wide, "inputs, the base's has 64"), (strange, "attentions.9.* which the base has not")):
        save_file(content, tmp_path / WEIGHTS_NAME)
        with pytest.raises(ConfigError, match=f"decoder: .* does not fit tiny: .*{message}"):
            drawn(root, BAD, "weights=tiny", f"decoder_adapter={tmp_path}")
    save_file({"some.weight": torch.zeros(2)}, tmp_path / WEIGHTS_NAME)
    with pytest.raises(ConfigError, match=r"decoder_adapter: .* holds no LoRA"):
        drawn(root, BAD, "weights=tiny", f"decoder_adapter={tmp_path}")


def test_negative_prompt_size_and_file_of_prompts(root: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("a cat, sitting\n")
    images = drawn(root, "file", "weights=tiny", f"prompts={file}", "negative_prompt=blue", "height=96", "width=64")
    assert [image.shape for image in images] == [(96, 64, 3)]
    assert not np.array_equal(images, drawn(root, "plain", "weights=tiny", f"prompts={file}", "height=96", "width=64"))


def test_images_can_be_logged_to_the_run_that_made_them(root: Path) -> None:
    drawn(root, "logged", f"decoder={root}/decoder", "log_to_run=true")
    run_id = next(run.info.run_id for run in runs(root) if run.info.run_name == "decoder")
    logged = {file.path for file in client(root).list_artifacts(run_id, "generate/logged")}
    assert "generate/logged/grid.png" in logged


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["weights=tiny", "decoder={root}/prior"],
            "decoder: .*no trained decoder, it is of the prior; give it as prior=",
        ),
        (["weights=tiny", "prior={root}/nowhere"], "prior: there is no folder"),
        (["weights=tiny", "decoder=0123456789abcdef0123456789abcdef"], "has no run 0123"),
        (["weights=tiny", "decoder={root}/prior/checkpoints/step-00000004"], "holds no trained decoder"),
        (["weights=tiny", "log_to_run=true"], "log_to_run: neither"),
        (["weights=tiny", "prompts=[]"], "prompts: is empty"),
        (["weights=tiny", "prompts=missing.txt"], "prompts: there is no text file"),
        (["weights=tiny", "height=63"], "height: has to be a whole number, a multiple of 8"),
        (["prior=nobody/nothing", "decoder=tiny"], "could not be fetched from the hub"),
        (
            ["weights=tiny", "prior_adapter={root}/dora"],
            "prior_adapter: .* is of the decoder; give it as decoder_adapter=",
        ),
        (
            ["weights=tiny", "decoder_adapter={root}/decoder"],
            "decoder_adapter: .* trained all weights, no adapter; it is",
        ),
        (["weights=tiny", "decoder_adapter={root}/nowhere"], "decoder_adapter: .*there is no such run or folder"),
        (["weights=tiny", "decoder_adapter=nobody/nothing"], "decoder_adapter: .* could not be fetched from the hub"),
        (["weights=tiny", "decoder_adapter={root}/dora", "adapter_scale=[1,2]"], "adapter_scale: 2 for 1 adapters"),
        (["weights=tiny", "adapter_scale=0.5"], "adapter_scale: is set, but there is no adapter"),
        (["weights=tiny", "adapter_scale=.inf", "decoder_adapter={root}/dora"], "adapter_scale: has to be"),
    ],
)
def test_bad_sources(root: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        drawn(root, BAD, *(text.format(root=root) for text in overrides))


@pytest.mark.parametrize(
    ("status", "keeps", "message"),
    [
        (
            "FAILED",
            1,
            r"failed \(train\.log says why\) and left no result; give its newest checkpoint, {typed}, or go on",
        ),
        (
            "KILLED",
            1,
            r"was stopped and left no result; give its newest checkpoint, {typed}, or go on with it first, by",
        ),
        (
            "RUNNING",
            1,
            r"was killed and left no result; give its newest checkpoint, {typed}, or go on with it first, by",
        ),
        (
            "FINISHED",
            1,
            r"is finished, but its result is gone; give its newest checkpoint, {typed}, or train it once more",
        ),
        (
            "FAILED",
            0,
            r"failed .* left no result, and there is no checkpoint of it; go on with it first, by the command",
        ),
    ],
)
@pytest.mark.parametrize(("run", "key"), [("prior", "prior"), ("lora", "prior"), ("lora", "prior_adapter")])
def test_a_run_without_a_result_says_what_can_be_had_of_it(
    root: Path, tmp_path: Path, run: str, key: str, status: str, keeps: int, message: str
) -> None:
    """What the message says to give is taken as it is printed."""
    folder = left_by(root / run, tmp_path / "a=b", status, keeps)
    step = folder / "checkpoints" / "step-00000004"
    typed = f"'{key}=\"{step}\"'"
    with pytest.raises(ConfigError, match=f"{key}: {re.escape(str(folder))} " + message.format(typed=re.escape(typed))):
        origins(root, f"{key}='{folder}'", "weights=tiny")
    if keeps:
        (override,) = shlex.split(typed)
        found = origins(root, override, "weights=tiny")["prior"]
        assert (found.network or found.adapters[0].folder).parent == step


def left_by(run: Path, folder: Path, status: str, keeps: int) -> Path:
    shutil.copytree(run, folder, symlinks=True)
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(record | {"status": status}))
    for name in ("pipeline", "adapter", *(() if keeps else ("checkpoints",))):
        shutil.rmtree(folder / name, ignore_errors=True)
    return folder


def test_a_run_that_trains_now_is_told_from_one_that_was_killed(root: Path, tmp_path: Path) -> None:
    folder = left_by(root / "prior", tmp_path / "now", "RUNNING", 0)
    other = Forked(hold, folder)
    other.wait_until(lambda: "held" in other.printed())
    with pytest.raises(ConfigError, match=r"is running, and has no result yet, and there is no checkpoint .* wait for"):
        origins(root, f"prior={folder}", "weights=tiny")
    other.kill()
    with pytest.raises(ConfigError, match="was killed and left no result, and there is no checkpoint"):
        origins(root, f"prior={folder}", "weights=tiny")


def hold(folder: Path) -> None:
    """Keep a run's folder as a process does that trains there."""
    with occupied(folder):
        print("held", flush=True)
        signal.pause()
