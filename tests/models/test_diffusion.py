import math

import pytest
import torch

from dcar.models.diffusion import (
    NoiseSchedule,
    add_noise,
    ancestral_step,
    diffusion_loss,
    learned_log_variance,
    noise_schedule,
    predicted_start,
    respaced_steps,
)


def rows(schedule: NoiseSchedule, channels: int = 4) -> tuple[torch.Tensor, ...]:
    step = torch.arange(len(schedule))
    start = torch.rand(len(step), channels) * 2 - 1
    return start, torch.randn_like(start), step


def test_thirty_two_steps_are_spread_from_0_to_999() -> None:
    steps = respaced_steps(1000, 32)
    assert steps[:4] == [0, 32, 64, 97]
    assert steps[-1] == 999
    assert len(set(steps)) == 32


@pytest.mark.parametrize("steps", [0, 1001])
def test_more_steps_than_were_trained_are_refused(steps: int) -> None:
    with pytest.raises(ValueError, match=f"sample_steps {steps}"):
        respaced_steps(1000, steps)


@pytest.mark.parametrize("steps", [1, 2, 32, 1000])
def test_one_posterior_step_leads_from_each_marginal_to_the_one_before(steps: int) -> None:
    schedule = noise_schedule(1000, steps)
    signal_before = torch.cat([torch.ones(1), schedule.signal[:-1]])
    noise_before = torch.cat([torch.zeros(1), schedule.noise[:-1]])
    variance = schedule.posterior_log_variance.exp()
    variance[0] = 0  # stored as its neighbour's, for the logarithm
    mean = schedule.posterior_from_start + schedule.posterior_from_noisy * schedule.signal
    spread = (schedule.posterior_from_noisy * schedule.noise).square() + variance
    assert torch.allclose(mean, signal_before, atol=1e-5)
    assert torch.allclose(spread, noise_before.square(), atol=1e-5)


def test_the_signal_follows_the_squared_cosine() -> None:
    schedule = noise_schedule(1000, 1000)
    time = (torch.arange(1, 901) / 1000 + 0.008) / 1.008 * math.pi / 2
    expected = time.cos() / math.cos(0.008 / 1.008 * math.pi / 2)
    assert torch.allclose(schedule.signal[:900], expected, atol=1e-5)
    assert schedule.signal[-1] < 1e-2


def test_the_start_is_recovered_from_the_true_noise() -> None:
    schedule = noise_schedule(1000, 50)
    start, noise, step = (part[:-2] for part in rows(schedule))
    noisy = add_noise(schedule, start, noise, step)
    guess = predicted_start(schedule, noisy, noise, step, clip=0.0)
    assert torch.allclose(guess, start, atol=1e-3)


def test_clipping_limits_the_predicted_start_alone() -> None:
    schedule = noise_schedule(1000, 50)
    step = torch.full((3,), 25)
    noisy = torch.full((3, 2), 40.0)
    noisy[0] = -40.0
    for clip in (1.0, 2.5):
        guess = predicted_start(schedule, noisy, torch.zeros(3, 2), step, clip=clip)
        assert (guess.min(), guess.max()) == (-clip, clip)
    assert predicted_start(schedule, noisy, torch.zeros(3, 2), step, clip=0.0).max() > 10


@pytest.mark.parametrize("steps", [1, 8, 32])
def test_a_perfect_denoiser_leads_back_to_the_target(steps: int) -> None:
    schedule = noise_schedule(1000, steps)
    target = torch.rand(5, 3) * 2 - 1
    noisy = torch.randn(5, 3)
    for index in reversed(range(steps)):
        step = torch.full((5,), index)
        signal, noise = schedule.signal[index], schedule.noise[index]
        output = torch.cat([(noisy - signal * target) / noise, torch.randn(5, 3)], dim=1)
        fresh = torch.randn(5, 3) if index else None
        noisy = ancestral_step(schedule, noisy, output, step, fresh, clip=1.0)
    # a single step divides by the little signal that the last one has, 5e-5
    assert torch.allclose(noisy, target, atol=1e-2 if steps == 1 else 1e-4)


def test_temperature_scales_the_fresh_noise() -> None:
    schedule = noise_schedule(1000, 32)
    noisy, output, step = torch.randn(4, 3), torch.randn(4, 6), torch.full((4,), 9)
    fresh = torch.randn(4, 3)
    cold, half, full = (
        ancestral_step(schedule, noisy, output, step, fresh, clip=0.0, temperature=value)
        for value in (0.0, 0.5, 1.0)
    )
    assert torch.allclose(cold, ancestral_step(schedule, noisy, output, step, None, clip=0.0))
    assert torch.allclose(half, (cold + full) / 2, atol=1e-6)
    deviation = learned_log_variance(schedule, output[:, 3:], step).exp().sqrt()
    assert torch.allclose(full - cold, deviation * fresh, atol=1e-6)


def test_the_learned_variance_spans_the_posterior_and_beta() -> None:
    schedule = noise_schedule(1000, 32)
    step, ones = torch.arange(32), torch.ones(32, 1)
    low = learned_log_variance(schedule, -ones, step)[:, 0]
    high = learned_log_variance(schedule, ones, step)[:, 0]
    assert torch.allclose(low, schedule.posterior_log_variance)
    assert torch.allclose(high, schedule.log_beta, atol=1e-6)
    assert bool((low[1:] < high[1:]).all())


def test_the_loss_of_a_perfect_prediction_is_zero_after_the_first_step() -> None:
    schedule = noise_schedule(1000, 1000)
    start, noise, step = rows(schedule)
    output = torch.cat([noise, -torch.ones_like(noise)], dim=1)
    loss = diffusion_loss(schedule, start, noise, step, output)
    assert loss[1:].abs().max() < 1e-4


def test_predicting_the_start_is_the_same_diffusion_as_predicting_the_noise() -> None:
    """The same guess in the other's terms has the same bound and the same step of sampling."""
    schedule = noise_schedule(1000, 1000)
    start, noise, step = rows(schedule)
    guess, raw = start + 0.1 * torch.randn_like(start), torch.rand_like(start) - 0.5
    noisy = add_noise(schedule, start, noise, step)
    signal, deviation = (part[step][:, None] for part in (schedule.signal, schedule.noise))
    as_noise = torch.cat([(noisy - signal * guess) / deviation, raw], dim=1)
    as_start = torch.cat([guess, raw], dim=1)
    bounds = []
    for output, kind, target in ((as_noise, "noise", noise), (as_start, "start", start)):
        loss = diffusion_loss(schedule, start, noise, step, output, prediction=kind)
        bounds.append(loss - (output[:, : start.shape[1]] - target).square().mean(1))
    early = step < 900  # later a noise says its start to few digits
    assert torch.allclose(*(bound[early] for bound in bounds), rtol=1e-2, atol=1e-3)
    ends = [
        ancestral_step(schedule, noisy, output, step, None, clip=0.0, prediction=kind)
        for output, kind in ((as_noise, "noise"), (as_start, "start"))
    ]
    assert torch.allclose(ends[0][early], ends[1][early], atol=1e-3)


def test_the_bound_is_the_divergence_of_two_normals_in_bits() -> None:
    schedule = noise_schedule(1000, 1000)
    step, noise = torch.tensor([400]), torch.zeros(1, 1)
    start = torch.zeros(1, 1)
    output = torch.tensor([[0.0, 0.3]])
    low = schedule.posterior_log_variance[400]
    log_variance = low + 0.65 * (schedule.log_beta[400] - low)
    true = torch.distributions.Normal(0.0, (0.5 * low).exp())
    model = torch.distributions.Normal(0.0, (0.5 * log_variance).exp())
    expected = torch.distributions.kl_divergence(true, model) / math.log(2)
    loss = diffusion_loss(schedule, start, noise, step, output)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-3)


def test_at_the_first_step_the_bound_is_a_likelihood_of_bins() -> None:
    schedule = noise_schedule(1000, 1000)
    start, noise = torch.tensor([[0.2]]), torch.zeros(1, 1)
    output = torch.tensor([[0.0, 1.0]])
    loss = diffusion_loss(schedule, start, noise, torch.tensor([0]), output)
    normal = torch.distributions.Normal(0.2, (0.5 * schedule.log_beta[0]).exp())
    inside = normal.cdf(torch.tensor(0.2 + 1 / 255)) - normal.cdf(torch.tensor(0.2 - 1 / 255))
    assert loss.item() == pytest.approx(-math.log2(inside.item()), abs=0.01)


def test_the_bound_trains_the_variance_and_the_error_the_noise() -> None:
    schedule = noise_schedule(1000, 1000)
    start, noise, step = rows(schedule)
    output = torch.randn(1000, 8, requires_grad=True)
    diffusion_loss(schedule, start, noise, step, output).sum().backward()
    error_gradient = 2 * (output.detach()[:, :4] - noise) / 4
    assert torch.allclose(output.grad[:, :4], error_gradient, atol=1e-5)
    assert bool((output.grad[:, 4:].abs().sum(1) > 0).all())


def test_tables_made_in_inference_mode_can_be_trained_with() -> None:
    noise_schedule.cache_clear()
    with torch.inference_mode():
        noise_schedule(1000, 7)
    schedule = noise_schedule(1000, 7)
    output = torch.randn(7, 8, requires_grad=True)
    start, noise, step = rows(schedule)
    diffusion_loss(schedule, start, noise, step, output).sum().backward()
    assert not schedule.signal.is_inference()


def test_a_single_step_starts_where_all_is_noise() -> None:
    assert respaced_steps(1000, 1) == [999]
