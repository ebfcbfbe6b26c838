"""Streams: who sees what, in which order, what happens to bad samples, and exact resumption."""

import io
from collections import Counter
from itertools import islice
from pathlib import Path

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from torch import Tensor

from dcar.data.samples import Sample
from dcar.data.shards import DataError, write_manifest, write_shards
from dcar.data.stream import Batch, ShardLoader, ShardStream
from dcar.data.transforms import ImageTransform

UNEVEN = (13, 7, 10, 9)  # samples per shard


def row(key: str) -> dict[str, bytes | str]:
    buffer = io.BytesIO()
    shade = 37 * int(key[1:]) % 256
    image = Image.new("RGB", (12, 8), (shade, 0, 0))
    image.paste((0, shade, 255), (3, 0, 7, 8))
    image.save(buffer, "PNG")
    return {"__key__": key, "png": buffer.getvalue(), "txt": f"picture {key}".encode()}


def build(
    folder: Path, sizes: tuple[int, ...] = UNEVEN, bad: dict[str, dict] | None = None
) -> Path:
    entries, start = [], 0
    for shard, size in enumerate(sizes):
        rows = [row(f"k{number:04d}") for number in range(start, start + size)]
        rows = [
            {
                kind: data
                for kind, data in {**each, **(bad or {}).get(each["__key__"], {})}.items()
                if data
            }
            for each in rows
        ]
        entries += write_shards(rows, folder, f"s{shard}", size)
        start += size
    write_manifest(folder, {"train": entries})
    return folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return build(tmp_path_factory.mktemp("uneven"))


def stream(folder: Path, **settings) -> ShardStream:
    transform = ImageTransform(8, crop="random", flip=True)
    base = {"transform": transform, "batch_size": 3, "seed": 7, "shuffle": True, "buffer": 8}
    return ShardStream(folder / "s*.tar", **{**base, **settings})


def keys(batches) -> list[str]:
    return [key for batch in batches for key in batch["key"]]


def same(one: Batch, two: Batch) -> bool:
    return one["key"] == two["key"] and torch.equal(one["image"], two["image"])


def test_a_batch_holds_the_documented_keys_and_shapes(shards):
    batch = next(iter(ShardLoader(stream(shards))))
    assert set(batch) == {"key", "image", "caption"}
    assert batch["image"].shape == (3, 3, 8, 8) and batch["image"].dtype == torch.float32
    assert batch["caption"] == [f"picture {key}" for key in batch["key"]]


@pytest.mark.parametrize("workers", [0, 2])
def test_the_order_is_a_function_of_seed_and_epoch(shards, workers):
    def epochs(seed: int) -> list[list[str]]:
        loader = ShardLoader(stream(shards, seed=seed), num_workers=workers)
        return [keys(loader) for _ in range(2)]

    first = epochs(1)
    assert first == epochs(1)
    assert len({tuple(order) for order in first + epochs(2)}) == 4


@pytest.mark.parametrize("world, workers", [(1, 0), (2, 0), (1, 2), (2, 2), (4, 0), (3, 1)])
def test_every_rank_has_the_same_number_of_full_batches_and_shares_no_sample(
    shards, world, workers
):
    seen: list[str] = []
    for rank in range(world):
        loader = ShardLoader(stream(shards, rank=rank, world=world), num_workers=workers)
        batches = list(loader)
        assert len(batches) == len(loader) == sum(UNEVEN) // (3 * world)
        assert all(len(batch["key"]) == 3 for batch in batches)
        seen += keys(batches)
    assert len(seen) == len(set(seen))


@pytest.mark.parametrize("world, workers", [(1, 0), (2, 0), (1, 2), (2, 2), (4, 0)])
def test_validation_visits_every_sample_once_over_ranks_and_workers(shards, world, workers):
    settings = {"shuffle": False, "batch_size": 4, "world": world}
    seen: Counter[str] = Counter()
    for rank in range(world):
        loader = ShardLoader(stream(shards, rank=rank, **settings), num_workers=workers)
        batches = list(loader)
        assert len(batches) == len(loader)
        seen.update(keys(batches))
    assert seen == Counter(f"k{number:04d}" for number in range(sum(UNEVEN)))


def test_validation_starts_over_after_a_broken_off_iteration(shards):
    loader = ShardLoader(stream(shards, shuffle=False))
    first = [batch["key"] for batch in islice(iter(loader), 2)]
    assert [batch["key"] for batch in islice(iter(loader), 2)] == first


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
    resumed, plain = ShardLoader(stream(shards, cache=True)), ShardLoader(stream(shards))
    for loader in (resumed, plain):
        loader.load_state_dict({"epoch": 0, "batches": 9})
    for _ in range(3):
        assert all(same(*pair) for pair in zip(resumed, plain, strict=True))
    assert not resumed.stream.skipped


def test_one_shard_too_is_shuffled_anew_each_epoch(tmp_path):
    loader = ShardLoader(stream(build(tmp_path, sizes=(30,))))
    assert len({tuple(keys(loader)) for _ in range(3)}) == 3


def test_a_cache_with_workers_is_refused(shards):
    with pytest.raises(ValueError, match="num_workers 2"):
        ShardLoader(stream(shards, cache=True), num_workers=2)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", [1, 4, 5, 12, 13, 17])
def test_a_resumed_loader_gives_exactly_the_next_batches(shards, workers, stop):
    straight = ShardLoader(stream(shards), num_workers=workers)
    expected = [batch for _ in range(2) for batch in straight]
    stopped = ShardLoader(stream(shards), num_workers=workers)
    taken = 0
    while taken < stop:  # 13 batches an epoch: the last cases stop in the second
        for _ in stopped:
            taken += 1
            if taken == stop:
                break
    resumed = ShardLoader(stream(shards), num_workers=workers)
    resumed.load_state_dict(stopped.state_dict())
    rest = list(resumed) + (list(resumed) if stop < 13 else [])
    assert len(rest) == len(expected) - stop
    assert all(same(*pair) for pair in zip(rest, expected[stop:], strict=True))


def test_resuming_decodes_no_skipped_picture(shards, monkeypatch):
    loader = ShardLoader(stream(shards))
    loader.load_state_dict({"epoch": 0, "batches": 10})
    decoded = []
    read = ImageTransform.read
    monkeypatch.setattr(
        ImageTransform, "read", lambda self, data: decoded.append(1) or read(self, data)
    )
    assert len(list(loader)) == 3 and len(decoded) == 9


def test_the_state_counts_batches_handed_out_not_those_that_workers_hold(shards):
    loader = ShardLoader(stream(shards), num_workers=2, prefetch_factor=3)
    batches = iter(loader)
    for taken in range(1, 5):
        next(batches)
        assert loader.state_dict()["batches"] == taken
    assert len(list(batches)) == 9
    assert (loader.state_dict()["epoch"], loader.state_dict()["batches"]) == (1, 0)


@pytest.mark.parametrize("ranks", [1, 4])
def test_resuming_with_other_ranks_repeats_no_sample_in_the_epoch(shards, ranks, caplog):
    loader = ShardLoader(stream(shards, rank=0, world=2))
    next(iter(loader))
    resumed = ShardLoader(stream(shards, rank=0, world=ranks))
    resumed.load_state_dict(loader.state_dict())
    assert "the rest of epoch 0 is left out" in caplog.text
    fresh = ShardLoader(stream(shards, rank=0, world=ranks))
    fresh.load_state_dict({"epoch": 1, "batches": 0})
    assert all(same(*pair) for pair in zip(resumed, fresh, strict=True))


def test_fewer_shards_than_readers_is_an_error_before_the_first_step(shards):
    loader = ShardLoader(stream(shards, rank=0, world=3), num_workers=2)
    with pytest.raises(ValueError, match="4 shards are fewer than 3 ranks x 2 workers"):
        len(loader)
    with pytest.raises(ValueError, match="4 shards are fewer than 3 ranks x 2 workers"):
        iter(loader)


def test_too_few_samples_for_one_batch_is_an_error(shards):
    with pytest.raises(ValueError, match="39 samples cannot fill one batch of 20 on each of 2"):
        len(ShardLoader(stream(shards, batch_size=20, rank=0, world=2)))


@pytest.mark.parametrize(
    "settings", [{"batch_size": 0}, {"buffer": 0}, {"rank": 2, "world": 2}, {"rank": 0}]
)
def test_impossible_settings_are_refused(shards, settings):
    with pytest.raises(ValueError):
        stream(shards, **settings)


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


def test_batches_of_one_bad_sample_take_the_one_before_and_resume_exactly(tmp_path):
    bad = {f"k{number:04d}": {"png": b"no"} for number in (3, 11, 12, 30)}
    folder = build(tmp_path, bad=bad)
    expected = list(ShardLoader(stream(folder, batch_size=1, max_bad=1.0)))
    assert len(expected) == sum(UNEVEN)
    for done in range(1, len(expected)):
        resumed = ShardLoader(stream(folder, batch_size=1, max_bad=1.0))
        resumed.load_state_dict({"epoch": 0, "batches": done})
        assert same(next(iter(resumed)), expected[done])


def test_validation_leaves_bad_samples_out(tmp_path):
    folder = build(tmp_path, bad={"k0000": {"png": b"no"}, "k0038": {"txt": b""}})
    loader = ShardLoader(stream(folder, shuffle=False, batch_size=1, max_bad=0.1))
    batches = list(loader)
    assert sorted(keys(batches)) == [f"k{number:04d}" for number in range(1, 38)]
    assert all(len(batch["key"]) == 1 for batch in batches)
    assert sum(loader.stream.skipped.values()) == 2


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


def test_too_many_bad_samples_end_the_run_with_their_reasons(tmp_path):
    folder = build(tmp_path, sizes=(150,), bad={"k0003": {"txt": b""}, "k0009": {"png": b"no"}})
    with pytest.raises(DataError, match="2 of 1.. samples .* 1.0% .*no caption: 1"):
        list(ShardLoader(stream(folder)))


def test_one_bad_sample_in_two_hundred_is_within_the_default_limit(tmp_path):
    folder = build(tmp_path, sizes=(201,), bad={"k0003": {"txt": b""}})
    loader = ShardLoader(stream(folder))
    assert len(list(loader)) == 67 and sum(loader.stream.skipped.values()) == 1


def test_a_set_without_one_good_sample_is_an_error_not_a_hang(tmp_path):
    folder = build(
        tmp_path, sizes=(6,), bad={f"k{number:04d}": {"txt": b""} for number in range(6)}
    )
    with pytest.raises(DataError, match="not one of 3 samples"):
        list(ShardLoader(stream(folder)))


@pytest.mark.slow  # torch takes seconds to let go of a worker that raised
def test_what_a_worker_cannot_read_reaches_the_training_process(tmp_path):
    folder = build(tmp_path, sizes=(6, 6), bad={f"k{n:04d}": {"txt": b""} for n in range(12)})
    with pytest.raises(DataError, match="not one of 3 samples"):
        list(ShardLoader(stream(folder), num_workers=1))


def test_a_sample_is_prepared_before_chance_comes_in(shards):
    cached = stream(shards, cache=True)
    list(ShardLoader(cached))
    assert all(isinstance(sample, Sample) for sample in cached._samples.values())
    assert {sample.pixels.shape for sample in cached._samples.values()} == {(8, 12, 3)}


class Recorder(lightning.LightningModule):
    """Remembers the batches it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.batches: list[Batch] = []

    def training_step(self, batch: Batch) -> Tensor:
        self.batches.append({"key": batch["key"], "image": batch["image"].clone()})
        return (self.weight * batch["image"]).mean()

    def validation_step(self, batch: Batch) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(
    folder: Path, root: Path, *, steps: int, workers: int, ckpt: Path | None = None
) -> Recorder:
    module = Recorder()
    saving = ModelCheckpoint(root, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=steps,
        callbacks=[saving],
        default_root_dir=root,
        logger=False,
        val_check_interval=5,
        num_sanity_val_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loaders = (
        ShardLoader(stream(folder), num_workers=workers),
        ShardLoader(stream(folder, shuffle=False)),
    )
    trainer.fit(module, *loaders, ckpt_path=ckpt)
    return module


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("workers, stops", [(0, (1, 6, 12, 13, 14)), (2, (6,))])
def test_lightning_resumes_at_exactly_the_next_batch(shards, tmp_path, workers, stops):
    straight = fit(shards, tmp_path / "straight", steps=18, workers=workers)
    assert len(straight.batches) == 18  # 13 batches an epoch
    for stop in stops:
        saved = tmp_path / "straight" / f"step={stop}.ckpt"
        resumed = fit(shards, tmp_path / f"from{stop}", steps=18, workers=workers, ckpt=saved)
        assert len(resumed.batches) == 18 - stop
        rest = zip(resumed.batches, straight.batches[stop:], strict=True)
        assert all(same(*pair) for pair in rest)
        state = torch.load(saved, weights_only=True)["loops"]["fit_loop"]["state_dict"]
        (loader_state,) = state["combined_loader"]
        assert (loader_state["epoch"], loader_state["batches"]) == divmod(stop, 13)
