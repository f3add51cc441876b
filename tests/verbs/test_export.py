"""`kandinsky-exp export`: a merged pipeline draws what base and adapter draw."""

from pathlib import Path

import foreign
import numpy as np
import pytest
from diffusers import AutoPipelineForText2Image, DiffusionPipeline
from drawing import drawn
from running import composed, network, same, train
from safetensors.torch import load_file

from kandinsky_exp import cli
from kandinsky_exp.errors import ConfigError
from kandinsky_exp.models import adapters
from kandinsky_exp.verbs.export import export


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    common = ["optimizer.lr=0.3", "trainer.max_steps=2", "validation.every=10", "validation.reconstructions=0"]
    train(folder, "model=prior", "name=lora", "adapter=lora", "trainer.ema_decay=0.5", *common)
    train(folder, "model=decoder", "name=dora", "adapter=dora", "adapter.init=olora", *common)
    return folder


def exported(root: Path, name: str, *overrides: str) -> Path:
    export(composed(root, f"name={name}", "weights=tiny", *overrides, verb="export", small=[]))
    return root / "export" / name


def close(first: list[np.ndarray], second: list[np.ndarray]) -> bool:
    """Of 8-bit pixels: sums of rounded products are rounded elsewhere."""
    return max(np.abs(one.astype(int) - other).max() for one, other in zip(first, second, strict=True)) <= 2


@pytest.mark.parametrize(
    ("side", "run", "scale"), [("prior", "lora", 1.0), ("decoder", "dora", 1.0), ("decoder", "dora", 0.5)]
)
def test_a_merged_pipeline_draws_what_base_and_adapter_draw(root: Path, side: str, run: str, scale: float) -> None:
    folder = exported(root, f"{run}-{scale}", f"adapter.source={root}/{run}", f"adapter_scale={scale}")
    expected = drawn(root, f"{run}-{scale}", f"{side}_adapter={root}/{run}", f"adapter_scale={scale}")
    assert close(drawn(root, f"{run}-{scale}-merged", f"{side}={folder}", "weights=tiny"), expected)
    assert not close(drawn(root, "base", "weights=tiny"), expected)
    loads = DiffusionPipeline if side == "prior" else AutoPipelineForText2Image
    pipeline = loads.from_pretrained(folder / "pipeline", local_files_only=True)
    assert not adapters.has_adapter(pipeline.prior if side == "prior" else pipeline.unet)


def test_the_command_takes_the_adapter_by_its_short_name(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Hydra would look for a file of conf/adapter/."""
    cli.main(["export", f"adapter={root}/lora", "merge=true", "weights=tiny", f"output_root={root}", "name=typed"])
    assert capsys.readouterr().out.splitlines()[-1] == str(root / "export" / "typed")
    assert (root / "export" / "typed" / "pipeline" / "model_index.json").is_file()


def test_an_export_is_a_base_to_train_from(root: Path) -> None:
    folder = exported(root, "start", f"adapter.source={root}/dora")
    train(
        root,
        "name=on",
        f"weights.decoder={folder}",
        f"weights.prior={folder}",
        "trainer.max_steps=1",
        "optimizer.lr=1e-9",
    )
    assert network(root / "on" / "pipeline" / "unet").keys() == network(folder / "pipeline" / "unet").keys()


def test_in_half_precision_and_onto_another_base(root: Path) -> None:
    halved = network(exported(root, "half", f"adapter.source={root}/lora", "precision=bf16") / "pipeline" / "prior")
    assert {str(value.dtype) for value in halved.values()} == {"torch.bfloat16"}
    plain = network(exported(root, "plain", f"adapter.source={root}/lora") / "pipeline" / "prior")
    twice = network(
        exported(root, "twice", f"adapter.source={root}/lora", f"base={root}/export/plain") / "pipeline" / "prior"
    )
    assert not same(plain, twice)


def test_the_averaged_adapter_of_a_checkpoint_alone(root: Path) -> None:
    step = root / "lora" / "checkpoints" / "step-00000002"
    folder = exported(root, "alone", f"adapter.source={step}", "merge=false")
    assert [file.name for file in (folder / "adapter").iterdir()] == [adapters.WEIGHTS_NAME]
    content = (folder / "adapter" / adapters.WEIGHTS_NAME).read_bytes()
    assert content == (step / "prior_ema" / adapters.WEIGHTS_NAME).read_bytes()
    results = [place / "adapter" / adapters.WEIGHTS_NAME for place in (folder, root / "lora")]
    assert same(*map(load_file, results))


def test_an_adapter_of_another_trainer_is_used_as_if_it_was_made_here(root: Path, tmp_path: Path) -> None:
    """To draw with, to merge, and written anew: the file then has the bare names that diffusers' models read."""
    rank = 4
    for form in ("kohya", "peft"):
        other = foreign.write(form, root / "lora" / "adapter", tmp_path / form, "prior", float(rank), rank)
        assert close(
            drawn(root, form, "weights=tiny", f"prior_adapter={other}"),
            drawn(root, f"{form}-plain", f"prior_adapter={root}/lora"),
        )
        if form == "kohya":  # as such files are called
            other = (other / adapters.WEIGHTS_NAME).rename(tmp_path / "their own.safetensors")
        alone = exported(root, f"{form}-alone", f"adapter.source={other}", "merge=false")
        results = [load_file(place / "adapter" / adapters.WEIGHTS_NAME) for place in (alone, root / "lora")]
        assert same(*results)
        folders = [
            exported(root, f"{form}-{index}", f"adapter.source={place}")
            for index, place in enumerate((other, root / "lora"))
        ]
        first, second = (network(folder / "pipeline" / "prior") for folder in folders)
        assert all(np.allclose(value, second[name], rtol=1e-5, atol=1e-6) for name, value in first.items())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "adapter.source: is not set; give the folder of a run with adapter=lora or dora"),
        (["adapter.source={root}/nowhere"], "adapter: .*there is no such run or folder"),
        (
            ["adapter.source={root}/lora", "adapter_scale=0"],
            "adapter_scale: at 0 the merged network would be the base itself",
        ),
        (["adapter.source=[{root}/lora,{root}/dora]"], "adapter: some are of the prior, some of the decoder"),
        (["adapter.source=[{root}/dora,{root}/dora]"], "adapter: .* is a DoRA"),
        (["adapter.source={root}/lora", "adapter_scale=0.5", "merge=false"], "merge: is false"),
        (["adapter.source={root}/lora", "base=nobody/nothing"], "could not be fetched"),
        (["adapter.source={root}/lora", "adapter_scale=[1,2]"], "adapter_scale: 2 for 1 adapters"),
    ],
)
def test_what_cannot_be_exported(root: Path, overrides: list[str], message: str) -> None:
    before = set((root / "export").glob("bad*"))
    with pytest.raises(ConfigError, match=message):
        exported(root, "bad", *(text.format(root=root) for text in overrides))
    assert set((root / "export").glob("bad*")) == before, "nothing is left of it"
