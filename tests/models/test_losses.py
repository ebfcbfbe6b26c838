"""Tokenizer and masked-token losses: terms, weights, precision, known values."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dcar.models.losses import (
    CrossEntropy,
    TokenizerCriterion,
    hinge_discriminator_loss,
    hinge_generator_loss,
    masked_token_loss,
)
from dcar.models.tokenizer import Latents


class Distance(nn.Module):
    """A toy perceptual distance: mean squared difference per image, as a product of matrices."""

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        difference = (first - second).flatten(1)
        return (difference @ difference.T).diagonal() / difference.shape[1]


def make_latents(codebook_loss: float = 0.5) -> Latents:
    latent = torch.zeros(2, 4, 2, 2)
    ids = torch.zeros(2, 2, 2, dtype=torch.int64)
    return Latents(latent, latent, ids, torch.tensor(codebook_loss))


def make_criterion(**changes: Any) -> TokenizerCriterion:
    settings: dict[str, Any] = {
        "pixel": "l1",
        "pixel_weight": 1.0,
        "perceptual": Distance(),
        "perceptual_weight": 2.0,
        "codebook_weight": 3.0,
        "adversarial_weight": 4.0,
    }
    return TokenizerCriterion(**settings | changes)


# Tokenizer


def test_the_loss_is_the_weighted_sum_of_all_terms() -> None:
    recon, image, logits = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8), torch.randn(2, 1, 2, 2)
    terms = make_criterion()(recon, image, make_latents(), logits)
    assert list(terms) == ["loss", "l1", "lpips", "codebook", "adversarial"]
    torch.testing.assert_close(terms["l1"], (recon - image).abs().mean())
    torch.testing.assert_close(terms["lpips"], (recon - image).square().mean())
    torch.testing.assert_close(terms["codebook"], torch.tensor(0.5))
    torch.testing.assert_close(terms["adversarial"], -logits.mean())
    weighted = terms["l1"] + 2 * terms["lpips"] + 3 * terms["codebook"] + 4 * terms["adversarial"]
    torch.testing.assert_close(terms["loss"], weighted)


@pytest.mark.parametrize(
    ("changes", "absent"),
    [
        ({"perceptual": None, "perceptual_weight": 0.0}, "lpips"),
        ({"perceptual_weight": 0.0}, "lpips"),
        ({"codebook_weight": 0.0}, "codebook"),
        ({"adversarial_weight": 0.0}, "adversarial"),
    ],
)
def test_terms_without_weight_are_absent(changes: dict[str, Any], absent: str) -> None:
    image, logits = torch.randn(2, 3, 8, 8), torch.randn(2, 1, 2, 2)
    terms = make_criterion(**changes)(image, image, make_latents(), logits)
    expected = {"loss", "l1", "lpips", "codebook", "adversarial"} - {absent}
    assert set(terms) == expected


def test_without_logits_there_is_no_adversarial_term() -> None:
    image = torch.randn(2, 3, 8, 8)
    assert "adversarial" not in make_criterion()(image, image, make_latents())


def test_the_pixel_loss_can_be_squared() -> None:
    recon, image = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    terms = make_criterion(pixel="l2")(recon, image, make_latents())
    assert "l1" not in terms
    torch.testing.assert_close(terms["l2"], (recon - image).square().mean())


def test_terms_are_fp32_under_autocast() -> None:
    image = torch.randn(2, 3, 8, 8)
    recon, logits = torch.randn(2, 3, 8, 8).bfloat16(), torch.randn(2, 1, 2, 2).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        terms = make_criterion()(recon, image, make_latents(), logits)
    assert {term.dtype for term in terms.values()} == {torch.float32}
    torch.testing.assert_close(terms["l1"], (recon.float() - image).abs().mean())
    torch.testing.assert_close(terms["lpips"], (recon.float() - image).square().mean())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pixel": "huber"}, "'huber'"),
        ({"perceptual": None}, r"perceptual_weight 2\.0"),
        ({"codebook_weight": -1.0}, r"codebook is -1\.0"),
    ],
)
def test_impossible_criteria_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_criterion(**changes)


# Adversarial


def test_hinges_have_their_known_values() -> None:
    zero, far = torch.zeros(2, 1, 3, 3), torch.full((2, 1, 3, 3), 5.0)
    assert hinge_discriminator_loss(zero, zero) == 1
    assert hinge_discriminator_loss(far, -far) == 0
    assert hinge_discriminator_loss(-far, far) == 6
    assert hinge_generator_loss(far) == -5


# Masked tokens


def test_uniform_logits_cost_the_log_of_the_codebook_size() -> None:
    ids, mask = torch.randint(0, 16384, (2, 8)), torch.rand(2, 8) < 0.5
    total = masked_token_loss(torch.zeros(2, 8, 16384), ids, mask)
    torch.testing.assert_close(total / (0.1 + 0.9 * mask.float()).sum(), torch.tensor(9.704061))


def test_masked_tokens_weigh_one_and_visible_ones_less() -> None:
    logits, ids = torch.randn(2, 5, 7), torch.randint(0, 7, (2, 5))
    mask = torch.tensor([[True, True, False, False, False], [True, False, False, False, False]])
    total = masked_token_loss(logits, ids, mask, label_smoothing=0.2, unmasked_weight=0.25)
    each = F.cross_entropy(logits.mT, ids, reduction="none", label_smoothing=0.2)
    torch.testing.assert_close(total, each[mask].sum() + 0.25 * each[~mask].sum())


def test_smoothing_follows_its_definition() -> None:
    logits, ids = torch.randn(1, 4, 9), torch.randint(0, 9, (1, 4))
    total = masked_token_loss(logits, ids, torch.ones(1, 4, dtype=torch.bool), label_smoothing=0.1)
    log_probabilities = logits.log_softmax(-1)
    right = log_probabilities.gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    expected = -(0.9 * right + 0.1 * log_probabilities.mean(-1)).sum()
    torch.testing.assert_close(total, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_cross_entropy_and_its_slope_are_torch_s(dtype: torch.dtype, smoothing: float) -> None:
    rows = 2**19 // 1024 + 3  # of two parts
    logits = torch.randn(rows, 1024).mul(4).to(dtype).requires_grad_()
    ids, weights = torch.randint(0, 1024, (rows,)), torch.rand(rows)
    loss = CrossEntropy.apply(logits, ids, smoothing)
    (slope,) = torch.autograd.grad((loss * weights).sum(), logits)
    expected = F.cross_entropy(logits.float(), ids, reduction="none", label_smoothing=smoothing)
    (expected_slope,) = torch.autograd.grad((expected * weights).sum(), logits)
    assert loss.dtype == torch.float32 and slope.dtype == dtype
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(
        slope, expected_slope, rtol=max(5e-6, 2 * torch.finfo(dtype).eps), atol=1e-6
    )


def test_parts_of_a_batch_add_up_to_the_whole() -> None:
    logits, ids, mask = torch.randn(6, 5, 7), torch.randint(0, 7, (6, 5)), torch.rand(6, 5) < 0.5
    whole = masked_token_loss(logits, ids, mask)
    rows = (slice(0, 1), slice(1, 6))
    parts = [masked_token_loss(logits[r], ids[r], mask[r]) for r in rows]
    torch.testing.assert_close(parts[0] + parts[1], whole)


def test_the_masked_loss_is_fp32_under_autocast() -> None:
    logits, ids, mask = torch.randn(2, 5, 7), torch.randint(0, 7, (2, 5)), torch.rand(2, 5) < 0.5
    expected = masked_token_loss(logits.bfloat16().float(), ids, mask)
    with torch.autocast("cpu", torch.bfloat16):
        total = masked_token_loss(logits.bfloat16(), ids, mask)
    assert total.dtype == torch.float32
    torch.testing.assert_close(total, expected)
