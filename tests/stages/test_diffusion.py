"""The formulas of training against the libraries' own and against independent ones in double precision."""

import math

import pytest
import torch
from diffusers import DDPMScheduler, UnCLIPScheduler
from diffusers.training_utils import compute_snr
from torch.distributions import Normal, kl_divergence

from kandinsky_exp.stages import diffusion

TYPES = ["sample", "epsilon", "v_prediction"]
SHAPE = (8, 4, 3, 3)
TIMESTEPS = torch.tensor([0, 1, 2, 10, 100, 500, 998, 999])
LINEAR = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "linear"}  # the decoder's own
SCHEDULES = {
    "linear": DDPMScheduler(**LINEAR, variance_type="learned_range"),
    "cosine": DDPMScheduler(beta_schedule="squaredcos_cap_v2", variance_type="learned_range"),
    "zero terminal SNR": DDPMScheduler(**LINEAR, variance_type="learned_range", rescale_betas_zero_snr=True),
}


def normal(seed, shape=SHAPE):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


CLEAN, NOISE, OUTPUT, VARIANCE = normal(0), normal(1), normal(2), normal(3).tanh()


@pytest.mark.parametrize("schedule", [*SCHEDULES.values(), UnCLIPScheduler()], ids=[*SCHEDULES, "UnCLIP"])
def test_noise_is_added_as_the_schedulers_do(schedule):
    noisy = diffusion.add_noise(CLEAN, NOISE, TIMESTEPS, schedule.alphas_cumprod)
    torch.testing.assert_close(noisy, schedule.add_noise(CLEAN, NOISE, TIMESTEPS))


def test_targets_are_those_of_the_schedulers():
    schedule = SCHEDULES["linear"]
    targets = [diffusion.training_target(CLEAN, NOISE, TIMESTEPS, schedule.alphas_cumprod, kind) for kind in TYPES]
    assert targets[0] is CLEAN
    assert targets[1] is NOISE
    torch.testing.assert_close(targets[2], schedule.get_velocity(CLEAN, NOISE, TIMESTEPS))


@pytest.mark.parametrize("kind", TYPES)
def test_a_perfect_answer_stands_for_the_clean_sample(kind):
    alphas = SCHEDULES["linear"].alphas_cumprod
    noisy = diffusion.add_noise(CLEAN, NOISE, TIMESTEPS, alphas)
    answer = diffusion.training_target(CLEAN, NOISE, TIMESTEPS, alphas, kind)
    torch.testing.assert_close(
        diffusion.predict_clean(answer, noisy, TIMESTEPS, alphas, kind), CLEAN, rtol=0, atol=1e-3
    )


@pytest.mark.parametrize("gamma", [1.0, 5.0])
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_min_snr_weights_are_the_published_ones(name, kind, gamma):
    schedule = SCHEDULES[name]
    snr = compute_snr(schedule, TIMESTEPS)
    divisor = {"sample": torch.ones_like(snr), "epsilon": snr, "v_prediction": snr + 1}[kind]
    weights = diffusion.min_snr_weights(TIMESTEPS, schedule.alphas_cumprod, gamma, kind)
    torch.testing.assert_close(weights, snr.clamp(max=gamma) / divisor, rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize(
    ("kind", "without_signal", "without_noise"), [(TYPES[0], 0, 5), (TYPES[1], 1, 0), (TYPES[2], 0, 0)]
)
def test_min_snr_weights_are_finite_without_signal_and_without_noise(kind, without_signal, without_noise):
    weights = diffusion.min_snr_weights(torch.tensor([0, 1]), torch.tensor([0.0, 1.0]), 5.0, kind)
    assert weights.tolist() == [without_signal, without_noise]


def test_the_kl_divergence_is_that_of_torch():
    means, logs = normal(5, (2, 50)).double(), normal(6, (2, 50)).double()
    first, second = (Normal(mean, (log / 2).exp()) for mean, log in zip(means, logs, strict=True))
    divergence = diffusion.gaussian_kl(means[0], logs[0], means[1], logs[1])
    torch.testing.assert_close(divergence, kl_divergence(first, second))


def test_the_binned_likelihood_is_a_gaussians_mass_and_sums_to_one():
    centres = torch.arange(-20, 20, 2 / 255, dtype=torch.float64)
    mean, log_variance = torch.tensor(0.3).double(), torch.tensor(-2.0).double()
    mass = (-diffusion.binned_gaussian_nll(centres, mean, log_variance)).exp()
    gaussian = Normal(mean, (log_variance / 2).exp())
    expected = gaussian.cdf(centres + 1 / 255) - gaussian.cdf(centres - 1 / 255)
    torch.testing.assert_close(mass, expected.clamp(min=1e-12))
    assert mass.sum().item() == pytest.approx(1, abs=1e-6)


def posterior(alphas_cumprod, step, x_t, x_0):
    """q(x_{t-1} | x_t, x_0) for t > 0, by Bayes' rule from q(x_t | x_{t-1}) and q(x_{t-1} | x_0)."""
    before = alphas_cumprod[step - 1]
    alpha = alphas_cumprod[step] / before
    precision = alpha / (1 - alpha) + 1 / (1 - before)
    mean = (alpha.sqrt() / (1 - alpha) * x_t + before.sqrt() / (1 - before) * x_0) / precision
    return Normal(mean, precision.rsqrt().expand_as(mean))


def expected_bound(alphas_cumprod, step, x_t, x_0, predicted, variance):
    """L_t of one sample in bits per dimension: the KL divergence, and at t = 0 the mass of a bin."""
    narrow = posterior(alphas_cumprod, max(step, 1), x_t, predicted)
    beta = 1 - alphas_cumprod[step] / (alphas_cumprod[step - 1] if step else 1)
    log_variance = (variance + 1) / 2 * beta.log() + (1 - variance) / 2 * narrow.variance.log()
    model = Normal(narrow.mean if step else predicted, (log_variance / 2).exp())
    if step:
        return kl_divergence(posterior(alphas_cumprod, step, x_t, x_0), model).mean() / math.log(2)
    mass = model.cdf(x_0 + 1 / 255) - model.cdf(x_0 - 1 / 255)
    return -mass.clamp(min=1e-12).log().mean() / math.log(2)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("name", list(SCHEDULES))
def test_the_variational_bound_is_what_distributions_say(name, kind):
    alphas = SCHEDULES[name].alphas_cumprod
    noisy = diffusion.add_noise(CLEAN, NOISE, TIMESTEPS, alphas)
    predicted = diffusion.predict_clean(OUTPUT, noisy, TIMESTEPS, alphas, kind)
    bound = diffusion.variational_bound(OUTPUT, VARIANCE, CLEAN, noisy, TIMESTEPS, alphas, kind)
    rows = zip(TIMESTEPS.tolist(), noisy.double(), CLEAN.double(), predicted.double(), VARIANCE.double(), strict=True)
    expected = torch.stack([expected_bound(alphas.double(), *row) for row in rows]).float()
    if name == "zero terminal SNR" and kind == "epsilon":
        expected[-1] = 0  # ε says nothing of x_0 there, so the term has no mean to measure from
    torch.testing.assert_close(bound, expected, rtol=2e-3, atol=1e-6)


def test_the_log_variance_is_interpolated_as_the_scheduler_samples_it():
    """With a perfect answer only the variances differ, and L_t gives the model's away."""
    schedule = SCHEDULES["linear"]
    for step in (1, 10, 500, 999):
        steps = torch.full((8,), step)
        noisy = schedule.add_noise(CLEAN, NOISE, steps)
        bound = diffusion.variational_bound(NOISE, VARIANCE, CLEAN, noisy, steps, schedule.alphas_cumprod)
        log_variance = schedule._get_variance(step, predicted_variance=VARIANCE)
        narrow = schedule._get_variance(step, variance_type="fixed_small").log()
        nats = diffusion.gaussian_kl(torch.zeros(()), narrow, torch.zeros(()), log_variance)
        torch.testing.assert_close(bound, nats.flatten(1).mean(1) / math.log(2), rtol=1e-2, atol=1e-6)


def test_a_perfect_answer_with_the_posteriors_variance_costs_nothing():
    alphas = SCHEDULES["linear"].alphas_cumprod
    noisy = diffusion.add_noise(CLEAN, NOISE, TIMESTEPS, alphas)
    bound = diffusion.variational_bound(NOISE, torch.full(SHAPE, -1.0), CLEAN, noisy, TIMESTEPS, alphas)
    torch.testing.assert_close(bound[1:], torch.zeros(7), rtol=0, atol=1e-4)
    assert bound[0] > 0  # the likelihood of a bin: a price that no answer avoids


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("name", list(SCHEDULES))
def test_the_variational_bound_has_finite_gradients_at_every_step(name, kind):
    alphas = SCHEDULES[name].alphas_cumprod
    variance = VARIANCE.clone().requires_grad_()
    noisy = diffusion.add_noise(CLEAN, NOISE, TIMESTEPS, alphas)
    diffusion.variational_bound(OUTPUT, variance, CLEAN, noisy, TIMESTEPS, alphas, kind).sum().backward()
    assert variance.grad.isfinite().all()
    assert variance.grad[1:-1].abs().sum() > 0


def test_an_absurd_answer_is_still_a_finite_loss():
    alphas = SCHEDULES["linear"].alphas_cumprod
    noisy = diffusion.add_noise(CLEAN, NOISE, TIMESTEPS, alphas)
    output, variance = (1e3 * OUTPUT).requires_grad_(), (10 * VARIANCE).requires_grad_()
    bound = diffusion.variational_bound(output, variance, CLEAN, noisy, TIMESTEPS, alphas)
    bound.sum().backward()
    assert bound.isfinite().all()
    assert output.grad.isfinite().all()
    assert variance.grad.isfinite().all()
