"""Losses of the tokenizer and of masked-token training; all computed in fp32.

B batch, S image side, N tokens, K codebook size.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dcar.models.precision import without_autocast
from dcar.models.tokenizer import Latents

PIXEL_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"l1": F.l1_loss, "l2": F.mse_loss}


def hinge_discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Half the sum of both hinges: 1 for logits of zero, 0 once both sides are beyond one."""
    real, fake = F.relu(1 - real_logits.float()), F.relu(1 + fake_logits.float())
    return (real.mean() + fake.mean()) / 2


def hinge_generator_loss(fake_logits: Tensor) -> Tensor:
    return -fake_logits.float().mean()


class TokenizerCriterion(nn.Module):
    """Weighted sum of the tokenizer's loss terms (DC-AR section 3.1, docs/method.md).

    `(recon, image, latents, fake_logits=None)` gives `{"loss": ..., "l1" or "l2", "lpips",
    "codebook", "adversarial"}`: terms unweighted, those of weight 0 or without input absent.
    Images are (B, 3, S, S) in [-1, 1]; `perceptual` maps two of them to distances (B,). A subclass
    adds a term in `terms`, and its weight to `weights`.
    Raises ValueError for an unknown pixel loss, a negative weight, or a perceptual weight without
    a perceptual network.
    """

    def __init__(
        self,
        *,
        pixel: str,
        pixel_weight: float,
        perceptual: nn.Module | None,
        perceptual_weight: float,
        codebook_weight: float,
        adversarial_weight: float,
    ):
        super().__init__()
        if pixel not in PIXEL_LOSSES:
            raise ValueError(f"pixel loss {pixel!r} is not one of {sorted(PIXEL_LOSSES)}")
        if perceptual is None and perceptual_weight:
            raise ValueError(f"perceptual_weight {perceptual_weight} needs a perceptual network")
        self.pixel, self.perceptual = pixel, perceptual
        self.weights = {
            pixel: pixel_weight,
            "lpips": perceptual_weight,
            "codebook": codebook_weight,
            "adversarial": adversarial_weight,
        }
        for name, weight in self.weights.items():
            if weight < 0:
                raise ValueError(f"the weight of {name} is {weight}, below 0")

    def forward(
        self, recon: Tensor, image: Tensor, latents: Latents, fake_logits: Tensor | None = None
    ) -> dict[str, Tensor]:
        with without_autocast(recon):
            terms = self.terms(recon.float(), image.float(), latents, fake_logits)
            loss = torch.stack([self.weights[name] * term for name, term in terms.items()]).sum()
        return {"loss": loss, **terms}

    def terms(
        self, recon: Tensor, image: Tensor, latents: Latents, fake_logits: Tensor | None
    ) -> dict[str, Tensor]:
        terms = {self.pixel: PIXEL_LOSSES[self.pixel](recon, image)}
        if self.perceptual is not None and self.weights["lpips"]:
            terms["lpips"] = self.perceptual(recon, image).mean()
        if self.weights["codebook"]:
            terms["codebook"] = latents.codebook_loss
        if fake_logits is not None and self.weights["adversarial"]:
            terms["adversarial"] = hinge_generator_loss(fake_logits)
        return terms


LOGITS_AT_ONCE = {"cpu": 2**19}  # that are widened to fp32, where the device is not a GPU


@contextmanager
def as_many_logits_as_on_a_gpu() -> Iterator[None]:
    """For what counts a GPU's memory with tensors of the CPU."""
    of_a_cpu = LOGITS_AT_ONCE.pop("cpu")
    try:
        yield
    finally:
        LOGITS_AT_ONCE["cpu"] = of_a_cpu


class CrossEntropy(torch.autograd.Function):
    """`F.cross_entropy` of logits (M, K) and ids (M,) with label smoothing: losses (M,) in fp32.

    The logits are widened a few rows at a time, and once more in the backward pass, so that nothing
    of their size is kept or written in fp32, which costs `F.cross_entropy` time and several times
    the logits' memory (benchmarks/cross_entropy.py).
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, ids: Tensor, smoothing: float) -> Tensor:
        losses, normalisers = [], []
        for part, part_ids in _rows(logits, ids):
            wide = part.float()
            normaliser = wide.logsumexp(1)
            right = wide.gather(1, part_ids[:, None])[:, 0]
            losses.append(normaliser - (1 - smoothing) * right - smoothing * wide.mean(1))
            normalisers.append(normaliser)
        ctx.smoothing = smoothing
        ctx.save_for_backward(logits, ids, torch.cat(normalisers))
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        logits, ids, normalisers = ctx.saved_tensors
        slopes = torch.empty_like(logits)
        rows = _rows(logits, ids, normalisers, grads[0], slopes)
        for part, part_ids, normaliser, grad, written in rows:
            slope = (part.float() - normaliser[:, None]).exp_()  # (m, K), the probabilities
            slope -= ctx.smoothing / logits.shape[1]
            column = part_ids[:, None]
            slope.scatter_(1, column, slope.gather(1, column) - (1 - ctx.smoothing))
            written.copy_(slope.mul_(grad[:, None]))
        return slopes, None, None


def _rows(logits: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same rows of all: as many as stay in a core's cache, or keep a GPU busy."""
    rows = max(1, LOGITS_AT_ONCE.get(logits.device.type, 2**26) // logits.shape[1])
    return zip(*(tensor.split(rows) for tensor in (logits, *others)), strict=True)


def masked_token_loss(
    logits: Tensor,
    ids: Tensor,
    mask: Tensor,
    *,
    label_smoothing: float = 0.1,
    unmasked_weight: float = 0.1,
) -> Tensor:
    """Cross-entropy over all tokens; visible ones count `unmasked_weight` (docs/method.md).

    logits (B, N, K), ids (B, N), mask (B, N) True where the token was hidden. Returns the weighted
    sum, an fp32 scalar, which the caller divides by the weights of the whole batch.
    """
    with without_autocast(logits):
        loss = CrossEntropy.apply(logits.flatten(0, 1), ids.flatten(), label_smoothing)  # (B*N,)
        weights = torch.where(mask, 1.0, unmasked_weight).flatten()
        return (loss * weights).sum()
