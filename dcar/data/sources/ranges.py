"""Cuts a known number of samples into units."""


def ranges(total: int, most: int) -> list[tuple[int, int]]:
    """[first, stop) of as few pieces as hold `total` with at most `most` each, all about as long.

    Raises ValueError for `most` below 1.
    """
    if most < 1:
        raise ValueError(f"samples_per_shard is {most}; it must be at least 1")
    pieces = -(-total // most)
    return [(total * k // pieces, total * (k + 1) // pieces) for k in range(pieces)]
