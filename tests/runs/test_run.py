"""The contract of a run: what it writes, what it records, what it returns."""

import contextlib
import json
import math
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoPipelineForText2Image, DiffusionPipeline, PriorTransformer, UNet2DConditionModel
from PIL import Image
from running import PROMPTS, client, history, network, runs, same, stopped_at, train
from safetensors.torch import load_file

from kandinsky_exp import run_settings
from kandinsky_exp.errors import ConfigError, NonFiniteLoss
from kandinsky_exp.models import adapters, compatibility
from kandinsky_exp.runs import run_folder
from kandinsky_exp.tiny.pipelines import build as build_tiny

# Validated at step 0 and at the end, without pictures.
QUIET = ["validation.every=100", "validation.reconstructions=0"]


@pytest.fixture(scope="module")
def decoder_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("decoder")
    train(root, "model=decoder", "name=d", PROMPTS, "trainer.ema_decay=0.9")
    return root


@pytest.fixture(scope="module")
def prior_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("prior")
    train(root, "model=prior", "name=p", PROMPTS)
    return root


def test_run_folder(decoder_root: Path) -> None:
    folder = decoder_root / "d"
    assert {path.name for path in folder.iterdir()} == {
        "config.yaml", "run.json", "train.log", "checkpoints", "samples", "pipeline",
    }  # fmt: skip
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-00000002", "step-00000004"]
    checkpoint = folder / "checkpoints" / "step-00000004"
    assert {path.name for path in checkpoint.iterdir()} == {"unet", "unet_ema", "optimizer.safetensors", "state.json"}
    assert sorted(path.name for path in (folder / "samples").iterdir()) == [
        "step-00000000", "step-00000002", "step-00000004",
    ]  # fmt: skip
    assert sorted(path.name for path in (folder / "samples" / "step-00000004").iterdir()) == [
        "00.png", "01.png", "grid.png", "prompts.txt", "reconstruction-00.png",
    ]  # fmt: skip
    with Image.open(folder / "samples" / "step-00000004" / "00.png") as image:
        assert image.size == (64, 64)
    assert "step 4: checkpoint" in (folder / "train.log").read_text()
    assert not list(decoder_root.rglob(".hydra"))


@pytest.mark.parametrize(
    ("recorded", "half"),
    [
        ({"stage": "prior", "part": "prior"}, "prior"),
        ({"stage": "mine", "part": "prior"}, "prior"),
        ({"stage": "mine", "part": "unet"}, "decoder"),
        ({"stage": "prior"}, "prior"),  # of before the part was recorded
        ({"stage": "decoder"}, "decoder"),
    ],
)
def test_the_record_tells_which_half_trained(recorded: dict[str, str], half: str, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps(recorded))
    record = run_folder.read_record(tmp_path)
    assert record is not None
    assert record.half == half


def test_records(decoder_root: Path) -> None:
    (found,) = runs(decoder_root)
    params, tags = found.data.params, found.data.tags
    assert found.info.status == "FINISHED"
    assert found.info.run_name == "d"
    assert params["optimizer.lr"] == "0.001"
    assert params["model._target_"] == "kandinsky_exp.stages.decoder.DecoderStage"
    assert params["model.snr_gamma"] == "null"
    assert tags["config.hub.push"] == "false"
    assert not [
        key for key in params if key.startswith(("hub.", "tracker.", "name", "output_root")) or "partial" in key
    ]
    assert tags["stage"] == "decoder"
    assert tags["weights"] == "tiny"
    assert len(tags["data_fingerprint"]) == 64
    assert len(tags["git_commit"]) in (40, len("unknown"))
    times = ("train/samples_per_second", "train/step_seconds", "train/data_seconds", "train/peak_memory_gb")
    for key in ("train/loss", "train/lr", "train/grad_norm", *times):
        assert list(history(decoder_root, found.info.run_id, key)) == [2, 4], key
    assert list(history(decoder_root, found.info.run_id, "validation/loss")) == [0, 2, 4]
    inputs = {entry.tags[0].value: entry.dataset for entry in found.inputs.dataset_inputs}
    assert json.loads(inputs["training"].profile) == {"num_rows": 12}
    assert {"config.yaml", "pip_freeze.txt", "prompts", "images"} <= {
        file.path for file in client(decoder_root).list_artifacts(found.info.run_id)
    }


def test_images_by_key_and_step(decoder_root: Path) -> None:
    (found,) = runs(decoder_root)
    names = [file.path for file in client(decoder_root).list_artifacts(found.info.run_id, "images")]
    for key in ("validation~00", "validation~01", "reconstruction~00", "validation~grid"):
        steps = {int(name.split("+step+")[1].split("+")[0]) for name in names if f"/{key}+" in name}
        assert steps == {0, 2, 4}, key


def test_config_artifact_is_the_whole_truth(decoder_root: Path) -> None:
    text = (decoder_root / "d" / "config.yaml").read_text()
    assert "${" not in text
    assert "ema_decay: 0.9" in text


def test_returns_the_last_validation_loss(prior_root: Path) -> None:
    (found,) = runs(prior_root)
    last = history(prior_root, found.info.run_id, "validation/loss")[4]
    assert train(prior_root, "model=prior", "name=p", PROMPTS) == pytest.approx(last)


def test_finished_run_has_nothing_left_to_do(prior_root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = sorted(path.stat().st_mtime_ns for path in (prior_root / "p" / "checkpoints").rglob("*"))
    train(prior_root, "model=prior", "name=p", PROMPTS)
    assert "nothing left to do" in capfd.readouterr().err
    assert sorted(path.stat().st_mtime_ns for path in (prior_root / "p" / "checkpoints").rglob("*")) == before
    assert len(runs(prior_root)) == 1


def test_training_changes_what_trains_and_nothing_else(prior_root: Path) -> None:
    trained = network(prior_root / "p" / "pipeline" / "prior")
    (tiny,) = (path for path in (prior_root / "cache").glob("tiny-*") if path.is_dir())
    base = network(tiny / "prior_prior")
    assert torch.equal(trained["clip_mean"], base["clip_mean"])
    assert torch.equal(trained["clip_std"], base["clip_std"])
    assert not torch.equal(trained["proj_in.weight"], base["proj_in.weight"])


# --- the three inference snippets of the Kandinsky 2.2 guide, on local folders, offline

diffusers_own = pytest.mark.filterwarnings("ignore:`callback:FutureWarning")  # its combined pipeline passes it on


@diffusers_own
def test_snippet_prior(prior_root: Path, decoder_root: Path) -> None:
    output_dir = prior_root / "p" / "pipeline"
    prior_pipeline = DiffusionPipeline.from_pretrained(output_dir, dtype=torch.float32)
    prior_components = {"prior_" + k: v for k, v in prior_pipeline.components.items()}
    pipeline = AutoPipelineForText2Image.from_pretrained(
        decoder_root / "d" / "pipeline", **prior_components, dtype=torch.float32
    )
    image = pipeline(
        prompt="A robot naruto, 4k photo", negative_prompt="blurry", num_inference_steps=2, prior_num_inference_steps=2,
        height=64, width=64,
    ).images[0]  # fmt: skip
    assert image.size == (64, 64)
    assert same(pipeline.prior_prior.state_dict(), network(output_dir / "prior"))


@diffusers_own
def test_snippet_decoder(decoder_root: Path) -> None:
    folder = decoder_root / "d" / "pipeline"
    pipeline = AutoPipelineForText2Image.from_pretrained(folder, dtype=torch.float32)
    image = pipeline(
        prompt="A robot naruto, 4k photo", num_inference_steps=2, prior_num_inference_steps=2, height=64, width=64
    ).images[0]
    assert np.asarray(image).std() > 0
    averaged = network(decoder_root / "d" / "checkpoints" / "step-00000004" / "unet_ema")
    assert same(pipeline.unet.state_dict(), averaged)


@diffusers_own
def test_snippet_checkpoint(decoder_root: Path) -> None:
    unet = UNet2DConditionModel.from_pretrained(decoder_root / "d" / "checkpoints" / "step-00000002" / "unet")
    pipeline = AutoPipelineForText2Image.from_pretrained(
        decoder_root / "d" / "pipeline", unet=unet, dtype=torch.float32
    )
    image = pipeline(
        prompt="A robot naruto, 4k photo", num_inference_steps=2, prior_num_inference_steps=2, height=64, width=64
    ).images[0]
    assert image.size == (64, 64)


def test_checkpoint_network_loads(prior_root: Path) -> None:
    PriorTransformer.from_pretrained(prior_root / "p" / "checkpoints" / "step-00000004" / "prior")


def test_untrained_parts_are_linked_and_safe_to_save_over(decoder_root: Path, tmp_path: Path) -> None:
    (tiny,) = (path for path in (decoder_root / "cache").glob("tiny-*") if path.is_dir())
    linked = decoder_root / "d" / "pipeline" / "prior_text_encoder" / "model.safetensors"
    base = tiny / "prior_text_encoder" / "model.safetensors"
    assert linked.samefile(base)
    before = base.read_bytes()
    pipeline = AutoPipelineForText2Image.from_pretrained(decoder_root / "d" / "pipeline")
    pipeline.prior_text_encoder.text_projection.weight.data.zero_()
    pipeline.prior_text_encoder.save_pretrained(linked.parent)
    assert base.read_bytes() == before


# --- the loop


@pytest.mark.parametrize("stage", ["prior", "decoder"])
def test_a_run_can_start_from_an_earlier_one(stage: str, tmp_path: Path) -> None:
    common = [f"model={stage}", "trainer.max_steps=1", "tracker=none", *QUIET]
    train(tmp_path, *common, "name=first")
    train(tmp_path, *common, "name=second", f"weights.{stage}={tmp_path}/first")
    assert (tmp_path / "second" / "pipeline" / "model_index.json").is_file()


def test_prior_without_prompts_never_touches_decoder_weights(tmp_path: Path) -> None:
    train(tmp_path, "model=prior", "weights.decoder=nobody/nothing-there", "tracker=none",
          "trainer.max_steps=1")  # fmt: skip


def test_train_loss_is_the_mean_since_the_last_point(tmp_path: Path) -> None:
    often, seldom = tmp_path / "often", tmp_path / "seldom"
    train(often, "model=prior", "trainer.log_every=1", *QUIET)
    train(seldom, "model=prior", "trainer.log_every=4", *QUIET)
    single = history(often, runs(often)[0].info.run_id, "train/loss")
    mean = history(seldom, runs(seldom)[0].info.run_id, "train/loss")
    assert list(mean) == [4]
    assert mean[4] == pytest.approx(np.mean([single[step] for step in (1, 2, 3, 4)]), rel=1e-5)


def test_accumulation_equals_a_larger_batch_up_to_noise(tmp_path: Path) -> None:
    """Two micro-batches of 2 see the rows of one batch of 4, take one step, and log one learning rate."""
    train(tmp_path, "model=prior", "name=a", "trainer.batch_size=2", "trainer.grad_accumulation=2", *QUIET)
    assert list(history(tmp_path, runs(tmp_path)[0].info.run_id, "train/lr")) == [2, 4]


@pytest.mark.parametrize("accumulation", [1, 4])
def test_learning_rate_counts_optimizer_steps(accumulation: int, tmp_path: Path) -> None:
    train(
        tmp_path, "model=prior", "scheduler=cosine", "scheduler.warmup_steps=2", "trainer.max_steps=8",
        "trainer.log_every=1", f"trainer.grad_accumulation={accumulation}", "trainer.batch_size=1",
        "validation.every=8", "checkpoint.every=8",
    )  # fmt: skip
    rates = history(tmp_path, runs(tmp_path)[0].info.run_id, "train/lr")
    expected = {
        step + 1: 1e-3 * (step / 2 if step < 2 else 0.5 * (1 + math.cos(math.pi * (step - 2) / 6))) for step in range(8)
    }
    assert rates == pytest.approx(expected, abs=1e-9)  # that of step n is the one that step n trained with


def test_validation_loss_compares_between_runs(tmp_path: Path) -> None:
    """Same weights, other weighting, dropout, batch sizes: the loss at step 0 is the same."""
    first = tmp_path / "1"
    second = tmp_path / "2"
    common = ["model=decoder", "trainer.max_steps=1", "validation.reconstructions=0"]
    train(first, *common)
    train(
        second, *common, "model.snr_gamma=5", "model.condition_dropout=0.5", "model.vlb_weight=0", "seed=3",
        "validation.batch_size=3", "trainer.batch_size=2", "data.max_samples=12",
    )  # fmt: skip
    losses = [history(root, runs(root)[0].info.run_id, "validation/loss")[0] for root in (first, second)]
    # `seed` draws which rows max_samples keeps, also of the held-out split, so equal only where rows are equal.
    assert losses[0] == pytest.approx(losses[1], rel=0.2)
    third = tmp_path / "3"
    train(third, *common, "model.snr_gamma=5", "validation.batch_size=3", "trainer.batch_size=2")
    assert history(third, runs(third)[0].info.run_id, "validation/loss")[0] == pytest.approx(losses[0], rel=1e-5)


def test_same_noise_for_validation_images_each_time(tmp_path: Path) -> None:
    """With a learning rate that moves nothing, the images of all steps are the same."""
    train(tmp_path, "model=decoder", "name=d", "optimizer.lr=1e-30", PROMPTS, "trainer.max_steps=1", "tracker=none")
    first, last = (tmp_path / "d" / "samples" / f"step-{step:08d}" for step in (0, 1))
    for name in ("00.png", "01.png", "reconstruction-00.png"):
        assert (first / name).read_bytes() == (last / name).read_bytes()
    assert (first / "00.png").read_bytes() != (first / "01.png").read_bytes()


@pytest.mark.parametrize("stage", ["prior", "decoder"])
def test_cached_fp32_features_train_like_online_ones_to_the_last_bit(stage: str, tmp_path: Path) -> None:
    """At equal batches of the encoders: 12 images in batches of 4."""
    for cache in ("true", "false"):
        train(
            tmp_path, f"model={stage}", f"name=cache-{cache}", f"data.cache={cache}", "data.cache_dtype=fp32",
            "data.encode_batch=4", "trainer.max_steps=2", "tracker=none", *QUIET,
        )  # fmt: skip
    part = "prior" if stage == "prior" else "unet"
    cached, online = (network(tmp_path / f"cache-{cache}" / "pipeline" / part) for cache in ("true", "false"))
    assert same(cached, online)


def test_max_epochs_ends_first(tmp_path: Path) -> None:
    train(tmp_path, "model=prior", "name=p", "trainer.max_epochs=1", "trainer.max_steps=100", "trainer.log_every=1",
          "tracker=none")  # fmt: skip
    assert json.loads((tmp_path / "p" / "run.json").read_text())["step"] == 3  # 12 rows in batches of 4


def test_another_optimizer_by_target(tmp_path: Path) -> None:
    train(tmp_path, "model=prior", "optimizer._target_=torch.optim.NAdam", "tracker=none")


def test_gradient_checkpointing_trains_alike(tmp_path: Path) -> None:
    for stage, part in (("prior", "prior"), ("decoder", "unet")):
        for on in ("false", "true"):
            train(
                tmp_path, f"model={stage}", f"name={stage}-{on}", f"trainer.gradient_checkpointing={on}",
                "trainer.max_steps=2", "tracker=none", *QUIET,
            )  # fmt: skip
        plain, recomputed = (network(tmp_path / f"{stage}-{on}" / "pipeline" / part) for on in ("false", "true"))
        assert same(plain, recomputed), stage


@pytest.mark.parametrize("precision", ["bf16"])
def test_half_precision_keeps_trainable_weights_in_fp32(precision: str, tmp_path: Path) -> None:
    train(tmp_path, "model=decoder", "name=d", f"precision={precision}", "data.resolution=16", "tracker=none",
          "trainer.max_steps=1", "validation.prompts=[a dog]", *QUIET)  # fmt: skip
    assert {value.dtype for value in network(tmp_path / "d" / "pipeline" / "unet").values()} == {torch.float32}
    train(tmp_path, "model=prior", "name=p", "validation.prompts=[a dog]", "tracker=none", "trainer.max_steps=1",
          *QUIET)  # fmt: skip  # another precision in the same process


def test_non_finite_loss_stops_with_step_rate_and_rows(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteLoss, match=r"at step \d.*lr 1e\+30, samples \S+\.png"):
        train(tmp_path, "model=prior", "name=p", "optimizer=sgd", "optimizer.lr=1e30", "trainer.max_steps=20",
              "trainer.max_grad_norm=null")  # fmt: skip
    (found,) = runs(tmp_path)
    assert found.info.status == "FAILED"
    assert json.loads((tmp_path / "p" / "run.json").read_text())["status"] == "FAILED"
    for folder in (tmp_path / "p" / "checkpoints").glob("step-*"):
        assert all(value.isfinite().all() for value in network(folder / "prior").values())


def bytes_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def test_lora_run_leaves_an_adapter_only(tmp_path: Path) -> None:
    train(tmp_path, "model=decoder", "name=d", "adapter=lora", "trainer.ema_decay=0.9", "trainer.max_steps=2",
          "tracker=none", *QUIET)  # fmt: skip
    folder = tmp_path / "d"
    assert not (folder / "pipeline").exists()
    tensors = load_file(folder / "adapter" / "pytorch_lora_weights.safetensors")
    assert all(not key.startswith(("unet.", "prior.")) for key in tensors)
    (tiny,) = (path for path in (tmp_path / "cache").glob("tiny-*") if path.is_dir())
    unet = UNet2DConditionModel.from_pretrained(tiny / "unet")
    unet.load_lora_adapter(folder / "adapter", weight_name="pytorch_lora_weights.safetensors", prefix=None)
    loaded = [name for name, _ in unet.named_parameters() if "lora_" in name]
    assert len(loaded) == len(tensors) > 0
    assert any("add_k_proj" in name for name in loaded)
    whole = 4 * bytes_of(tiny / "unet")  # a full one: weights, their average, and two moments
    steps = list((folder / "checkpoints").glob("step-*"))
    assert steps
    assert all(bytes_of(step) < 0.02 * whole for step in steps)


@pytest.mark.parametrize("part", ["prior", "unet"])
def test_at_true_size_a_checkpoint_of_rank_8_is_a_three_hundredth(part: str, tmp_path: Path) -> None:
    file = Path(__file__).parents[3] / "shared" / "data" / "kandinsky22" / f"{part}.json"
    if not file.is_file():
        pytest.skip("LOUD: the true-size architectures are not beside this checkout")
    shutil.copyfile(file, tmp_path / "config.json")
    network = compatibility.without_data(part, tmp_path)
    whole = sum(value.nbytes for value in network.parameters())
    adapters.attach_lora(
        network, rank=8, alpha=None, dropout=0.0, target_modules=None, use_dora=False, dtype=torch.float16
    )
    trained = sum(value.nbytes for value in network.parameters() if value.requires_grad)
    assert 0 < trained < whole / 300


# --- resuming


def test_resume_before_the_first_checkpoint_goes_on_in_the_same_mlflow_run(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteLoss):
        train(tmp_path, "model=prior", "name=p", "optimizer=sgd", "optimizer.lr=1e30", "trainer.max_grad_norm=null",
              "trainer.max_steps=4", "checkpoint.every=4", "trainer.log_every=4", *QUIET)  # fmt: skip
    assert not list((tmp_path / "p" / "checkpoints").glob("step-*"))
    train(tmp_path, "model=prior", "name=p")
    (found,) = runs(tmp_path)
    assert found.info.status == "FINISHED"


def test_interruption_writes_a_checkpoint_and_says_killed(tmp_path: Path) -> None:
    with stopped_at("step 2 of") as caught:
        train(tmp_path, "model=prior", "name=p", "trainer.max_steps=100000", "checkpoint.every=100000", *QUIET)
    assert caught.value.signal_number == signal.SIGTERM
    (found,) = runs(tmp_path)
    assert found.info.status == "KILLED"
    (folder,) = (tmp_path / "p" / "checkpoints").glob("step-*")
    step = json.loads((folder / "state.json").read_text())["step"]
    assert step > 0
    train(tmp_path, "model=prior", "name=p", f"trainer.max_steps={step + 1}", *QUIET)
    assert runs(tmp_path)[0].info.status == "FINISHED"


def test_resume_never_refuses_an_existing_name(prior_root: Path) -> None:
    with pytest.raises(ConfigError, match=r"name: the run .* exists and checkpoint.resume=never"):
        train(prior_root, "model=prior", "name=p", "checkpoint.resume=never")


def test_fork_from_a_checkpoint_of_another_run(prior_root: Path, tmp_path: Path) -> None:
    source = prior_root / "p" / "checkpoints" / "step-00000002"
    train(tmp_path, "model=prior", "name=fork", f"checkpoint.resume={source}")
    (fork,) = runs(tmp_path)
    assert fork.info.run_name == "fork"
    assert fork.data.tags["resumed_from"] == runs(prior_root)[0].info.run_id
    assert same(network(tmp_path / "fork" / "pipeline" / "prior"), network(prior_root / "p" / "pipeline" / "prior"))


def test_checkpoints_are_pruned_but_the_best_stays(tmp_path: Path) -> None:
    train(tmp_path, "model=prior", "name=p", "trainer.max_steps=6", "checkpoint.every=1", "checkpoint.keep=2",
          "validation.every=1")  # fmt: skip
    losses = history(tmp_path, runs(tmp_path)[0].info.run_id, "validation/loss")
    best = min((loss, step) for step, loss in losses.items() if step > 0)[1]
    kept = {int(folder.name.removeprefix("step-")) for folder in (tmp_path / "p" / "checkpoints").iterdir()}
    assert kept == {5, 6, best}


def test_unnamed_runs_of_one_second_get_a_suffix(tmp_path: Path) -> None:
    from kandinsky_exp.runs.run_folder import claim

    with contextlib.ExitStack() as held:
        names = {claim(tmp_path, None, "prior", "auto", held).folder.name for _ in range(3)}
    assert len(names) == 3
    assert all(name.startswith("prior-") for name in names)


def test_prompts_come_from_a_file_too(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("a fox, in = snow\n\n  a dog \n")
    assert run_settings.prompts(str(file)) == ["a fox, in = snow", "a dog"]


def test_a_strangers_weights_and_pictures(tmp_path: Path) -> None:
    """Separate prior and decoder folders as the hub has them, and an image folder with a caption column of its own."""
    combined = build_tiny(tmp_path / "cache")
    pipeline = AutoPipelineForText2Image.from_pretrained(combined)
    pipeline.prior_pipe.save_pretrained(tmp_path / "their-prior")
    pipeline.decoder_pipe.save_pretrained(tmp_path / "their-decoder")
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    rows = []
    for index in range(6):
        image = Image.fromarray(np.full((90 + index, 120, 3), 40 * index, np.uint8))
        image.save(pictures / f"{index}.jpg")
        rows.append(json.dumps({"file_name": f"{index}.jpg", "caption": [f"grey {index}", "a shade"]}))
    (pictures / "metadata.jsonl").write_text("\n".join(rows))
    for stage in ("prior", "decoder"):
        train(
            tmp_path, f"model={stage}", f"name={stage}", "data=folder", f"data.path={pictures}", PROMPTS,
            "data.caption_column=caption", "data.resolution=64", f"weights.prior={tmp_path}/their-prior",
            f"weights.decoder={tmp_path}/their-decoder", "trainer.max_steps=1",
        )  # fmt: skip
    DiffusionPipeline.from_pretrained(tmp_path / "prior" / "pipeline")
    AutoPipelineForText2Image.from_pretrained(tmp_path / "decoder" / "pipeline")
    inputs = {entry.tags[0].value: entry.dataset for entry in runs(tmp_path)[0].inputs.dataset_inputs}
    assert (inputs["training"].name, json.loads(inputs["training"].profile)) == ("pictures", {"num_rows": 5})
    assert json.loads(inputs["validation"].profile) == {"num_rows": 1}


def test_push_without_a_login_is_refused_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(ConfigError, match=r"hub\.push: nobody is logged in"):
        train(tmp_path, "model=prior", "name=p", "hub.push=true", "hub.repo_id=me/mine")
    assert not (tmp_path / "p").exists()


def test_a_refused_resume_leaves_a_finished_run_finished(tmp_path: Path) -> None:
    train(tmp_path, "model=prior", "name=p", "trainer.max_steps=1", *QUIET)
    with pytest.raises(ConfigError):
        train(tmp_path, "model=prior", "name=p", "adapter=lora", "adapter.rank=2", "trainer.max_steps=6")
    assert runs(tmp_path)[0].info.status == "FINISHED"
    assert json.loads((tmp_path / "p" / "run.json").read_text())["status"] == "FINISHED"
