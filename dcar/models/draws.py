"""All randomness of one optimizer step, numbered by image. B: images of one call."""

import math

import torch
from torch import Tensor

# The constants of SplitMix64 (Steele, Lea and Flood, 2014) as signed 64-bit integers.
GOLDEN, FIRST_MIX, SECOND_MIX = -7046029254386353131, -4658895280553007687, -7723592293110705685


def _logical_shift(bits: Tensor, places: int) -> Tensor:
    return (bits >> places) & ((1 << (64 - places)) - 1)


def scramble(counters: Tensor) -> Tensor:
    """64 random bits for each int64 counter: the finaliser of SplitMix64, elementwise."""
    bits = (counters ^ _logical_shift(counters, 30)) * FIRST_MIX
    bits = (bits ^ _logical_shift(bits, 27)) * SECOND_MIX
    return bits ^ _logical_shift(bits, 31)


class Draws:
    """Random numbers for the images of a step that may be split over ranks and micro-batches.

    A number is a function of (seed, which call, which image of the step, which element) alone: no
    generator has a state to save, a GPU draws the same bits as a CPU, and however a step's images
    are split, each sees the numbers that it sees where one process takes them all at once. Image j
    of a call is number `part * B * world + j * world + rank` of the step.

    part, parts: this micro-batch among those of the step. Raises ValueError for a rank outside the
    world or a part outside the parts.
    """

    def __init__(
        self,
        seed: int,
        device: torch.device | str = "cpu",
        *,
        rank: int = 0,
        world: int = 1,
        part: int = 0,
        parts: int = 1,
    ):
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} is not in [0, world={world})")
        if not 0 <= part < parts:
            raise ValueError(f"part {part} is not in [0, parts={parts})")
        self.seed, self.device = seed, torch.device(device)
        self.rank, self.world, self.part, self.parts = rank, world, part, parts
        self.calls = 0

    def of_every_part(self) -> list["Draws"]:
        """The draws of each micro-batch of the step on this rank, from their first call on."""
        place = {"rank": self.rank, "world": self.world, "parts": self.parts}
        return [Draws(self.seed, self.device, part=part, **place) for part in range(self.parts)]

    def rand(self, batch: int, *shape: int) -> Tensor:
        """Uniform in [0, 1), (batch, *shape)."""
        return _logical_shift(self._bits(self._images(batch), shape), 40).float() * 2.0**-24

    def randn(self, batch: int, *shape: int) -> Tensor:
        """Standard normal, (batch, *shape); beyond 5.8 there are none."""
        bits = self._bits(self._images(batch), shape)
        radius = (_logical_shift(bits, 40) + 1).float().mul(2.0**-24).log().mul(-2).sqrt()
        return radius * ((bits & 0xFFFFFF).float() * (2.0**-24 * 2 * math.pi)).cos()

    def randint(self, high: int, batch: int, *shape: int) -> Tensor:
        """Integers in [0, high) for high up to 2 ** 31, (batch, *shape)."""
        return _logical_shift(self._bits(self._images(batch), shape), 33) * high >> 31

    def rand_of_step(self) -> Tensor:
        """One uniform number (1,), the same for all images of the step."""
        image = torch.zeros(1, dtype=torch.int64, device=self.device)
        return _logical_shift(self._bits(image, ()), 40).float() * 2.0**-24

    def _images(self, batch: int) -> Tensor:
        rows = torch.arange(batch, device=self.device)
        return (self.part * batch + rows) * self.world + self.rank  # (B,)

    def _bits(self, images: Tensor, shape: tuple[int, ...]) -> Tensor:
        key = hash_pair(self.seed, self.calls)
        self.calls += 1
        elements = torch.arange(math.prod(shape), device=self.device)
        counters = (images[:, None] << 32) + elements  # (B, elements)
        return scramble(counters * GOLDEN + key).view(len(images), *shape)


class RowDraws:
    """Draws for rows ordered (image, repeat, token), so that ranks and one process agree."""

    def __init__(self, draws: Draws, batch: int, tokens: int, repeats: int):
        self.draws, self.batch, self.shape = draws, batch, (repeats, tokens)

    def randint(self, high: int) -> Tensor:
        return self.draws.randint(high, self.batch, *self.shape).flatten()  # (M,)

    def rand(self) -> Tensor:
        return self.draws.rand(self.batch, *self.shape).flatten()  # (M,)

    def randn(self, channels: int) -> Tensor:
        return self.draws.randn(self.batch, *self.shape, channels).flatten(0, 2)  # (M, C)


def hash_pair(seed: int, call: int) -> int:
    """A signed 64-bit integer that differs in half its bits for other seeds and other calls."""
    mixed = scramble(torch.tensor(seed % 2**63) * GOLDEN)
    return int(scramble(mixed + call))
