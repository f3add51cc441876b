"""LoRA and DoRA: what they train, how they are saved, and that diffusers loads what was saved."""

import json
import logging

import diffusers
import foreign
import pytest
import torch
from diffusers import AutoPipelineForText2Image, KandinskyV22Pipeline, KandinskyV22PriorPipeline
from omegaconf import OmegaConf
from safetensors import safe_open
from safetensors.torch import load_file, save

from kandinsky_exp.errors import ConfigError
from kandinsky_exp.models import adapter_files, adapter_tensors, adapters, compatibility, pipelines
from kandinsky_exp.models.weights import Weights

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


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"target_modules": ["to_q", "to_x"]},
            r"adapter\.target_modules: to_x match no module of UNet2DConditionModel",
        ),
        ({"target_modules": ["norm1"]}, r"adapter\.target_modules: .*norm1 \(GroupNorm\) takes no such adapter"),
        (
            {"target_modules": ["conv1"], "init": "pissa"},
            r"target_modules: .*conv1 .* takes no such adapter, linear layers",
        ),
        ({"rank": 65}, r"adapter\.rank: 65 is more than the 64 of .*add_k_proj"),
        ({"rank": 33, "target_modules": ["conv_in"]}, r"adapter\.rank: 33 is more than the 32 of conv_in"),
    ],
    ids=["no module", "a norm", "pissa on convolutions", "rank", "rank of a convolution"],
)
def test_an_adapter_that_the_network_does_not_take_is_refused(settings, message, weights):
    """The network itself, and one without data, of which it is told before anything loads."""
    with pytest.raises(ConfigError, match=message):
        attach(weights.load_trainable("unet"), **settings)
    values = {"rank": 4, "target_modules": None, "init": "default", **settings}
    assert len(adapters.problems(compatibility.without_data("unet", weights.folder("unet")), **values)) == 1


def test_the_largest_rank_is_accepted(weights):
    attach(weights.load_trainable("unet"), rank=32, target_modules=["conv_in"])
    attach(weights.load_trainable("prior"), rank=64, init="pissa")


@EACH
def test_presets(part, weights):
    named, default = (attach(weights.load_trainable(part), target_modules=one) for one in ("attention", None))
    assert adapter_state(named).keys() == adapter_state(default).keys()
    whole = attach(weights.load_trainable(part), target_modules="all-linear")
    adapted = {name.split(".lora_")[0] for name in adapter_state(whole)}
    plain = weights.load(part)
    assert adapted == {name for name, module in plain.named_modules() if isinstance(module, torch.nn.Linear)}
    assert len(adapted) > len(adapter_state(default)) / 2
    ask(part, whole).square().mean().backward()  # each is used as a module, so that its update trains
    stuck = [name for name, value in whole.named_parameters() if "lora_B" in name and not (value.grad != 0).any()]
    assert not stuck


@pytest.mark.parametrize(("init", "lines"), [("default", 0), ("gaussian", 0), ("pissa", 1), ("olora", 1)])
def test_an_init_that_takes_long_says_so(init, lines, weights, caplog):
    with caplog.at_level("INFO", "kandinsky_exp"):
        attach(weights.load_trainable("prior"), init=init)
    assert [f"adapter.init={init} decomposes the weights on the CPU" in text for text in caplog.messages] == [
        True
    ] * lines


@EACH
@KINDS
@pytest.mark.parametrize("init", ["gaussian", "pissa", "olora"])
def test_every_init_begins_as_the_base_and_is_saved_for_the_base(part, use_dora, init, weights, tmp_path):
    """PiSSA and OLoRA take from the weights what the adapter begins with: the file is for the weights as they were."""
    trained = attach(weights.load_trainable(part), init=init, use_dora=use_dora, rank=4, alpha=12.0)
    base = answer(part, weights.load(part))
    torch.testing.assert_close(answer(part, trained), base, rtol=1e-3, atol=1e-4)
    factors = [value for name, value in trained.named_parameters() if "lora_A" in name]
    assert all(value.std() > 0 for value in factors)
    shake(trained)
    adapters.snapshot(trained, {}).write(tmp_path)
    network = weights.load_trainable(part)
    network.load_lora_adapter(tmp_path, weight_name=adapters.WEIGHTS_NAME, prefix=None)
    torch.testing.assert_close(answer(part, network), answer(part, trained), rtol=1e-3, atol=1e-4)
    assert not torch.allclose(answer(part, network), base, rtol=1e-2, atol=1e-3)
    again = attach(weights.load_trainable(part), init=init, use_dora=use_dora, rank=4, alpha=12.0)
    adapters.load(again, tmp_path)  # what a run that goes on does: the same begins, the same tensors
    state = again.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in adapter_state(trained).items())


@pytest.mark.parametrize("init", ["default", "pissa"])
def test_rslora_scales_by_the_root_of_the_rank(init, weights, tmp_path):
    trained = shake(attach(weights.load_trainable("prior"), rank=4, alpha=6.0, use_rslora=True, init=init))
    adapters.snapshot(trained, {}).write(tmp_path)
    network = weights.load_trainable("prior")
    network.load_lora_adapter(tmp_path, weight_name=adapters.WEIGHTS_NAME, prefix=None)
    layers = [module for module in network.modules() if getattr(module, "scaling", None)]
    assert {round(scale, 6) for layer in layers for scale in layer.scaling.values()} == {3.0}
    torch.testing.assert_close(answer("prior", network), answer("prior", trained), rtol=1e-3, atol=1e-4)


@EACH
@KINDS
def test_a_merged_network_answers_as_the_base_with_its_adapter(part, use_dora, weights, tmp_path):
    adapters.snapshot(shake(attach(weights.load_trainable(part), use_dora=use_dora)), {}).write(tmp_path)
    network = weights.load_trainable(part).eval()
    names = network.state_dict().keys()
    adapter_tensors.apply(network, [(tmp_path, 0.5)])
    expected, base = answer(part, network), answer(part, weights.load(part))
    assert not torch.allclose(expected, base, rtol=1e-2, atol=1e-3)
    without = weights.load_trainable(part)
    adapter_tensors.apply(without, [(tmp_path, 0.0)])
    torch.testing.assert_close(answer(part, without), base, rtol=1e-3, atol=1e-4)
    adapter_tensors.merge(network)
    assert network.state_dict().keys() == names
    torch.testing.assert_close(answer(part, network), expected, rtol=1e-3, atol=1e-4)


FORMS = [
    *("prefixed", "prefixed with settings", "with alpha", "kohya", "kohya without alpha", "old processors"),
    *("older processors", "old diffusers", "peft"),
]


@pytest.fixture(scope="module")
def plain(tiny_folder, tmp_path_factory):
    """An adapter of each stage, as it is saved here, and the weights that it makes of the base's: {part: …}."""
    weights, made = Weights(str(tiny_folder), str(tiny_folder), cache_folder=tiny_folder.parent), {}
    for part in PARTS:
        folder = tmp_path_factory.mktemp(part)
        adapters.snapshot(shake(attach(weights.load_trainable(part), rank=4, alpha=12.0)), {}).write(folder)
        made[part] = folder, merged(weights, part, folder)
    return made


def merged(weights, part, place):
    network = weights.load_trainable(part)
    adapter_tensors.apply(network, [(place, 1.0)])
    adapter_tensors.merge(network)
    return network.state_dict()


@EACH
@pytest.mark.parametrize("form", FORMS)
def test_an_adapter_counts_the_same_under_other_trainers_names(form, part, plain, weights, tmp_path):
    folder, expected = plain[part]
    other = foreign.write(form, folder, tmp_path / "other", part, 12.0, 4)
    shapes = adapter_files.read(other)
    assert adapter_files.stage(shapes) == {"prior": "prior", "unet": "decoder"}[part]
    assert adapter_files.base_problem(shapes, compatibility.expected_shapes(part, weights.folder(part))) is None
    found, base = merged(weights, part, other), weights.load(part).state_dict()
    assert found.keys() == expected.keys()
    changed = [name for name, value in expected.items() if not torch.equal(value, base[name])]
    assert len(changed) == len([name for name in shapes if "lora_A" in name])
    for name in changed:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-6)


@EACH
def test_a_dora_of_another_trainer(part, weights, tmp_path):
    trained = shake(attach(weights.load_trainable(part), rank=4, alpha=12.0, use_dora=True))
    adapters.snapshot(trained, {}).write(tmp_path / "plain")
    stored = load_file(tmp_path / "plain" / adapters.WEIGHTS_NAME)
    (tmp_path / "kohya.safetensors").write_bytes(save(foreign.kohya("lora_unet", foreign.with_alpha(stored, 12.0))))
    expected, found = (merged(weights, part, tmp_path / name) for name in ("plain", "kohya.safetensors"))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)


TRUTHS = {
    "a text encoder too": ({"lora_te_text_model_0.lora_down.weight": (4, 8)}, "holds 1 tensors, such as 'lora_te_text"),
    "another method": ({"mid_block.to_q.hada_w1_a": (4, 8)}, r"holds 1 tensors, such as 'mid_block\.to_q\.hada_w1_a'"),
    "one factor": ({"mid_block.to_q.lora_A.weight": (4, 8)}, r"lacks a factor of 'mid_block\.to_q', .* has lora_A"),
    "twice": ({"unet.down_blocks.0.to_q.lora_A.weight": (4, 8)}, "the same tensor under two names"),
    "no matrix": ({"down_blocks.1.to_q.lora_A.weight": (4,), "down_blocks.1.to_q.lora_B.weight": (8, 4)}, "no matrix"),
    "sideways": ({"down_blocks.0.to_q.dora_scale": (1, 8)}, "a magnitude for each input"),
}


@pytest.mark.parametrize("name", TRUTHS)
def test_what_cannot_be_read_is_said_truthfully(name, tmp_path):
    """A part of a file is never left out in silence."""
    shapes, message = TRUTHS[name]
    good = {f"down_blocks.0.to_q.lora_{factor}.weight": (4, 8) for factor in "AB"}
    tensors = {key: torch.zeros(shape) for key, shape in {**good, **shapes}.items()}
    (tmp_path / adapters.WEIGHTS_NAME).write_bytes(save(tensors))
    with pytest.raises(ValueError, match=message):
        adapter_files.read(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "LOHA"}, "is of the type LOHA"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4, which changed its base"),
        ({"lora_alpha": "much"}, "no numbers, such as 'much'"),
        ({"lora_alpha": float("nan")}, "no numbers, such as nan"),
        ({"alpha_pattern": {"(": 3}}, "an alpha_pattern that is no table of patterns"),
        ([1], "damaged or cut off .*no table"),
    ],
)
def test_settings_of_peft_that_cannot_be_followed(settings, message, plain, tmp_path):
    folder = foreign.write("peft", plain["prior"][0], tmp_path / "peft", "prior", 12.0, 4)
    (folder / adapter_files.PEFT_CONFIG).write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=message):
        adapter_files.read(folder)


def test_several_adapters_add_up(weights, tmp_path):
    folders = [tmp_path / name for name in ("one", "two")]
    for seed, folder in enumerate(folders):
        adapters.snapshot(shake(attach(weights.load_trainable("prior"), rank=2 + seed), seed), {}).write(folder)
    network, layer = weights.load_trainable("prior"), "transformer_blocks.0.attn1.to_q"
    adapter_tensors.apply(network, [(folders[0], 0.5), (folders[1], -2.0)])
    adapter_tensors.merge(network)
    factors = [load_file(folder / adapters.WEIGHTS_NAME) for folder in folders]
    change = [one[f"{layer}.lora_B.weight"] @ one[f"{layer}.lora_A.weight"] for one in factors]
    expected = weights.load("prior").get_submodule(layer).weight + 0.5 * change[0] - 2.0 * change[1]
    torch.testing.assert_close(network.get_submodule(layer).weight, expected, rtol=1e-5, atol=1e-6)


def test_the_file_tells_whose_it_is_and_whom_it_fits(weights, tmp_path):
    for part, side in (("prior", "prior"), ("unet", "decoder")):
        adapters.snapshot(attach(weights.load_trainable(part)), {}).write(tmp_path / part)
        shapes = adapter_files.read(tmp_path / part)
        assert adapter_files.stage(shapes) == side
        network = compatibility.expected_shapes(part, weights.folder(part))
        assert adapter_files.base_problem(shapes, network) is None
        wider = {name: (shape[0], *(size + 1 for size in shape[1:])) for name, shape in network.items()}
        assert "inputs, the base's has" in str(adapter_files.base_problem(shapes, wider))
        flat = {name: shape[:1] for name, shape in network.items()}
        assert "no layer that an adapter can change" in str(adapter_files.base_problem(shapes, flat))
        fewer = {name: shape for name, shape in network.items() if "to_q" not in name}
        assert "which the base has not" in str(adapter_files.base_problem(shapes, fewer))
    (tmp_path / "unet" / adapters.WEIGHTS_NAME).write_bytes(b"\x10" + bytes(20))
    with pytest.raises(ValueError, match="damaged or cut off"):
        adapter_files.read(tmp_path / "unet")


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="LOUD: bitsandbytes quantises with CUDA only, and none is here"
)
@EACH
@pytest.mark.parametrize("bits", ["int8", "nf4"])
def test_a_quantised_network_trains_its_adapter(part, bits, tiny_folder):
    pytest.importorskip("bitsandbytes", reason="LOUD: bitsandbytes is not installed")
    folder = str(tiny_folder)
    weights = Weights(folder, folder, cache_folder=tiny_folder.parent, frozen_dtype="float16", base_precision=bits)
    network = attach(weights.load_trainable(part), dtype=torch.float16).to("cuda")
    assert any(parameter.dtype in (torch.int8, torch.uint8) for parameter in network.parameters())
    assert {parameter.dtype for parameter in network.parameters() if parameter.requires_grad} == {torch.float32}
    with torch.device("cuda"), torch.autocast("cuda", torch.float16):
        torch.set_default_device("cuda")
        try:
            ask(part, network).float().square().mean().backward()
        finally:
            torch.set_default_device("cpu")
    assert all(p.grad is not None for p in network.parameters() if p.requires_grad)


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
    adapters.snapshot(trained, {}).write(tmp_path)
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
    """Why `generate` and docs/adapters.md pass prefix=None."""
    adapters.snapshot(attach(weights.load_trainable(part)), {}).write(tmp_path)
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
    adapters.snapshot(trained, {}).write(tmp_path)
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


def test_the_readmes_code_loads_an_adapter_of_either_stage(weights, tiny_folder, tmp_path):
    pipeline = AutoPipelineForText2Image.from_pretrained(tiny_folder, local_files_only=True)
    answers = {"prior": lambda: pipeline.prior_pipe.prior, "unet": lambda: pipeline.decoder_pipe.unet}
    for part, network in (("prior", pipeline.prior_prior), ("unet", pipeline.unet)):
        trained = shake(attach(weights.load_trainable(part)))
        adapters.snapshot(trained, {}).write(tmp_path / part)
        network.load_lora_adapter(tmp_path / part, weight_name=adapters.WEIGHTS_NAME, prefix=None)
        torch.testing.assert_close(answer(part, answers[part]()), answer(part, trained), rtol=1e-4, atol=1e-5)


@EACH
@KINDS
def test_an_adapter_reloads_exactly(part, use_dora, weights, tmp_path):
    trained = shake(attach(weights.load_trainable(part), use_dora=use_dora, dtype=torch.bfloat16))
    adapters.snapshot(trained, {}).write(tmp_path)
    again = attach(weights.load_trainable(part), use_dora=use_dora, dtype=torch.bfloat16)
    before = dict(again.named_parameters())
    adapters.load(again, tmp_path)
    assert dict(again.named_parameters()) == before  # in place: the optimizer holds these very tensors
    for key, value in trained.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key


@EACH
def test_a_whole_network_reloads_exactly(part, weights, tmp_path):
    trained = shake(weights.load_trainable(part))
    adapters.snapshot(trained, {}).write(tmp_path)
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
    adapters.snapshot(saved, {}).write(tmp_path)
    with pytest.raises((ValueError, RuntimeError), match=r"another adapter|size mismatch"):
        adapters.load(loading, tmp_path)


@EACH
@KINDS
def test_configuration_types_never_reach_what_is_saved(part, use_dora, weights, tmp_path):
    """An OmegaConf list inside a peft or diffusers configuration breaks the save, hours later."""
    cfg = OmegaConf.create({"target_modules": ["to_q", "to_k"], "rank": 2, "alpha": 4})
    network = weights.load_trainable(part)
    attach(network, rank=cfg.rank, alpha=cfg.alpha, target_modules=cfg.target_modules, use_dora=use_dora)
    adapters.snapshot(network, {}).write(tmp_path)
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
