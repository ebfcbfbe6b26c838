"""Cutting a number of samples into units."""

import pytest

from dcar.data.sources.ranges import ranges


@pytest.mark.parametrize(("total", "most"), [(0, 5), (1, 5), (5, 5), (6, 5), (1281167, 5000)])
def test_pieces_follow_each_other_and_none_is_too_long(total: int, most: int) -> None:
    pieces = ranges(total, most)
    assert [place for piece in pieces for place in range(*piece)] == list(range(total))
    lengths = [stop - first for first, stop in pieces]
    assert all(0 < length <= most for length in lengths)
    assert not lengths or max(lengths) - min(lengths) <= 1
    assert len(pieces) == -(-total // most)


def test_a_piece_must_hold_something() -> None:
    with pytest.raises(ValueError, match="samples_per_shard is 0"):
        ranges(3, 0)
