"""Vector quantisers: latent -> nearest codes, and ids -> codes.

B batch, C latent channels, H W latent grid, K codebook size, M = B*H*W vectors of one call.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from dcar.models.distributed import is_distributed
from dcar.models.kmeans import nearest_codes
from dcar.models.precision import without_autocast

REVIVAL_SHARPNESS = 10.0  # arXiv 2307.15139
ENTROPY_TEMPERATURE = 0.01  # arXiv 2412.02692
HASH_FACTORS = (2654435761, 40503)  # Knuth's multiplicative hash, and a shift from step to step


@dataclass(frozen=True)
class Quantized:
    """One call's result; `continuous` and `discrete` are fp32."""

    continuous: Tensor  # (B, C, H, W): what the codes stand for, normalised where the codes are
    discrete: Tensor  # (B, C, H, W): equals lookup(ids); its gradient goes to `continuous`
    ids: Tensor  # (B, H, W) int64
    loss: Tensor  # scalar


@dataclass(frozen=True)
class SeenBatch:
    """What revival needs of one call in training mode."""

    vectors: Tensor  # (M, C)
    ids: Tensor  # (M,) int64
    batch: int  # B: M = B*H*W


def count_codes(ids: Tensor, num_codes: int) -> Tensor:
    """How often each code occurs, (K,) int64."""
    ids = ids.flatten()
    counts = torch.zeros(num_codes, dtype=torch.int64, device=ids.device)
    return counts.scatter_add_(0, ids, torch.ones_like(ids))


def codebook_usage(counts: Tensor) -> Tensor:
    """Share of codes that occur at all, in [0, 1]."""
    return (counts > 0).double().mean().float()


def codebook_perplexity(counts: Tensor) -> Tensor:
    """exp of the entropy of code frequencies, in [1, K]: K when all codes are used alike."""
    frequencies = counts.double() / counts.sum().clamp_min(1)
    return torch.special.entr(frequencies).sum().exp().float()


def straight_through(vectors: Tensor, codes: Tensor) -> Tensor:
    """Exactly the value of `codes`, with the gradient of `vectors`."""
    return codes.detach() + (vectors - vectors.detach())


def entropy_penalty(vectors: Tensor, codes: Tensor) -> Tensor:
    """Low when each vector is sure of its code and the codes are used alike (arXiv 2310.05737).

    Holds the (M, K) matrix: for small codebooks or batches.
    """
    affinity = (2 * vectors @ codes.T - codes.square().sum(1)) / ENTROPY_TEMPERATURE
    probabilities = affinity.softmax(1)  # (M, K)
    per_vector = torch.special.entr(probabilities).sum(1).mean()
    return per_vector - torch.special.entr(probabilities.mean(0)).sum()


def sum_over_ranks(counts: Tensor) -> Tensor:
    if is_distributed():
        dist.all_reduce(counts)
    return counts


def global_batch(vectors: Tensor, batch: int) -> Tensor:
    """Vectors of the global batch as one process would see them: image i is on rank i % world."""
    if not is_distributed():
        return vectors
    gathered = [torch.empty_like(vectors) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, vectors.contiguous())
    return rearrange(torch.stack(gathered), "world (b n) c -> (b world n) c", b=batch)


class Quantizer(nn.Module, ABC):
    """What the tokenizer asks of a quantiser.

    `forward(latent (B, C, H, W)) -> Quantized` and `lookup(ids (B, H, W)) -> (B, C, H, W)`. A
    training loop calls `after_step` after each optimizer step, or `forget_batches` where none was
    taken: batches may be kept until then.
    """

    def __init__(self, *, num_codes: int, dim: int):
        super().__init__()
        self.num_codes, self.dim = num_codes, dim

    def after_step(self) -> None:
        """What is learned other than by gradients, after an optimizer step; on all ranks alike."""

    def forget_batches(self) -> None:
        """The batches since the last step had no step: nothing is learned from them."""

    @abstractmethod
    def lookup(self, ids: Tensor) -> Tensor:
        """Codes (B, C, H, W) of ids (B, H, W)."""


class VectorQuantizer(Quantizer):
    """The nearest of K learned codes, by angle if `normalize` (DC-AR section 3, docs/method.md).

    With `normalize` latents and codes have length one, so `continuous` is the unit-length latent.
    `commitment` weighs the pull of latents to codes, `codebook_weight` that of codes to latents.
    `revival_decay` (0.99 in arXiv 2307.15139; None switches it off) is the decay of a running mean
    of code usage; rarely used codes move onto latents of the step's batches, on all ranks alike,
    when `after_step` is called. Computes in fp32, whatever autocast says. ids tie to the lowest.
    """

    initialized: Tensor
    usage_mean: Tensor
    revivals: Tensor

    def __init__(
        self,
        *,
        num_codes: int,
        dim: int,
        normalize: bool = True,
        commitment: float = 0.25,
        codebook_weight: float = 1.0,
        revival_decay: float | None = None,
        entropy_weight: float = 0.0,
    ):
        super().__init__(num_codes=num_codes, dim=dim)
        if revival_decay is not None and not 0 < revival_decay < 1:
            raise ValueError(f"revival_decay {revival_decay} is not between 0 and 1")
        self.normalize, self.commitment = normalize, commitment
        self.codebook_weight, self.entropy_weight = codebook_weight, entropy_weight
        self.revival_decay = revival_decay
        codebook = torch.empty(num_codes, dim).uniform_(-1 / num_codes, 1 / num_codes)
        self.codebook = nn.Parameter(self.on_sphere(codebook))
        self.register_buffer("initialized", torch.tensor(False))
        self.register_buffer("usage_mean", torch.zeros(num_codes))
        self.register_buffer("revivals", torch.tensor(0))
        self.seen: list[SeenBatch] = []  # since the last step, where codes are revived
        self.revived: Tensor | None = None  # (K,) bool, of the last step

    def on_sphere(self, vectors: Tensor) -> Tensor:
        """Length one along the last axis, if this quantiser compares angles."""
        return F.normalize(vectors, dim=-1) if self.normalize else vectors

    def forward(self, latent: Tensor) -> Quantized:
        with without_autocast(latent):
            batch, _, height, _ = latent.shape
            vectors = self.on_sphere(rearrange(latent.float(), "b c h w -> (b h w) c"))  # (M, C)
            ids = self.assign(vectors.detach(), batch)  # (M,)
            codes = self.on_sphere(F.embedding(ids, self.codebook))  # (M, C)
            loss = self.loss(vectors, codes)
            grid = {"b": batch, "h": height}
            return Quantized(
                continuous=rearrange(vectors, "(b h w) c -> b c h w", **grid),
                discrete=rearrange(
                    straight_through(vectors, codes), "(b h w) c -> b c h w", **grid
                ),
                ids=rearrange(ids, "(b h w) -> b h w", **grid),
                loss=loss,
            )

    @torch.no_grad()
    def assign(self, vectors: Tensor, batch: int) -> Tensor:
        """Nearest code of each vector, (M,), which is remembered for what comes after the step."""
        ids = nearest_codes(vectors, self.on_sphere(self.codebook.float()))[0]
        if self.training and self.revival_decay is not None:
            self.seen.append(SeenBatch(vectors, ids, batch))
        return ids

    def loss(self, vectors: Tensor, codes: Tensor) -> Tensor:
        to_latents = F.mse_loss(codes, vectors.detach())
        to_codes = F.mse_loss(vectors, codes.detach())
        loss = self.codebook_weight * to_latents + self.commitment * to_codes
        if self.entropy_weight:
            codebook = self.on_sphere(self.codebook)
            loss = loss + self.entropy_weight * entropy_penalty(vectors, codebook)
        return loss

    @torch.no_grad()
    def after_step(self) -> None:
        """Tally the step's codes and move rarely used ones onto its latents (arXiv 2307.15139).

        Between steps, so that `discrete` equals `lookup(ids)` while gradients flow, and that a
        batch in several parts does what it does in one. A new codebook has no usage: of it only the
        codes that the first step used stay where they are.
        """
        if self.revival_decay is None or not self.seen:
            return
        ids = torch.cat([seen.ids for seen in self.seen])
        counts = sum_over_ranks(count_codes(ids, self.num_codes)).float()
        self.usage_mean.lerp_(counts / counts.sum(), 1 - self.revival_decay)
        self._revive(torch.cat([global_batch(s.vectors, s.batch) for s in self.seen]))
        self.forget_batches()

    def forget_batches(self) -> None:
        self.seen.clear()

    @torch.no_grad()
    def carry_over(self, average: "VectorQuantizer") -> None:
        """A revived code is another one: in an averaged quantizer it begins anew where it is."""
        if self.revived is not None:
            moved = torch.where(self.revived[:, None], self.codebook, average.codebook)
            average.codebook.copy_(moved)  # a mask as an index would wait for the device

    def _revive(self, vectors: Tensor) -> None:
        """vectors (M, C): latents of the step's whole batch, in the order of one process."""
        assert self.revival_decay is not None
        # A hash of (code, step) picks the latents: the same on every rank, no generator to resume.
        steps = self.revivals * HASH_FACTORS[1]
        picks = torch.arange(self.num_codes, device=vectors.device) * HASH_FACTORS[0] + steps
        anchors = vectors[picks % len(vectors)]  # (K, C)
        sharpness = self.num_codes * REVIVAL_SHARPNESS / (1 - self.revival_decay)
        share = torch.exp(-self.usage_mean * sharpness).unsqueeze(1)  # (K, 1): 1 for dead codes
        self.revived = share.squeeze(1) > 0.5
        self.codebook.lerp_(anchors.to(self.codebook.dtype), share.to(self.codebook.dtype))
        self.revivals += 1

    @torch.no_grad()
    def initialize(self, codes: Tensor) -> None:
        """Replace the codebook by `codes` (K, C), for example from k-means over latents.

        All count as used alike, so revival waits until a code has been idle for some hundred steps.
        Raises ValueError for another shape.
        """
        if codes.shape != self.codebook.shape:
            raise ValueError(
                f"codes of shape {tuple(codes.shape)} do not fit a codebook of "
                f"{tuple(self.codebook.shape)}"
            )
        self.codebook.copy_(self.on_sphere(codes.float()))
        self.usage_mean.fill_(1 / self.num_codes)
        self.initialized.fill_(True)

    def lookup(self, ids: Tensor) -> Tensor:
        """Codes (B, C, H, W) of ids (B, H, W)."""
        codes = self.on_sphere(F.embedding(ids, self.codebook.float()))
        return rearrange(codes, "b h w c -> b c h w")
