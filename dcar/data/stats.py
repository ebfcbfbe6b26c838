"""What is in shards: counts, sizes, shapes, words, classes, and what a stream would leave out.

Only the headers of pictures are read, and nothing of them where `sizes.npz` knows their sizes.
"""

import io
import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from dcar.data.distributors import Tick, advance
from dcar.data.images import MAX_PIXELS, image_size
from dcar.data.members import IMAGE_TYPES, BadSample, Raw
from dcar.data.samples import TOO_LARGE, decoding, image_bytes, read_caption
from dcar.data.shard_check import ShardCheck, ShardFile, holds_captions, open_tar, tar_samples
from dcar.data.shard_set import caption_names
from dcar.data.shards import ShardEntry, read_facts, read_manifest, read_sizes
from dcar.data.storage import name_of, open_read
from dcar.data.verify import over_processes, quiet, shard_urls, splits_of, wants_captions

QUANTILES = {"min": 0, "p5": 5, "p25": 25, "median": 50, "p75": 75, "p95": 95, "max": 100}
ASPECT_EDGES = 2 ** np.linspace(-2, 2, 33)  # of width / height; rarer ones fall in the outer bins
MAX_BINS = 40
TAIL = 99.5  # percent: what lies beyond is drawn in the last bin
HISTOGRAMS = ("shorter", "aspect", "words", "caption_bytes")

log = logging.getLogger(__name__)


@dataclass
class ShardStats:
    """What was counted in one shard. sizes: (width, height) in pixels, int32 (pictures, 2).

    samples: looked at, is_whole: which are all that there are. size: of the file in bytes.
    words, caption_bytes: of each caption, int32 (captions,).
    skipped: samples that a stream would not use, by reason.
    """

    name: str
    samples: int = 0
    is_whole: bool = True
    size: int = 0
    sizes: np.ndarray = field(default_factory=lambda: np.empty((0, 2), np.int32))
    words: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))
    caption_bytes: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))
    formats: Counter[str] = field(default_factory=Counter)
    classes: Counter[int] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)


class _Tally:
    """Samples of a shard one by one, before they become a ShardStats."""

    def __init__(self, *, captioned: bool | None, sizes: np.ndarray | None):
        self.captioned, self.known = captioned, sizes
        self.samples = 0
        self.sizes: list[tuple[int, int]] = []
        self.captions: list[tuple[int, int]] = []  # words, bytes
        self.formats: Counter[str] = Counter()
        self.classes: Counter[int] = Counter()
        self.skipped: Counter[str] = Counter()

    def add(self, raw: Raw) -> None:
        try:
            if holds_captions(raw):
                self._add_captions(raw)
            else:
                self._add_class(raw)
                self._add_caption(raw)
                self._add_picture(raw)
        except BadSample as reason:
            self.skipped[str(reason)] += 1
        self.samples += 1

    def _add_class(self, raw: Raw) -> None:
        if "cls" in raw:
            try:
                self.classes[int(raw["cls"])] += 1
            except ValueError:  # no stream reads it
                self.formats["broken cls"] += 1

    def _add_caption(self, raw: Raw) -> None:
        optional = "cls" in raw or "ids.npy" in raw
        required = not optional if self.captioned is None else self.captioned
        if caption := read_caption(raw, required=required):
            self._count_words(caption)

    def _add_captions(self, raw: Raw) -> None:
        captions = caption_names(raw["json"])
        if not captions:
            raise BadSample("no caption")
        self.formats["captions"] += 1
        for caption in captions.values():
            self._count_words(caption)

    def _count_words(self, caption: str) -> None:
        self.captions.append((len(caption.split()), len(caption.encode())))

    def _add_picture(self, raw: Raw) -> None:
        if "ids.npy" in raw:
            self.formats["tokens"] += 1
            return
        data = image_bytes(raw)
        size = self._size(data)
        if math.prod(size) > MAX_PIXELS:
            raise BadSample(TOO_LARGE)
        self.formats[_format(data, next(kind for kind in IMAGE_TYPES if kind in raw))] += 1
        self.sizes.append(size)

    def _size(self, data: bytes) -> tuple[int, int]:
        if self.known is not None and self.samples < len(self.known):
            width, height = self.known[self.samples].tolist()
            return width, height
        with decoding():
            return image_size(data)


def _format(data: bytes, kind: str) -> str:
    """ "png", or "png named jpg": ImageNet has one."""
    starts = {"png": b"\x89PNG", "jpg": b"\xff\xd8", "webp": b"RIFF"}
    named = "jpg" if kind == "jpeg" else kind
    found = next((name for name, start in starts.items() if data.startswith(start)), named)
    return found if found == named else f"{found} named {kind}"


def measure_shard(
    url: str | Path,
    entry: ShardEntry | None = None,
    sizes: np.ndarray | None = None,
    *,
    samples: int | None = None,
    captioned: bool | None = None,
) -> ShardStats:
    """Count what one shard holds; samples that `entry` promises and that cannot be read are lost.

    sizes: (width, height) from sizes.npz, (samples, 2). samples: how many to look at, the first
    ones. Raises OSError where the file cannot be opened.
    """
    tally, check = _Tally(captioned=captioned, sizes=sizes), ShardCheck(name_of(url))
    with open_read(str(url)) as stream:
        size, is_whole = stream.seek(0, io.SEEK_END), True
        stream.seek(0)
        try:
            with open_tar(ShardFile(stream)) as tar:
                rest = tar_samples(tar, check, deep=True)
                for raw in islice(rest, samples):
                    tally.add(raw)
                    advance(1, sum(map(len, raw.values())))
                is_whole = samples is None or next(rest, None) is None
        except Exception as error:  # tarfile raises many kinds for what is no tar
            log.warning("the rest of %s is lost: %s", url, error)
    for reason in ("member twice", "member too large"):
        if check.counts[reason]:
            tally.skipped[reason] += check.counts[reason]
    due = min(entry.samples, samples or entry.samples) if entry else 0
    if due > tally.samples:
        tally.skipped["lost with its shard"] += due - tally.samples
    words, caption_bytes = np.array(tally.captions, np.int32).reshape(-1, 2).T  # (captions,) each
    return ShardStats(
        name=check.name,
        samples=tally.samples,
        is_whole=is_whole,
        size=size,
        sizes=np.array(tally.sizes, np.int32).reshape(-1, 2),
        words=words,
        caption_bytes=caption_bytes,
        formats=tally.formats,
        classes=tally.classes,
        skipped=tally.skipped,
    )


@dataclass
class SplitStats:
    """The shards of one split together; the arrays are those of ShardStats.

    samples: in its shards by the manifest, else by counting; None where neither tells, as only the
    first of each shard were looked at. looked: of those looked at.
    dropped: left out when the shards were built, by reason.
    """

    split: str
    shards: int
    samples: int | None
    looked: int
    bytes: int
    sizes: np.ndarray
    words: np.ndarray
    caption_bytes: np.ndarray
    formats: Counter[str]
    classes: Counter[int]
    skipped: Counter[str]
    dropped: Counter[str]

    @property
    def shorter(self) -> np.ndarray:
        """Shorter edge of each picture in pixels."""
        return self.sizes.min(axis=1)

    @property
    def aspect(self) -> np.ndarray:
        """Width / height of each picture."""
        return self.sizes[:, 0] / self.sizes[:, 1]


def _together(
    split: str,
    shards: Sequence[ShardStats],
    listed: Mapping[str, ShardEntry],
    dropped: Mapping[str, int],
) -> SplitStats:
    shards = sorted(shards, key=lambda shard: shard.name)
    are_known = all(shard.is_whole or shard.name in listed for shard in shards)
    samples = [listed[s.name].samples if s.name in listed else s.samples for s in shards]
    return SplitStats(
        split=split,
        shards=len(shards),
        samples=sum(samples) if are_known else None,
        looked=sum(shard.samples for shard in shards),
        bytes=sum(shard.size for shard in shards),
        sizes=np.concatenate([shard.sizes for shard in shards]),
        words=np.concatenate([shard.words for shard in shards]),
        caption_bytes=np.concatenate([shard.caption_bytes for shard in shards]),
        formats=sum((shard.formats for shard in shards), Counter()),
        classes=sum((shard.classes for shard in shards), Counter()),
        skipped=sum((shard.skipped for shard in shards), Counter()),
        dropped=Counter(dropped),
    )


def quantiles(values: np.ndarray) -> dict[str, float]:
    """Smallest, 5, 25, 50, 75, 95 % and largest; empty for no values."""
    if not len(values):
        return {}
    found = np.percentile(values, list(QUANTILES.values()), method="nearest")
    return dict(zip(QUANTILES, (round(float(value), 3) for value in found), strict=True))


def bin_edges(values: np.ndarray) -> np.ndarray:
    """At most 40 bins of whole width from 0; the largest half percent falls in the last one."""
    top = int(np.percentile(values, TAIL, method="higher")) + 1 if len(values) else 1
    width = -(-top // MAX_BINS)
    return np.arange(0, top + width, width)


def histogram(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """How many fall in each bin; what lies outside counts in the outer ones."""
    inside = np.clip(values, edges[0], np.nextafter(edges[-1], edges[0]))
    return np.histogram(inside, edges)[0]


@dataclass
class Stats:
    """What was counted in a folder, split by split."""

    folder: str
    splits: list[SplitStats]

    def edges(self, what: str) -> np.ndarray:
        """The bins that all splits share, of "shorter", "aspect", "words" or "caption_bytes"."""
        if what == "aspect":
            return ASPECT_EDGES
        return bin_edges(np.concatenate([getattr(split, what) for split in self.splits]))

    def summary(self) -> dict[str, Any]:
        """Plain numbers, as stats.json holds them."""
        edges = {what: self.edges(what) for what in HISTOGRAMS}
        return {
            "folder": self.folder,
            "splits": {split.split: _summary(split, edges) for split in self.splits},
        }


def _summary(split: SplitStats, edges: Mapping[str, np.ndarray]) -> dict[str, Any]:
    numbers: dict[str, Any] = {
        name: getattr(split, name) for name in ("shards", "samples", "looked", "bytes")
    }
    measured = {"width": split.sizes[:, 0], "height": split.sizes[:, 1]}
    measured |= {what: getattr(split, what) for what in HISTOGRAMS}
    numbers["quantiles"] = {name: quantiles(values) for name, values in measured.items()}
    numbers["histograms"] = {
        what: {
            "edges": np.round(edges[what], 4).tolist(),
            "counts": histogram(measured[what], edges[what]).tolist(),
        }
        for what in HISTOGRAMS
    }
    for name in ("formats", "dropped", "skipped"):
        numbers[name] = dict(getattr(split, name).most_common())
    if split.classes:
        per_class = np.array(list(split.classes.values()))
        numbers["classes"] = {"number": len(per_class), "samples": quantiles(per_class)}
    return numbers


def collect(
    folder: str | Path,
    *,
    samples: int | None = None,
    captioned: bool | None = None,
    processes: int | None = None,
    tick: Tick = quiet,
) -> Stats:
    """Count what a folder of shards holds, local or remote.

    samples: look at so many of each shard, the first ones; None is all of them. captioned: whether
    a sample without words is one that a stream would skip; None: unless it has a class or tokens.
    processes: as for `over_processes`. tick: is told now and then how many samples and bytes have
    been looked at.
    Raises FileNotFoundError for a folder without shards, ValueError for samples below 1.
    """
    if samples is not None and samples < 1:
        raise ValueError(f"samples is {samples}; it must be at least 1")
    urls = shard_urls(folder)
    if not urls:
        raise FileNotFoundError(f"no shard (*.tar) in {folder}")
    listed, sizes = read_manifest(folder), read_sizes(folder)
    built = read_facts(folder).get("splits", {})
    tasks = [(url, listed.get(name_of(url)), sizes.get(name_of(url))) for url in urls]
    wanted = wants_captions(folder, captioned)
    measure = partial(measure_shard, samples=samples, captioned=wanted)
    by_split: dict[str, list[ShardStats]] = {}
    splits = splits_of(folder)
    for shard in over_processes(measure, tasks, processes, tick):
        by_split.setdefault(splits[shard.name], []).append(shard)
    together = [
        _together(split, by_split[split], listed, built.get(split, {}).get("dropped", {}))
        for split in sorted(by_split)
    ]
    return Stats(str(folder), together)
