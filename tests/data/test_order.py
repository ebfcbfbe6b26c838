"""Orders: every sample once an epoch, the same for everyone, taken up anywhere by anyone."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dcar.data.order import (
    BucketOrder,
    Line,
    MixedOrder,
    Order,
    Place,
    SequentialOrder,
    Share,
    ShuffledOrder,
    Slice,
    Span,
    permutation,
    turns,
)

counts_of = st.lists(st.integers(0, 40), min_size=1, max_size=12)


def places(order: Order, epoch: int = 0) -> list[Place]:
    return [p for number in range(order.size) for p in order.unit(epoch, number).places]


def everything(counts: Sequence[int]) -> list[Place]:
    return [Place(shard, i) for shard, count in enumerate(counts) for i in range(count)]


def shuffled(counts: Sequence[int], *, seed: str = "s", window: int = 16, lanes: int = 1):
    return ShuffledOrder(counts, seed=seed, window=window, lanes=lanes)


def test_a_permutation_is_the_same_on_every_machine() -> None:
    assert permutation(10, "0/train/0/shards").tolist() == [1, 7, 8, 9, 0, 2, 5, 4, 6, 3]


@given(counts_of)
def test_a_line_finds_every_sample_of_shards_of_any_size(counts: list[int]) -> None:
    order = permutation(len(counts), "x")
    line = Line(counts, order)
    found = [line.place(number) for number in range(sum(counts))]
    assert found == [Place(shard, i) for shard in order for i in range(counts[shard])]


@given(counts_of, st.integers(0, 60), st.integers(0, 60))
def test_spans_are_the_places_of_a_piece_of_the_line(counts: list[int], first: int, more: int):
    line = Line(counts, range(len(counts)))
    stop = min(first + more, sum(counts))
    inside = [
        Place(span.shard, position)
        for span in line.spans(first, stop)
        for position in range(span.first, span.stop)
    ]
    assert inside == [line.place(number) for number in range(first, stop)]


@given(counts_of, st.integers(1, 5), st.integers(1, 50))
def test_an_epoch_has_every_sample_once_but_what_the_lanes_leave(
    counts: list[int], lanes: int, window: int
) -> None:
    found = places(shuffled(counts, window=window, lanes=lanes))
    assert len(found) == sum(counts) // lanes * lanes
    assert not Counter(found) - Counter(everything(counts))


def test_seeds_and_epochs_differ_and_repeat() -> None:
    counts = [30, 20, 10]
    runs = [places(shuffled(counts, seed=s), e) for s in ("a", "b") for e in (0, 1)]
    assert len({tuple(run) for run in runs}) == 4
    assert places(shuffled(counts, seed="a"), 1) == runs[1]


def test_samples_move_within_their_window_only_and_shards_anywhere() -> None:
    order = shuffled([100] * 4, window=10)
    line = order.line(0)
    numbers = [line.order.index(p.shard) * 100 + p.position for p in places(order)]
    assert all(abs(number - at) < 10 for at, number in enumerate(numbers))
    assert numbers != sorted(numbers)
    assert line.order != order.line(1).order


def test_a_window_is_shuffled_by_seed_epoch_lane_and_number() -> None:
    """In one shard, where no order of shards hides a window that is always shuffled alike."""

    def moves(*, seed: str = "s", epoch: int = 0, lane: int = 0, window: int = 0) -> list[int]:
        order, first = shuffled([80], seed=seed, window=20, lanes=2), 40 * lane + 20 * window
        numbers = range(40 * window + lane, 40 * window + 40, 2)
        return [order.unit(epoch, n).places[0].position - first for n in numbers]

    found = [moves(), moves(seed="t"), moves(epoch=1), moves(lane=1), moves(window=1)]
    assert all(sorted(each) == list(range(20)) for each in found)
    assert len({tuple(each) for each in found}) == 5


def test_each_rank_reads_a_piece_of_the_shards_of_its_own() -> None:
    order = shuffled([50] * 8, lanes=4)
    by_rank = [
        {order.unit(0, n).places[0].shard for n in range(rank, order.size, 4)} for rank in range(4)
    ]
    assert [len(shards) for shards in by_rank] == [2] * 4
    assert sorted(shard for shards in by_rank for shard in shards) == list(range(8))


@settings(max_examples=200)
@given(
    counts=st.lists(st.integers(0, 60), min_size=1, max_size=8),
    layouts=st.lists(
        st.tuples(st.integers(1, 4), st.integers(1, 7), st.integers(0, 6)), min_size=1, max_size=4
    ),
)
def test_ranks_and_batch_sizes_may_change_at_any_time_within_an_epoch(counts, layouts) -> None:
    """Nothing comes twice, and at the end less than one batch of all ranks is left."""
    order = shuffled(counts, lanes=layouts[0][0])
    taken, seen = 0, []
    for turn, (world, units, batches) in enumerate(layouts):
        shares = [Share(taken, order.size, rank, world, units) for rank in range(world)]
        last = turn == len(layouts) - 1
        number = shares[0].batches if last else min(batches, shares[0].batches)
        assert {share.batches for share in shares} == {shares[0].batches}
        for batch in range(number):
            seen += [n for share in shares for n in share.numbers(batch)]
        taken += number * world * units
    assert sorted(seen) == list(range(taken))
    assert order.size - taken < layouts[-1][0] * layouts[-1][1]


@given(st.integers(0, 100), st.integers(1, 5), st.integers(1, 7))
def test_validation_takes_every_sample_once_over_all_ranks(total, world, units) -> None:
    slices = [Slice(total, rank, world, units) for rank in range(world)]
    numbers = [n for part in slices for batch in range(part.batches) for n in part.numbers(batch)]
    assert numbers == list(range(total))


def test_around_a_batch_are_units_of_this_rank_s_turn_the_nearest_first() -> None:
    share = Share(12, 100, rank=1, world=2, units=3)
    assert share.numbers(1) == [19, 21, 23]
    others = list(share.others(1))
    assert others[:6] == [17, 25, 15, 27, 13, 29]
    assert all(number % 2 == 1 and 0 <= number < 100 for number in others)
    assert not set(others) & {19, 21, 23} and len(set(others)) == len(others)


def test_in_a_long_epoch_units_far_away_come_after_few_tries() -> None:
    others = list(Share(0, 4_000_000, rank=0, world=1, units=4).others(500_000))
    assert min(others) < 1_000_000 and max(others) > 3_000_000 and len(others) < 300


def test_what_lies_ahead_is_the_window_after_this_one() -> None:
    order = shuffled([10, 10, 10], window=8)
    line = order.line(0)
    assert order.ahead(0, 0) == order.ahead(0, 7) == line.spans(8, 16)
    assert order.ahead(0, 29) == []
    assert SequentialOrder([3, 3]).ahead(0, 1) == [Span(1, 0, 1)]


def test_what_lies_ahead_of_a_lane_ends_with_the_lane() -> None:
    order = shuffled([10] * 4, window=8, lanes=2)
    line = order.line(0)
    ahead = [[order.ahead(0, 2 * step + lane) for step in (0, 8, 16)] for lane in range(2)]
    assert ahead[0] == [line.spans(8, 16), line.spans(16, 20), []]
    assert ahead[1] == [line.spans(28, 36), line.spans(36, 40), []]


def buckets(counts: Sequence[int]) -> list[np.ndarray]:
    return [np.arange(count) * (shard + 3) // 2 % 3 for shard, count in enumerate(counts)]


def bucket_order(counts: Sequence[int], *, batch_size: int = 4, seed: str = "s") -> BucketOrder:
    shapes = [(64, 64), (32, 128), (128, 32)]
    return BucketOrder(buckets(counts), shapes, batch_size=batch_size, seed=seed, window=16)


@given(st.lists(st.integers(0, 40), min_size=1, max_size=6), st.integers(1, 5))
def test_batches_of_buckets_are_full_of_one_shape_and_leave_few_behind(counts, batch_size) -> None:
    order, known = bucket_order(counts, batch_size=batch_size), buckets(counts)
    seen = []
    for number in range(order.size):
        unit = order.unit(1, number)
        of = {int(known[p.shard][p.position]) for p in unit.places}
        assert len(unit.places) == batch_size and len(of) == 1
        assert unit.shape == order.shapes[of.pop()]
        seen += unit.places
    assert len(seen) == len(set(seen)) > sum(counts) - 3 * batch_size


def test_batches_of_buckets_come_mixed_and_new_each_epoch() -> None:
    order = bucket_order([40, 40, 40])
    shapes = [order.unit(0, number).shape for number in range(order.size)]
    assert len(set(shapes[:9])) == 3
    assert places(order, 0) != places(order, 1)
    assert places(order, 0) == places(bucket_order([40, 40, 40]), 0)


def test_batches_of_buckets_come_as_they_get_full_with_what_lies_ahead_of_them() -> None:
    order = bucket_order([40, 40, 40])
    met = {order.inner.unit(0, n).places[0]: n for n in range(order.inner.size)}
    full = [max(met[place] for place in order.unit(0, n).places) for n in range(order.size)]
    assert full == sorted(full)
    assert order.ahead(0, 12) == order.inner.line(0).spans(64, 80)  # batch 12: samples from 48 on


def mixed(lanes: int = 1, weights: Sequence[float] = (3, 1), size: int = 80) -> MixedOrder:
    orders = [shuffled([20, 20], lanes=lanes), shuffled([7, 9, 9], seed="t", lanes=lanes)]
    return MixedOrder(orders, weights, lanes=lanes, size=size)


def test_a_mixture_takes_its_sets_in_proportion() -> None:
    found = [p.data_set for epoch in range(100) for p in places(mixed(), epoch)]
    assert found.count(0) / len(found) == 0.75
    assert abs(found[:40].count(0) - 30) <= 1  # evenly, not in runs


@pytest.mark.parametrize("lanes", [1, 2, 5])
def test_each_set_of_a_mixture_goes_through_whole_epochs_of_its_own(lanes: int) -> None:
    order = mixed(lanes)
    found = [p for epoch in range(10) for p in places(order, epoch) if p.data_set == 1]
    size = order.orders[1].size
    for start in range(0, len(found) - size, size):
        assert len(set(found[start : start + size])) == size


def test_turns_are_the_same_on_every_machine() -> None:
    shares = np.array([5, 2, 1]) / 8
    assert turns(shares)[:8].tolist() == [0, 1, 0, 0, 2, 0, 1, 0]


def test_what_lies_ahead_of_a_set_of_a_mixture_is_of_that_set() -> None:
    order = mixed()
    own = [(order.unit(0, n).places[0].data_set, order.ahead(0, n)) for n in range(20)]
    assert all({span.data_set for span in spans} <= {data_set} for data_set, spans in own)
    assert any(spans for data_set, spans in own if data_set == 1)


def test_an_epoch_of_a_mixture_is_of_whole_groups_of_lanes() -> None:
    assert [mixed(lanes, size=83).size for lanes in (1, 2, 5)] == [83, 82, 80]


def test_a_mixture_of_samples_and_buckets_is_refused() -> None:
    with pytest.raises(ValueError, match="buckets in all of its data sets or in none"):
        MixedOrder([shuffled([20]), bucket_order([20])], [1, 1], lanes=1, size=20)


def test_weights_too_small_to_be_chosen_are_refused() -> None:
    for weights in ((10_000, 1), (0, 0)):
        with pytest.raises(ValueError, match=rf"weights \[{weights[0]}, {weights[1]}\]"):
            mixed(weights=weights)


def test_a_set_too_small_for_the_ranks_is_refused() -> None:
    with pytest.raises(ValueError, match="too small for 9 ranks"):
        MixedOrder([shuffled([20], lanes=9), shuffled([8], lanes=9)], [1, 1], lanes=9, size=20)
