"""Pure functions of diffusion training: targets, weights and the variational term. Nothing here knows a model.

Notation of Ho et al. 2020 (arXiv:2006.11239): ᾱ_t is `alphas_cumprod[t]`, x_0 is `clean`, x_t is `noisy`, ε is `noise`.
"""

import math
from typing import Literal

import torch
from torch import Tensor

PredictionType = Literal["sample", "epsilon", "v_prediction"]
Generators = torch.Generator | list[torch.Generator]  # one for the batch, or one per sample


def uniform(size: int, generator: Generators, device: torch.device, *each: int) -> Tensor:
    """(size, *each) numbers in [0, 1)."""
    if isinstance(generator, list):
        return torch.cat([torch.rand(1, *each, generator=one, device=one.device) for one in generator]).to(device)
    return torch.rand(size, *each, generator=generator, device=device)


def at_timesteps(table: Tensor, timesteps: Tensor, like: Tensor) -> Tensor:
    """`table[timesteps]`, (T,) and (B,) → (B, 1, …), shaped to broadcast over `like`, (B, …)."""
    return table[timesteps].view(-1, *[1] * (like.ndim - 1))


def add_noise(clean: Tensor, noise: Tensor, timesteps: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """x_t = √ᾱ_t x_0 + √(1 − ᾱ_t) ε, eq. 4 of Ho et al. 2020; all (B, …), timesteps (B,)."""
    alpha = at_timesteps(alphas_cumprod, timesteps, clean)
    return alpha.sqrt() * clean + (1 - alpha).sqrt() * noise


def training_target(
    clean: Tensor, noise: Tensor, timesteps: Tensor, alphas_cumprod: Tensor, prediction_type: PredictionType
) -> Tensor:
    """What the network should answer: x_0, ε, or v = √ᾱ_t ε − √(1 − ᾱ_t) x_0 (Salimans and Ho 2022, appendix D)."""
    if prediction_type == "sample":
        return clean
    if prediction_type == "epsilon":
        return noise
    alpha = at_timesteps(alphas_cumprod, timesteps, clean)
    return alpha.sqrt() * noise - (1 - alpha).sqrt() * clean


def min_snr_weights(timesteps: Tensor, alphas_cumprod: Tensor, gamma: float, prediction_type: PredictionType) -> Tensor:
    """Min-SNR-γ loss weights, (B,), section 3.4 of Hang et al. 2023 (arXiv:2303.09556).

    `min(snr, γ)` for sample-prediction, divided by `snr` for ε and by `snr + 1` for v. Written so that it stays finite
    where the signal-to-noise ratio is zero (zero terminal SNR) or infinite.
    """
    alpha = alphas_cumprod[timesteps]
    snr = alpha / (1 - alpha)
    if prediction_type == "sample":
        return snr.clamp(max=gamma)
    if prediction_type == "epsilon":
        return (gamma / snr).clamp(max=1.0)
    return torch.minimum(snr, gamma * torch.ones_like(snr)) / (snr + 1)


def weighted_mean(values: Tensor, weights: Tensor | None) -> Tensor:
    """Mean of `values` (B,), each times its weight where there are `weights` (B,); these are not divided by again."""
    return values.mean() if weights is None else (values * weights).mean()


def predict_clean(
    output: Tensor, noisy: Tensor, timesteps: Tensor, alphas_cumprod: Tensor, prediction_type: PredictionType
) -> Tensor:
    """The x_0 that a network's answer stands for, (B, …). Where ᾱ_t = 0 an ε says nothing of x_0; see the caller."""
    alpha = at_timesteps(alphas_cumprod, timesteps, noisy)
    if prediction_type == "sample":
        return output
    if prediction_type == "epsilon":
        return (noisy - (1 - alpha).sqrt() * output) / alpha.clamp(min=1e-12).sqrt()
    return alpha.sqrt() * noisy - (1 - alpha).sqrt() * output


def variational_bound(
    output: Tensor,
    variance: Tensor,
    clean: Tensor,
    noisy: Tensor,
    timesteps: Tensor,
    alphas_cumprod: Tensor,
    prediction_type: PredictionType = "epsilon",
) -> Tensor:
    """L_t of the variational bound with a learned variance, per sample, (B,), in bits per dimension.

    Nichol and Dhariwal 2021 (arXiv:2102.09672), eq. 14: the network's v in [-1, 1] interpolates the log variance
    between the posterior's and β_t. L_t is the KL divergence of the posterior from the model (eq. 5); at t = 0 it is
    the negative log-likelihood of x_0 under a Gaussian over bins of 1/127.5, as in their code.

    Args:
        output: the network's prediction, (B, C, H, W); detach it so that only the variance learns from this term.
        variance: the other half of the network's channels, (B, C, H, W).
    """
    alpha = at_timesteps(alphas_cumprod, timesteps, clean)
    before = torch.where(timesteps > 0, alphas_cumprod[(timesteps - 1).clamp(min=0)], torch.ones_like(alpha.flatten()))
    alpha_before = before.view_as(alpha)
    beta = 1 - alpha / alpha_before
    # The posterior variance is zero at t = 0; like the paper's code, t = 1 stands in for it.
    first = alphas_cumprod[:2]
    floor = (1 - first[0]) / (1 - first[1]) * (1 - first[1] / first[0])
    posterior_variance = torch.where(
        timesteps.view_as(alpha) > 0, (1 - alpha_before) / (1 - alpha) * beta, floor.expand_as(alpha)
    )
    low, high = posterior_variance.log(), beta.log()
    fraction = (variance + 1) / 2
    log_variance = fraction * high + (1 - fraction) * low
    of_clean = alpha_before.sqrt() * beta / (1 - alpha)
    of_noisy = (alpha / alpha_before).sqrt() * (1 - alpha_before) / (1 - alpha)
    predicted = predict_clean(output, noisy, timesteps, alphas_cumprod, prediction_type)
    mean = of_clean * predicted + of_noisy * noisy
    divergence = gaussian_kl(of_clean * clean + of_noisy * noisy, low, mean, log_variance)
    likelihood = binned_gaussian_nll(clean, mean, log_variance)
    bound = torch.where(timesteps.view_as(alpha) > 0, divergence, likelihood).flatten(1).mean(1) / math.log(2)
    if prediction_type == "epsilon":
        # With zero terminal SNR the last step has no defined mean: it carries no variance signal.
        bound = torch.where(alphas_cumprod[timesteps] > 0, bound, 0.0)
    return bound


def gaussian_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """KL(N₁ ‖ N₂) of diagonal Gaussians, elementwise, in nats."""
    ratio = log_variance1 - log_variance2
    return 0.5 * (-1 - ratio + ratio.exp() + (mean1 - mean2).square() * (-log_variance2).exp())


def binned_gaussian_nll(value: Tensor, mean: Tensor, log_variance: Tensor, bin_width: float = 2 / 255) -> Tensor:
    """−log of the Gaussian's mass in the bin around `value`, elementwise, in nats (Ho et al. 2020, section 3.3)."""
    scale = (-0.5 * log_variance).exp() / math.sqrt(2)
    # The mass is symmetric, and in float32 only erfc of positive numbers keeps its digits far from the mean.
    distance = (value - mean).abs()
    mass = torch.erfc((distance - bin_width / 2) * scale) - torch.erfc((distance + bin_width / 2) * scale)
    return -(mass / 2).clamp(min=1e-12).log()
