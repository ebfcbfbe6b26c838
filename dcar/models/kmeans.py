"""k-means for codebook initialisation. M vectors of C channels, K codes."""

import torch
import torch.nn.functional as F
from torch import Tensor

from dcar.models.precision import exact_products, without_autocast

CHUNK_ELEMENTS = {"cpu": 2**22, "cuda": 2**26}  # similarities held at once: one cache, 256 MiB
SEEDING_ROUNDS = 64


def nearest_codes(vectors: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Index of the nearest code and the squared distance to it, both (M,); ties to the lowest."""
    half_norms = codes.square().sum(1) / 2  # (K,)
    rows = max(1, CHUNK_ELEMENTS.get(vectors.device.type, 2**24) // len(codes))
    with exact_products():  # TF32 would give vectors near a border to another code
        best = [torch.addmm(-half_norms, chunk, codes.T).max(1) for chunk in vectors.split(rows)]
    ids = torch.cat([chunk.indices for chunk in best])  # (M,)
    closeness = torch.cat([chunk.values for chunk in best])  # (M,)
    return ids, (vectors.square().sum(1) - 2 * closeness).clamp_min(0)


def spread_seeds(vectors: Tensor, num_codes: int, generator: torch.Generator) -> Tensor:
    """(K, C) distinct vectors far from each other: k-means++ drawn in rounds (arXiv 1203.6402)."""
    distance = torch.ones(len(vectors), device=vectors.device)
    chosen: list[Tensor] = []
    for part in torch.arange(num_codes).chunk(SEEDING_ROUNDS):
        # The floor keeps a draw possible when fewer distinct vectors than codes exist.
        weights = (distance + distance.mean() * 1e-6).clamp_min(1e-30)
        if chosen:
            weights[torch.cat(chosen)] = 0
        picked = torch.multinomial(weights.cpu(), len(part), generator=generator)
        chosen.append(picked.to(vectors.device))
        newest = nearest_codes(vectors, vectors[chosen[-1]])[1]
        distance = torch.minimum(distance, newest) if len(chosen) > 1 else newest
    return vectors[torch.cat(chosen)]


def refine(vectors: Tensor, codes: Tensor) -> Tensor:
    """One Lloyd step; codes that nothing chose move onto the worst represented vectors."""
    ids, distance = nearest_codes(vectors, codes)
    sums = torch.zeros_like(codes).index_add_(0, ids, vectors)
    counts = torch.bincount(ids, minlength=len(codes))
    means = sums / counts.clamp_min(1).unsqueeze(1)
    empty = (counts == 0).nonzero().squeeze(1)
    means[empty] = vectors[distance.topk(len(empty)).indices]
    return means


@torch.no_grad()
def kmeans(
    vectors: Tensor, num_codes: int, *, iterations: int, seed: int, spherical: bool
) -> Tensor:
    """Centres (K, C) of vectors (M, C) in fp32, the same for the same seed.

    `spherical` clusters directions: vectors and centres are scaled to length one.
    Raises ValueError for fewer vectors than codes. Never holds an (M, K) matrix; M is at most 2^24.
    """
    if len(vectors) < num_codes:
        raise ValueError(f"k-means needs at least {num_codes} vectors, got {len(vectors)}")
    with without_autocast(vectors):
        vectors = vectors.float()
        vectors = F.normalize(vectors, dim=1) if spherical else vectors
        codes = spread_seeds(vectors, num_codes, torch.Generator().manual_seed(seed))
        for _ in range(iterations):
            codes = refine(vectors, codes)
            codes = F.normalize(codes, dim=1) if spherical else codes
    return codes
