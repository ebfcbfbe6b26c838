"""Two kinds of loaders from config: one that trains, several named ones that validate."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from lightning import LightningDataModule

from dcar.data.stream import ShardLoader


class ShardDataModule(LightningDataModule):
    """Wraps partials of `ShardLoader`: `train`, and `val` as a mapping from name to partial.

    The names are those that validation metrics are logged under, in this order.
    """

    def __init__(
        self, *, train: Callable[[], ShardLoader], val: Mapping[str, Callable[[], ShardLoader]]
    ):
        super().__init__()
        self.train_partial, self.val_partials = train, dict(val)

    def train_dataloader(self) -> ShardLoader:
        return self.train_partial()

    def val_dataloader(self) -> list[ShardLoader]:
        return [partial() for partial in self.val_partials.values()]

    def preview_batches(self) -> Iterator[dict[str, Any]]:
        """Training batches from the start of the stream, without moving the trainer's own."""
        return iter(self.train_partial())
