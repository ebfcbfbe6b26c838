"""The shards of one data set, wherever they lie: counts, facts, and any sample by its place."""

import errno
import json
import logging
import os
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from dcar.data.cache import ShardCache
from dcar.data.images import image_size
from dcar.data.index import ShardIndex, count_samples
from dcar.data.members import BadSample, Raw
from dcar.data.samples import OWN, image_bytes, is_text
from dcar.data.shards import ShardEntry, read_facts, read_manifest, read_sizes
from dcar.data.storage import expand, is_remote, join, list_files, name_of, parent
from dcar.errors import DataError

MAX_EDGE = 65_535  # of a picture, in a table of uint16
MANY_OPEN = 4096
OPEN_SHARDS = 16  # held open by a reader that does not say how many it needs

log = logging.getLogger(__name__)


def caption_names(data: bytes | str) -> dict[str, str]:
    """Captions by name of a `json` member; {} where it holds none."""
    try:
        captions = json.loads(data)["captions"]
        words = {str(name): text for name, text in captions.items() if isinstance(text, str)}
        return {name: text for name, text in words.items() if text and is_text(text)}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def counted(path: Path) -> int:
    """`count_samples`, once for a file that stays as it is: several sets of a run may read it."""
    facts = path.stat()
    return _counted(path, facts.st_size, facts.st_mtime_ns)


@lru_cache(maxsize=100_000)
def _counted(path: Path, size: int, changed: int) -> int:
    return count_samples(path)


def most_open() -> int:
    """Files that one set may hold open: a quarter of what the system allows a process."""
    try:
        import resource
    except ImportError:  # Windows
        return MANY_OPEN
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return MANY_OPEN if limit == resource.RLIM_INFINITY else max(2, limit // 4)


class OpenShards:
    """Indexes of shards by URL, opened when asked for and closed when too many are open.

    One process alone uses an open file: a copy in another one, forked or unpickled, starts empty.
    """

    def __init__(self, cache: ShardCache):
        self.cache, self.room = cache, OPEN_SHARDS
        self._open: OrderedDict[str, ShardIndex] = OrderedDict()
        self._lost: set[str] = set()
        self._owner = os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": OrderedDict()}

    def get(self, url: str, entry: ShardEntry | None) -> ShardIndex | None:
        """None, after a warning, for a shard that cannot be had; it is not tried twice."""
        if self._owner != os.getpid():
            self._open, self._owner = OrderedDict(), os.getpid()
        if url not in self._open:
            if url in self._lost or (index := self._opened(url, entry)) is None:
                return None
            self._open[url] = index
            while len(self._open) > self.room:
                self._open.popitem(last=False)[1].close()
        self._open.move_to_end(url)
        return self._open[url]

    def _opened(self, url: str, entry: ShardEntry | None) -> ShardIndex | None:
        try:
            try:
                index = ShardIndex(self.cache.fetch(url, entry))
            except FileNotFoundError:  # another process made room in the cache in between
                index = ShardIndex(self.cache.fetch(url, entry))
        except (DataError, OSError) as error:
            if getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE):
                raise DataError(f"{url} cannot be opened: {error}") from error
            self.cache.forget(url, entry)
            self._lost.add(url)
            log.warning("a shard is lost: %s", error)
            return None
        if index.broken:
            log.warning("the rest of a shard is lost: %s: %s", index.path, index.broken)
        return index

    def forget_losses(self) -> None:
        self._lost.clear()

    def prepare(self, url: str, entry: ShardEntry | None, first: int, stop: int) -> None:
        """Download a remote shard in the background; have the system load a part of a local one."""
        if url in self._lost:
            return
        if is_remote(url) and url not in self._open:
            self.cache.prefetch(url, entry)
        elif index := self.get(url, entry):
            index.advise(first, stop)


class ShardSet:
    """Shards by path, glob, brace pattern or URL, of one or more folders.

    captions: folders of caption shards: the same shard names and keys, `json` members that hold
        {"captions": {name: words}}.
    cache: where remote shards are kept, and the schemes of URLs that may be opened.
    Raises FileNotFoundError for missing shards, ValueError for a scheme that is not allowed, and
    for two shards of one name where there are captions.
    """

    def __init__(
        self,
        urls: str | Path | Iterable[str | Path],
        *,
        captions: str | Path | Sequence[str | Path] | None = None,
        cache: ShardCache | None = None,
    ):
        self.cache = cache or ShardCache()
        self.urls = expand(urls, schemes=self.cache.schemes)
        self.folders = sorted({parent(url) for url in self.urls})
        manifests = {folder: read_manifest(folder) for folder in self.folders if _listed(folder)}
        self.entries = [manifests.get(parent(url), {}).get(name_of(url)) for url in self.urls]
        self.counts = [
            entry.samples if entry else counted(self.cache.fetch(url))
            for url, entry in zip(self.urls, self.entries, strict=True)
        ]
        folders = [captions] if isinstance(captions, str | Path) else list(captions or ())
        self.caption_folders = [str(folder) for folder in folders]
        for folder in self.caption_folders:
            self._check_captions(folder)
        self.shards = OpenShards(self.cache)

    def _check_captions(self, folder: str) -> None:
        first: dict[str, str] = {}
        for url in self.urls:
            if (other := first.setdefault(name_of(url), url)) != url:
                raise ValueError(
                    f"captions={folder}: {other} and {url} have the same name, so that their "
                    "captions cannot be told apart"
                )
        names = set(read_manifest(folder)) or {name_of(url) for url in list_files(folder)}
        if missing := [name_of(url) for url in self.urls if name_of(url) not in names]:
            raise FileNotFoundError(
                f"captions={folder} holds no {missing[0]} "
                f"({len(missing)} of {len(self.urls)} shards are missing)"
            )

    def keep_open(self, shards: int) -> None:
        """How many shards a reader goes back and forth between."""
        self.shards.room = min(max(shards, 2) * (1 + len(self.caption_folders)), most_open())

    def read(self, shard: int, position: int) -> Raw:
        """Raises BadSample where the sample cannot be used."""
        index = self.shards.get(self.urls[shard], self.entries[shard])
        if index is None or position >= len(index):
            raise BadSample("lost with its shard")
        return _read(index, position, self.urls[shard])

    @contextmanager
    def required(self, shard: int, position: int) -> Iterator[None]:
        """Within it a sample that cannot be used is a DataError that names it."""
        try:
            yield
        except BadSample as reason:
            raise DataError(f"{self.urls[shard]}: sample {position}: {reason}") from reason

    def captions(self, shard: int, key: str) -> dict[str, str]:
        """Further captions of a sample, by name, from the caption shards."""
        found: dict[str, str] = {}
        for folder in self.caption_folders:
            url = join(folder, name_of(self.urls[shard]))
            index = self.shards.get(url, None)
            position = index.find(key) if index else None
            if index and position is not None:
                found |= caption_names(_read(index, position, url).get("json", b""))
        return found

    def caption_names(self) -> set[str]:
        """The names of the captions that samples have, as the first hundred of each folder tell."""
        found = {OWN}
        for folder in self.caption_folders:
            url = join(folder, name_of(self.urls[0]))
            index = self.shards.get(url, None)
            if index:
                for position in range(min(len(index), 100)):
                    with suppress(BadSample):  # told where it is read
                        raw = _read(index, position, url)
                        found |= set(caption_names(raw.get("json", b"")))
        return found

    def prepare(self, shard: int, first: int, stop: int) -> None:
        """Samples [first, stop) of a shard are read soon, in some order: let them be fetched."""
        self.shards.prepare(self.urls[shard], self.entries[shard], first, stop)

    def forget_losses(self) -> None:
        """Try again what could not be had."""
        self.shards.forget_losses()

    def facts(self) -> list[dict[str, Any]]:
        """What the manifests say about how the shards were made, with their `folder`."""
        return [read_facts(folder) | {"folder": folder} for folder in self.folders]

    def sizes(self) -> list[np.ndarray]:
        """(width, height) of each picture in pixels, uint16 (samples, 2) a shard.

        From `sizes.npz` where it lies beside the shards, else from the headers of the pictures.

        A sample without a readable picture has size (1, 1): it is found out when it is read.
        """
        stored = {folder: read_sizes(folder) for folder in self.folders if _listed(folder)}
        found = []
        for shard, url in enumerate(self.urls):
            sizes = stored.get(parent(url), {}).get(name_of(url))
            if sizes is None or len(sizes) != self.counts[shard]:
                log.info("%s: reading the sizes of %d pictures", url, self.counts[shard])
                sizes = np.array(list(self._measure(shard)), np.uint16).reshape(-1, 2)
            found.append(sizes)
        return found

    def _measure(self, shard: int) -> Iterator[tuple[int, int]]:
        for position in range(self.counts[shard]):
            try:
                width, height = image_size(image_bytes(self.read(shard, position)))
                yield min(width, MAX_EDGE), min(height, MAX_EDGE)
            except ValueError:
                yield 1, 1


def _read(index: ShardIndex, position: int, url: str) -> Raw:
    try:
        return index.read(position)
    except OSError as error:  # the training saves a checkpoint, as for all DataErrors
        raise DataError(f"{url} cannot be read: {error}") from error


def _listed(folder: str) -> bool:
    """Whether a manifest may lie in a folder; `pipe:` has none."""
    return not folder.startswith("pipe:")
