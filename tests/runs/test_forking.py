"""A new run that begins at another's checkpoint: what does not fit is told before anything is encoded or recorded."""

from pathlib import Path

import pytest
import torch
from running import network, runs, same, train

from kandinsky_exp.errors import CheckpointError, UserError

QUICK = ["model=prior", "tracker=none", "trainer.max_steps=2", "validation.every=100", "validation.reconstructions=0"]
LORA = ["adapter=lora", "adapter.rank=2"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs without and with an adapter, both of two steps."""
    folder = tmp_path_factory.mktemp("forking")
    train(folder, *QUICK, "name=full", "trainer.ema_decay=0.9")
    train(folder, *QUICK, "name=lora", *LORA)
    return folder


@pytest.mark.parametrize(
    ("source", "settings", "reason"),
    [
        ("full", LORA, "adapter: it holds all weights of a run without one, and this run trains a lora"),
        ("lora", [], "adapter: it holds an adapter, and this run trains all weights"),
        ("full", ["optimizer=sgd"], "optimizer: it was made with AdamW, and this run trains with SGD"),
        ("lora", ["adapter=lora", "adapter.rank=4"], "adapter.rank: it has 2, this run's file would have 4"),
        ("lora", [*LORA, "adapter.init=pissa"], "adapter.rank: it has 2, this run's file would have 4"),
        ("lora", [*LORA, "adapter.alpha=4"], "adapter.alpha, adapter.use_rslora: its output is scaled by 1, this"),
        ("lora", ["adapter=dora", "adapter.rank=2"], "adapter: it is lora, this run's dora"),
        ("lora", [*LORA, "adapter.target_modules=[to_q]"], "adapter.target_modules: it changes "),
        ("full", ["model=decoder"], "belongs to another stage; set model="),
        ("full", ["trainer.max_steps=2"], "is of step 2, and this run has 2 in all: nothing is left to train"),
        ("full", ["trainer.max_steps=1"], "is of step 2, and this run has 1 in all: nothing is left to train"),
    ],
)
def test_what_does_not_fit_is_told_first(source: str, settings: list[str], reason: str, root: Path) -> None:
    cache = {path.name for path in (root / "cache").iterdir()}
    more = ["trainer.max_steps=4", "data.max_samples=9"]  # nobody has encoded these
    with pytest.raises(UserError) as caught:
        train(root, *QUICK, "name=fork", f"checkpoint.resume={root}/{source}", *more, *settings)
    assert reason in str(caught.value)
    assert not (root / "fork").exists()
    assert {path.name for path in (root / "cache").iterdir() if path.suffix != ".lock"} <= cache


def test_a_base_of_other_shapes(root: Path, tmp_path: Path) -> None:
    """A checkpoint of a prior whose embeddings are called otherwise."""
    from safetensors.torch import load_file, save_file

    from kandinsky_exp.runs import integrity

    folder = root / "full" / "checkpoints" / "step-00000002"
    copied = tmp_path / "run" / "checkpoints" / folder.name
    copied.mkdir(parents=True)
    for name in ("prior", "prior_ema"):
        tensors = load_file(folder / name / "diffusion_pytorch_model.safetensors")
        first = sorted(tensors)[0]
        tensors[first] = torch.cat([tensors[first], tensors[first]])
        (copied / name).mkdir()
        save_file(tensors, copied / name / "diffusion_pytorch_model.safetensors")
    state = integrity.read_state(folder)
    del state["files"]
    integrity.seal(copied, state)
    with pytest.raises(CheckpointError, match=r"weights\.prior: its network is another: \S+ is \[.*\] there, "):
        train(root, *QUICK, "name=fork", f"checkpoint.resume={tmp_path}/run", "trainer.max_steps=4")


@pytest.mark.parametrize(
    ("source", "settings"),
    [
        ("full", ["trainer.ema_decay=null"]),
        ("full", ["trainer.ema_decay=0.5"]),
        ("lora", [*LORA, "trainer.ema_decay=0.9", "adapter.dropout=0.1"]),
    ],
    ids=["no-average", "other-average", "a-first-average"],
)
def test_what_fits_goes_on(source: str, settings: list[str], root: Path, request: pytest.FixtureRequest) -> None:
    name = request.node.callspec.id
    more = [f"name={name}", f"checkpoint.resume={root}/{source}", "trainer.max_steps=3"]
    train(root, *QUICK, *more, *settings)
    assert (root / name / "checkpoints" / "step-00000003").is_dir()
    if source == "full":
        assert not same(*(network(root / each / "pipeline" / "prior") for each in (name, source)))


def test_epochs_that_are_over_are_told_once_they_are_known(root: Path) -> None:
    settings = [*QUICK[2:], "model=prior", f"checkpoint.resume={root}/full", "name=epochs"]
    with pytest.raises(CheckpointError, match=r"is of step 2, and this run has 1 in all"):
        train(root, *settings, "trainer.max_steps=9", "trainer.max_epochs=1", "trainer.batch_size=12")
    (found,) = runs(root)
    assert found.info.status == "FAILED"
    assert "nothing is left to train" in found.data.tags["error"]
