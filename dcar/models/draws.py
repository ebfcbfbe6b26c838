"""All randomness of one training step, drawn for the global batch. B: images of this rank."""

import torch
from torch import Tensor


class Draws:
    """Random numbers for the images of a batch that may be split over ranks.

    Each draw is made for the global batch and this rank keeps rows `rank::world`, so N ranks with
    1/N of the batch each see the very numbers that one process sees for the same images.
    """

    def __init__(
        self, seed: int, device: torch.device | str = "cpu", *, rank: int = 0, world: int = 1
    ):
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} is not in [0, world={world})")
        self.device, self.rank, self.world = torch.device(device), rank, world
        self.generator = torch.Generator(self.device).manual_seed(seed)

    def rand(self, batch: int, *shape: int) -> Tensor:
        """Uniform in [0, 1), (batch, *shape)."""
        size = (batch * self.world, *shape)
        return self._rows(torch.rand(size, generator=self.generator, device=self.device))

    def randn(self, batch: int, *shape: int) -> Tensor:
        """Standard normal, (batch, *shape)."""
        size = (batch * self.world, *shape)
        return self._rows(torch.randn(size, generator=self.generator, device=self.device))

    def randint(self, high: int, batch: int, *shape: int) -> Tensor:
        """Integers in [0, high), (batch, *shape)."""
        size = (batch * self.world, *shape)
        return self._rows(torch.randint(high, size, generator=self.generator, device=self.device))

    def _rows(self, drawn: Tensor) -> Tensor:
        return drawn[self.rank :: self.world]
