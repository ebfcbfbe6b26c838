"""Loaders from config: one stream that trains, several named ones that validate."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from lightning import LightningDataModule

from dcar.data.batches import in_unit_range
from dcar.data.loader import ShardLoader
from dcar.data.storage import parent
from dcar.data.stores import shown
from dcar.data.stream import ShardStream
from dcar.errors import CheckpointError


def _token_facts(stream: ShardStream) -> list[dict[str, Any]]:
    known = [facts for data in stream.sets for facts in data.facts()]
    tokens = [facts for facts in known if facts.get("kind") == "tokens"]
    folders = {facts["folder"] for facts in tokens}
    for data in stream.sets if tokens else ():
        for url, entry in zip(data.urls, data.entries, strict=True):
            if entry is None or parent(url) not in folders:
                raise CheckpointError(
                    f"{shown(url)} is in no manifest of token shards: finish "
                    "--exp=data/precompute first"
                )
    return tokens


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
        """What the manifests of token shards say of their tokens, with split and `folder`.

        Raises CheckpointError for a set of tokens with a shard that no such manifest lists.
        """
        streams = {"train": self.train_stream, **self.val_streams}
        return [
            {"split": name, **facts}
            for name, partial in streams.items()
            for facts in _token_facts(partial())
        ]

    def preview_batches(self) -> Iterator[dict[str, Any]]:
        """Training batches, in [-1, 1], from the start of the stream; the trainer's own stays."""
        loader = ShardLoader(self.train_stream(), num_workers=self.num_workers)
        return map(in_unit_range, loader)
