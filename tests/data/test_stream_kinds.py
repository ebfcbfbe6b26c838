"""Streams of more kinds: mixtures, aspect buckets, captions by weight, shards of tokens."""

import io
import json
import shutil
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from dcar.data.buckets import Buckets
from dcar.data.index import ShardIndex
from dcar.data.loader import ShardLoader
from dcar.data.shard_set import ShardSet
from dcar.data.shards import write_manifest, write_shards
from dcar.data.stream import Part, ShardStream
from dcar.data.transforms import ImageTransform
from dcar.errors import DataError
from tests.shards import UNEVEN, build, keys, other, row, same, stream


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return build(tmp_path_factory.mktemp("uneven"))


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
    with pytest.raises(ValueError, match="2 samples cannot fill one batch of 3"):
        len(mixture(shards, other(tmp_path / "more"), samples_per_epoch=2))
    with pytest.raises(ValueError, match="samples_per_epoch 30 is for a mixture"):
        stream(shards, samples_per_epoch=30)


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
    share = (sum(UNEVEN) - len(UNEVEN)) / sum(UNEVEN)  # the others have their own words alone
    assert abs(drawn["long"] / total - 0.5 * share) < 0.06
    assert abs(drawn["s"] / total - 0.25 * share) < 0.06


def test_some_captions_end_at_a_comma_and_differ_from_epoch_to_epoch(tmp_path):
    rows = [row(key) | {"txt": f"{key}, b, c".encode()} for key in ("k0", "k1", "k2", "k3")]
    write_shards(rows, tmp_path, "s", 4)
    loader = ShardLoader(stream(tmp_path, batch_size=2, cut_captions=0.6))
    drawn = Counter(caption for _ in range(200) for b in loader for caption in b["caption"])
    assert set(drawn) == {f"{r['__key__']}{end}" for r in rows for end in ("", ", b", ", b, c")}
    whole = sum(count for caption, count in drawn.items() if caption.endswith("c"))
    assert abs(whole / drawn.total() - (0.4 + 0.6 / 3)) < 0.06
    whole = [caption for batch in ShardLoader(stream(tmp_path)) for caption in batch["caption"]]
    assert all(caption.endswith(", b, c") for caption in whole)


@pytest.mark.parametrize("share", [-0.1, 1.5])
def test_a_share_of_cut_captions_that_is_none_is_refused(shards, share):
    with pytest.raises(ValueError, match=f"cut_captions {share}"):
        stream(shards, cut_captions=share)


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
    assert set(batch) == {"key", "place", "caption", "ids", "residual", "text", "text_mask"}
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
