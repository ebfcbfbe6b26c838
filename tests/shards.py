"""Small shards that tests share, and streams over them."""

import io
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from dcar.data.batches import Batch
from dcar.data.loader import ShardLoader
from dcar.data.shard_set import ShardSet
from dcar.data.shards import write_manifest, write_shards
from dcar.data.stream import ShardStream
from dcar.data.transforms import ImageTransform

UNEVEN = (13, 7, 10, 9)  # samples per shard


def row(key: str, width: int = 12, height: int = 8) -> dict[str, bytes | str]:
    """One sample; its picture and its words are functions of the key."""
    buffer = io.BytesIO()
    shade = 37 * int(key[1:]) % 256
    image = Image.new("RGB", (width, height), (shade, 0, 0))
    image.paste((0, shade, 255), (3, 0, 7, height))
    image.save(buffer, "PNG")
    return {"__key__": key, "png": buffer.getvalue(), "txt": f"picture {key}".encode()}


def build(
    folder: Path,
    sizes: tuple[int, ...] = UNEVEN,
    bad: Mapping[str, Mapping[str, bytes]] | None = None,
) -> Path:
    """Shards s0-000000.tar, s1-... of keys k0000, k0001, ...; `bad` replaces members of a key."""
    entries, start = [], 0
    for shard, size in enumerate(sizes):
        rows = [row(f"k{number:04d}") for number in range(start, start + size)]
        changed = [{**each, **(bad or {}).get(str(each["__key__"]), {})} for each in rows]
        rows = [{kind: data for kind, data in each.items() if data} for each in changed]
        entries += write_shards(rows, folder, f"s{shard}", size)
        start += size
    write_manifest(folder, {"train": entries})
    return folder


def stream(data: Path | ShardSet | None, **settings: Any) -> ShardStream:
    transform = ImageTransform(8, crop="random", flip=True)
    base = {"transform": transform, "batch_size": 3, "seed": 7, "shuffle": True, "buffer": 8}
    urls = data / "s*.tar" if isinstance(data, Path) else data
    return ShardStream(urls, **{**base, **settings})


def keys(batches: Iterable[Batch]) -> list[str]:
    return [key for batch in batches for key in batch["key"]]


def same(one: Batch, two: Batch) -> bool:
    """Whether two batches hold the same samples, crops and words."""
    words = one["key"] == two["key"] and one["caption"] == two["caption"]
    return words and torch.equal(one["image"], two["image"])


def everything(sizes: tuple[int, ...] = UNEVEN) -> list[str]:
    return [f"k{number:04d}" for number in range(sum(sizes))]


def loader_of(folder: Path, workers: int = 0, **options) -> ShardLoader:
    return ShardLoader(stream(folder, **options), num_workers=workers)


def take(loader: ShardLoader, count: int) -> list[Batch]:
    """The next batches, over the ends of epochs, as a trainer that is stopped would take them."""
    taken: list[Batch] = []
    while len(taken) < count:
        taken += islice(iter(loader), count - len(taken))
    return taken


def other(folder: Path, count: int = 8) -> Path:
    """A second data set: keys from k1000 on."""
    rows = [row(f"k{number}") for number in range(1000, 1000 + count)]
    write_manifest(folder, {"train": write_shards(rows, folder, "t", 5)})
    return folder
