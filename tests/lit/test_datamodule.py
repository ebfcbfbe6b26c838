"""Loaders over the embedded shards: named validation sets, previews that move nothing."""

from functools import partial

from dcar.data.stream import ShardStream
from dcar.data.transforms import ImageTransform
from dcar.lit.datamodule import ShardDataModule
from tests.toys import ROOT


def stream(split: str, *, shuffle: bool) -> partial[ShardStream]:
    return partial(
        ShardStream,
        f"{ROOT}/assets/emoji/{split}-*.tar",
        transform=ImageTransform(16),
        batch_size=64,
        seed=0,
        shuffle=shuffle,
    )


def data() -> ShardDataModule:
    val = {name: stream(name, shuffle=False) for name in ("val", "heldout")}
    return ShardDataModule(train=stream("train", shuffle=True), val=val)


def test_validation_loaders_come_in_the_order_of_their_names() -> None:
    val, heldout = data().val_dataloader()
    sizes = [sum(len(batch["key"]) for batch in loader) for loader in (val, heldout)]
    assert sizes == [sum(val.stream.counts), sum(heldout.stream.counts)]
    assert sizes[0] != sizes[1]


def test_a_preview_shows_the_first_batches_and_moves_nothing() -> None:
    module = data()
    loader = module.train_dataloader()
    batches = iter(loader)
    preview = next(module.preview_batches())
    assert preview["key"] == next(batches)["key"]
    assert loader.state_dict()["batches"] == 1
