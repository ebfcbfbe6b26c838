"""Frechet distances over ranks, each picture through the network once. B images, F features."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance


def fid_metric(features: nn.Module) -> FrechetInceptionDistance:
    """torchmetrics' Frechet distance on an extractor: `update(uint8 (B, 3, S, S), real=bool)`.

    `features` has `num_features` and maps such images to (B, F). `compute` raises RuntimeError for
    fewer than two images on either side. With fewer images than features the distance is biased
    upwards: compare only at equal counts.
    """
    return FrechetInceptionDistance(feature=features, normalize=False)


class GivenFeatures(nn.Module):
    """Stands where a Frechet distance has its network, for features that are there already."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def fingerprints(image: Tensor) -> list[int]:
    """A 64-bit hash of each uint8 picture: pixels times fixed random integers, modulo 2^64."""
    pixels = image.flatten(1).long()  # (B, 3*S*S)
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(-(2**63), 2**63 - 1, (pixels.shape[1],), generator=generator)
    return (pixels * factors.to(image.device)).sum(1).tolist()


class RememberedFeatures(nn.Module):
    """Features of the real pictures, which every validation shows again: computed once each.

    Keyed by content, so order and batches may change between validations. At most `limit` pictures
    are kept, in main memory (5 KB each at F 1280); those beyond are computed every time.
    """

    def __init__(self, features: nn.Module, *, limit: int = 20_000):
        super().__init__()
        self.features, self.limit = features, limit
        self.kept: dict[int, Tensor] = {}

    def forward(self, image: Tensor) -> Tensor:
        keys = fingerprints(image)
        fresh = [index for index, key in enumerate(keys) if key not in self.kept]
        rows: dict[int, Tensor] = {}
        if fresh:
            computed = self.features(image[fresh]).cpu()  # (fresh, F)
            rows = {keys[index]: row for index, row in zip(fresh, computed, strict=True)}
        features = torch.stack([rows[key] if key in rows else self.kept[key] for key in keys])
        for key in list(rows)[: self.limit - len(self.kept)]:
            self.kept[key] = rows[key].clone()
        return features.to(image.device)  # (B, F)


class FrechetDistances(nn.Module):
    """Distances of several sets of uint8 pictures to one set of real ones, by the sets' names."""

    def __init__(self, features: nn.Module, names: Sequence[str]):
        super().__init__()
        self.features, self.real_features = features, RememberedFeatures(features)
        given = GivenFeatures(int(features.num_features))  # type: ignore[arg-type]
        self.metrics: Any = nn.ModuleDict({name: fid_metric(given) for name in names})

    def update_real(self, picture: Tensor) -> None:
        features = self.real_features(picture)
        for metric in self.metrics.values():
            metric.update(features, real=True)

    def update_fake(self, name: str, picture: Tensor) -> None:
        self.metrics[name].update(self.features(picture), real=False)

    def compute(self) -> dict[str, Tensor]:
        return {name: metric.compute() for name, metric in self.metrics.items()}

    def reset(self) -> None:
        for metric in self.metrics.values():
            metric.reset()
