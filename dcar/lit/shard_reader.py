"""Whole input shards to ranks and workers, for predictions that are written shard by shard."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from dcar.data.cache import ShardCache
from dcar.data.index import ShardIndex
from dcar.data.members import BadSample, Raw
from dcar.data.shards import ShardEntry, is_unfinished, read_manifest, read_splits, split_of
from dcar.data.storage import expand, join, local_path, name_of, parent
from dcar.data.stores import filesystem, is_remote, shown, with_retries
from dcar.errors import DataError

Batch = dict[str, Any]
Decode = Callable[[Raw], dict[str, Any]]  # raises BadSample; its entry "key" names the sample


@dataclass(frozen=True)
class Source:
    """An input shard. entry: what a manifest beside it says of it, None without one."""

    url: str
    split: str
    entry: ShardEntry | None

    @property
    def name(self) -> str:
        return name_of(self.url)

    def identity(self) -> dict[str, Any]:
        """What another shard of this name would not share, as plain data.

        The manifest's entry; without one size and time of the last change, or URL and size.
        """
        if self.entry is not None:
            return asdict(self.entry)
        if not is_remote(self.url):
            facts = local_path(self.url).stat()
            return {"name": self.name, "bytes": facts.st_size, "mtime_ns": facts.st_mtime_ns}
        store = filesystem(self.url)
        size = with_retries(lambda: store.size(store._strip_protocol(self.url)), self.url)
        return {"url": shown(join(parent(self.url), self.name)), "bytes": size}


def find_sources(urls: str | Path | Iterable[str | Path]) -> list[Source]:
    """Shards by path, glob or brace pattern, local or remote, with what their manifests say.

    A shard's split is the manifest's word, else what its name tells (`split_of`).
    Raises FileNotFoundError for a pattern that matches nothing, ValueError where two shards of
    different folders have one name (their outputs would), DataError where a folder's are still
    being made.
    """
    found: dict[str, str] = {}
    for url in expand(urls):
        other = found.setdefault(name_of(url), url)
        if other != url:
            raise ValueError(f"{other} and {url} have the same name, so their outputs would too")
    folders = {parent(url) for url in found.values()}
    entries = {folder: read_manifest(folder) for folder in sorted(folders)}
    for folder, listed in entries.items():
        if not listed and is_unfinished(folder):
            raise DataError(f"{folder} is not finished: run what makes it again")
    splits = {folder: read_splits(folder) for folder in folders}
    return [
        Source(url, splits[parent(url)].get(name, split_of(name)), entries[parent(url)].get(name))
        for name, url in found.items()
    ]


def collate(samples: Sequence[dict[str, Any]]) -> Batch:
    """A list for each entry; tensors, which must agree in shape, are stacked."""
    columns = {name: [sample[name] for sample in samples] for name in (samples or [{"key": ""}])[0]}
    return {
        name: torch.stack(column) if column and isinstance(column[0], Tensor) else column
        for name, column in columns.items()
    }


@dataclass
class Tally:
    """Samples tried, and the bad ones among them by reason, since the last `take`."""

    tried: int = 0
    bad: Counter[str] = field(default_factory=Counter)

    def take(self) -> Batch:
        taken = {"tried": self.tried, "bad": dict(self.bad)}
        self.tried, self.bad = 0, Counter()
        return taken


class ShardReader(IterableDataset):
    """Batches of decoded samples, shard after shard; none holds samples of two shards.

    Worker w of W takes shards w, w + W, ... whole, in order. Besides what `decode` gives, a batch
    holds `shard` (its name), `last` (whether the shard ends with it), and, since the shard's batch
    before, `tried` (samples) and `bad` (reasons and how often). The last one may hold no sample.
    Raises DataError where a shard is no tar or cannot be fetched; samples that are lost because a
    shard breaks off are counted as bad.
    """

    def __init__(
        self, sources: Sequence[Source], *, decode: Decode, batch_size: int, cache: ShardCache
    ):
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1")
        self.sources, self.decode, self.cache = list(sources), decode, cache
        self.batch_size = batch_size

    def __iter__(self) -> Iterator[Batch]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        own = self.sources[worker::workers]
        for source, following in zip_longest(own, own[1:]):
            path = self.cache.fetch(source.url, source.entry)
            if following is not None:
                self.cache.prefetch(following.url, following.entry)
            yield from self._batches(source, path)

    def _batches(self, source: Source, path: Path) -> Iterator[Batch]:
        tally = Tally()
        index = ShardIndex(path)
        try:
            samples = self._samples(index, source, tally)
            group = list(islice(samples, self.batch_size))
            while True:
                following = list(islice(samples, self.batch_size))
                rest = {"shard": source.name, "last": not following, **tally.take()}
                yield collate(group) | rest
                if not following:
                    return
                group = following
        finally:
            index.close()

    def _samples(self, index: ShardIndex, source: Source, tally: Tally) -> Iterator[dict[str, Any]]:
        """The good samples of a shard; all are counted, the others by reason."""
        keys: set[str] = set()
        for position, key in enumerate(index.keys):
            tally.tried += 1
            try:
                if key in keys:
                    raise BadSample("key twice")
                keys.add(key)
                yield self.decode(index.read(position))
            except BadSample as reason:
                tally.bad[str(reason)] += 1
        if index.broken:
            promised = source.entry.samples if source.entry else 0
            lost = max(promised - len(index), 1)
            tally.tried += lost
            tally.bad["lost with its shard"] += lost


class ShardReading(LightningDataModule):
    """Hands the shards that are not finished yet to ranks: rank r of W gets r, r + W, ...

    finished: names of those that are; asked on the first rank only, so that all ranks agree.
    num_workers: processes that read and decode, on each rank. own: this rank's shards.
    """

    own: list[Source]

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        decode: Decode,
        finished: Callable[[], set[str]],
        batch_size: int,
        num_workers: int,
        cache: ShardCache,
    ):
        super().__init__()
        self.sources, self.decode, self.finished = list(sources), decode, finished
        self.batch_size, self.num_workers, self.cache = batch_size, num_workers, cache

    def predict_dataloader(self) -> DataLoader:
        trainer = self.trainer
        assert trainer is not None
        remaining: list[Source] = []
        if trainer.is_global_zero:
            finished = self.finished()
            remaining = [source for source in self.sources if source.name not in finished]
        remaining = trainer.strategy.broadcast(remaining)
        self.own = remaining[trainer.global_rank :: trainer.world_size]
        reader = ShardReader(
            self.own,
            decode=self.decode,
            batch_size=self.batch_size,
            cache=self.cache,
        )
        return DataLoader(reader, batch_size=None, num_workers=self.num_workers)
