"""LoRA and DoRA: what they train, how they are saved, and that diffusers loads what was saved."""

import json
import logging

import diffusers
import pytest
import torch
from diffusers import KandinskyV22Pipeline, KandinskyV22PriorPipeline
from omegaconf import OmegaConf
from safetensors import safe_open
from safetensors.torch import load_file

from kandinsky_exp import adapters, pipelines
from kandinsky_exp.errors import ConfigError
from kandinsky_exp.weights import Weights

PARTS = ["prior", "unet"]
EACH = pytest.mark.parametrize("part", PARTS)
KINDS = pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])


@pytest.fixture
def weights(tiny_folder):
    return Weights(str(tiny_folder), str(tiny_folder), cache_folder=tiny_folder.parent)


def attach(network, **settings):
    defaults = {"rank": 4, "alpha": None, "dropout": 0.0, "target_modules": None, "use_dora": False}
    adapters.attach_lora(network, **{**defaults, "dtype": torch.float32, **settings})
    return network


def adapter_state(network):
    return {key: value for key, value in network.state_dict().items() if "lora_" in key}


@torch.no_grad()
def shake(network, seed=0):
    """As if it had trained: no tensor is what it was made as, and equal seeds make equal adapters."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in network.named_parameters():
        change = 0.2 * torch.randn(parameter.shape, generator=generator)
        if ".lora_A" in name or ".lora_B" in name:
            parameter.copy_(change)
        elif parameter.requires_grad:
            parameter *= 1 + change
    return network


def ask(part, network):
    generator = torch.Generator().manual_seed(1)
    condition = torch.randn(2, 64, generator=generator)
    steps = torch.tensor([10, 700])
    if part == "unet":
        noisy = torch.randn(2, 4, 16, 16, generator=generator)
        return network(noisy, steps, None, added_cond_kwargs={"image_embeds": condition}).sample
    states, noisy = torch.randn(2, 77, 64, generator=generator), torch.randn(2, 64, generator=generator)
    mask = torch.arange(77) < torch.tensor([[5], [9]])
    return network(noisy, steps, condition, states, mask).predicted_image_embedding


@torch.no_grad()
def answer(part, network):
    return ask(part, network.eval())


@EACH
@KINDS
def test_a_new_adapter_changes_nothing_and_alone_trains(part, use_dora, weights):
    network = attach(weights.load_trainable(part), use_dora=use_dora)
    torch.testing.assert_close(answer(part, network), answer(part, weights.load(part)), rtol=1e-4, atol=1e-5)
    trainable = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert trainable == adapter_state(network).keys()
    assert any("lora_magnitude_vector" in name for name in trainable) == use_dora


def test_the_decoders_image_keys_get_an_adapter_by_default(weights):
    """They are the only place where the image embedding enters the attention."""
    adapted = {name.split(".lora_")[0] for name in adapter_state(attach(weights.load_trainable("unet")))}
    names = {name for name, _ in weights.load("unet").named_modules()}
    expected = {name for name in names if name.endswith(adapters.ATTENTION)}
    assert adapted == expected
    assert {name.rsplit(".", 1)[-1] for name in adapted} == {"to_q", "to_k", "to_v", "0", "add_k_proj", "add_v_proj"}


def test_every_attention_of_the_prior_gets_an_adapter_by_default(weights):
    network = weights.load_trainable("prior")
    blocks = len(network.transformer_blocks)
    adapted = {name.split(".lora_")[0] for name in adapter_state(attach(network))}
    assert adapted == {
        f"transformer_blocks.{block}.attn1.{name}"
        for block in range(blocks)
        for name in ("to_q", "to_k", "to_v", "to_out.0")
    }


def test_targets_that_no_module_has_are_refused(weights):
    with pytest.raises(ConfigError, match=r"adapter\.target_modules: .*to_x.* match no module of UNet2DConditionModel"):
        attach(weights.load_trainable("unet"), target_modules=["to_x"])


@EACH
@KINDS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_frozen_network_may_be_half_while_the_adapter_stays_full(part, use_dora, dtype, weights):
    network = shake(attach(weights.load_trainable(part), use_dora=use_dora, dtype=dtype))
    kinds = {(parameter.requires_grad, parameter.dtype) for parameter in network.parameters()}
    assert kinds == {(True, torch.float32), (False, dtype)}
    full = answer(part, shake(attach(weights.load_trainable(part), use_dora=use_dora)))
    with torch.autocast("cpu", dtype):
        half = answer(part, network)
    assert torch.nn.functional.cosine_similarity(half.float().flatten(), full.flatten(), dim=0) > 0.99


@EACH
def test_half_frozen_networks_train_their_adapter_under_autocast(part, weights):
    network = attach(weights.load_trainable(part), use_dora=True, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        ask(part, network).square().mean().backward()
    trainable = {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert all(parameter.grad is not None for parameter in trainable.values())
    # lora_B starts at zero, so at the first step lora_A's gradient is zero as well.
    assert all((p.grad != 0).any() for name, p in trainable.items() if "lora_B" in name)
    assert not any(p.grad is not None for p in network.parameters() if not p.requires_grad)


@EACH
@KINDS
def test_diffusers_loads_what_was_saved(part, use_dora, weights, tmp_path):
    """With bare keys, every tensor, and the scale alpha / rank."""
    trained = shake(attach(weights.load_trainable(part), rank=4, alpha=12.0, use_dora=use_dora))
    adapters.save(trained, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [adapters.WEIGHTS_NAME]
    stored = load_file(tmp_path / adapters.WEIGHTS_NAME)
    assert len(stored) == len(adapter_state(trained))
    assert not any(key.startswith(("unet.", "prior.", "base_model.")) for key in stored)

    network = weights.load_trainable(part)
    network.load_lora_adapter(tmp_path, weight_name=adapters.WEIGHTS_NAME, prefix=None)
    loaded = {key.replace(".default_0", "").replace(".default", ""): v for key, v in adapter_state(network).items()}
    assert len(loaded) == len(stored)
    layers = [module for module in network.modules() if getattr(module, "scaling", None)]
    assert len(layers) == len([key for key in stored if "lora_A" in key])
    assert {scale for layer in layers for scale in layer.scaling.values()} == {3.0}
    torch.testing.assert_close(answer(part, network), answer(part, trained), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(answer(part, network), answer(part, weights.load(part)), rtol=1e-2, atol=1e-3)


@EACH
def test_the_default_prefix_of_diffusers_finds_nothing(part, weights, tmp_path, caplog):
    """Why `generate` and the README pass prefix=None."""
    adapters.save(attach(weights.load_trainable(part)), tmp_path)
    network = weights.load_trainable(part)
    logging.getLogger("diffusers").addHandler(caplog.handler)
    diffusers.utils.logging.set_verbosity_warning()  # a run in the same process leaves it at errors only
    try:
        network.load_lora_adapter(tmp_path, weight_name=adapters.WEIGHTS_NAME)
    finally:
        logging.getLogger("diffusers").removeHandler(caplog.handler)
    assert not adapter_state(network)
    assert "No LoRA keys associated" in caplog.text


def test_an_adapter_loads_through_a_pipelines_network(weights, tmp_path):
    """Kandinsky pipelines have no `load_lora_weights`: it goes through the model."""
    assert not hasattr(KandinskyV22Pipeline, "load_lora_weights")
    assert not hasattr(KandinskyV22PriorPipeline, "load_lora_weights")
    trained = shake(attach(weights.load_trainable("unet")))
    adapters.save(trained, tmp_path)
    settings = pipelines.SampleSettings(inference_steps=2, height=64, width=64)
    embeds = torch.randn(2, 1, 64, generator=torch.Generator().manual_seed(0)).unbind()
    (expected,) = pipelines.decode(pipelines.decoder_pipeline(weights, trained.eval()), embeds, settings)
    pipeline = pipelines.decoder_pipeline(weights, weights.load_trainable("unet").eval())
    (before,) = pipelines.decode(pipeline, embeds, settings)
    pipeline.unet.load_lora_adapter(tmp_path, weight_name=adapters.WEIGHTS_NAME, prefix=None)
    (found,) = pipelines.decode(pipeline, embeds, settings)
    assert before.tobytes() != expected.tobytes()
    pixels = [torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).int() for image in (found, expected)]
    assert (pixels[0] - pixels[1]).abs().max() <= 1


@EACH
@KINDS
def test_an_adapter_reloads_exactly(part, use_dora, weights, tmp_path):
    trained = shake(attach(weights.load_trainable(part), use_dora=use_dora, dtype=torch.bfloat16))
    adapters.save(trained, tmp_path)
    again = attach(weights.load_trainable(part), use_dora=use_dora, dtype=torch.bfloat16)
    before = dict(again.named_parameters())
    adapters.load(again, tmp_path)
    assert dict(again.named_parameters()) == before  # in place: the optimizer holds these very tensors
    for key, value in trained.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key


@EACH
def test_a_whole_network_reloads_exactly(part, weights, tmp_path):
    trained = shake(weights.load_trainable(part))
    adapters.save(trained, tmp_path)
    again = weights.load_trainable(part)
    adapters.load(again, tmp_path)
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in trained.state_dict().items())


@pytest.mark.parametrize(
    ("part", "settings"),
    [
        ("prior", {}),
        ("unet", {"rank": 8}),
        ("unet", {"use_dora": True}),
        ("unet", {"target_modules": ["to_q"]}),
    ],
    ids=["another network", "another rank", "another kind", "fewer modules"],
)
@pytest.mark.parametrize("turned", [False, True])
def test_another_adapter_is_refused(part, settings, turned, weights, tmp_path):
    """In either direction: nothing is left out in silence."""
    networks = attach(weights.load_trainable("unet")), attach(weights.load_trainable(part), **settings)
    saved, loading = networks[::-1] if turned else networks
    adapters.save(saved, tmp_path)
    with pytest.raises((ValueError, RuntimeError), match=r"another adapter|size mismatch"):
        adapters.load(loading, tmp_path)


@EACH
@KINDS
def test_configuration_types_never_reach_what_is_saved(part, use_dora, weights, tmp_path):
    """An OmegaConf list inside a peft or diffusers configuration breaks the save, hours later."""
    cfg = OmegaConf.create({"target_modules": ["to_q", "to_k"], "rank": 2, "alpha": 4})
    network = weights.load_trainable(part)
    attach(network, rank=cfg.rank, alpha=cfg.alpha, target_modules=cfg.target_modules, use_dora=use_dora)
    adapters.save(network, tmp_path)
    with safe_open(tmp_path / adapters.WEIGHTS_NAME, "pt") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
    assert sorted(metadata["target_modules"]) == ["to_k", "to_q"]
    assert (metadata["r"], metadata["lora_alpha"], metadata["use_dora"]) == (2, 4, use_dora)
    config = network.peft_config["default"].to_dict()
    assert not any(type(value).__module__.startswith("omegaconf") for value in config.values())


def test_alpha_defaults_to_the_rank(weights):
    network = attach(weights.load_trainable("prior"), rank=3)
    assert network.peft_config["default"].lora_alpha == 3
    assert adapters.has_adapter(network)
    assert not adapters.has_adapter(weights.load("prior"))
