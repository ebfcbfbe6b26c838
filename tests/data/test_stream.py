"""Streams: what a batch holds, what happens to bad samples, mixtures, buckets, captions, tokens."""

import io
import json
import shutil
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import distributed
from torch.testing._internal.distributed.fake_pg import FakeStore

from dcar.data.buckets import Buckets
from dcar.data.cache import ShardCache
from dcar.data.index import ShardIndex
from dcar.data.loader import ShardLoader
from dcar.data.members import DataError
from dcar.data.samples import Sample
from dcar.data.shard_set import ShardSet
from dcar.data.shards import write_manifest, write_shards
from dcar.data.stream import Part, ShardStream
from dcar.data.transforms import ImageTransform
from tests.servers import ALWAYS, Fault, FaultyServer
from tests.shards import UNEVEN, build, keys, row, same, stream


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return build(tmp_path_factory.mktemp("uneven"))


def test_a_batch_holds_the_documented_keys_and_shapes(shards):
    batch = next(iter(ShardLoader(stream(shards))))
    assert set(batch) == {"key", "image", "caption"}
    assert batch["image"].shape == (3, 3, 8, 8) and batch["image"].dtype == torch.uint8
    assert batch["caption"] == [f"picture {key}" for key in batch["key"]]


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


def other(folder: Path, count: int = 8) -> Path:
    """A second data set: keys from k1000 on."""
    rows = [row(f"k{number}") for number in range(1000, 1000 + count)]
    write_manifest(folder, {"train": write_shards(rows, folder, "t", 5)})
    return folder


def mixture(shards: Path, second: Path, **settings) -> ShardLoader:
    parts = {
        "main": Part(ShardSet(shards / "s*.tar"), weight=2),
        "more": Part(ShardSet(second / "t*.tar"), weight=1),
    }
    transform = ImageTransform(8)
    base = {"transform": transform, "batch_size": 3, "seed": 7, "shuffle": True, "buffer": 8}
    return ShardLoader(ShardStream(mixture=parts, **{**base, **settings}))


def test_a_mixture_draws_by_weight_and_each_set_goes_round_at_its_own_pace(shards, tmp_path):
    loader = mixture(shards, other(tmp_path), samples_per_epoch=45)
    drawn = [key for _ in range(6) for key in keys(loader)]
    from_second = [key for key in drawn if key >= "k1000"]
    assert len(drawn) == 6 * 45 and abs(len(from_second) - len(drawn) / 3) <= 1
    assert all(len(set(from_second[i : i + 8])) == 8 for i in range(0, len(from_second) - 8, 8))


def test_a_mixture_is_taken_up_exactly(shards, tmp_path):
    straight, stopped = (mixture(shards, other(tmp_path)) for _ in range(2))
    expected = list(straight) + list(straight)
    list(islice(iter(stopped), 15)), list(islice(iter(stopped), 4))
    resumed = mixture(shards, other(tmp_path))
    resumed.load_state_dict(stopped.state_dict())
    assert all(same(*pair) for pair in zip(resumed, expected[19:], strict=True))
    assert resumed.stream.counts == [*UNEVEN, 5, 3]


def test_an_epoch_of_a_mixture_is_as_long_as_one_says(shards, tmp_path):
    assert len(mixture(shards, other(tmp_path), samples_per_epoch=30)) == 10


def test_an_epoch_of_a_mixture_with_buckets_is_counted_in_samples(tmp_path):
    first = of_many_shapes(tmp_path / "first", with_sizes=True)
    buckets = Buckets(area=8, multiple=4, max_ratio=4)
    loader = mixture(first, other(tmp_path / "more"), buckets=buckets, samples_per_epoch=30)
    assert len(list(loader)) == len(loader) == 10


def test_mixtures_and_buckets_are_for_training(shards, tmp_path):
    with pytest.raises(ValueError, match="a mixture is for training"):
        mixture(shards, other(tmp_path), shuffle=False)
    with pytest.raises(ValueError, match="buckets are for training"):
        len(ShardLoader(stream(shards, shuffle=False, buckets=Buckets(area=8, multiple=4))))


def test_the_signature_changes_with_all_that_the_order_depends_on(shards, tmp_path):
    counts, names = build(tmp_path / "counts", sizes=(13, 7, 10, 10)), tmp_path / "names"
    shutil.copytree(shards, names)
    text = (names / "manifest.json").read_text()
    (names / "manifest.json").write_text(text.replace("s3-000000", "s4-000000"))
    (names / "s3-000000.tar").rename(names / "s4-000000.tar")
    square, wide = (Buckets(area=8, multiple=4, max_ratio=ratio) for ratio in (1, 4))
    second = other(tmp_path / "more")
    streams = [
        *(stream(folder) for folder in (shards, counts, names)),
        *(stream(shards, **change) for change in ({"seed": 8}, {"buffer": 9})),
        *(stream(shards, buckets=buckets) for buckets in (square, wide)),
        stream(shards, buckets=wide, batch_size=2),
        mixture(shards, second).stream,
        mixture(shards, second, samples_per_epoch=30).stream,
    ]
    reweighted = mixture(shards, second).stream
    reweighted.parts["more"].weight = 3
    assert len({each.signature() for each in [*streams, reweighted]}) == 11
    assert stream(shards).signature() == stream(shards, batch_size=2, cache=True).signature()


def test_urls_or_a_mixture_but_not_both_nor_neither(shards):
    data = ShardSet(shards / "s*.tar")
    settings = {"transform": ImageTransform(8), "batch_size": 1, "seed": 0, "shuffle": True}
    for given in ({}, {"urls": data, "mixture": {"a": Part(data)}}):
        with pytest.raises(ValueError, match="one of urls and mixture"):
            ShardStream(**given, **settings)


def of_many_shapes(folder: Path, *, with_sizes: bool) -> Path:
    heights = [(number // 2) % 3 for number in range(40)]
    sizes = {0: (30, 31), 1: (60, 15), 2: (16, 60)}  # (width, height)
    rows = [row(f"k{n:04d}", *sizes[kind]) for n, kind in enumerate(heights)]
    entries = write_shards(rows, folder, "s", 15)
    listed = np.array([sizes[kind] for kind in heights], np.uint16)
    named = {e.name: listed[15 * i : 15 * i + e.samples] for i, e in enumerate(entries)}
    write_manifest(folder, {"train": entries}, sizes=named if with_sizes else None)
    return folder


@pytest.mark.parametrize("with_sizes", [True, False])
def test_a_batch_of_buckets_holds_pictures_of_one_shape(tmp_path, with_sizes):
    folder = of_many_shapes(tmp_path, with_sizes=with_sizes)
    buckets = Buckets(area=8, multiple=4, max_ratio=4)
    loader = ShardLoader(stream(folder, buckets=buckets))
    batches = list(loader)
    shapes = Counter(tuple(batch["image"].shape[2:]) for batch in batches)
    assert set(shapes) == {(8, 8), (4, 16), (16, 4)} and len(batches) == len(loader) == 12
    assert len(keys(batches)) == len(set(keys(batches))) == 36


@pytest.mark.parametrize("world", [1, 2])
def test_buckets_are_taken_up_exactly_and_by_other_ranks(tmp_path, world):
    folder = of_many_shapes(tmp_path, with_sizes=True)
    options = {"buckets": Buckets(area=8, multiple=4, max_ratio=4)}
    straight = list(ShardLoader(stream(folder, **options)))
    stopped = ShardLoader(stream(folder, **options))
    list(islice(iter(stopped), 4))
    rest = {}
    for rank in range(world):
        resumed = ShardLoader(stream(folder, rank=rank, world=world, **options))
        resumed.load_state_dict(stopped.state_dict())
        rest |= {4 + rank + world * turn: batch for turn, batch in enumerate(resumed)}
    assert all(same(rest[number], straight[number]) for number in range(4, 12))


def test_buckets_too_are_decoded_once_where_they_are_kept(tmp_path, monkeypatch):
    decoded, read = [], ImageTransform.read

    def counted(self: ImageTransform, *arguments):
        decoded.append(1)
        return read(self, *arguments)

    monkeypatch.setattr(ImageTransform, "read", counted)
    buckets = Buckets(area=8, multiple=4, max_ratio=4)
    folder = of_many_shapes(tmp_path, with_sizes=True)
    loader = ShardLoader(stream(folder, buckets=buckets, cache=True))
    assert sum(len(keys(loader)) for _ in range(3)) == 3 * 36
    assert len(decoded) <= 40


FIRSTS = ["k0000", "k0013", "k0020", "k0030"]  # of the shards


def captioned(folder: Path, shards: Path) -> Path:
    """Caption shards: two captions by name for each key but the first of each shard."""
    for path in sorted(shards.glob("*.tar")):
        first = int({"s0": 0, "s1": 13, "s2": 20, "s3": 30}[path.name[:2]])
        size = UNEVEN[int(path.name[1])]
        rows = [
            {
                "__key__": f"k{n:04d}",
                "json": json.dumps({"captions": {"long": f"long {n}", "short": f"s {n}"}}).encode(),
            }
            for n in range(first + 1, first + size)
        ]
        write_shards(rows, folder, path.stem.partition("-")[0], 100)
    return folder


def test_captions_of_parallel_shards_are_drawn_by_weight(shards, tmp_path):
    data = ShardSet(shards / "s*.tar", captions=captioned(tmp_path, shards))
    settings = {"transform": ImageTransform(8), "batch_size": 3, "seed": 7, "buffer": 8}
    weights = {"own": 1, "long": 2, "short": 1}
    loader = ShardLoader(ShardStream(data, shuffle=True, caption_weights=weights, **settings))
    drawn = Counter(
        caption.split()[0] for _ in range(20) for batch in loader for caption in batch["caption"]
    )
    total = sum(drawn.values())
    assert set(drawn) == {"picture", "long", "s"}
    assert abs(drawn["long"] / total - 0.5) < 0.07 and abs(drawn["s"] / total - 0.25) < 0.06


def test_each_set_of_a_mixture_has_the_captions_that_were_given_for_it(shards, tmp_path):
    told = ShardSet(shards / "s*.tar", captions=captioned(tmp_path / "captions", shards))
    parts = {"plain": Part(ShardSet(other(tmp_path / "more") / "t*.tar")), "told": Part(told)}
    settings = {"transform": ImageTransform(8), "batch_size": 3, "seed": 7, "shuffle": True}
    loader = ShardLoader(ShardStream(mixture=parts, caption_weights={"long": 1}, **settings))
    words = {k: c for b in loader for k, c in zip(b["key"], b["caption"], strict=True)}
    assert {caption for key, caption in words.items() if caption.startswith("long")} == {
        f"long {int(key[1:])}" for key in words if key < "k1000" and key not in FIRSTS
    }


def test_a_sample_keeps_its_own_words_where_no_caption_was_made(shards, tmp_path):
    data = ShardSet(shards / "s*.tar", captions=captioned(tmp_path, shards))
    settings = {"transform": ImageTransform(8), "batch_size": 3, "seed": 7, "shuffle": False}
    loader = ShardLoader(ShardStream(data, **settings))
    words = {k: c for b in loader for k, c in zip(b["key"], b["caption"], strict=True)}
    assert [key for key, caption in words.items() if caption.startswith("picture")] == FIRSTS


def tokens(folder: Path) -> Path:
    def npy(array: np.ndarray) -> bytes:
        buffer = io.BytesIO()
        np.save(buffer, array)
        return buffer.getvalue()

    rows = [
        {
            "__key__": f"k{n:04d}",
            "ids.npy": npy(np.full((2, 2), n, np.uint16)),
            "residual.npy": npy(np.full((4, 2, 2), n / 8, np.float16)),
            "text.npy": npy(np.full((1 + n % 3, 5), n, np.float16)),
            "txt": f"picture {n}".encode(),
        }
        for n in range(9)
    ]
    write_manifest(folder, {"train": write_shards(rows, folder, "s", 4)}, kind="tokens", size=16)
    return folder


def test_shards_of_tokens_give_batches_of_tokens(tmp_path):
    loader = ShardLoader(stream(tokens(tmp_path), shuffle=False))
    batch = list(loader)[1]
    assert set(batch) == {"key", "caption", "ids", "residual", "text", "text_mask"}
    assert batch["ids"].shape == (3, 2, 2) and batch["ids"].dtype == torch.int64
    assert batch["residual"].shape == (3, 4, 2, 2) and batch["residual"].dtype == torch.float32
    assert batch["ids"][:, 0, 0].tolist() == [3, 4, 5]
    assert torch.equal(batch["residual"][:, 0, 0, 0], torch.tensor([3, 4, 5]) / 8)
    assert batch["text"].shape == (3, 3, 5)
    assert batch["text_mask"].sum(1).tolist() == [1, 2, 3]
    assert batch["text"][batch["text_mask"]].min() == 3 and batch["text"][0, 1:].sum() == 0


def test_tokens_among_pictures_are_an_error(shards, tmp_path):
    both = shutil.copytree(shards, tmp_path / "both")
    with pytest.raises(DataError, match="a picture"):
        list(ShardLoader(stream(tokens(both), batch_size=7)))


def remote(server: FaultyServer, cache: Path, **options) -> ShardSet:
    store = ShardCache(cache, attempts=3, backoff=0.01, timeout=1.0)
    urls = [server.url(f"s{shard}-000000.tar") for shard in range(4)]
    return ShardSet(urls, cache=store, **options)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_store_that_stumbles_gives_the_same_batches_as_local_shards(shards, tmp_path, workers):
    faults = {
        "s0-000000.tar": Fault(unavailable=2),
        "s1-000000.tar": Fault(cut=1),
        "s2-000000.tar": Fault(latency=0.3),
        "s3-000000.tar": Fault(stalled=1),
    }
    with FaultyServer(shards) as server:
        server.faults.update(faults)
        loader = ShardLoader(stream(remote(server, tmp_path)), num_workers=workers)
        far = list(loader)
        once = {f"s{n}-000000.tar": tries for n, tries in enumerate((3, 2, 1, 2))}
        assert {name: server.gets[name] for name in once} == once
    assert all(same(*pair) for pair in zip(far, ShardLoader(stream(shards)), strict=True))
    assert not loader.stream.skipped


def test_a_shard_that_never_comes_is_tried_so_often_then_skipped_and_counted(shards, tmp_path):
    with FaultyServer(shards) as server:
        server.faults["s2-000000.tar"] = Fault(unavailable=ALWAYS)
        loader = ShardLoader(stream(remote(server, tmp_path), max_bad=1.0))
        assert len(list(loader)) == 13
        tries = server.gets["s2-000000.tar"]
    assert loader.stream.skipped == {"lost with its shard": 10}
    assert 3 <= tries <= 6  # three by the read, and some by the thread that reads ahead


def test_a_store_that_is_gone_ends_the_run(shards, tmp_path):
    with FaultyServer(shards) as server:
        data = remote(server, tmp_path)
    with pytest.raises(DataError, match="not one of 3 samples"):
        list(ShardLoader(stream(data)))


def test_weights_of_captions_that_nobody_wrote_are_refused(shards, tmp_path):
    data = ShardSet(shards / "s*.tar", captions=captioned(tmp_path, shards))
    with pytest.raises(ValueError, match=r"\['lnog'\]; there is \['long', 'own', 'short'\]"):
        stream(data, caption_weights={"lnog": 1})


def test_a_run_begun_by_many_ranks_keeps_every_lane_s_shard_open(tmp_path, monkeypatch):
    folder = build(tmp_path, sizes=(6,) * 24)
    opened = []
    monkeypatch.setattr(
        "dcar.data.shard_set.ShardIndex", lambda path: opened.append(path) or ShardIndex(path)
    )
    many = ShardLoader(stream(folder, rank=0, world=24, batch_size=1))
    next(iter(many))
    alone = ShardLoader(stream(folder))
    alone.load_state_dict(many.state_dict())
    assert len(list(alone)) == 40
    assert len(opened) < 24 * 4


@pytest.mark.parametrize("seed", range(4))
def test_a_lost_shard_longer_than_the_window_is_skipped_and_counted(tmp_path, seed):
    folder = build(tmp_path, sizes=(200,) * 3)
    (folder / "s1-000000.tar").write_bytes(b"<html>")
    loader = ShardLoader(stream(folder, seed=seed, buffer=20, max_bad=1.0))
    batches = list(loader)
    assert len(batches) == 200 and loader.stream.skipped == {"lost with its shard": 200}
    assert all(not 200 <= int(key[1:]) < 400 for key in keys(batches))
