"""Weights in other files than one plain one for each network: shards, variants, and shards of a variant."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoPipelineForText2Image
from drawing import drawn
from running import composed, train

from kandinsky_exp.config import validation
from kandinsky_exp.errors import ConfigError
from kandinsky_exp.models import compatibility, components, pipelines, weight_files
from kandinsky_exp.models.weights import Weights

NETWORKS = ("prior", "text_encoder", "image_encoder", "unet", "movq")


def older(folder: Path) -> None:
    """Shards as libraries named them before: the variant behind the number."""
    for file in folder.glob("*.fp16-*.safetensors"):
        stem, number = file.name.removesuffix(".safetensors").split(".fp16")
        file.rename(folder / f"{stem}{number}.fp16.safetensors")
    for index in folder.glob("*.index.fp16.json"):
        content = json.loads(index.read_text())
        names = content["weight_map"].items()
        content["weight_map"] = {
            key: name.replace(".fp16", "").replace(".safetensors", ".fp16.safetensors") for key, name in names
        }
        index.write_text(json.dumps(content))


@pytest.fixture(scope="module", params=["as written now", "as written before"])
def sharded(request, tiny_folder: Path, tmp_path_factory) -> Path:
    """The tiny Kandinsky 2.2, every network in several files of a variant, as both libraries save them."""
    folder = tmp_path_factory.mktemp("sharded") / "weights"
    shutil.copytree(tiny_folder, folder)
    plain = Weights(str(tiny_folder), str(tiny_folder), cache_folder=folder.parent, frozen_dtype="float16")
    for part in NETWORKS:
        place = folder / components.subfolder(folder, part)
        for file in place.glob("*.safetensors"):
            file.unlink()
        size = sum(value.nbytes for value in plain.load(part).state_dict().values())
        plain.load(part).save_pretrained(place, variant="fp16", max_shard_size=size // 2)
        if request.param == "as written before":
            older(place)
        assert len(list(place.glob("*.safetensors"))) > 1
    return folder


def load(folder: Path, variant: str | None = "fp16") -> Weights:
    return Weights(str(folder), str(folder), cache_folder=folder.parent, variant=variant)


def test_shards_of_a_variant_are_read(sharded: Path, tiny_folder: Path) -> None:
    validation.validate(
        composed(sharded.parent, f"weights.prior={sharded}", f"weights.decoder={sharded}", "weights.variant=fp16"),
        "train",
    )
    theirs, ours = load(sharded), load(tiny_folder, None)
    assert compatibility.check(theirs, set(components.PARTS)) == []
    for part in NETWORKS:
        expected = ours.load(part).state_dict()
        for name, value in theirs.load(part).state_dict().items():
            assert torch.equal(value, expected[name].half().float()), name


def test_without_the_variants_name_the_message_has_it(sharded: Path) -> None:
    cfg = composed(sharded.parent, f"weights.prior={sharded}", f"weights.decoder={sharded}")
    message = r"weights\.prior: .*'prior_prior' has weights of the variant fp16 alone; set weights\.variant=fp16"
    with pytest.raises(ConfigError, match=message) as caught:
        validation.validate(cfg, "train")
    assert "fetch it again" not in str(caught.value)  # nothing is wrong with the folder
    with pytest.raises(
        ConfigError, match=r"set weights\.variant=fp16"
    ):  # as of a hub's folder, which nobody has looked at
        compatibility.check(load(sharded, None), {"unet"})


def test_every_shard_counts_for_the_fingerprint(sharded: Path, tmp_path: Path) -> None:
    copy = tmp_path / "weights"
    shutil.copytree(sharded, copy)
    before = load(copy).content(["unet"])
    shard = sorted((copy / "unet").glob("*.safetensors"))[-1]
    shard.write_bytes(shard.read_bytes()[:-1] + b"\7")
    assert load(copy).content(["unet"]) != before


def test_a_result_from_shards_of_a_variant_loads_as_any_other(sharded: Path, tmp_path: Path) -> None:
    """Its parts have plain names, its index names them, and what was there of other variants stays behind."""
    (sharded / "movq" / "diffusion_pytorch_model.bf16.safetensors").write_bytes(b"of another variant")
    weights = load(sharded)
    result, save = components.RESULTS["decoder"], weights.load("unet").save_pretrained
    pipelines.save_result(weights, "decoder", result, tmp_path / "pipeline", save)
    assert not list((tmp_path / "pipeline").rglob("*16*"))
    loaded = AutoPipelineForText2Image.from_pretrained(tmp_path / "pipeline", local_files_only=True)
    for part, network in (("movq", loaded.movq), ("image_encoder", loaded.prior_image_encoder)):
        expected = weights.load(part).state_dict()
        assert all(torch.equal(value.float(), expected[name]) for name, value in network.state_dict().items())


def test_what_a_run_from_a_variant_trained_is_drawn_with_it(sharded: Path, tmp_path: Path) -> None:
    """Its adapter, and its checkpoints, go onto the files that it started from, whatever `weights.variant` is now."""
    base = [f"weights.prior={sharded}", f"weights.decoder={sharded}", "weights.variant=fp16"]
    small = ["trainer.max_steps=1", "validation.every=100", "validation.reconstructions=0", "data.max_samples=2"]
    train(tmp_path, "model=prior", "name=lora", "adapter=lora", *base, *small, "trainer.batch_size=1")
    assert len(drawn(tmp_path, "drawn", f"prior_adapter={tmp_path}/lora", "weights=tiny")) == 2


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.fp16.safetensors", "model.safetensors"),
        ("model.fp16-00001-of-00002.safetensors", "model-00001-of-00002.safetensors"),
        (
            "diffusion_pytorch_model-00001-of-00002.non_ema.safetensors",
            "diffusion_pytorch_model-00001-of-00002.safetensors",
        ),
        ("model.safetensors.index.fp16.json", "model.safetensors.index.json"),
        ("model-00001-of-00002.safetensors", "model-00001-of-00002.safetensors"),
        ("model.safetensors.index.json", "model.safetensors.index.json"),
        ("config.json", "config.json"),
    ],
)
def test_names_of_variants(name: str, expected: str, tmp_path: Path) -> None:
    assert weight_files.without_variant(name) == expected
    (tmp_path / name).touch()
    assert weight_files.variants(tmp_path) == ({"non_ema" if "ema" in name else "fp16"} if name != expected else set())


def test_a_vocabulary_that_changes_is_read_again(tmp_path: Path) -> None:
    folder = tmp_path / "prior_tokenizer"
    folder.mkdir()
    file = folder / "tokenizer.json"
    for text, is_good in (("{}", True), ("{", False), ("[]", False), ('{"a": 1}', True)):
        file.write_text(text)
        assert (weight_files.unreadable(folder) is None) is is_good
        assert (weight_files.unreadable(folder) is None) is is_good
    file.unlink()
    assert (
        weight_files.unreadable(folder)
        == "'prior_tokenizer' has no vocabulary (tokenizer.json, or vocab.json and merges.txt)"
    )
