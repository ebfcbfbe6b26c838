"""Loaders from config: one stream that trains, several named ones that validate."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from lightning import LightningDataModule

from dcar.data.batches import in_unit_range
from dcar.data.loader import ShardLoader
from dcar.data.stream import ShardStream


class ShardDataModule(LightningDataModule):
    """Wraps partials of `ShardStream`: `train`, and `val` as a mapping from name to partial.

    The names are those that validation metrics are logged under, in this order. Each loader gets a
    stream of its own. num_workers: processes that read and decode, for each loader; 0 reads in the
    training process.
    """

    def __init__(
        self,
        *,
        train: Callable[[], ShardStream],
        val: Mapping[str, Callable[[], ShardStream]],
        num_workers: int = 0,
    ):
        super().__init__()
        self.train_stream, self.val_streams, self.num_workers = train, dict(val), num_workers

    def train_dataloader(self) -> ShardLoader:
        return ShardLoader(self.train_stream(), num_workers=self.num_workers)

    def val_dataloader(self) -> list[ShardLoader]:
        streams = [partial() for partial in self.val_streams.values()]
        return [ShardLoader(stream, num_workers=self.num_workers) for stream in streams]

    def token_facts(self) -> list[dict[str, Any]]:
        """What the manifests of token shards say of their tokens, with split and `folder`."""
        streams = {"train": self.train_stream, **self.val_streams}
        return [
            {"split": name, **facts}
            for name, partial in streams.items()
            for data in partial().sets
            for facts in data.facts()
            if facts.get("kind") == "tokens"
        ]

    def preview_batches(self) -> Iterator[dict[str, Any]]:
        """Training batches, in [-1, 1], from the start of the stream; the trainer's own stays."""
        return map(in_unit_range, ShardLoader(self.train_stream()))
