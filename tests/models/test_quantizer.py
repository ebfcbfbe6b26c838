"""The vector quantiser: identities, precision, losses, counting, revival on one rank and on two."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dcar.models.quantizer import (
    ENTROPY_TEMPERATURE,
    VectorQuantizer,
    codebook_perplexity,
    codebook_usage,
    count_codes,
    entropy_penalty,
)
from tests.ranks import join, run_on_two_ranks


def make_quantizer(**changes: Any) -> VectorQuantizer:
    return VectorQuantizer(**{"num_codes": 16, "dim": 8} | changes)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("revival", [None, 0.99])
def test_discrete_is_exactly_the_lookup_of_ids(
    normalize: bool, training: bool, revival: float | None
) -> None:
    quantizer = make_quantizer(normalize=normalize, revival_decay=revival).train(training)
    quantized = quantizer(torch.randn(2, 8, 4, 3))
    assert quantized.ids.shape == (2, 4, 3) and quantized.ids.dtype == torch.int64
    assert torch.equal(quantized.discrete, quantizer.lookup(quantized.ids))


@pytest.mark.parametrize("normalize", [True, False])
def test_ids_are_the_nearest_codes(normalize: bool) -> None:
    quantizer = make_quantizer(normalize=normalize)
    latent = torch.randn(2, 8, 4, 3)
    vectors, codes = latent.permute(0, 2, 3, 1).reshape(-1, 8), quantizer.codebook.detach()
    if normalize:
        vectors, codes = F.normalize(vectors, dim=1), F.normalize(codes, dim=1)
    expected = torch.cdist(vectors.double(), codes.double()).argmin(1)
    assert torch.equal(quantizer(latent).ids.flatten(), expected)


def test_normalised_latents_and_codes_have_length_one_and_keep_their_direction() -> None:
    latent = torch.randn(2, 8, 4, 3) * 7
    quantized = make_quantizer()(latent)
    for vectors in (quantized.continuous, quantized.discrete):
        torch.testing.assert_close(vectors.norm(dim=1), torch.ones(2, 4, 3))
    torch.testing.assert_close(quantized.continuous * latent.norm(dim=1, keepdim=True), latent)


def test_without_normalisation_the_continuous_latent_is_the_input() -> None:
    latent = torch.randn(2, 8, 4, 3)
    assert torch.equal(make_quantizer(normalize=False)(latent).continuous, latent)


def test_the_straight_through_gradient_is_the_identity() -> None:
    latent = torch.randn(2, 8, 4, 3, requires_grad=True)
    upstream = torch.randn(2, 8, 4, 3)
    quantizer = make_quantizer(normalize=False)
    quantizer(latent).discrete.backward(upstream)
    assert latent.grad is not None and torch.equal(latent.grad, upstream)
    assert quantizer.codebook.grad is None


def test_with_normalisation_both_paths_have_the_same_gradient() -> None:
    upstream, gradients = torch.randn(2, 8, 4, 3), []
    for name in ("discrete", "continuous"):
        torch.manual_seed(1)
        latent = torch.randn(2, 8, 4, 3, requires_grad=True)
        getattr(make_quantizer()(latent), name).backward(upstream)
        gradients.append(latent.grad)
    torch.testing.assert_close(gradients[0], gradients[1])


def test_ids_are_the_same_under_autocast() -> None:
    quantizer = make_quantizer(num_codes=512)
    latent = torch.randn(4, 8, 8, 8)
    exact = quantizer(latent)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = quantizer(latent)
    assert torch.equal(rounded.ids, exact.ids)
    assert rounded.discrete.dtype == rounded.continuous.dtype == torch.float32
    assert torch.equal(rounded.loss, exact.loss)


def test_the_loss_weighs_both_directions() -> None:
    latent = torch.randn(2, 8, 4, 3)
    torch.manual_seed(2)
    quantizer = make_quantizer(commitment=0.25, codebook_weight=3.0)
    quantized = quantizer(latent)
    error = (quantized.continuous - quantized.discrete).square().mean()
    torch.testing.assert_close(quantized.loss, 3.25 * error)


def test_commitment_moves_latents_and_the_codebook_weight_moves_codes() -> None:
    for commitment, codebook_weight in [(0.5, 0.0), (0.0, 0.5)]:
        quantizer = make_quantizer(commitment=commitment, codebook_weight=codebook_weight)
        latent = torch.randn(2, 8, 4, 3, requires_grad=True)
        quantizer(latent).loss.backward()
        assert latent.grad is not None and quantizer.codebook.grad is not None
        assert (latent.grad.abs().sum() > 0) == (commitment > 0)
        assert (quantizer.codebook.grad.abs().sum() > 0) == (codebook_weight > 0)


def test_the_entropy_penalty_is_low_when_sure_and_spread() -> None:
    quantizer = make_quantizer(num_codes=8, commitment=0.0, codebook_weight=0.0, entropy_weight=2.0)
    quantizer.initialize(torch.eye(8))
    spread = torch.eye(8).view(8, 8, 1, 1)
    same = torch.eye(8)[:1].expand(8, 8).reshape(8, 8, 1, 1)
    torch.testing.assert_close(quantizer(spread).loss.item(), -2 * math.log(8), rtol=1e-4, atol=0)
    assert abs(quantizer(same).loss.item()) < 1e-4


def test_the_entropy_penalty_is_of_softmax_over_distances_and_moves_both_sides() -> None:
    vectors = torch.randn(6, 8, dtype=torch.float64, requires_grad=True)
    codes = (0.1 * torch.randn(5, 8, dtype=torch.float64)).requires_grad_()
    penalty = entropy_penalty(vectors, codes)
    probabilities = (-torch.cdist(vectors, codes).square() / ENTROPY_TEMPERATURE).softmax(1)
    mean = probabilities.mean(0)
    sure = -(probabilities * probabilities.clamp(min=1e-300).log()).sum(1).mean()
    torch.testing.assert_close(penalty, sure + (mean * mean.clamp(min=1e-300).log()).sum())
    penalty.backward()
    assert vectors.grad.abs().max() > 0 and codes.grad.abs().max() > 0


# Counting


def test_usage_and_perplexity_of_known_counts() -> None:
    assert codebook_usage(torch.tensor([3, 0, 1, 0])) == 0.5
    torch.testing.assert_close(codebook_perplexity(torch.tensor([5, 5, 5, 5])), torch.tensor(4.0))
    torch.testing.assert_close(codebook_perplexity(torch.tensor([9, 0, 0, 0])), torch.tensor(1.0))
    assert codebook_perplexity(torch.zeros(4, dtype=torch.int64)).isfinite()


def test_counts_are_those_of_the_ids() -> None:
    ids = torch.randint(0, 5, (3, 4, 4))
    assert torch.equal(count_codes(ids, 7), torch.bincount(ids.flatten(), minlength=7))


# Initialisation and revival


def test_initialize_replaces_the_codebook_and_is_remembered() -> None:
    quantizer, codes = make_quantizer(revival_decay=0.99), torch.randn(16, 8)
    assert not quantizer.initialized
    quantizer.initialize(codes)
    assert quantizer.initialized and quantizer.state_dict()["initialized"]
    expected = F.normalize(codes, dim=1)
    torch.testing.assert_close(
        quantizer.lookup(torch.arange(16).view(1, 4, 4))[0, :, 0, 1], expected[1]
    )
    quantizer(torch.randn(1, 8, 2, 2))  # most codes stay unused, yet none is replaced at once
    quantizer.after_step()
    torch.testing.assert_close(F.normalize(quantizer.codebook, dim=1), expected)


def test_codes_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(16, 4\).*\(16, 8\)"):
        make_quantizer().initialize(torch.randn(16, 4))


def test_an_impossible_decay_is_refused() -> None:
    with pytest.raises(ValueError, match=r"1\.5"):
        make_quantizer(revival_decay=1.5)


def narrow_latents(seed: int, batch: int = 8) -> Tensor:
    """Latents in a narrow cone, so that most random codes are never the nearest."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(batch, 8, 4, 4, generator=generator)
    return noise + 4 * torch.ones(8).view(8, 1, 1)


def used_share(quantizer: VectorQuantizer) -> float:
    ids = quantizer.eval()(narrow_latents(100, batch=32)).ids
    return codebook_usage(count_codes(ids, quantizer.num_codes)).item()


def test_dead_codes_come_back_to_life_only_with_revival() -> None:
    shares = {}
    for decay in (None, 0.99):
        torch.manual_seed(3)
        quantizer = make_quantizer(num_codes=64, revival_decay=decay)
        for step in range(3):
            quantizer(narrow_latents(step))
            quantizer.after_step()
        shares[decay] = used_share(quantizer)
    assert shares[None] < 0.3
    assert shares[0.99] > 0.9


def test_one_dead_code_moves_onto_a_latent_and_busy_ones_stay() -> None:
    quantizer = make_quantizer(num_codes=4, revival_decay=0.99)
    quantizer.initialize(torch.eye(8)[:4] * torch.tensor([[1], [1], [1], [-1]]))  # nobody's
    quantizer.usage_mean[3] = 0.0
    latent = F.normalize(narrow_latents(0), dim=1)
    before = quantizer.codebook.detach().clone()
    quantizer(latent)
    assert torch.equal(quantizer.codebook, before)  # what was looked up stays until the step
    quantizer.after_step()
    after = quantizer.codebook.detach()
    torch.testing.assert_close(after[:3], before[:3])
    vectors = latent.permute(0, 2, 3, 1).reshape(-1, 8)
    assert (after[3] - vectors).abs().sum(1).min() < 1e-5


def test_usage_is_a_running_mean_and_decides_how_far_a_code_moves() -> None:
    """docs/method.md: by exp(-usage * K * 10 / (1 - decay)) towards a latent of the step."""
    quantizer = make_quantizer(num_codes=4, revival_decay=0.9)
    quantizer.initialize(torch.eye(8)[:4])
    torch.testing.assert_close(quantizer.usage_mean, torch.full((4,), 0.25))
    quantizer.usage_mean.copy_(torch.tensor([0.5, 0.002, 0.001, 0.0]))
    usage, before = quantizer.usage_mean.clone(), quantizer.codebook.detach().clone()
    latent = torch.eye(8)[:1].view(1, 8, 1, 1)  # one vector, of code 0: the anchor of all
    quantizer(latent)
    quantizer.after_step()
    usage = 0.9 * usage + 0.1 * torch.tensor([1.0, 0, 0, 0])
    torch.testing.assert_close(quantizer.usage_mean, usage)
    share = torch.exp(-usage * 4 * 10 / (1 - 0.9))[:, None]
    assert 0.1 < share[1] < share[2] < 0.9 and share[3] == 1
    expected = torch.lerp(before, latent.view(1, 8).expand(4, 8), share)
    torch.testing.assert_close(quantizer.codebook.detach(), expected)


def test_a_dead_code_tries_another_latent_at_each_step() -> None:
    quantizer = make_quantizer(num_codes=2, revival_decay=0.99)
    tried = []
    for _ in range(5):
        quantizer.usage_mean.zero_()
        quantizer.initialize(torch.stack([torch.ones(8), -torch.ones(8)]))
        quantizer.usage_mean[1] = 0.0
        quantizer(narrow_latents(0))
        quantizer.after_step()
        tried.append(quantizer.codebook[1:].detach().clone())
    assert torch.cat(tried).unique(dim=0).shape[0] == 5


def test_a_step_in_parts_moves_the_codes_that_the_whole_batch_moves() -> None:
    torch.manual_seed(4)
    whole = make_quantizer(num_codes=32, revival_decay=0.9)
    parts = copy.deepcopy(whole)
    for step in range(5):
        latent = narrow_latents(step)
        whole(latent)
        whole.after_step()
        for part in latent.chunk(2):
            parts(part)
        parts.after_step()
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(parts.state_dict()[name], tensor, msg=name)


def test_a_step_that_was_not_taken_leaves_the_codes() -> None:
    quantizer = make_quantizer(num_codes=32, revival_decay=0.9)
    before = {name: tensor.clone() for name, tensor in quantizer.state_dict().items()}
    quantizer(narrow_latents(0) * float("nan"))
    quantizer.forget_batches()
    quantizer.after_step()
    for name, tensor in quantizer.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_evaluation_and_a_switched_off_revival_never_touch_the_codebook() -> None:
    for quantizer in (make_quantizer(revival_decay=0.99).eval(), make_quantizer().train()):
        before = {name: tensor.clone() for name, tensor in quantizer.state_dict().items()}
        quantizer(torch.randn(2, 8, 4, 3))
        quantizer.after_step()
        for name, tensor in quantizer.state_dict().items():
            assert torch.equal(tensor, before[name]), name


def train_on_rank(rank: int, world: int, folder: Path, steps: int = 10) -> None:
    """Some steps with revival on this rank's images rank::world; saves the quantiser's state."""
    torch.manual_seed(4)
    quantizer = make_quantizer(num_codes=32, revival_decay=0.9)
    for step in range(steps):
        quantizer(narrow_latents(step)[rank::world])
        quantizer.after_step()
    torch.save(quantizer.state_dict(), folder / f"{world}-{rank}.pt")


def train_in_process(rank: int, folder: Path) -> None:
    join(rank, folder)
    train_on_rank(rank, 2, folder)
    torch.distributed.destroy_process_group()


def test_two_ranks_keep_the_codebook_of_one_process(tmp_path: Path) -> None:
    train_on_rank(0, 1, tmp_path)
    run_on_two_ranks(train_in_process, tmp_path)
    single, first, second = (torch.load(tmp_path / f"{name}.pt") for name in ("1-0", "2-0", "2-1"))
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
        torch.testing.assert_close(tensor, single[name])
