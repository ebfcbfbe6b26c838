import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from einops import rearrange
from torch import Tensor

from dcar.models.diffusion import noise_schedule
from dcar.models.draws import Draws, RowDraws
from dcar.models.noise import ImageNoise
from dcar.models.residual_head import (
    BaseResidualHead,
    FlowResidualHead,
    ResidualHead,
)

HEADS = pytest.mark.parametrize("kind", [ResidualHead, FlowResidualHead])


def build(kind: type[BaseResidualHead], **changes: Any) -> BaseResidualHead:
    """A head that is not the zero function."""
    sizes = {"channels": 3, "dim": 5, "width": 16, "depth": 2, "scale": 0.2, "sample_steps": 6}
    head = kind(**(sizes | changes))
    for layer in (head.denoiser.output, head.denoiser.output_modulation):
        torch.nn.init.normal_(layer.weight, std=0.2)
    return head


def data(batch: int = 4, tokens: int = 6) -> tuple[Tensor, Tensor]:
    return 0.2 * torch.randn(batch, tokens, 3), torch.randn(batch, tokens, 5)


def test_the_published_size_has_36_192_320_parameters() -> None:
    with torch.device("meta"):
        head = ResidualHead(channels=32, dim=1152)
    assert sum(weight.numel() for weight in head.parameters()) == 36_192_320


@HEADS
def test_a_head_without_a_scale_refuses_to_train_and_to_sample(kind: type) -> None:
    head, (residual, hidden) = build(kind, scale=None), data()
    with pytest.raises(ValueError, match="scale"):
        head.loss(residual, hidden, Draws(0))
    with pytest.raises(ValueError, match="scale"):
        head.sample(hidden, noise=ImageNoise(range(4)))
    head.set_scale(0.2)
    assert head.loss(residual, hidden, Draws(0)).isfinite()


def test_a_head_that_predicts_the_start_gives_its_mean_in_one_step() -> None:
    """From pure noise: the only step at temperature 0 is the network's prediction itself."""
    head, (_, hidden) = build(ResidualHead, prediction="start", clip_denoised=0.0), data()
    noise = ImageNoise(range(4)).randn(1, 6, 3)  # (B, 1, N, C)
    rows = rearrange(noise, "b 1 n c -> (b n) c")
    condition = head.denoiser.condition_embedding(hidden).flatten(0, 1)
    mean = head.denoiser(rows, torch.tensor([999]), condition)[:, :3]
    drawn = head.sample(hidden, noise=ImageNoise(range(4)), temperature=0.0, steps=1)
    torch.testing.assert_close(drawn, 0.2 * rearrange(mean, "(b n) c -> b n c", b=4))


def test_the_start_learns_what_to_expect_where_noise_alone_is_given() -> None:
    """Residuals of one certain value: a head that predicts them finds it in one step."""
    torch.manual_seed(0)
    head, (_, hidden) = build(ResidualHead, prediction="start", clip_denoised=0.0), data()
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2)
    for step in range(300):
        optimizer.zero_grad()
        head.loss(torch.full((4, 6, 3), 0.2), hidden, Draws(step)).backward()
        optimizer.step()
    drawn = head.sample(hidden, noise=ImageNoise(range(4)), temperature=0.0, steps=1)
    assert (drawn - 0.2).abs().max() < 0.05


@HEADS
def test_a_head_that_is_told_codes_starts_without_them_and_then_follows_them(kind: type) -> None:
    torch.manual_seed(0)
    head, (residual, hidden) = build(kind, num_codes=7), data()
    ids = torch.randint(0, 7, (4, 6))

    def sample(ids: Tensor) -> Tensor:
        noise = ImageNoise(range(4))
        return head.sample(hidden, noise=noise, ids=ids, guidance=1.0, hidden_uncond=-hidden)

    assert torch.equal(sample(ids), sample((ids + 1) % 7))
    head.loss(residual, hidden, Draws(0), ids=ids).backward()
    met = head.code_embedding.weight.grad.abs().sum(1) > 0
    assert met.tolist() == [code in ids for code in range(7)]
    torch.nn.init.normal_(head.code_embedding.weight)
    scaled = head.sample(3 * hidden, noise=ImageNoise(range(4)), ids=ids)
    plain = head.sample(hidden, noise=ImageNoise(range(4)), ids=ids)
    assert torch.allclose(scaled, plain, atol=1e-4)  # hidden states of any scale are normalised
    changed = ids.clone()
    changed[0, 0] = (ids[0, 0] + 1) % 7
    moved = (sample(ids) != sample(changed)).any(2)
    assert moved[0, 0] and moved.sum() == 1


@HEADS
def test_a_head_that_is_told_codes_asks_for_them(kind: type) -> None:
    head, (residual, hidden) = build(kind, num_codes=7), data()
    with pytest.raises(ValueError, match="ids"):
        head.loss(residual, hidden, Draws(0))
    with pytest.raises(ValueError, match="ids"):
        head.sample(hidden, noise=ImageNoise(range(4)))


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan, math.inf])
def test_a_scale_that_is_no_positive_number_is_refused(scale: float) -> None:
    with pytest.raises(ValueError, match="scale"):
        build(ResidualHead, scale=scale)


def test_the_scale_travels_with_the_weights_and_stays_exact_in_half_precision() -> None:
    trained, fresh = build(ResidualHead, scale=0.107), build(ResidualHead, scale=None)
    unset = {name: part.clone() for name, part in fresh.state_dict().items()}
    fresh.load_state_dict(trained.state_dict())
    assert fresh.loss(*data(), Draws(0)).isfinite()
    fresh.load_state_dict(unset)
    with pytest.raises(ValueError, match="scale"):
        fresh.loss(*data(), Draws(0))
    fresh.load_state_dict(trained.state_dict())
    halved = fresh.to(torch.bfloat16)
    assert halved.scale.item() == pytest.approx(0.107, abs=1e-7)
    sampled = halved.sample(data()[1], noise=ImageNoise(range(4)))
    assert sampled.dtype == torch.float32 and sampled.isfinite().all()


@HEADS
def test_residuals_and_samples_are_in_units_of_the_scale(kind: type) -> None:
    small, large = build(kind), build(kind)
    large.load_state_dict(small.state_dict())
    large.set_scale(0.2 * 8)
    residual, hidden = data()
    losses = small.loss(residual, hidden, Draws(0)), large.loss(8 * residual, hidden, Draws(0))
    assert torch.allclose(*losses)
    samples = [head.sample(hidden, noise=ImageNoise(range(4))) for head in (small, large)]
    assert torch.allclose(8 * samples[0], samples[1], atol=1e-5)


@HEADS
def test_without_guidance_the_unconditional_half_has_no_part(kind: type) -> None:
    head, hidden = build(kind), data()[1]
    plain = head.sample(hidden, noise=ImageNoise(range(4)))
    broken = torch.full_like(hidden, math.nan)
    ignored = head.sample(hidden, noise=ImageNoise(range(4)), guidance=0, hidden_uncond=broken)
    assert torch.equal(plain, ignored)
    same = head.sample(hidden, noise=ImageNoise(range(4)), guidance=3, hidden_uncond=hidden)
    assert torch.allclose(plain, same, atol=1e-5)
    other = head.sample(hidden, noise=ImageNoise(range(4)), guidance=3, hidden_uncond=-hidden)
    assert not torch.allclose(plain, other, atol=1e-3)


def test_guidance_moves_the_noise_and_leaves_the_variance() -> None:
    head = build(ResidualHead)
    conditional, unconditional = torch.randn(5, 6), torch.randn(5, 6)
    guided = head._guide(conditional, unconditional, 2.0)
    assert torch.allclose(guided[:, :3], 3 * conditional[:, :3] - 2 * unconditional[:, :3])
    assert torch.equal(guided[:, 3:], conditional[:, 3:])


def test_guidance_moves_a_velocity() -> None:
    head = build(FlowResidualHead)
    conditional, unconditional = torch.randn(5, 3), torch.randn(5, 3)
    guided = head._guide(conditional, unconditional, 2.0)
    assert torch.allclose(guided, 3 * conditional - 2 * unconditional)


def test_guidance_goes_away_from_the_unconditional_hidden_states() -> None:
    """One Euler step: the noise and the velocity there, of which the guided one is known."""
    head, hidden = build(FlowResidualHead, sample_steps=1, solver="euler"), data()[1]
    other = torch.randn_like(hidden)

    def draw(condition: Tensor, **guided: Any) -> Tensor:
        return head.sample(condition, noise=ImageNoise(range(4)), **guided)

    expected = 3.5 * draw(hidden) - 2.5 * draw(other)
    guided = draw(hidden, guidance=2.5, hidden_uncond=other)
    assert torch.allclose(guided, expected, atol=1e-5)


def test_guidance_without_unconditional_states_is_refused() -> None:
    with pytest.raises(ValueError, match="hidden_uncond"):
        build(ResidualHead).sample(data()[1], noise=ImageNoise(range(4)), guidance=1.0)


@HEADS
def test_a_sampled_image_does_not_depend_on_its_batch(kind: type) -> None:
    head, hidden = build(kind), data()[1]
    together = head.sample(hidden, noise=ImageNoise([5, 6, 7, 8]))
    alone = head.sample(hidden[2:3], noise=ImageNoise([7]))
    assert together.shape == (4, 6, 3)
    assert torch.allclose(together[2:3], alone, atol=1e-6)


def perfect_diffusion(target: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    every_step = noise_schedule(1000, 1000)

    def denoise(noisy: Tensor, time: Tensor) -> Tensor:
        noise = (noisy - every_step.signal[time] * target) / every_step.noise[time]
        return torch.cat([noise, torch.zeros_like(noise)], dim=1)

    return denoise


def test_a_perfect_diffusion_denoiser_gives_the_target() -> None:
    target = torch.rand(6, 3) * 2 - 1
    sampled = build(ResidualHead)._sample_rows(
        perfect_diffusion(target),
        lambda count: torch.randn(count, 6, 3),
        temperature=1.0,
        clip=None,
        steps=None,
    )
    assert torch.allclose(sampled, target, atol=1e-4)


def test_the_denoiser_is_told_the_steps_it_was_trained_with() -> None:
    told: list[int] = []

    def denoise(noisy: Tensor, time: Tensor) -> Tensor:
        told.extend(time.tolist())
        return torch.zeros(6, 6)

    build(ResidualHead)._sample_rows(
        denoise, lambda count: torch.randn(count, 6, 3), temperature=1.0, clip=None, steps=4
    )
    assert told == [999, 666, 333, 0]


@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize("steps", [1, 5])
def test_a_perfect_flow_ends_at_the_target(solver: str, steps: int) -> None:
    start, target = torch.randn(6, 3), torch.randn(6, 3)
    sampled = build(FlowResidualHead, solver=solver)._sample_rows(
        lambda noisy, time: target - start,
        lambda count: start[None],
        temperature=1.0,
        clip=None,
        steps=steps,
    )
    assert torch.allclose(sampled, target, atol=1e-5)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
def test_solvers_converge_at_their_order(solver: str, order: int) -> None:
    head = build(FlowResidualHead, solver=solver)

    def error(steps: int) -> float:
        end = head._sample_rows(
            lambda noisy, time: noisy * (time / 1000),  # ends at start * exp(1 / 2)
            lambda count: torch.ones(count, 1, 3, dtype=torch.float64),
            temperature=1.0,
            clip=None,
            steps=steps,
        )
        return abs(end[0, 0].item() - math.exp(0.5))

    assert error(20) / error(40) == pytest.approx(2**order, rel=0.1)


def test_clipping_keeps_every_residual_within_the_scale() -> None:
    head = build(ResidualHead)
    torch.nn.init.normal_(head.denoiser.output.bias)
    hidden = data()[1]
    largest = [
        head.sample(hidden, noise=ImageNoise(range(4)), clip=clip).abs().max().item()
        for clip in (None, 1.0, 1.5, 0.0)
    ]
    assert largest[:3] == pytest.approx([0.2, 0.2, 0.3]) and largest[3] > 0.31
    with pytest.raises(ValueError, match="clip"):
        build(FlowResidualHead).sample(hidden, noise=ImageNoise(range(4)), clip=1.0)


def test_limits_of_older_configs_were_true_and_false() -> None:
    limits = [build(ResidualHead, clip_denoised=given).clip_denoised for given in (True, False)]
    assert limits == [1.0, 0.0]


@HEADS
def test_the_steps_of_a_call_replace_those_of_the_head(kind: type) -> None:
    head, hidden = build(kind, sample_steps=3), data()[1]
    own = head.sample(hidden, noise=ImageNoise(range(4)))
    assert torch.equal(own, head.sample(hidden, noise=ImageNoise(range(4)), steps=3))
    assert not torch.equal(own, head.sample(hidden, noise=ImageNoise(range(4)), steps=4))


@HEADS
def test_a_masked_loss_sees_the_masked_positions_alone(kind: type) -> None:
    head, (residual, hidden) = build(kind), data()
    everywhere = torch.ones(4, 6, dtype=torch.bool)
    full = head.loss(residual, hidden, Draws(0))
    assert torch.allclose(full, head.loss(residual, hidden, Draws(0), mask=everywhere))
    mask = everywhere.clone()
    mask[:, ::2] = False
    part = head.loss(residual, hidden, Draws(0), mask=mask)
    rest = head.loss(residual, hidden, Draws(0), mask=~mask)
    assert torch.allclose((part + rest) / 2, full)
    residual[:, ::2] += 5
    assert torch.equal(part, head.loss(residual, hidden, Draws(0), mask=mask))
    residual[:, 1::2] += 5
    assert not torch.allclose(part, head.loss(residual, hidden, Draws(0), mask=mask))


@HEADS
def test_two_ranks_average_to_the_loss_of_one_process(kind: type) -> None:
    head, (residual, hidden) = build(kind), data()
    whole = head.loss(residual, hidden, Draws(3))
    parts = [
        head.loss(residual[rank::2], hidden[rank::2], Draws(3, rank=rank, world=2))
        for rank in range(2)
    ]
    assert torch.allclose(whole, (parts[0] + parts[1]) / 2)


@HEADS
def test_a_loss_of_many_repeats_is_the_mean_of_single_ones(kind: type) -> None:
    residual, hidden = data(1, 1)
    many, one = build(kind, batch_mul=256), build(kind, batch_mul=1)
    one.load_state_dict(many.state_dict())
    singles = torch.stack([one.loss(residual, hidden, Draws(seed)) for seed in range(256)])
    mean = many.loss(residual, hidden, Draws(0))
    assert mean.item() == pytest.approx(singles.mean().item(), abs=6 * singles.std().item() / 16)


def test_each_repeat_of_a_position_has_noise_of_its_own() -> None:
    draws = RowDraws(Draws(0), batch=2, tokens=3, repeats=4)
    for drawn in (draws.randn(5), draws.rand()[:, None], draws.randint(10**6)[:, None]):
        assert len(drawn.unique(dim=0)) == 2 * 3 * 4


@HEADS
def test_gradients_reach_the_hidden_states_and_every_weight(kind: type) -> None:
    head, (residual, hidden) = build(kind), data()
    for block in head.denoiser.blocks:
        torch.nn.init.normal_(block.modulation.weight)
    hidden.requires_grad_()
    head.loss(residual, hidden, Draws(0)).backward()
    assert bool(hidden.grad.any(dim=2).all())
    assert all(bool(weight.grad.any()) for weight in head.parameters())


@HEADS
def test_full_precision_holds_inside_autocast_unless_switched_off(kind: type) -> None:
    head, (residual, hidden) = build(kind), data()
    exact = head.loss(residual, hidden, Draws(0))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(head.loss(residual, hidden, Draws(0)), exact)
        head.full_precision = False
        rough = head.loss(residual, hidden, Draws(0))
    assert rough.dtype == torch.float32
    assert not torch.equal(rough, exact)
    assert torch.allclose(rough, exact, rtol=0.05)


def test_the_velocity_of_the_flow_points_from_noise_to_data() -> None:
    head = FlowResidualHead(channels=3, dim=5, width=8, depth=1, scale=1.0, batch_mul=2000)
    residual, hidden = torch.full((1, 1, 3), 2.0), torch.zeros(1, 1, 5)
    # a zero network leaves the second moment of data - noise: 2^2 + 1
    assert head.loss(residual, hidden, Draws(0)).item() == pytest.approx(5.0, abs=0.3)


@pytest.mark.slow
@HEADS
def test_a_head_learns_a_residual_that_its_condition_decides(kind: type) -> None:
    head = kind(channels=2, dim=2, width=32, depth=1, scale=0.5, sample_steps=16)
    hidden = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).repeat(8, 1)[None]
    target = torch.tensor([[0.3, -0.3], [-0.2, 0.4]]).repeat(8, 1)[None]
    optimizer = torch.optim.Adam(head.parameters(), lr=5e-3)
    for step in range(250):
        optimizer.zero_grad()
        head.loss(target, hidden, Draws(step)).backward()
        optimizer.step()
    sampled = head.sample(hidden, noise=ImageNoise([0]))
    assert (sampled - target).abs().mean() < 0.1


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (ResidualHead, {"sample_steps": 2000}, "sample_steps 2000"),
        (ResidualHead, {"batch_mul": 0}, "batch_mul 0"),
        (ResidualHead, {"clip_denoised": -1.0}, "clip_denoised -1.0"),
        (ResidualHead, {"prediction": "velocity"}, "prediction 'velocity'"),
        (FlowResidualHead, {"solver": "rk9"}, "rk9"),
        (FlowResidualHead, {"sample_steps": 0}, "sample_steps 0"),
    ],
)
def test_impossible_settings_are_refused(kind: type, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(kind, **changes)
