"""Streams: what a batch holds, what happens to bad samples, mixtures, buckets, captions, tokens."""

from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import distributed
from torch.testing._internal.distributed.fake_pg import FakeStore

from dcar.data.loader import ShardLoader
from dcar.data.samples import Sample
from dcar.data.shard_set import ShardSet
from dcar.data.shards import write_shards
from dcar.data.stream import Part, ShardStream
from dcar.data.transforms import ImageTransform
from dcar.errors import DataError
from tests.shards import UNEVEN, build, keys, other, row, same, stream


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return build(tmp_path_factory.mktemp("uneven"))


def test_a_batch_holds_the_documented_keys_and_shapes(shards):
    batch = next(iter(ShardLoader(stream(shards))))
    assert set(batch) == {"key", "place", "image", "caption"}
    assert batch["image"].shape == (3, 3, 8, 8) and batch["image"].dtype == torch.uint8
    assert batch["caption"] == [f"picture {key}" for key in batch["key"]]


def test_samples_of_one_key_in_two_shards_differ_by_their_places(tmp_path):
    for name in ("s0", "s1"):
        write_shards([row("k0000"), row("k0001")], tmp_path, name, 2)
    part = Part(ShardSet(tmp_path / "*.tar"))
    for cache in (False, True, True):
        batches = list(stream(None, mixture={"a": part, "b": part}, batch_size=8, cache=cache))
        assert set(batches[0]["key"]) == {"k0000", "k0001"}
        assert len(set(batches[0]["place"])) == 8


def test_without_a_manifest_the_shards_are_counted(shards, tmp_path):
    for path in shards.glob("*.tar"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    with_manifest, without = stream(shards), stream(tmp_path)
    assert without.counts == with_manifest.counts == list(UNEVEN)
    assert keys(ShardLoader(without)) == keys(ShardLoader(with_manifest))


def test_each_epoch_draws_new_crops_of_the_same_pictures(shards):
    loader = ShardLoader(stream(shards, cache=True))
    first, second = (
        {
            key: image
            for batch in loader
            for key, image in zip(batch["key"], batch["image"], strict=True)
        }
        for _ in range(2)
    )
    changed = [
        key for key in first.keys() & second.keys() if not torch.equal(first[key], second[key])
    ]
    assert len(changed) > 10


def test_a_small_set_is_cropped_anew_each_time_it_comes_within_a_mixture_s_epoch(shards, tmp_path):
    parts = {
        "many": Part(ShardSet(shards / "s*.tar"), weight=1.0),
        "few": Part(ShardSet(other(tmp_path, 3) / "t*.tar"), weight=2.0),
    }
    batches = list(ShardLoader(stream(None, mixture=parts, cut_captions=1.0)))
    pairs = [pair for batch in batches for pair in zip(batch["key"], batch["image"], strict=True)]
    crops = [image for key, image in pairs if key == "k1000"]
    assert len(crops) > 5  # of one picture, in one epoch
    assert len({bytes(image.numpy()) for image in crops}) > 3


def test_the_cache_changes_no_batch(shards):
    plain, cached = ShardLoader(stream(shards)), ShardLoader(stream(shards, cache=True))
    for _ in range(3):
        assert all(same(*pair) for pair in zip(plain, cached, strict=True))


def test_a_cache_that_a_resumed_epoch_filled_in_part_loses_nothing(shards):
    plain, resumed = ShardLoader(stream(shards)), ShardLoader(stream(shards, cache=True))
    list(islice(iter(plain), 9))
    resumed.load_state_dict(plain.state_dict())
    for _ in range(3):
        assert all(same(*pair) for pair in zip(resumed, plain, strict=True))
    assert not resumed.stream.skipped


def test_one_shard_too_is_shuffled_anew_each_epoch(tmp_path):
    loader = ShardLoader(stream(build(tmp_path, sizes=(30,))))
    assert len({tuple(keys(loader)) for _ in range(3)}) == 3


def test_too_few_samples_for_one_batch_is_an_error(shards):
    with pytest.raises(ValueError, match="39 samples cannot fill one batch of 20 on each of 2"):
        len(ShardLoader(stream(shards, batch_size=20, rank=0, world=2)))


@pytest.mark.parametrize(
    "settings", [{"batch_size": 0}, {"buffer": 0}, {"rank": 2, "world": 2}, {"rank": 0}]
)
def test_impossible_settings_are_refused(shards, settings):
    with pytest.raises(ValueError):
        stream(shards, **settings)


def test_rank_and_world_are_the_process_group_s_unless_given(shards):
    assert stream(shards).place == (0, 1)
    distributed.init_process_group("fake", rank=1, world_size=3, store=FakeStore())
    try:
        assert stream(shards).place == (1, 3)
        assert stream(shards, rank=4, world=5).place == (4, 5)
        grouped, given = stream(shards), stream(shards, rank=1, world=3)
        assert keys(ShardLoader(grouped)) == keys(ShardLoader(given))
    finally:
        distributed.destroy_process_group()


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_training_samples_are_counted_and_replaced_without_moving_the_others(
    tmp_path, shards, workers
):
    bad = {"k0005": {"png": b"\x89PNG broken"}, "k0020": {"txt": b""}}
    broken = build(tmp_path, bad=bad)
    loader = ShardLoader(stream(broken, max_bad=0.1), num_workers=workers)
    batches, clean = list(loader), list(ShardLoader(stream(shards), num_workers=workers))
    assert loader.stream.skipped == {"broken image": 1, "no caption": 1}
    assert [len(batch["key"]) for batch in batches] == [len(batch["key"]) for batch in clean]
    pairs = list(zip(keys(batches), keys(clean), strict=True))
    assert {before for after, before in pairs if after != before} == set(bad)
    assert not set(keys(batches)) & set(bad)


def test_batches_of_one_bad_sample_take_the_one_before_and_resume_exactly(tmp_path, shards):
    bad = {f"k{number:04d}": {"png": b"no"} for number in (3, 11, 12, 30)}
    folder = build(tmp_path, bad=bad)
    expected = list(ShardLoader(stream(folder, batch_size=1, max_bad=1.0)))
    wanted: list[str] = []
    for key in keys(ShardLoader(stream(shards, batch_size=1))):
        wanted.append(wanted[-1] if key in bad else key)
    assert keys(expected) == wanted
    straight = ShardLoader(stream(folder, batch_size=1, max_bad=1.0))
    for done, _ in enumerate(islice(iter(straight), len(expected) - 1), start=1):
        resumed = ShardLoader(stream(folder, batch_size=1, max_bad=1.0))
        resumed.load_state_dict(straight.state_dict())
        assert same(next(iter(resumed)), expected[done])


def test_validation_leaves_bad_samples_out(tmp_path):
    folder = build(tmp_path, bad={"k0000": {"png": b"no"}, "k0038": {"txt": b""}})
    loader = ShardLoader(stream(folder, shuffle=False, batch_size=1, max_bad=0.1))
    batches = list(loader)
    assert sorted(keys(batches)) == [f"k{number:04d}" for number in range(1, 38)]
    assert all(len(batch["key"]) == 1 for batch in batches)
    assert (sum(loader.stream.skipped.values()), loader.stream.seen) == (2, 39)


def test_words_are_not_needed_where_the_stream_says_so(tmp_path):
    folder = build(tmp_path, bad={"k0000": {"txt": b""}})
    loader = ShardLoader(stream(folder, shuffle=False, captioned=False))
    assert len(keys(loader)) == 39 and not loader.stream.skipped


def test_a_shard_cut_short_is_counted_and_every_batch_still_comes(tmp_path, caplog):
    folder = build(tmp_path)
    path = folder / "s2-000000.tar"
    path.write_bytes(path.read_bytes()[: 9 * 512])  # three samples of three blocks or so
    loader = ShardLoader(stream(folder, max_bad=0.5))
    assert len(list(loader)) == len(loader) == 13
    assert loader.stream.skipped["lost with its shard"] >= 7


def test_a_shard_that_was_lost_is_tried_again_in_the_next_epoch(tmp_path):
    folder = build(tmp_path)
    path = folder / "s1-000000.tar"
    whole = path.read_bytes()
    path.write_bytes(b"<html>")
    loader = ShardLoader(stream(folder, buffer=39, max_bad=1.0))
    list(loader)
    path.write_bytes(whole)
    assert len(set(keys(loader))) == 39
    assert loader.stream.skipped == {"lost with its shard": 7}


class Told(ShardSet):
    """Remembers which samples it was told to have fetched."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.told: list[tuple[int, int, int]] = []

    def prepare(self, *span: int) -> None:
        self.told.append(span)
        super().prepare(*span)


def test_each_window_is_fetched_ahead_once_and_in_every_epoch(tmp_path):
    data = Told(build(tmp_path, sizes=(39,)) / "s*.tar")
    loader = ShardLoader(stream(data))
    for _ in range(2):
        list(loader)
        assert data.told == [(0, 8, 16), (0, 16, 24), (0, 24, 32), (0, 32, 39)]
        data.told.clear()


def test_each_set_of_a_mixture_has_its_own_samples_fetched_ahead(shards, tmp_path):
    main, more = Told(shards / "s*.tar"), Told(other(tmp_path, 20) / "t*.tar")
    settings = {"transform": ImageTransform(8), "batch_size": 1, "seed": 7, "shuffle": True}
    list(ShardLoader(ShardStream(mixture={"a": Part(main), "b": Part(more)}, buffer=8, **settings)))
    for data in (main, more):
        assert data.told and all(stop <= data.counts[shard] for shard, _, stop in data.told)
        assert len(data.told) <= 15  # once a window, though the sets take turns


def test_too_many_bad_samples_end_the_run_with_their_reasons(tmp_path):
    folder = build(tmp_path, sizes=(150,), bad={"k0003": {"txt": b""}, "k0009": {"png": b"no"}})
    with pytest.raises(DataError, match="2 of 1.. samples .* 1.0% .*no caption: 1"):
        list(ShardLoader(stream(folder)))


def test_one_bad_sample_in_two_hundred_is_within_the_default_limit(tmp_path):
    folder = build(tmp_path, sizes=(201,), bad={"k0003": {"txt": b""}})
    loader = ShardLoader(stream(folder))
    assert len(list(loader)) == 67 and sum(loader.stream.skipped.values()) == 1


def test_as_many_bad_samples_as_the_limit_says_are_within_it(tmp_path):
    folder = build(tmp_path, sizes=(100,), bad={"k0003": {"txt": b""}})
    loader = ShardLoader(stream(folder, batch_size=4))
    assert len(list(loader)) == 25 and sum(loader.stream.skipped.values()) == 1


def test_several_bad_samples_of_a_batch_are_replaced_by_different_ones(tmp_path):
    folder = build(tmp_path, sizes=(4,), bad={f"k{n:04d}": {"png": b"no"} for n in (0, 3)})
    (batch,) = ShardLoader(stream(folder, batch_size=4, max_bad=1.0))
    assert Counter(batch["key"]) == {"k0001": 2, "k0002": 2}


def test_a_set_without_one_good_sample_is_an_error_not_a_hang(tmp_path):
    folder = build(
        tmp_path, sizes=(6,), bad={f"k{number:04d}": {"txt": b""} for number in range(6)}
    )
    with pytest.raises(DataError, match="not one of 3 samples"):
        list(ShardLoader(stream(folder)))


def test_a_sample_is_prepared_before_chance_comes_in(shards):
    cached = stream(shards, cache=True)
    list(ShardLoader(cached))
    assert all(isinstance(sample, Sample) for sample in cached._samples.values())
    assert {sample.pixels.shape for sample in cached._samples.values()} == {(8, 12, 3)}


@pytest.mark.parametrize("seed", range(4))
def test_a_lost_shard_longer_than_the_window_is_skipped_and_counted(tmp_path, seed):
    folder = build(tmp_path, sizes=(200,) * 3)
    (folder / "s1-000000.tar").write_bytes(b"<html>")
    loader = ShardLoader(stream(folder, seed=seed, buffer=20, max_bad=1.0))
    batches = list(loader)
    assert len(batches) == 200 and loader.stream.skipped == {"lost with its shard": 200}
    assert all(not 200 <= int(key[1:]) < 400 for key in keys(batches))
