"""What users break by accident: damaged folders, weights that are none, names that are taken, settings that changed."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import start_server
from running import client, composed, history, network, runs, same, train
from safetensors.torch import load_file

from kandinsky_exp import cli
from kandinsky_exp.data.encoded.columns import HEAD
from kandinsky_exp.data.encoded.table import FeatureTable
from kandinsky_exp.data.sources import EMOJI
from kandinsky_exp.errors import CheckpointError, ConfigError, DataError, RunFailure
from kandinsky_exp.run import run
from kandinsky_exp.training import feature_loader, state_file
from kandinsky_exp.verbs.generate import generate

QUICK = ["tracker=none", "trainer.max_steps=2"]
LATEST = "step-00000002"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with a finished prior `p` of two steps, checkpoints after both, and an adapter `l`."""
    root = tmp_path_factory.mktemp("faults")
    train(root, "model=prior", "name=p", "checkpoint.every=1", *QUICK)
    train(root, "model=prior", "name=l", "checkpoint.every=1", "adapter=lora", *QUICK)
    return root


@pytest.fixture
def root(source: Path, tmp_path: Path) -> Path:
    for name in ("p", "l"):
        shutil.copytree(source / name, tmp_path / name)
    (tmp_path / "cache").symlink_to(source / "cache")
    return tmp_path


def resume(root: Path, *overrides: str) -> None:
    train(root, "model=prior", "name=p", "tracker=none", "trainer.max_steps=3", "trainer.log_every=1", *overrides)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:100])


# --- names that are taken


def test_a_run_of_the_other_stage_is_left_alone(root: Path) -> None:
    before = {path: path.read_bytes() for path in (root / "p").glob("*.*")}
    with pytest.raises(ConfigError, match=r"name: .*p holds a prior, with which model=decoder cannot go on"):
        train(root, "model=decoder", "name=p", *QUICK)
    assert before == {path: path.read_bytes() for path in (root / "p").glob("*.*")}


def test_a_finished_run_keeps_the_config_it_was_trained_with(root: Path) -> None:
    before = (root / "p" / "config.yaml").read_text()
    train(root, "model=prior", "name=p", "optimizer.lr=0.5", *QUICK)
    assert (root / "p" / "config.yaml").read_text() == before


def test_a_refused_resume_keeps_the_config(root: Path) -> None:
    before = (root / "p" / "config.yaml").read_text()
    with pytest.raises(ConfigError, match=r"adapter\.name: was none, is lora"):
        resume(root, "adapter=lora")
    assert (root / "p" / "config.yaml").read_text() == before
    resume(root, "optimizer.lr=0.5")
    assert "lr: 0.5" in (root / "p" / "config.yaml").read_text()


def test_a_running_run_is_left_alone(root: Path) -> None:
    hold = f"import fcntl, sys; f = open({str(root / 'p' / 'train.log')!r}, 'a'); fcntl.lockf(f, fcntl.LOCK_EX); " \
           "print('held', flush=True); sys.stdin.read()"  # fmt: skip
    other = subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    assert other.stdout.readline() == "held\n"
    with pytest.raises(ConfigError, match="name: another process is training in"):
        resume(root)
    other.communicate()
    resume(root)


# --- settings that changed


def test_a_new_rate_counts_on_resume(root: Path) -> None:
    resume(root, "optimizer.lr=1e-6", "optimizer.weight_decay=0.25")
    assert "lr 1.00e-06" in (root / "p" / "train.log").read_text()
    state = checkpoint_tensors(root)["optimizer"]["param_groups"][0]
    assert (state["initial_lr"], state["lr"], state["weight_decay"]) == (1e-6, 1e-6, 0.25)


def checkpoint_tensors(root: Path) -> dict:
    return state_file.read(root / "p" / "checkpoints" / "step-00000003" / state_file.NAME)


REFUSED = [
    (["optimizer=sgd"], "optimizer._target_: was torch.optim.AdamW, is torch.optim.SGD"),
    (["seed=3"], "seed: was 0, is 3"),
    (["model.snr_gamma=5"], "model.snr_gamma: was None, is 5"),
    (["data.flip=true"], "data.flip: was False, is True"),
    (["data.max_samples=11"], "data: not the images and captions that it trains on"),
    (["trainer.batch_size=2"], "trainer.batch_size × trainer.grad_accumulation × processes: was 4, is 2"),
    (["weights.prior={root}/other"], "weights: not the encoders that it trains with"),
]


@pytest.mark.parametrize(("overrides", "message"), REFUSED, ids=[overrides[0] for overrides, _ in REFUSED])
def test_what_may_not_change_is_refused(overrides: list[str], message: str, root: Path, tiny_folder: Path) -> None:
    if "weights" in overrides[0]:
        shutil.copytree(tiny_folder, root / "other")
        config = root / "other" / "prior_text_encoder" / "config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), "mended": 1}))
    before = tree(root / "p")
    with pytest.raises(ConfigError) as caught:
        resume(root, *(text.format(root=root) for text in overrides))
    assert message in str(caught.value)
    # No checkpoint of this run fits another adapter or optimizer: a new run can begin with its result.
    way = "weights.prior" if overrides[0].startswith(("adapter", "optimizer")) else "checkpoint.resume"
    assert f"start anew under another name, with {way}={root}/p" in str(caught.value)
    assert tree(root / "p") == before


def test_all_that_may_not_change_is_listed_at_once(root: Path) -> None:
    with pytest.raises(ConfigError, match=r"(?s)cannot go on with other\n  seed.*\n  model.*\n  data: .*\n.*anew"):
        resume(root, "seed=3", "model.snr_gamma=5", "data.max_samples=11")


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_may_change_does_and_is_said(source: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").symlink_to(source / "cache")
    settings = ["model=prior", "name=p", "trainer.max_steps=2"]
    train(tmp_path, *settings)
    changes = ["trainer.max_steps=4", "trainer.log_every=1", "validation.every=1", "checkpoint.every=1"]
    train(tmp_path, *settings, *changes, "trainer.batch_size=2", "trainer.grad_accumulation=2")
    log = (tmp_path / "p" / "train.log").read_text()
    assert "going on with changed settings: trainer.max_steps 2 → 4, trainer.batch_size 4 → 2" in log
    assert "the order of the data stays the same" in log
    (found,) = runs(tmp_path)
    changed = json.loads(found.data.tags["changed_params"])
    assert changed["trainer.max_steps"] == ["2", "4"]
    assert changed["validation.every"] == ["2", "1"]
    assert list(history(tmp_path, found.info.run_id, "validation/loss")) == [0, 2, 3, 4]
    assert list(history(tmp_path, found.info.run_id, "train/loss")) == [2, 3, 4]


def test_a_data_set_may_move(root: Path) -> None:
    """It counts by what it holds."""
    shutil.copytree(EMOJI, root / "here")
    settings = ["model=prior", "name=moved", "tracker=none", "data=folder", "data.resolution=64"]
    train(root, *settings, f"data.path={root}/here", "trainer.max_steps=2")
    (root / "here").rename(root / "there")
    train(root, *settings, f"data.path={root}/there", "trainer.max_steps=3")
    assert json.loads((root / "moved" / "run.json").read_text())["step"] == 3


def test_a_fork_stopped_before_its_first_checkpoint_begins_where_it_began(root: Path) -> None:
    (root / "fork").mkdir()
    (root / "fork" / "run.json").write_text('{"run_id": null, "status": "KILLED"}')
    train(root, "model=prior", "name=fork", f"checkpoint.resume={root}/p", "tracker=none", "trainer.max_steps=3")
    resume(root)
    assert same(*(network(root / name / "pipeline" / "prior") for name in ("fork", "p")))


# --- damaged folders


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def pickled(file: Path) -> None:
    file.with_name("optimizer.pt").write_bytes(b"\x80\x04cos\nsystem\n.")


STATE, OPTIMIZER = "state.json", "optimizer.safetensors"
NETWORK, ADAPTER = "prior/diffusion_pytorch_model.safetensors", "prior/pytorch_lora_weights.safetensors"


@pytest.mark.parametrize(
    ("run_name", "file", "how", "what"),
    [
        ("p", STATE, truncate, "state.json"),
        ("p", STATE, flip, "state.json"),
        ("p", STATE, Path.unlink, "No such file"),
        ("p", OPTIMIZER, truncate, "optimizer.safetensors has 100 bytes instead of"),
        ("p", OPTIMIZER, flip, "the checksum of optimizer.safetensors differs"),
        ("p", OPTIMIZER, Path.unlink, "optimizer.safetensors is missing"),
        ("p", NETWORK, truncate, f"{NETWORK} has 100 bytes instead of"),
        ("p", NETWORK, flip, f"the checksum of {NETWORK} differs"),
        ("p", NETWORK, lambda file: shutil.rmtree(file.parent), "prior/config.json is missing"),
        ("p", NETWORK, pickled, "prior/optimizer.pt is none of its files"),
        ("l", ADAPTER, flip, f"the checksum of {ADAPTER} differs"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over(
    run_name: str, file: str, how: Callable[[Path], object], what: str, root: Path
) -> None:
    """The same weights come out: the one before is gone on from, and the steps are the same."""
    settings = [f"name={run_name}", f"adapter={'lora' if run_name == 'l' else 'none'}"]
    shutil.copytree(root / run_name, root / "undisturbed")
    resume(root, *settings, "name=undisturbed")
    how(root / run_name / "checkpoints" / LATEST / file)
    resume(root, *settings)
    log = (root / run_name / "train.log").read_text()
    assert f"{LATEST} is damaged and was passed over: " in log
    assert what in log
    assert "step-00000001: step 1 of 3" in log
    made = file if "prior" in file else NETWORK
    results = [root / name / "checkpoints" / "step-00000003" / made for name in (run_name, "undisturbed")]
    assert results[0].is_file()
    assert same(*map(load_file, results))


def test_where_no_checkpoint_is_whole_the_run_is_refused(root: Path) -> None:
    for folder in (root / "p" / "checkpoints").iterdir():
        flip(folder / NETWORK)
    before = tree(root / "p")
    with pytest.raises(CheckpointError, match=r"none of the 2 checkpoints in .* is whole .*remove that folder"):
        resume(root)
    assert tree(root / "p") == before


@pytest.mark.parametrize("given", ["checkpoints/step-00000002", ""])
def test_a_fork_from_what_is_damaged(given: str, root: Path) -> None:
    """A step that was named is refused, of a run the newest good one is taken."""
    flip(root / "p" / "checkpoints" / LATEST / OPTIMIZER)
    settings = ["name=fork", f"checkpoint.resume={root}/p/{given}"]
    if given:
        with pytest.raises(CheckpointError, match=r"is no whole checkpoint \(the checksum of optimizer"):
            resume(root, *settings)
        assert not (root / "fork").exists()
    else:
        resume(root, *settings)
        assert "step-00000001: step 1 of 3" in (root / "fork" / "train.log").read_text()


@pytest.mark.parametrize("text", ["{", '{"run_id": null, "step": "x"}'])
def test_a_damaged_record_is_refused(text: str, root: Path) -> None:
    (root / "p" / "run.json").write_text(text)
    with pytest.raises(ConfigError, match=r"name: .*p exists and its run\.json cannot be read"):
        resume(root)


@pytest.mark.parametrize("tracker", ["none", "mlflow"])
def test_a_root_that_cannot_be_written_is_named(tracker: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"output_root: .*file/out cannot be written"):
        run(composed(tmp_path / "file" / "out", "model=prior", f"tracker={tracker}"))


def test_a_table_that_is_damaged_fails_the_run(tmp_path: Path) -> None:
    """What was trained before counts: a finished run that is extended is finished no more."""
    train(tmp_path, "model=prior", "name=p", *QUICK)
    for file in tmp_path.glob("cache/*/*/captions.arrow"):
        damage(file)
    with pytest.raises(RunFailure, match=r"is damaged; .*\n\(training stopped after step 2"):
        train(tmp_path, "model=prior", "name=p", "tracker=none", "trainer.max_steps=4")
    assert json.loads((tmp_path / "p" / "run.json").read_text())["status"] == "FAILED"


def damage(file: Path) -> None:
    """One bit of each caption's features behind the file's head: nothing that opening the table could see."""
    table, content = FeatureTable(file.parents[1]), bytearray(file.read_bytes())
    for index in range(len(table)):
        row = table.row(index)
        place = content.index(row["text_states"][row["text_mask"]].numpy().tobytes())
        if place >= HEAD:
            content[place] ^= 1
    file.write_bytes(content)


def test_a_table_that_only_some_processes_see(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="output_root has to be on a disk that all machines share"):
        feature_loader.opened_by_all(tmp_path / "nothing")


# --- weights that are none


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda folder: truncate(folder / "prior_text_encoder" / "model.safetensors"), "is damaged or cut off"),
        (
            lambda folder: truncate(folder / "prior_prior" / "diffusion_pytorch_model.safetensors"),
            "is damaged or cut off",
        ),
        (lambda folder: (folder / "model_index.json").write_text("{"), "model_index.json cannot be read"),
        (lambda folder: (folder / "model_index.json").write_text("[]"), "model_index.json cannot be read"),
        (lambda folder: (folder / "prior_prior" / "config.json").write_text("[]"), "config.json' cannot be read"),
        (lambda folder: [file.unlink() for file in (folder / "prior_tokenizer").iterdir()], "has no vocabulary"),
    ],
)
def test_damaged_weights_are_named(harm: Callable[[Path], object], message: str, root: Path, tiny_folder: Path) -> None:
    folder = root / "theirs"
    shutil.copytree(tiny_folder, folder)
    harm(folder)
    with pytest.raises(ConfigError, match=rf"weights\.prior: .*{message}"):
        train(root, "model=prior", f"weights.prior={folder}", "data.cache=false", *QUICK)


def test_an_adapter_run_is_no_weights(root: Path) -> None:
    with pytest.raises(
        ConfigError,
        match=r"weights\.prior: .*has an adapter, no whole network; make one: kandinsky-exp export",
    ):
        train(root, "model=prior", f"weights.prior={root}/l", *QUICK)


def test_one_step_is_too_few_for_the_priors_schedule(root: Path) -> None:
    with pytest.raises(ConfigError, match="has to be a whole number, at least 2"):
        train(root, "model=prior", "validation.inference_steps=1")


def test_a_resolution_that_the_unet_cannot_halve_is_refused(root: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.resolution: has to be a multiple of 16 for these weights, not 72"):
        train(root, "model=decoder", "data.resolution=72", *QUICK)


def test_half_precision_weights_need_mixed_precision(root: Path) -> None:
    with pytest.raises(ConfigError, match=r"precision\.frozen_dtype: half precision needs mixed precision"):
        train(root, "model=prior", "precision.frozen_dtype=bfloat16", *QUICK)


# --- generate


def draw(root: Path, *overrides: str) -> float:
    base = ["inference_steps=1", "prior_inference_steps=2", "prompts=[a dog]", "weights=tiny"]
    return generate(composed(root, *base, *overrides, verb="generate", small=[]))


@pytest.mark.parametrize("text", ["a: [", "{}", None])
def test_generate_from_a_run_without_a_readable_config(text: str | None, root: Path) -> None:
    file = root / "p" / "config.yaml"
    file.unlink()
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match=r"config\.yaml (cannot be read|has no weights\.prior)"):
        draw(root, f"prior={root}/p/checkpoints/{LATEST}")


def test_generate_refuses_a_size_that_it_would_round(root: Path) -> None:
    with pytest.raises(ConfigError, match="height: has to be a multiple of 16 for this decoder, not 72"):
        draw(root, "height=72", "width=64")


def test_generate_with_a_damaged_adapter(root: Path) -> None:
    truncate(root / "l" / "adapter" / "pytorch_lora_weights.safetensors")
    with pytest.raises(ConfigError, match=r"prior: .*adapter cannot be loaded"):
        draw(root, f"prior={root}/l")


def test_generate_finds_what_is_wrong_before_it_draws(root: Path) -> None:
    checkpoint = root / "p" / "checkpoints" / LATEST
    truncate(checkpoint / "prior" / "diffusion_pytorch_model.safetensors")  # drawing would end there
    with pytest.raises(ConfigError, match="log_to_run: neither"):
        draw(root, f"prior={checkpoint}", "log_to_run=true")
    (root / "file").write_text("")
    with pytest.raises(ConfigError, match="output_root"):
        draw(root / "file" / "out", f"prior={checkpoint}", "decoder=nobody/nothing")


# --- sweeps


def test_a_sweep_over_paths_has_one_parent_and_flat_folders(root: Path) -> None:
    start_server()  # the process that jobs are forked from
    cli.main([
        "--multirun", "model=prior", "weights=tiny", "data=emoji", "data.max_samples=4", "trainer.max_steps=1",
        f"weights.prior={root}/p,tiny", "name=sweep", f"output_root={root}",
    ])  # fmt: skip
    jobs = [path.parent for path in (root / "sweep").glob("*/run.json")]
    assert len(jobs) == 2
    beside = {".jobs", "report"}
    assert {path.name for path in (root / "sweep").iterdir() if path.is_dir()} - beside == {path.name for path in jobs}
    parents = {found.data.tags.get("mlflow.parentRunId") for found in runs(root)} - {None}
    assert len(parents) == 1
    assert history(root, json.loads((jobs[0] / "run.json").read_text())["run_id"], "validation/loss")
    with pytest.raises(ConfigError, match=r"name: .*sweep holds a sweep"):
        train(root, "model=prior", "name=sweep")
    assert client(root).get_run(parents.pop()).info.status == "FINISHED"


def test_a_long_job_name_is_cut() -> None:
    first, second = cli.folder_name("a=" + "x" * 400), cli.folder_name("a=" + "x" * 399 + "y")
    assert first != second
    assert len(first) < 255
    assert cli.folder_name("weights.prior=/a/b") == "weights.prior=_a_b"
