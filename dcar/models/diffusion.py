"""Gaussian diffusion with a cosine schedule and learned-range variance (iDDPM, arXiv 2102.09672).

Pure functions over a table of constants; knows no network. M rows, C channels, T steps; all fp32.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class NoiseSchedule:
    """Constants of every step, each (T,) float32, computed in float64."""

    timesteps: Tensor  # int64, the step of the training schedule that the network is told
    signal: Tensor  # sqrt of alpha_bar
    noise: Tensor  # sqrt of 1 - alpha_bar
    posterior_from_start: Tensor  # q(x_t-1 | x_t, x_0): weight of x_0 in the mean
    posterior_from_noisy: Tensor  # and of x_t
    posterior_log_variance: Tensor  # lower end of the learned range
    log_beta: Tensor  # upper end of the learned range

    def __len__(self) -> int:
        return len(self.timesteps)


def cosine_alpha_bar(steps: int) -> Tensor:
    """Cumulative signal power after each step, (T,) float64; betas are capped at 0.999."""
    time = torch.arange(steps + 1, dtype=torch.float64, device="cpu") / steps
    power = torch.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - (1 - power[1:] / power[:-1]).clamp(max=0.999)).cumprod(0)


def respaced_steps(train_steps: int, sample_steps: int) -> list[int]:
    """`sample_steps` steps of the training schedule, evenly spread from 0 to the last one.

    A single step is the last one, whose input is all noise.
    """
    if not 1 <= sample_steps <= train_steps:
        raise ValueError(f"sample_steps {sample_steps} is not in [1, train_steps={train_steps}]")
    if sample_steps == 1:
        return [train_steps - 1]
    stride = (train_steps - 1) / (sample_steps - 1)
    return [round(index * stride) for index in range(sample_steps)]


@lru_cache(maxsize=32)
@torch.inference_mode(False)
def noise_schedule(
    train_steps: int, sample_steps: int, device: torch.device | str = "cpu"
) -> NoiseSchedule:
    """The cosine schedule over `train_steps`, restricted to `sample_steps` of them."""
    kept = torch.tensor(respaced_steps(train_steps, sample_steps), device="cpu")
    alpha_bar = cosine_alpha_bar(train_steps)[kept]
    previous = torch.cat([torch.ones_like(alpha_bar[:1]), alpha_bar[:-1]])
    beta = 1 - alpha_bar / previous
    variance = beta * (1 - previous) / (1 - alpha_bar)
    # the first step's posterior variance is zero: its logarithm is replaced by the second step's
    log_variance = torch.cat([variance[1:2] if len(kept) > 1 else beta, variance[1:]]).log()
    tables = (
        alpha_bar.sqrt(),
        (1 - alpha_bar).sqrt(),
        beta * previous.sqrt() / (1 - alpha_bar),
        (1 - previous) * (1 - beta).sqrt() / (1 - alpha_bar),
        log_variance,
        beta.log(),
    )
    return NoiseSchedule(kept.to(device), *(table.float().to(device) for table in tables))


def add_noise(schedule: NoiseSchedule, start: Tensor, noise: Tensor, step: Tensor) -> Tensor:
    """x_t from x_0 (M, C) for steps (M,)."""
    return schedule.signal[step][:, None] * start + schedule.noise[step][:, None] * noise


def predicted_start(
    schedule: NoiseSchedule,
    noisy: Tensor,
    predicted: Tensor,
    step: Tensor,
    *,
    clip: float,
    prediction: str = "noise",
) -> Tensor:
    """x_0 from x_t and what is predicted of it, limited to [-clip, clip]; 0 for no limit."""
    start = predicted
    if prediction == "noise":
        signal, noise = schedule.signal[step][:, None], schedule.noise[step][:, None]
        start = (noisy - noise * predicted) / signal
    return start.clamp(-clip, clip) if clip else start


def posterior_mean(schedule: NoiseSchedule, start: Tensor, noisy: Tensor, step: Tensor) -> Tensor:
    """Mean of q(x_t-1 | x_t, x_0)."""
    from_start = schedule.posterior_from_start[step][:, None]
    return from_start * start + schedule.posterior_from_noisy[step][:, None] * noisy


def learned_log_variance(schedule: NoiseSchedule, raw: Tensor, step: Tensor) -> Tensor:
    """The network's raw output in [-1, 1] interpolates between the two ends, in the logarithm."""
    low, high = schedule.posterior_log_variance[step][:, None], schedule.log_beta[step][:, None]
    return low + (raw + 1) / 2 * (high - low)


def ancestral_step(
    schedule: NoiseSchedule,
    noisy: Tensor,
    output: Tensor,
    step: Tensor,
    noise: Tensor | None,
    *,
    clip: float,
    temperature: float = 1.0,
    prediction: str = "noise",
) -> Tensor:
    """x_t-1 from x_t (M, C) and the network's output (M, 2C); noise None at t = 0."""
    predicted, raw_variance = output.chunk(2, dim=1)
    start = predicted_start(schedule, noisy, predicted, step, clip=clip, prediction=prediction)
    mean = posterior_mean(schedule, start, noisy, step)
    if noise is None:
        return mean
    log_variance = learned_log_variance(schedule, raw_variance, step)
    return mean + temperature * (0.5 * log_variance).exp() * noise


def diffusion_loss(
    schedule: NoiseSchedule,
    start: Tensor,
    noise: Tensor,
    step: Tensor,
    output: Tensor,
    *,
    prediction: str = "noise",
) -> Tensor:
    """Squared error of the prediction plus the variational bound in bits, per row: (M,).

    prediction: "noise" or "start" (x_0), whichever the first half of `output` (M, 2C) is. The bound
    trains the variance alone: its mean comes from the detached prediction.
    """
    predicted, raw_variance = output.chunk(2, dim=1)
    noisy = add_noise(schedule, start, noise, step)
    guess = predicted_start(
        schedule, noisy, predicted.detach(), step, clip=0.0, prediction=prediction
    )
    bound = _variational_bound(schedule, start, noisy, step, guess, raw_variance)
    target = start if prediction == "start" else noise
    return (target - predicted).square().mean(1) + bound


def _variational_bound(
    schedule: NoiseSchedule,
    start: Tensor,
    noisy: Tensor,
    step: Tensor,
    guess: Tensor,
    raw_variance: Tensor,
) -> Tensor:
    """guess (M, C): of x_0."""
    true_mean = posterior_mean(schedule, start, noisy, step)
    mean = posterior_mean(schedule, guess, noisy, step)
    log_variance = learned_log_variance(schedule, raw_variance, step)
    true_log_variance = schedule.posterior_log_variance[step][:, None]
    divergence = _gaussian_kl(true_mean, true_log_variance, mean, log_variance)
    likelihood = _discrete_log_likelihood(start, mean, 0.5 * log_variance)
    bound = torch.where((step == 0)[:, None], -likelihood, divergence)
    return bound.mean(1) / math.log(2.0)


def _gaussian_kl(
    mean: Tensor, log_variance: Tensor, mean_2: Tensor, log_variance_2: Tensor
) -> Tensor:
    """KL divergence from the first normal distribution to the second, in nats, elementwise."""
    ratio = (log_variance - log_variance_2).exp()
    shift = (mean - mean_2).square() * (-log_variance_2).exp()
    return 0.5 * (log_variance_2 - log_variance - 1 + ratio + shift)


def _discrete_log_likelihood(value: Tensor, mean: Tensor, log_deviation: Tensor) -> Tensor:
    """Log probability of the 1/255-wide bin around `value`; the outermost bins are open (iDDPM)."""
    inverse = (-log_deviation).exp()
    upper = _normal_cdf(inverse * (value - mean + 1 / 255))
    lower = _normal_cdf(inverse * (value - mean - 1 / 255))
    inside = torch.where(value > 0.999, 1 - lower, upper - lower)
    return torch.where(value < -0.999, upper, inside).clamp(min=1e-12).log()


def _normal_cdf(value: Tensor) -> Tensor:
    """The tanh approximation that the iDDPM loss is defined with."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (value + 0.044715 * value**3)))
