"""Both stages on the tiny Kandinsky: objectives, null conditions, precision, memory savers and sampling.

What is expected is computed here from the published objective with the libraries' own classes, never by the package.
"""

import importlib.util
import json
import logging
import os
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler, PriorTransformer, UnCLIPScheduler, UNet2DConditionModel, VQModel
from diffusers.training_utils import compute_snr
from PIL import Image
from torch.nn import functional as F
from transformers import (
    CLIPImageProcessorPil,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
)

from kandinsky_exp.data import sources
from kandinsky_exp.errors import ConfigError
from kandinsky_exp.models import pipelines
from kandinsky_exp.models.weights import Weights
from kandinsky_exp.stages.attention import enable_attention
from kandinsky_exp.stages.decoder import DecoderStage
from kandinsky_exp.stages.prior import PriorStage
from kandinsky_exp.tiny import architecture
from kandinsky_exp.training.null_condition import null_condition

STAGES = {"prior": PriorStage, "decoder": DecoderStage}
ROWS = 4
TIMESTEPS = torch.tensor([3, 200, 600, 990])
BOTH = pytest.mark.parametrize("name", list(STAGES))
VOCABULARY = Path(__file__).parents[3] / "shared" / "data" / "clip_bpe" / "vocab.json"


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def load(folder, **settings):
    return Weights(str(folder), str(folder), cache_folder=folder.parent, **settings)


def make(name, folder, *, frozen_dtype="float32", **settings):
    """A stage without dropout or variational term unless asked for."""
    if name == "decoder":
        settings = {"vlb_weight": 0.0, **settings}
    weights = load(folder, frozen_dtype=frozen_dtype)
    return STAGES[name](weights, resolution=64, **{"condition_dropout": 0.0, **settings})


def copy_with(folder, target, part, **changes):
    """A copy of a pipeline folder whose `part` has another JSON configuration."""
    shutil.copytree(folder, target, copy_function=os.link)
    (file,) = (target / part).glob("*_config.json")
    text = json.dumps(json.loads(file.read_text("utf-8")) | changes)
    file.unlink()
    file.write_text(text, "utf-8")
    return target


@pytest.fixture(scope="module")
def examples():
    train = sources.emoji().train
    return [train[row] for row in range(ROWS)]


@pytest.fixture(scope="module")
def features(tiny_folder, examples):
    """Of each stage, by its name."""
    return {name: encode(make(name, tiny_folder), examples) for name in STAGES}


def encode(stage, examples):
    rows = [stage.preprocess(example.image(), example.captions[0]) for example in examples]
    return stage.encode({key: torch.stack([row[key] for row in rows]) for key in rows[0]})


def gradients(stage, features, seed=0):
    stage.network.zero_grad()
    stage.loss(stage.network, features, seeded(seed), TIMESTEPS).loss.backward()
    return {name: p.grad.clone() for name, p in stage.network.named_parameters() if p.grad is not None}


@BOTH
def test_features_of_another_encode_are_others(name, tiny_folder):
    """Tables of the package's own stages are found; who encodes otherwise from the same weights does not find them."""

    class Objective(STAGES[name]):
        part = STAGES[name].part

    class Other(STAGES[name]):
        def encode(self, examples):
            return super().encode(examples)

    weights = load(tiny_folder)
    ours, same, other = (cls(weights, resolution=64).encoding_fingerprint() for cls in (STAGES[name], Objective, Other))
    assert ours == same == weights.fingerprint(STAGES[name].encoders)
    assert other != ours
    assert (Objective.half, Objective.result_pipeline) == (STAGES[name].half, STAGES[name].result_pipeline)


@BOTH
def test_no_buffer_changes_while_the_network_trains(name, tiny_folder, features):
    """Several processes do not share them: each has what the architecture says, before and after steps."""
    stage, other = make(name, tiny_folder), make(name, tiny_folder)
    before = {key: value.clone() for key, value in stage.network.named_buffers()}
    stage.network.train()
    gradients(stage, features[name])
    for network in (stage.network, other.network):
        after = dict(network.named_buffers())
        assert after.keys() == before.keys()
        assert all(torch.equal(after[key], value) for key, value in before.items())


# ---- the published objectives, from the pictures on


def published_features(folder, examples, name):
    """What the frozen encoders say, by the libraries' own classes on their own."""
    images = [example.image() for example in examples]
    processor = CLIPImageProcessorPil.from_pretrained(folder / "prior_image_processor")
    image_encoder = CLIPVisionModelWithProjection.from_pretrained(folder / "prior_image_encoder").eval()
    embeds = image_encoder(processor(images, return_tensors="pt").pixel_values).image_embeds
    if name == "decoder":
        pixels = torch.stack([torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8) for image in images])
        pixels = pixels.view(ROWS, 64, 64, 3).permute(0, 3, 1, 2) / 127.5 - 1
        return embeds, VQModel.from_pretrained(folder / "movq").eval().encode(pixels).latents
    captions = [example.captions[0] for example in examples]
    tokens = CLIPTokenizer.from_pretrained(folder / "prior_tokenizer")(
        captions, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
    )
    text = CLIPTextModelWithProjection.from_pretrained(folder / "prior_text_encoder").eval()(tokens.input_ids)
    return embeds, text.text_embeds, text.last_hidden_state, tokens.attention_mask.bool()


@torch.no_grad()
def published_errors(folder, examples, name, noise_seed):
    """(B,) squared errors of the untrained network, before any weighting; and the noise schedule."""
    if name == "prior":
        embeds, pooled, states, mask = published_features(folder, examples, name)
        network = PriorTransformer.from_pretrained(folder / "prior_prior")
        schedule = DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="sample")
        clean = (embeds - network.clip_mean) / network.clip_std
        noisy = schedule.add_noise(clean, torch.randn(clean.shape, generator=seeded(noise_seed)), TIMESTEPS)
        answer = network(noisy, TIMESTEPS, pooled, states, mask).predicted_image_embedding
        return F.mse_loss(answer, clean, reduction="none").mean(1), schedule
    embeds, latents = published_features(folder, examples, name)
    network = UNet2DConditionModel.from_pretrained(folder / "unet")
    schedule = DDPMScheduler.from_pretrained(folder / "scheduler")
    noise = torch.randn(latents.shape, generator=seeded(noise_seed))
    noisy = schedule.add_noise(latents, noise, TIMESTEPS)
    answer = network(noisy, TIMESTEPS, None, added_cond_kwargs={"image_embeds": embeds}).sample[:, :4]
    target = noise if schedule.config.prediction_type == "epsilon" else schedule.get_velocity(latents, noise, TIMESTEPS)
    return F.mse_loss(answer, target, reduction="none").mean((1, 2, 3)), schedule


@BOTH
def test_the_loss_is_the_published_one(name, tiny_folder, examples, features):
    expected, _ = published_errors(tiny_folder, examples, name, noise_seed=7)
    stage = make(name, tiny_folder)
    found = stage.loss(stage.network, features[name], seeded(7), TIMESTEPS)
    torch.testing.assert_close(found.per_sample, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.loss.detach(), expected.mean(), rtol=1e-4, atol=1e-6)
    assert not found.per_sample.requires_grad


@pytest.mark.parametrize(("name", "kind"), [("prior", "sample"), ("decoder", "epsilon"), ("decoder", "v_prediction")])
def test_min_snr_weighs_the_loss_as_published(name, kind, tiny_folder, examples, features, tmp_path):
    folder = tiny_folder
    if kind == "v_prediction":
        folder = copy_with(tiny_folder, tmp_path / "v", "scheduler", prediction_type=kind)
    errors, schedule = published_errors(folder, examples, name, noise_seed=1)
    snr = compute_snr(schedule, TIMESTEPS)
    divisor = {"sample": torch.ones(ROWS), "epsilon": snr, "v_prediction": snr + 1}[kind]
    stage = make(name, folder, snr_gamma=5.0)
    found = stage.loss(stage.network, features[name], seeded(1), TIMESTEPS)
    torch.testing.assert_close(found.loss.detach(), (errors * snr.clamp(max=5) / divisor).mean(), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(found.per_sample, errors, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_zero_terminal_snr_trains_with_finite_loss_and_gradients(kind, tiny_folder, features, tmp_path):
    changes = {"rescale_betas_zero_snr": True, "prediction_type": kind}
    folder = copy_with(tiny_folder, tmp_path / "zero", "scheduler", **changes)
    stage = make("decoder", folder, snr_gamma=5.0, vlb_weight=0.001)
    assert stage.alphas_cumprod[-1] == 0
    found = stage.loss(stage.network, features["decoder"], seeded(), torch.full((ROWS,), 999))
    found.loss.backward()
    assert found.loss.isfinite()
    assert all(p.grad.isfinite().all() for p in stage.network.parameters() if p.grad is not None)


def test_the_priors_noise_is_that_of_the_scheduler_it_samples_with(tiny_folder):
    stage = make("prior", tiny_folder)
    sampler = UnCLIPScheduler.from_pretrained(tiny_folder / "prior_scheduler")
    assert torch.equal(stage.alphas_cumprod, sampler.alphas_cumprod)
    assert stage.num_timesteps == sampler.config.num_train_timesteps
    assert stage.prediction_type == sampler.config.prediction_type == "sample"


def test_timesteps_are_drawn_from_the_whole_schedule(tiny_folder, features):
    stage = make("prior", tiny_folder)
    with torch.no_grad():
        losses = [stage.loss(stage.network, features["prior"], seeded(seed)) for seed in range(40)]
    drawn = torch.cat([loss.timesteps for loss in losses])
    assert drawn.min() >= 0
    assert drawn.max() < 1000
    assert torch.histc(drawn.float(), bins=4, min=0, max=1000).min() > 20  # 40 each on average


# ---- the learned variance


def test_the_variational_term_leaves_the_mean_alone(tiny_folder, features):
    plain, hybrid = (make("decoder", tiny_folder, vlb_weight=weight) for weight in (0.0, 0.001))
    plain_grads, hybrid_grads = (gradients(stage, features["decoder"]) for stage in (plain, hybrid))
    last = "conv_out.weight"  # (8, C, 3, 3): four channels of noise, four of variance
    assert torch.equal(plain_grads[last][4:], torch.zeros_like(plain_grads[last][4:]))
    assert torch.equal(plain_grads["conv_out.bias"][4:], torch.zeros(4))
    assert torch.equal(hybrid_grads[last][:4], plain_grads[last][:4])
    assert (hybrid_grads["conv_out.bias"][4:] != 0).all()


def test_the_variational_term_has_the_published_weight(tiny_folder, features):
    """λ · T · L_t in bits per dimension: at λ = 0.001 and T = 1000 it is L_t itself."""
    losses = {}
    for weight in (0.0, 0.001, 0.002):
        stage = make("decoder", tiny_folder, vlb_weight=weight)
        losses[weight] = stage.loss(stage.network, features["decoder"], seeded(), TIMESTEPS).loss.item()
    term = losses[0.001] - losses[0.0]
    assert term > 0
    assert losses[0.002] - losses[0.0] == pytest.approx(2 * term, rel=1e-3)
    assert term == pytest.approx(expected_bound(stage, features["decoder"]), rel=1e-2)


@torch.no_grad()
def expected_bound(stage, features):
    """Mean L_t for t > 0, with the scheduler's own variances and torch's KL divergence."""
    schedule = stage.weights.load("decoder_scheduler")
    latents, noise = features["latents"], torch.randn(features["latents"].shape, generator=seeded())
    noisy = schedule.add_noise(latents, noise, TIMESTEPS)
    output = stage.predict(stage.network, noisy, TIMESTEPS, features)
    bounds = []
    for row, step in enumerate(TIMESTEPS.tolist()):
        now, before = schedule.alphas_cumprod[step], schedule.alphas_cumprod[step - 1]
        # μ(x_t, ε) = (x_t − β_t / √(1 − ᾱ_t) ε) / √α_t, eq. 11 of Ho et al. 2020; q's own mean has the true ε.
        means = [
            (noisy[row] - (1 - now / before) / (1 - now).sqrt() * value) / (now / before).sqrt()
            for value in (noise[row], output[row, :4])
        ]
        narrow = schedule._get_variance(step, variance_type="fixed_small").sqrt()
        learned = (schedule._get_variance(step, predicted_variance=output[row, 4:]) / 2).exp()
        true = torch.distributions.Normal(means[0], narrow)
        bounds.append(torch.distributions.kl_divergence(true, torch.distributions.Normal(means[1], learned)).mean())
    return (torch.stack(bounds).mean() / torch.log(torch.tensor(2.0))).item()


def test_a_schedule_without_learned_variance_has_no_term_and_says_so_once(tiny_folder, features, tmp_path, caplog):
    folder = copy_with(tiny_folder, tmp_path / "fixed", "scheduler", variance_type="fixed_small")
    with caplog.at_level(logging.WARNING, "kandinsky_exp"):
        stage = make("decoder", folder, vlb_weight=0.001)
        losses = [stage.loss(stage.network, features["decoder"], seeded(), TIMESTEPS) for _ in range(3)]
    assert losses[0].loss.item() == pytest.approx(losses[0].per_sample.mean().item())
    (record,) = caplog.records
    assert "learned variance" in record.getMessage()


# ---- the null condition


def test_the_priors_null_condition_is_the_empty_caption_as_the_pipeline_encodes_it(tiny_folder):
    stage = make("prior", tiny_folder)
    pipeline = pipelines.prior_pipeline(stage.weights)
    embeds, states, mask = pipeline._encode_prompt(["a cat"], torch.device("cpu"), 1, True, [""])
    null = stage.null_condition()
    assert set(null) == {"text_embeds", "text_states", "text_mask"}
    torch.testing.assert_close(null["text_embeds"], embeds[:1])
    longest = mask.shape[1]  # the pipeline's text is cut to its longest prompt; beyond its end the null has nothing
    torch.testing.assert_close(null["text_states"][:, :longest], states[:1] * mask[:1, :, None])
    assert torch.equal(null["text_mask"][:, :longest], mask[:1])
    assert not null["text_states"][:, longest:].any()
    assert null["text_mask"].dtype == torch.bool
    assert null["text_mask"].sum() == 2  # the two marks around no words


def test_the_decoders_null_condition_is_the_embedding_of_the_zero_image(tiny_folder):
    stage = make("decoder", tiny_folder)
    null = stage.null_condition()
    assert set(null) == {"image_embeds"}
    expected = pipelines.prior_pipeline(stage.weights).get_zero_embed()
    torch.testing.assert_close(null["image_embeds"], expected)
    assert null["image_embeds"].abs().max() > 0


@BOTH
def test_a_dropped_condition_is_the_null_condition_and_only_that(name, tiny_folder, features):
    kept, dropped = (make(name, tiny_folder, condition_dropout=p) for p in (0.0, 1.0))
    null = {key: value.expand(ROWS, *value.shape[1:]) for key, value in dropped.null_condition().items()}
    nulled = {**features[name], **null}
    expected = kept.loss(kept.network, nulled, seeded(), TIMESTEPS).per_sample
    found = dropped.loss(dropped.network, features[name], seeded(), TIMESTEPS).per_sample
    assert torch.equal(found, expected)
    assert not torch.allclose(found, kept.loss(kept.network, features[name], seeded(), TIMESTEPS).per_sample)


@BOTH
def test_conditions_are_dropped_only_while_the_network_trains(name, tiny_folder, features):
    kept, dropped = (make(name, tiny_folder, condition_dropout=p) for p in (0.0, 1.0))
    expected = kept.loss(kept.network.eval(), features[name], seeded(), TIMESTEPS).per_sample
    assert torch.equal(dropped.loss(dropped.network.eval(), features[name], seeded(), TIMESTEPS).per_sample, expected)
    assert not torch.equal(
        dropped.loss(dropped.network.train(), features[name], seeded(), TIMESTEPS).per_sample, expected
    )


@BOTH
def test_conditions_are_dropped_with_the_given_probability_sample_by_sample(name, tiny_folder, features):
    stages = [make(name, tiny_folder, condition_dropout=p) for p in (0.0, 0.3, 1.0)]
    count = 96
    many = {key: value[:1].expand(count, *value.shape[1:]) for key, value in features[name].items()}
    steps = torch.full((count,), 500)
    with torch.no_grad():
        kept, mixed, dropped = (stage.loss(stage.network, many, seeded(), steps).per_sample for stage in stages)
    is_dropped = torch.isclose(mixed, dropped, rtol=1e-5, atol=0)
    torch.testing.assert_close(mixed, torch.where(is_dropped, dropped, kept))
    assert 0.15 < is_dropped.float().mean() < 0.45  # three standard deviations around 0.3


def test_a_null_condition_from_a_cache_needs_no_encoder(tiny_folder, features):
    stage = make("prior", tiny_folder, condition_dropout=1.0)
    stage.use_null_condition(
        {
            key: value.half() if value.is_floating_point() else value
            for key, value in make("prior", tiny_folder).null_condition().items()
        }
    )
    stage.loss(stage.network, features["prior"], seeded(), TIMESTEPS).loss.backward()
    assert not {"text_encoder", "image_encoder"} & set(stage.weights._loaded)


# ---- noise


@BOTH
def test_the_noise_of_a_sample_does_not_depend_on_its_batch(name, tiny_folder, features):
    """Also while conditions are dropped: each sample has a generator of its own."""
    stage = make(name, tiny_folder, condition_dropout=0.5)
    whole = stage.loss(stage.network, features[name], [seeded(row) for row in range(ROWS)], TIMESTEPS).per_sample
    for row in range(ROWS):
        alone = {key: value[row : row + 1] for key, value in features[name].items()}
        single = stage.loss(stage.network, alone, [seeded(row)], TIMESTEPS[row : row + 1]).per_sample
        torch.testing.assert_close(single, whole[row : row + 1], rtol=1e-4, atol=1e-6)


@BOTH
def test_equal_generators_give_equal_losses(name, tiny_folder, features):
    stage = make(name, tiny_folder, condition_dropout=0.5)
    first, again, other = (stage.loss(stage.network, features[name], seeded(seed)) for seed in (5, 5, 6))
    assert torch.equal(first.per_sample, again.per_sample)
    assert torch.equal(first.timesteps, again.timesteps)
    assert not torch.equal(first.per_sample, other.per_sample)


# ---- the networks


def test_masked_text_positions_do_not_matter(tiny_folder, features):
    stage = make("prior", tiny_folder)
    mask = features["prior"]["text_mask"]
    assert not mask.all()
    noise = 100 * torch.randn((*mask.shape, 64), generator=seeded())
    states = torch.where(mask[..., None], features["prior"]["text_states"], noise)
    first = gradients(stage, features["prior"])
    other = gradients(stage, features["prior"] | {"text_states": states})
    for key, gradient in first.items():
        torch.testing.assert_close(other[key], gradient, rtol=1e-4, atol=1e-6)


def test_clip_statistics_never_train(tiny_folder, features):
    stage = make("prior", tiny_folder)
    frozen = {key for key, parameter in stage.network.named_parameters() if not parameter.requires_grad}
    assert frozen == {"clip_mean", "clip_std"}
    assert set(gradients(stage, features["prior"])) == dict(stage.network.named_parameters()).keys() - frozen


def test_every_weight_of_the_decoder_gets_a_gradient(tiny_folder, features):
    """Distributed training dies of a trainable weight that no loss reaches."""
    stage = make("decoder", tiny_folder)
    assert set(gradients(stage, features["decoder"])) == dict(stage.network.named_parameters()).keys()


def test_a_prior_from_scratch_is_refused(tiny_folder, tmp_path):
    folder = tmp_path / "scratch"
    shutil.copytree(tiny_folder, folder, copy_function=os.link)
    shutil.rmtree(folder / "prior_prior")
    architecture.prior().save_pretrained(folder / "prior_prior")
    with pytest.raises(ConfigError, match="clip_std has zeros"):
        _ = make("prior", folder).network


@BOTH
def test_gradient_checkpointing_gives_equal_gradients(name, tiny_folder, features):
    plain, saving = make(name, tiny_folder), make(name, tiny_folder)
    saving.enable_gradient_checkpointing()
    plain_peak, saving_peak = (saved_bytes(stage, features[name]) for stage in (plain, saving))
    assert saving_peak < 0.6 * plain_peak
    plain_grads, saving_grads = (gradients(stage, features[name]) for stage in (plain, saving))
    assert plain_grads.keys() == saving_grads.keys()
    for key, gradient in plain_grads.items():
        assert torch.equal(gradient, saving_grads[key]), key


def saved_bytes(stage, features):
    """Memory that the forward pass keeps for the backward pass."""
    storages = {}

    def note(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        stage.loss(stage.network, features, seeded(), TIMESTEPS)
    weights = {parameter.untyped_storage().data_ptr() for parameter in stage.network.parameters()}
    return sum(size for pointer, size in storages.items() if pointer not in weights)


@BOTH
def test_gradient_checkpointing_leaves_no_trace_in_what_is_saved(name, tiny_folder, tmp_path):
    stage = make(name, tiny_folder)
    keys = set(stage.network.state_dict())
    stage.enable_gradient_checkpointing()
    assert set(stage.network.state_dict()) == keys
    stage.snapshot(stage.network, {}).write(tmp_path / stage.part)
    again = type(stage.network).from_pretrained(tmp_path / stage.part)
    assert all(torch.equal(value, stage.network.state_dict()[key]) for key, value in again.state_dict().items())


@BOTH
def test_eager_attention_agrees_with_sdpa(name, tiny_folder, features):
    sdpa, eager = make(name, tiny_folder), make(name, tiny_folder)
    enable_attention(sdpa.network, "sdpa")
    enable_attention(eager.network, "eager")
    kinds = [{type(one).__name__ for one in stage.network.attn_processors.values()} for stage in (sdpa, eager)]
    assert all(kind.endswith("2_0") for kind in kinds[0])
    assert not any(kind.endswith("2_0") for kind in kinds[1])
    first, second = (gradients(stage, features[name]) for stage in (sdpa, eager))
    for key, gradient in first.items():
        torch.testing.assert_close(second[key], gradient, rtol=1e-3, atol=1e-5)


def shortened(features):
    longest = int(features["text_mask"].sum(1).max())
    return features | {key: features[key][:, :longest] for key in ("text_states", "text_mask")}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_prior_trains_alike_with_and_without_padding(tiny_folder, features, checkpointing):
    """`eager` is the published forward, which takes padded text only."""
    whole, short = features["prior"], shortened(features["prior"])
    assert short["text_mask"].shape[1] < whole["text_mask"].shape[1]
    found = {}
    for attention in ("sdpa", "eager"):
        stage = make("prior", tiny_folder, condition_dropout=0.5)
        stage.set_attention(attention)
        if checkpointing:
            stage.enable_gradient_checkpointing()
        stage.network.train()
        for given in (whole, short):
            found[attention, given is short] = gradients(stage, given)
        assert ("forward" in vars(stage.network)) == (attention == "sdpa")
    expected = found["eager", False]
    largest = max(gradient.abs().max() for gradient in expected.values())
    for other in found.values():
        for key, gradient in expected.items():
            torch.testing.assert_close(other[key], gradient, rtol=1e-4, atol=float(1e-6 * largest))


@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_lengths_of_a_compiled_prior_are_few(tiny_folder, features):
    stage = make("prior", tiny_folder)
    stage.set_attention("sdpa")
    seen = []
    stage.network.register_forward_pre_hook(
        lambda network, positional, named: seen.append(named["encoder_hidden_states"].shape[1]), with_kwargs=True
    )
    stage.compile(regional=False)
    stage.network.compile(backend="eager")
    mask = features["prior"]["text_mask"]
    for length in (9, 16, 17, 74, 77):
        given = {key: features["prior"][key][:, :length] for key in ("text_states", "text_mask")}
        stage.loss(stage.network, features["prior"] | given, seeded(), TIMESTEPS)
    assert mask.shape[1] == 77
    assert seen == [16, 16, 24, 77, 77]


@pytest.mark.skipif(
    torch.cuda.is_available() and importlib.util.find_spec("xformers") is not None, reason="xformers works here"
)
@BOTH
def test_xformers_where_it_cannot_work_is_a_clear_error(name, tiny_folder):
    with pytest.raises(ConfigError, match=r"trainer\.attention: xformers .* set sdpa"):
        enable_attention(make(name, tiny_folder).network, "xformers")


# ---- precision


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@BOTH
def test_frozen_parts_may_be_half_while_what_trains_stays_full(name, dtype, tiny_folder, examples, features):
    stage = make(name, tiny_folder, frozen_dtype=dtype, condition_dropout=0.5)
    encoded = encode(stage, examples)
    for part in stage.encoders:
        model = stage.weights.load(part)
        assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}
        assert not any(p.requires_grad for p in model.parameters())
        assert not model.training
    assert {value.dtype for value in encoded.values()} <= {getattr(torch, dtype), torch.bool}
    assert {p.dtype for p in stage.network.parameters()} == {torch.float32}
    half, full = gradients(stage, encoded), gradients(make(name, tiny_folder, condition_dropout=0.5), features[name])
    assert {gradient.dtype for gradient in half.values()} == {torch.float32}
    flat_half, flat_full = (torch.cat([grads[key].flatten() for key in full]) for grads in (half, full))
    assert F.cosine_similarity(flat_half, flat_full, dim=0) > 0.98


@BOTH
def test_mixed_precision_keeps_the_loss_in_full(name, tiny_folder, features):
    stage = make(name, tiny_folder)
    full = stage.loss(stage.network, features[name], seeded(), TIMESTEPS)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = stage.loss(stage.network, features[name], seeded(), TIMESTEPS)
    assert mixed.loss.dtype == mixed.per_sample.dtype == torch.float32
    torch.testing.assert_close(mixed.per_sample, full.per_sample, rtol=0.1, atol=0.01)


@BOTH
def test_what_trains_is_a_copy_of_its_own(name, tiny_folder):
    """Base images of a comparison come from the base weights, also after training."""
    stage = make(name, tiny_folder)
    base = stage.weights.load(stage.part)
    assert base is not stage.network
    assert not {p.data_ptr() for p in base.parameters()} & {p.data_ptr() for p in stage.network.parameters()}


# ---- tokenizer, image processor and autoencoder


@pytest.fixture(scope="module", params=["built", "from the folder"])
def tokenizer(request, tiny_folder):
    return architecture.tokenizer() if request.param == "built" else load(tiny_folder).load("tokenizer")


def test_the_tokenizer_is_clips(tokenizer):
    assert tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert len(tokenizer) == 49408
    padded = tokenizer("a photo of a cat", padding="max_length", truncation=True)
    assert padded.input_ids[7:] == [49407] * 70
    assert padded.attention_mask == [1] * 7 + [0] * 70
    assert len(tokenizer("cat " * 200, padding="max_length", truncation=True).input_ids) == 77


@pytest.mark.skipif(not VOCABULARY.is_file(), reason="NOT CHECKED: CLIP's published vocabulary is not at hand")
def test_the_whole_vocabulary_is_clips(tokenizer):
    vocabulary = json.loads(VOCABULARY.read_text("utf-8"))
    assert tokenizer.get_vocab() == vocabulary
    lines = (VOCABULARY.parent / "merges.txt").read_text("utf-8").splitlines()
    merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    published = CLIPTokenizer(vocab=vocabulary, merges=merges)
    texts = ["naïve café, 東京 🐈!", "Ünïcode's  [] <|endoftext|> 12:30"]
    texts += [text for example in sources.emoji().train for text in example.captions]
    assert tokenizer(texts).input_ids == published(texts).input_ids


def test_preprocessing_needs_no_torchvision(tiny_folder):
    processor = load(tiny_folder).load("image_processor")
    assert type(processor) is CLIPImageProcessorPil


def test_the_autoencoders_widths_fit_its_spatial_norm(tiny_folder):
    movq = load(tiny_folder).load("movq")
    assert all(width % 32 == 0 for width in movq.config.block_out_channels)
    assert movq.decode(torch.zeros(1, 4, 16, 16), force_not_quantize=True).sample.shape == (1, 3, 64, 64)


# ---- sampling


def settings(**changes):
    return pipelines.SampleSettings(**{"inference_steps": 2, "height": 64, "width": 64, **changes})


@torch.no_grad()
def constant_prior(folder, normalised):
    """A real prior whose answer is always `normalised`, (E,)."""
    network = PriorTransformer.from_pretrained(folder / "prior_prior")
    network.proj_to_clip_embeddings.weight.zero_()
    network.proj_to_clip_embeddings.bias.copy_(normalised)
    return network


def test_sampled_embeddings_are_unnormalised_with_the_statistics_of_training(tiny_folder):
    weights = load(tiny_folder)
    normalised = torch.linspace(-7, 7, 64)
    network = constant_prior(tiny_folder, normalised)
    embeds, _ = pipelines.embed_prompts(pipelines.prior_pipeline(weights, network), ["a cat", "a dog"], settings())
    clip_range = weights.load("prior_scheduler").config.clip_sample_range
    expected = normalised.clamp(-clip_range, clip_range) * network.clip_std + network.clip_mean
    # The scheduler's last step multiplies by β_0 / (1 − ᾱ_0), which is 1 only to three digits in float32.
    torch.testing.assert_close(embeds, expected.detach().expand(2, -1), rtol=3e-3, atol=3e-3)


def test_training_normalises_as_sampling_unnormalises(tiny_folder, features):
    stage = make("prior", tiny_folder)
    embeds = features["prior"]["image_embeds"]
    torch.testing.assert_close(stage.network.post_process_latents(stage.clean(features["prior"])), embeds)
    assert not torch.allclose(stage.clean(features["prior"]), embeds)


@BOTH
def test_samples_depend_on_prompt_number_and_seed_alone(name, tiny_folder):
    stage, prompts = make(name, tiny_folder), ["a cat", "a dog", "a red heart"]
    together = stage.sample(stage.network.eval(), prompts, settings())
    one_by_one = stage.sample(stage.network, prompts, settings(batch_size=1))
    reseeded = stage.sample(stage.network, prompts, settings(seed=1))
    assert [image.size for image in together] == [(64, 64)] * 3
    for first, second, other in zip(together, one_by_one, reseeded, strict=True):
        assert difference(first, second) < 1
        assert difference(first, other) > 3


def difference(first: Image.Image, second: Image.Image) -> float:
    """Mean absolute difference in grey levels of 256."""
    pixels = [torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).float() for image in (first, second)]
    return (pixels[0] - pixels[1]).abs().mean().item()


def test_a_decoder_redraws_images_from_their_own_embeddings(tiny_folder, features):
    stage = make("decoder", tiny_folder)
    embeds = features["decoder"]["image_embeds"]
    redrawn = stage.reconstruct(stage.network.eval(), features["decoder"], settings())
    null = stage.null_condition()["image_embeds"].expand_as(embeds)
    expected = pipelines.decode(pipelines.decoder_pipeline(stage.weights, stage.network), (embeds, null), settings())
    assert [difference(*pair) for pair in zip(redrawn, expected, strict=True)] == [0] * ROWS


def test_a_prior_samples_with_the_weights_in_training_and_the_base_decoder(tiny_folder):
    stage = make("prior", tiny_folder)
    before = stage.sample(stage.network.eval(), ["a cat"], settings())
    changed = constant_prior(tiny_folder, torch.full((64,), 2.0))
    assert difference(before[0], stage.sample(changed, ["a cat"], settings())[0]) > 1
    assert difference(before[0], stage.sample(stage.network, ["a cat"], settings())[0]) == 0


# --- what encoded features depend on


ENCODERS = ("text_encoder", "image_encoder")


@pytest.fixture
def theirs(tiny_folder, tmp_path):
    """A pipeline folder that may be written to, and the fingerprint of its encoders."""
    folder = tmp_path / "theirs"
    shutil.copytree(tiny_folder, folder)
    return folder, load(folder).fingerprint(ENCODERS)


def aged(file, seconds=100):
    """Old enough that its time says something."""
    times = (file.stat().st_atime - seconds, file.stat().st_mtime - seconds)
    os.utime(file, times)
    return file


def test_encoders_count_by_content(theirs):
    folder, before = theirs
    file = aged(folder / "prior_text_encoder" / "model.safetensors")
    assert load(folder).fingerprint(ENCODERS) == before  # another time alone
    assert load(folder).fingerprint(ENCODERS) == before  # from memory
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    os.utime(file, (0, file.stat().st_mtime - 200))
    assert load(folder).fingerprint(ENCODERS) != before


def test_a_copy_of_the_encoders_is_the_same(theirs):
    folder, before = theirs
    shutil.copytree(folder, folder.parent / "moved" / "copy", copy_function=shutil.copyfile)
    assert load(folder.parent / "moved" / "copy").fingerprint(ENCODERS) == before


def test_files_that_are_not_opened_do_not_count(theirs):
    folder, before = theirs
    part = folder / "prior_image_encoder"
    (part / "README.md").write_text("about it")
    (part / "model.fp16.safetensors").write_bytes(b"of another variant")
    assert load(folder).fingerprint(ENCODERS) == before
    assert load(folder, variant="bf16").fingerprint(ENCODERS) == before  # there is none: the plain files are read
    assert load(folder, variant="fp16").fingerprint(ENCODERS) != before


def test_shards_count(theirs):
    folder, before = theirs
    part = folder / "prior_text_encoder"
    (part / "model.safetensors").rename(part / "model-00001-of-00001.safetensors")
    index = {"metadata": {}, "weight_map": {"a": "model-00001-of-00001.safetensors"}}
    (part / "model.safetensors.index.json").write_text(json.dumps(index))
    sharded = load(folder).fingerprint(ENCODERS)
    assert sharded != before
    (part / "model-00001-of-00001.safetensors").write_bytes(b"other")
    assert load(folder).fingerprint(ENCODERS) != sharded


def test_precision_counts(theirs):
    folder, before = theirs
    assert load(folder, tf32=True).fingerprint(ENCODERS) != before
    half = load(folder, frozen_dtype="bfloat16").fingerprint(ENCODERS)
    assert half != before
    assert load(folder, frozen_dtype="bfloat16", tf32=True).fingerprint(ENCODERS) == half  # it has no part in it


def test_the_null_condition_is_encoded_once(tiny_folder, tmp_path):
    first = null_condition(make("prior", tiny_folder), tmp_path / "cache", "encoders", torch.device("cpu"))
    again = make("prior", tiny_folder)
    found = null_condition(again, tmp_path / "cache", "encoders", torch.device("cpu"))
    assert not again.weights._loaded.keys() & set(ENCODERS)
    assert found.keys() == first.keys()
    assert all(torch.equal(found[key], first[key]) for key in first)
    assert not list((tmp_path / "cache").glob("*.part"))


def test_the_null_condition_needs_no_disk_that_can_be_written(tiny_folder, tmp_path):
    (tmp_path / "file").write_text("")
    stage = make("decoder", tiny_folder)
    found = null_condition(stage, tmp_path / "file" / "cache", "encoders", torch.device("cpu"))
    assert torch.equal(found["image_embeds"], make("decoder", tiny_folder).null_condition()["image_embeds"])
