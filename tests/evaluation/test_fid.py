"""Frechet distances: known answers, each real picture through the network once."""

import pytest
import torch
from torch import Tensor, nn

from dcar.evaluation.fid import (
    FrechetDistances,
    GivenFeatures,
    RememberedFeatures,
    fid_metric,
    fingerprints,
)


class ChannelMeans(nn.Module):
    """Three features, and a count of the pictures they were computed for."""

    name, num_features = "means", 3

    def __init__(self) -> None:
        super().__init__()
        self.pictures = 0

    def forward(self, picture: Tensor) -> Tensor:
        self.pictures += len(picture)
        return picture.double().mean((2, 3))


def pictures(batch: int, high: int = 256) -> Tensor:
    return torch.randint(0, high, (batch, 3, 8, 8), dtype=torch.uint8)


def with_moments(mean: Tensor, deviations: Tensor, count: int = 64) -> Tensor:
    """Samples whose mean and (diagonal) covariance are exactly those asked for."""
    sample = torch.randn(count, len(mean), dtype=torch.float64)
    sample = sample - sample.mean(0)
    white = torch.linalg.solve_triangular(
        torch.linalg.cholesky(sample.T.cov()), sample.T, upper=False
    )
    return white.T * deviations + mean


def test_two_gaussians_have_the_analytic_distance() -> None:
    """|m - n|^2 + sum of (s - t)^2 where the covariances commute."""
    m, n = torch.tensor([1.0, 2.0, 0.0]).double(), torch.tensor([0.0, 2.0, 2.0]).double()
    s, t = torch.tensor([1.0, 0.5, 2.0]).double(), torch.tensor([2.0, 0.5, 1.0]).double()
    metric = fid_metric(GivenFeatures(3))
    metric.update(with_moments(m, s), real=True)
    for part in with_moments(n, t).split([10, 54]):
        metric.update(part, real=False)
    assert metric.compute().item() == pytest.approx((1 + 4) + (1 + 0 + 1), rel=1e-9)


def test_a_set_is_at_distance_zero_from_itself() -> None:
    distances, picture = FrechetDistances(ChannelMeans(), ["same", "darker"]), pictures(16)
    distances.update_real(picture)
    distances.update_fake("same", picture.flip(0))
    distances.update_fake("darker", picture // 2)
    found = distances.compute()
    assert found["same"].item() == pytest.approx(0, abs=1e-6)
    assert found["darker"] > 1000


def test_each_real_picture_goes_through_the_network_once() -> None:
    network = ChannelMeans()
    distances, picture = FrechetDistances(network, ["one", "two"]), pictures(12)
    results = []
    for order in (torch.arange(12), torch.randperm(12)):  # a second validation in another order
        for batch in picture[order].split(5):
            distances.update_real(batch)
            distances.update_fake("one", batch // 2)
            distances.update_fake("two", batch // 4)
        results.append(distances.compute())
        distances.reset()
    assert network.pictures == 12 + 2 * 2 * 12
    for name in ("one", "two"):
        assert torch.allclose(results[0][name], results[1][name])


def test_a_reset_forgets_the_pictures_of_the_last_validation() -> None:
    distances, picture = FrechetDistances(ChannelMeans(), ["fake"]), pictures(8)
    for scale in (4, 1):
        distances.update_real(picture)
        distances.update_fake("fake", picture // scale)
        last = distances.compute()["fake"]
        distances.reset()
    assert last.item() == pytest.approx(0, abs=1e-6)
    distances.update_real(picture)
    with pytest.raises(RuntimeError, match="More than one sample"):
        distances.compute()


def test_one_picture_is_too_few() -> None:
    distances = FrechetDistances(ChannelMeans(), ["fake"])
    distances.update_real(pictures(1))
    distances.update_fake("fake", pictures(4))
    with pytest.raises(RuntimeError, match="More than one sample"):
        distances.compute()


def test_remembered_features_are_the_network_s() -> None:
    remembered, picture = RememberedFeatures(ChannelMeans()), pictures(6)
    picture[3] = picture[0]  # the same picture twice in one batch
    remembered(picture[:2])
    assert torch.equal(remembered(picture), ChannelMeans()(picture))
    assert torch.equal(remembered(picture.flip(0)), ChannelMeans()(picture.flip(0)))


def test_no_more_pictures_are_remembered_than_the_limit() -> None:
    network = ChannelMeans()
    remembered, picture = RememberedFeatures(network, limit=4), pictures(6)
    for _ in range(2):
        assert torch.equal(remembered(picture), ChannelMeans()(picture))
    assert len(remembered.kept) == 4
    assert network.pictures == 6 + 2


def test_pictures_that_differ_a_little_have_other_fingerprints() -> None:
    picture = pictures(1, high=200).expand(1 + 3 * 64, -1, -1, -1).clone()
    picture[1:].view(192, 192).diagonal().add_(1)  # one level more in one place
    swapped = picture[:1].transpose(2, 3)
    assert len(set(fingerprints(torch.cat([picture, swapped])))) == 194
    assert fingerprints(picture[:1]) == fingerprints(picture[:1].clone())
