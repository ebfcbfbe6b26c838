"""Random numbers of sampling: one generator per image. B images."""

from collections.abc import Sequence

import torch
from torch import Tensor


class ImageNoise:
    """Noise for B images, row i from a CPU generator seeded with seeds[i].

    An image therefore depends on its own seed: not on the other images of the batch, nor on the
    device that computes it.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device | str = "cpu"):
        self.device = torch.device(device)
        self.generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]

    def rand(self, *shape: int) -> Tensor:
        """Uniform in [0, 1), (B, *shape)."""
        rows = [
            torch.rand(shape, generator=generator, device="cpu") for generator in self.generators
        ]
        return torch.stack(rows).to(self.device)

    def randn(self, *shape: int) -> Tensor:
        """Standard normal, (B, *shape)."""
        rows = [
            torch.randn(shape, generator=generator, device="cpu") for generator in self.generators
        ]
        return torch.stack(rows).to(self.device)
