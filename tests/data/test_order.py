"""Orders: every sample once, equal shares, the same numbers every time."""

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcar.data.order import Plan, plan_train, plan_validation, shard_order, shuffled, spans

small = st.integers(1, 6)


def line(counts: list[int], order: list[int]) -> list[tuple[int, int]]:
    return [(shard, place) for shard in order for place in range(counts[shard])]


@given(st.lists(st.integers(0, 9), min_size=1, max_size=8), st.data())
def test_spans_cut_the_line_where_they_are_told(counts, data):
    first = data.draw(st.integers(0, sum(counts)))
    stop = data.draw(st.integers(first, sum(counts)))
    order = shard_order(len(counts), seed=3, epoch=1)
    pieces = [
        (s.shard, i) for s in spans(order, counts, first, stop) for i in range(s.first, s.stop)
    ]
    assert pieces == line(counts, order)[first:stop]


@given(st.integers(0, 200), small, small, small)
def test_lanes_of_all_ranks_share_a_validation_set_out_once(samples, batch, world, workers):
    taken = Counter(
        place
        for rank in range(world)
        for worker in range(workers)
        for place in range(*plan_validation(samples, batch, rank, world).lane(worker, workers))
    )
    assert taken == Counter(range(samples))


@given(st.integers(1, 300), small, small, small)
def test_training_lanes_hold_equal_full_batches_and_share_nothing(samples, batch, world, workers):
    if samples < batch * world:
        with pytest.raises(ValueError, match=str(samples)):
            plan_train(samples, batch, 0, world)
        return
    plans = [plan_train(samples, batch, rank, world) for rank in range(world)]
    assert len({plan.batches for plan in plans}) == 1
    lanes = [plan.lane(worker, workers) for plan in plans for worker in range(workers)]
    assert all((stop - first) % batch == 0 for first, stop in lanes)
    places = [place for lane in lanes for place in range(*lane)]
    assert len(places) == len(set(places)) == plans[0].batches * batch * world
    assert samples - len(places) < batch * world


@given(st.integers(0, 99), small, small)
def test_earlier_workers_never_run_out_first(samples, batch, workers):
    plan = Plan(7, 7 + samples, batch)
    sizes = [stop - first for first, stop in (plan.lane(w, workers) for w in range(workers))]
    batches = [-(-size // batch) for size in sizes]
    assert batches == sorted(batches, reverse=True)
    assert sum(batches) == plan.batches


def test_the_shard_order_depends_on_seed_and_epoch_alone():
    orders = {(s, e): tuple(shard_order(20, seed=s, epoch=e)) for s in range(3) for e in range(3)}
    assert len(set(orders.values())) == 9
    assert all(sorted(order) == list(range(20)) for order in orders.values())
    assert orders[1, 2] == tuple(shard_order(20, seed=1, epoch=2))


@given(st.integers(0, 50), st.integers(1, 20))
def test_a_shuffle_buffer_loses_and_doubles_nothing(count, size):
    assert sorted(shuffled(range(count), size, random.Random(0))) == list(range(count))


def test_a_shuffle_buffer_shuffles_and_repeats_itself():
    once = list(shuffled(range(100), 30, random.Random(5)))
    assert once != list(range(100))
    assert once == list(shuffled(range(100), 30, random.Random(5)))
