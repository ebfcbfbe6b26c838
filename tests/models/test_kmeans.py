"""k-means: planted clusters, empty clusters, chunks, seeds."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dcar.models import kmeans as module
from dcar.models.kmeans import kmeans, nearest_codes, refine, spread_seeds


def planted(clusters: int, per_cluster: int, spread: float) -> tuple[Tensor, Tensor]:
    centres = F.normalize(torch.randn(clusters, 16), dim=1)
    vectors = centres.repeat(per_cluster, 1)
    return centres, vectors + spread * torch.randn_like(vectors)


@pytest.mark.parametrize("spherical", [False, True])
def test_planted_clusters_are_found(spherical: bool) -> None:
    centres, vectors = planted(20, 50, 0.005)
    codes = kmeans(vectors, 20, iterations=10, seed=0, spherical=spherical)
    nearest = torch.cdist(centres, codes).min(1)
    assert nearest.indices.unique().numel() == 20
    assert nearest.values.max() < 0.02


def test_spherical_clusters_ignore_length() -> None:
    centres, vectors = planted(12, 50, 0.005)
    lengths = torch.rand(len(vectors), 1) * 10 + 0.1
    codes = kmeans(vectors * lengths, 12, iterations=10, seed=0, spherical=True)
    torch.testing.assert_close(codes.norm(dim=1), torch.ones(12))
    assert torch.cdist(centres, codes).min(1).values.max() < 0.02


def test_more_iterations_fit_better() -> None:
    vectors = torch.randn(2000, 8)
    errors = []
    for iterations in (0, 1, 10):
        codes = kmeans(vectors, 32, iterations=iterations, seed=0, spherical=False)
        errors.append(nearest_codes(vectors, codes)[1].mean().item())
    assert errors[0] > errors[1] > errors[2]


def test_the_seed_alone_decides_the_result() -> None:
    vectors = torch.randn(500, 8)
    first = kmeans(vectors, 16, iterations=3, seed=1, spherical=True)
    torch.manual_seed(99)
    assert torch.equal(first, kmeans(vectors, 16, iterations=3, seed=1, spherical=True))
    assert not torch.equal(first, kmeans(vectors, 16, iterations=3, seed=2, spherical=True))


def test_seeds_are_distinct_vectors_even_where_distances_round_to_noise() -> None:
    vectors = 100 + 0.01 * torch.randn(200, 4)
    seeds = spread_seeds(vectors, 200, torch.Generator().manual_seed(0))
    assert seeds.unique(dim=0).shape[0] == 200


def test_an_empty_cluster_moves_to_the_worst_represented_vector() -> None:
    vectors = torch.tensor([[0.0, 0.0], [0.2, 0.0], [5.0, 0.0]])
    codes = refine(vectors, torch.tensor([[0.1, 0.0], [100.0, 100.0]]))
    torch.testing.assert_close(codes[1], vectors[2])


def test_repeated_vectors_still_give_finite_codes() -> None:
    vectors = torch.ones(50, 4)
    codes = kmeans(vectors, 40, iterations=3, seed=0, spherical=True)
    torch.testing.assert_close(codes, torch.full((40, 4), 0.5))


def test_chunks_do_not_change_the_nearest_code(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, codes = torch.randn(300, 8), torch.randn(50, 8)
    ids, distance = nearest_codes(vectors, codes)
    exact = torch.cdist(vectors.double(), codes.double())
    assert torch.equal(ids, exact.argmin(1))
    torch.testing.assert_close(distance, exact.min(1).values.square().float())
    monkeypatch.setitem(module.CHUNK_ELEMENTS, "cpu", 7 * 50)
    assert torch.equal(nearest_codes(vectors, codes)[0], ids)


def test_ties_go_to_the_lowest_code() -> None:
    codes = torch.eye(4).repeat(3, 1)
    assert nearest_codes(torch.eye(4), codes)[0].tolist() == [0, 1, 2, 3]


def test_autocast_changes_nothing() -> None:
    vectors = torch.randn(300, 8)
    codes = kmeans(vectors, 16, iterations=3, seed=0, spherical=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(kmeans(vectors, 16, iterations=3, seed=0, spherical=True), codes)


def test_products_in_less_than_fp32_are_not_allowed_to_move_a_code() -> None:
    """Lightning advises TF32 on GPUs; here "medium" stands for it where oneDNN computes in bf16."""
    vectors, codes = torch.randn(512, 64), torch.randn(2048, 64)
    expected = torch.cdist(vectors.double(), codes.double()).argmin(1)
    torch.set_float32_matmul_precision("medium")
    try:
        ids = nearest_codes(vectors, codes)[0]
        assert torch.get_float32_matmul_precision() == "medium"  # it stays for all else
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(ids, expected)


def test_too_few_vectors_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 8 vectors, got 5"):
        kmeans(torch.randn(5, 2), 8, iterations=1, seed=0, spherical=False)
