"""What embeds the pictures: Kandinsky's own encoders, and vision models of other folders."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

from kandinsky_exp.data.sources import emoji
from kandinsky_exp.errors import ConfigError
from kandinsky_exp.evaluation.encoders import FolderEncoder, OwnEncoder

CPU = torch.device("cpu")
TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
VISION = {**TINY, "intermediate_size": 16, "projection_dim": 12}
TEXT = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 99}


def pictures(count: int) -> list[Image.Image]:
    source = emoji().train
    return [example.image() for _, example in zip(range(count), source.examples(), strict=False)]


def saved(folder: Path, model: Any, processor: str = "CLIPImageProcessorPil") -> Path:
    model.save_pretrained(folder)
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    if processor.startswith("ViT"):
        size = {"size": {"height": 32, "width": 32}}
    getattr(transformers, processor)(**size).save_pretrained(folder)
    return folder


def made(name: str) -> Any:
    torch.manual_seed(0)
    if name == "dinov2":
        return transformers.Dinov2Model(transformers.Dinov2Config(**TINY, mlp_ratio=1))
    if name == "vit":
        return transformers.ViTModel(transformers.ViTConfig(**TINY, intermediate_size=16))
    if name == "clip vision":
        return transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**VISION))
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=12))


@pytest.mark.parametrize(("name", "width"), [("dinov2", 16), ("vit", 16), ("clip vision", 12), ("clip", 12)])
def test_vision_models_of_transformers_embed_pictures(name: str, width: int, tmp_path: Path) -> None:
    folder = saved(tmp_path / "judge", made(name), "ViTImageProcessorPil" if name == "vit" else "CLIPImageProcessorPil")
    encoder = FolderEncoder(folder, CPU)
    found = encoder(some := pictures(34))  # more than a batch
    assert encoder.name == "judge"
    assert found.shape == (34, width)
    assert found.dtype == torch.float32
    assert torch.allclose(encoder(some[33:]), found[33:], atol=1e-5)
    assert float(found.std(0).min()) > 0  # pictures differ


def test_the_projected_embedding_is_taken_where_there_is_one(tmp_path: Path) -> None:
    model = made("clip")
    folder = saved(tmp_path / "clip", model)
    (picture,) = pictures(1)
    pixels = transformers.CLIPImageProcessorPil.from_pretrained(folder)(
        images=picture, return_tensors="pt"
    ).pixel_values
    with torch.no_grad():
        expected = model.eval().visual_projection(model.vision_model(pixel_values=pixels).pooler_output)
    assert torch.allclose(FolderEncoder(folder, CPU)([picture]), expected, atol=1e-5)


def test_weights_that_are_missing_are_never_random(tmp_path: Path) -> None:
    """A classifier's have no pooler: its first token is taken. What lacks more is refused."""
    torch.manual_seed(0)
    classifier = transformers.ViTForImageClassification(transformers.ViTConfig(**TINY, intermediate_size=16))
    folder = saved(tmp_path / "vit", classifier, "ViTImageProcessorPil")
    (picture,) = pictures(1)
    pixels = transformers.ViTImageProcessorPil.from_pretrained(folder)(images=picture, return_tensors="pt").pixel_values
    with torch.no_grad():
        expected = classifier.eval().vit(pixels).last_hidden_state[:, 0]
    assert torch.allclose(FolderEncoder(folder, CPU)([picture]), expected, atol=1e-5)
    tensors = load_file(folder / "model.safetensors")
    first = next(name for name in sorted(tensors) if "layer" in name)
    save_file(
        {name: value for name, value in tensors.items() if name != first},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(ConfigError, match="it lacks 1 tensors such as "):
        FolderEncoder(folder, CPU)


def test_own_embeddings_are_those_that_stages_encode(weights: Any) -> None:
    own, (picture,) = OwnEncoder(weights), pictures(1)
    processor, model = weights.load("image_processor"), weights.load("image_encoder")
    with torch.no_grad():
        expected = model(processor(images=picture, return_tensors="pt").pixel_values).image_embeds
    assert torch.equal(own([picture]), expected)
    assert own.texts(["a fox", "a house " * 90]).shape == (2, expected.shape[1])


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (None, "has no config.json of a vision model"),
        ({"_class_name": "UNet2DConditionModel"}, "has no config.json of a vision model"),
        ({"model_type": "clip_text_model"}, "cannot embed pictures"),
        ({"model_type": "gpt2"}, "cannot embed pictures"),
        ({"model_type": "no such thing"}, "cannot embed pictures"),
    ],
)
def test_a_folder_of_another_kind_is_refused(config: dict[str, str] | None, told: str, tmp_path: Path) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=f"^encoder: .*{told}"):
        FolderEncoder(tmp_path, CPU)


def test_code_in_the_folder_is_not_run_and_not_asked_for(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("raise SystemExit('it ran')")
    about = {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config", "AutoModel": "mine.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(about))
    with pytest.raises(ConfigError, match="cannot embed pictures"):
        FolderEncoder(tmp_path, CPU)


def test_no_memory_is_no_fault_of_the_folder(tmp_path: Path) -> None:
    folder = saved(tmp_path / "vit", made("vit"), "ViTImageProcessorPil")
    about = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**about, "hidden_size": 2**23}))  # a layer of 256 TiB
    save_file({"other": torch.zeros(1)}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        FolderEncoder(folder, CPU)


def test_timm_is_asked_for_where_it_is_missing(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "resnet18"}))
    with pytest.raises(ConfigError, match="needs a package that is not installed: No module named 'timm'"):
        FolderEncoder(tmp_path, CPU)
