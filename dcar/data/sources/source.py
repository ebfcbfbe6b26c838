"""What a source of pictures is: units of work, each read on its own, the same way every time."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True)
class Unit:
    """A piece of the input that one task turns into shards, independent of every other piece.

    number: counts the units of a split from 0 and names the output (`<split>-<number>.tar`).
    samples: how many the unit holds where that is known, at most `samples_per_shard`: it becomes
        one shard, or more where it is larger than `max_shard_bytes`. None for a piece that can only
        be streamed (a .tgz): it becomes one or more.
    reference: what `Source.read` needs to find it again; plain data, so that it travels between
        processes and machines.
    """

    split: str
    number: int
    samples: int | None
    reference: Any


@dataclass(frozen=True)
class Record:
    """One sample as the source has it. image: the picture file as it was found, never re-encoded.

    key: unique in the split. facts: entries of the `json` member besides what the builder adds
    (source id, category, licence). dropped: why the source itself leaves this sample out; such a
    record is counted and not written.
    """

    key: str
    image: bytes
    caption: str | None = None
    label: int | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    dropped: str | None = None


class Source(Protocol):
    """Where pictures come from. Pickled to every worker, so it holds settings, not open files."""

    captioned: bool  # a record without words is dropped by the builder, and counted

    def prepare(self, work: str) -> None:
        """Once, before `units`, in the main process: what all units need, written below `work`.

        Must give the same result when it is run again after being killed.
        """

    def units(self, samples_per_shard: int) -> list[Unit]:
        """The work, in an order that depends on the input alone.

        Raises FileNotFoundError naming what is missing and DataError naming what is unreadable.
        """

    def read(self, unit: Unit) -> Iterator[Record]:
        """The records of one unit, always in the same order, in memory of one record."""
