"""Loaders over the embedded shards: named validation sets, previews that move nothing."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from dcar.data.buckets import Buckets
from dcar.data.shards import write_manifest, write_shards
from dcar.data.stream import ShardStream
from dcar.data.transforms import ImageTransform
from dcar.errors import CheckpointError
from dcar.lit.datamodule import ShardDataModule
from tests.toys import ROOT, SIZE, toy_stage, toy_trainer

NAMES = ("val", "heldout")  # not as the alphabet has them


def stream(split: str, *, shuffle: bool) -> partial[ShardStream]:
    return partial(
        ShardStream,
        f"{ROOT}/assets/emoji/{split}-*.tar",
        transform=ImageTransform(16),
        batch_size=64,
        seed=0,
        shuffle=shuffle,
    )


def data(num_workers: int = 0) -> ShardDataModule:
    val = {name: stream(name, shuffle=False) for name in NAMES}
    train = stream("train", shuffle=True)
    return ShardDataModule(train=train, val=val, num_workers=num_workers)


def test_validation_loaders_come_in_the_order_of_their_names() -> None:
    val, heldout = data().val_dataloader()
    shards = [Path(loader.stream.sets[0].urls[0]).name for loader in (val, heldout)]
    assert [name.partition("-")[0] for name in shards] == list(NAMES)
    sizes = [sum(len(batch["key"]) for batch in loader) for loader in (val, heldout)]
    assert sizes == [sum(val.stream.counts), sum(heldout.stream.counts)]
    assert sizes[0] != sizes[1]


def test_codes_are_not_learned_from_pictures_of_several_shapes() -> None:
    shapes = {"buckets": Buckets(area=SIZE, multiple=16), "batch_size": 2}
    pictures = ShardDataModule(train=partial(stream("val", shuffle=True), **shapes), val={})
    with pytest.raises(ValueError, match="codes are learned from pictures of one shape"):
        toy_trainer(1).fit(toy_stage(2), datamodule=pictures)
    toy_trainer(1).fit(toy_stage(1), datamodule=pictures)


def test_each_loader_has_a_stream_and_as_many_workers_of_its_own() -> None:
    module = data(num_workers=2)
    loaders = [module.train_dataloader(), module.train_dataloader(), *module.val_dataloader()]
    assert [loader.num_workers for loader in loaders] == [2] * 4
    assert len({id(loader.stream) for loader in loaders}) == 4


def test_facts_of_tokens_are_told_for_each_split_that_has_some(tmp_path: Path) -> None:
    kinds = {"train": "tokens", "drawn": "tokens", "plain": "pictures"}
    for number, (split, kind) in enumerate(kinds.items()):
        entries = write_shards([{"__key__": "k", "txt": b"x"}], tmp_path / split, "s", 1)
        write_manifest(tmp_path / split, {split: entries}, kind=kind, size=number)
    train, drawn, plain = (
        partial(
            ShardStream,
            tmp_path / split / "s-*.tar",
            transform=ImageTransform(16),
            batch_size=1,
            seed=0,
            shuffle=split == "train",
        )
        for split in kinds
    )
    module = ShardDataModule(train=train, val={"drawn": drawn, "plain": plain})
    assert module.token_facts() == [
        {"split": split, "kind": "tokens", "size": number, "folder": str(tmp_path / split)}
        for number, split in enumerate(("train", "drawn"))
    ]


def test_tokens_that_no_manifest_lists_are_refused_by_name(tmp_path: Path) -> None:
    """A run of precompute over more shards was stopped, or a second folder is not finished."""
    entries = [
        *write_shards([{"__key__": "k", "txt": b"x"}], tmp_path / "a", "s", 1),
        *write_shards([{"__key__": "k", "txt": b"x"}], tmp_path / "a", "t", 1),
    ]
    write_shards([{"__key__": "k", "txt": b"x"}], tmp_path / "b", "u", 1)

    def facts(*patterns: str) -> list[dict[str, Any]]:
        train = partial(
            ShardStream,
            [tmp_path / pattern for pattern in patterns],
            transform=ImageTransform(16),
            batch_size=1,
            seed=0,
            shuffle=True,
        )
        return ShardDataModule(train=train, val={}).token_facts()

    write_manifest(tmp_path / "a", {"train": entries}, kind="tokens")
    assert len(facts("a/*.tar")) == 1
    with pytest.raises(CheckpointError, match=r"b/u-000000\.tar is in no manifest of token"):
        facts("a/*.tar", "b/*.tar")
    write_manifest(tmp_path / "a", {"train": entries[:1]}, kind="tokens")
    with pytest.raises(CheckpointError, match=r"a/t-000000\.tar .* finish --exp=data/precompute"):
        facts("a/*.tar")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_preview_shows_the_first_batches_and_moves_nothing(num_workers: int) -> None:
    module = data(num_workers=num_workers)
    loader = module.train_dataloader()
    batches = iter(loader)
    preview = next(module.preview_batches())
    assert preview["key"] == next(batches)["key"]
    assert preview["image"].dtype == torch.float32 and preview["image"].min() < 0
    assert loader.state_dict()["batches"] == 1
