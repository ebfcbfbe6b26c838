"""Tar shards: written whole or not at all, and listed in a manifest.

A shard holds samples `{"__key__": "3d/red-apple", "webp": bytes, "txt": bytes}` as members named
`<key>.<type>`; the types are those of `members.py`.
"""

import hashlib
import io
import json
import re
import tarfile
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from dcar.data.members import MEMBER_TYPES, check_key
from dcar.data.storage import exists, join, name_of, read_bytes, write_atomically
from dcar.errors import DataError

MANIFEST, SIZES = "manifest.json", "sizes.npz"
WORK = ".build"  # folder in an output folder: what only an unfinished build needs
RECORDS = ".progress"  # the same of predictions
BEGUN = "begun"  # in it: shards of this folder may lack a record, and are made again


@dataclass(frozen=True)
class ShardEntry:
    """What the manifest says of one shard."""

    name: str
    samples: int
    bytes: int
    sha256: str


class _Hashed:
    """A file opened for writing that counts and hashes what goes through it."""

    def __init__(self, file: BinaryIO):
        self.file, self.size, self.digest = file, 0, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self.size += len(data)
        return self.file.write(data)

    def tell(self) -> int:
        return self.size


class ShardWriter:
    """One shard, as a context manager: it appears under its name when the block ends well.

    The bytes depend on the samples alone (no times, no users). url: a local path or an fsspec URL.
    samples, size: written so far, size in bytes. entry: for the manifest, after the block.
    """

    def __init__(self, url: str | Path):
        self.url = str(url)
        self.samples = 0
        self.entry: ShardEntry
        self._keys: set[str] = set()

    @property
    def size(self) -> int:
        return self._file.size

    def __enter__(self) -> "ShardWriter":
        with ExitStack() as stack:
            self._file = _Hashed(stack.enter_context(write_atomically(self.url)))
            file: Any = self._file  # as much of a file as tarfile asks for
            self._tar = tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT)
            stack.push(self._end)
            self._stack = stack.pop_all()
        return self

    def write(self, sample: Mapping[str, bytes | str]) -> None:
        """Raises ValueError for a key or a member type that no reader would accept."""
        key = str(sample["__key__"])
        check_key(key)
        if key in self._keys:
            raise ValueError(f"key {key!r} is written twice to {self.url}")
        for kind, data in sample.items():
            if kind != "__key__":
                self._add(key, kind, data)
        self._keys.add(key)
        self.samples += 1

    def _add(self, key: str, kind: str, data: bytes | str) -> None:
        if kind not in MEMBER_TYPES or not isinstance(data, bytes):
            raise ValueError(f"{key}: member {kind!r} is not bytes of one of {MEMBER_TYPES}")
        info = tarfile.TarInfo(f"{key}.{kind}")  # mtime, uid, gid 0; no user name
        info.size = len(data)
        self._tar.addfile(info, io.BytesIO(data))
        self._tar.members.clear()  # type: ignore[attr-defined]  # it would keep every header

    def _end(self, kind: type[BaseException] | None, *_: object) -> None:
        """The archive's last blocks, where nothing went wrong; what fails here is cleaned up."""
        if kind is None:
            self._tar.close()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.__exit__(kind, error, trace)
        digest = self._file.digest.hexdigest()
        self.entry = ShardEntry(name_of(self.url), self.samples, self._file.size, digest)


def write_shards(
    samples: Iterable[Mapping[str, bytes | str]],
    folder: str | Path,
    prefix: str,
    samples_per_shard: int,
) -> list[ShardEntry]:
    """Write `<prefix>-000000.tar`, ... and return their manifest entries.

    Raises ValueError for a key or a member type that no reader would accept.
    """
    if samples_per_shard < 1:
        raise ValueError(f"samples_per_shard is {samples_per_shard}; it must be at least 1")
    remaining = iter(samples)
    entries: list[ShardEntry] = []
    while (first := next(remaining, None)) is not None:
        with ShardWriter(join(folder, f"{prefix}-{len(entries):06d}.tar")) as writer:
            writer.write(first)
            for sample in islice(remaining, samples_per_shard - 1):
                writer.write(sample)
        entries.append(writer.entry)
    return entries


def write_manifest(
    folder: str | Path,
    shards: Mapping[str, list[ShardEntry]],
    *,
    sizes: Mapping[str, np.ndarray] | None = None,
    **facts: object,
) -> None:
    """`manifest.json` of a folder: shards by split, and any facts about how they were made.

    sizes: shard name -> (width, height) of its pictures in pixels, uint16 (samples, 2); they go to
    `sizes.npz` and let a stream sort pictures by shape without opening them.
    """
    if sizes is not None:
        with write_atomically(join(folder, SIZES)) as file:
            named: dict[str, Any] = {name: sizes[name] for name in sorted(sizes)}
            np.savez_compressed(file, **named)
    listed = [{"split": split, **asdict(entry)} for split in shards for entry in shards[split]]
    text = json.dumps({"shards": listed, **facts}, indent=1, sort_keys=True) + "\n"
    with write_atomically(join(folder, MANIFEST)) as file:
        file.write(text.encode())


def _manifest(folder: str | Path) -> dict[str, Any]:
    url = join(folder, MANIFEST)
    if not exists(url):
        return {"shards": []}
    try:
        manifest = json.loads(read_bytes(url))
        return {**manifest, "shards": list(manifest["shards"])}
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{url} is no manifest: {error!r}") from error


def is_unfinished(folder: str) -> bool:
    """Whether a build or predictions have begun to write there: no manifest yet."""
    marks = (WORK, f"{RECORDS}/{BEGUN}")
    return not exists(join(folder, MANIFEST)) and any(exists(join(folder, m)) for m in marks)


def read_manifest(folder: str | Path) -> dict[str, ShardEntry]:
    """Shard file name -> entry; empty without a manifest. Raises DataError if broken."""
    fields = ("name", "samples", "bytes", "sha256")
    try:
        shards = _manifest(folder)["shards"]
        return {shard["name"]: ShardEntry(*(shard[field] for field in fields)) for shard in shards}
    except (KeyError, TypeError) as error:
        raise DataError(f"{join(folder, MANIFEST)} is no manifest: {error!r}") from error


def split_of(name: str) -> str:
    """The split a shard's name tells, which is all before its number: "all" of `00012.tar`."""
    return re.sub(r"[-_.]?\d*$", "", name.removesuffix(".tar")) or "all"


def read_splits(folder: str | Path) -> dict[str, str]:
    """Shard file name -> split: the manifest's word, else what the name tells.

    Empty without a manifest. Raises DataError if broken.
    """
    try:
        shards = _manifest(folder)["shards"]
        return {
            shard["name"]: str(shard.get("split") or split_of(shard["name"])) for shard in shards
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{join(folder, MANIFEST)} is no manifest: {error!r}") from error


def read_facts(folder: str | Path) -> dict[str, Any]:
    """What a manifest says besides its shards; empty without one. Raises DataError if broken."""
    return {name: fact for name, fact in _manifest(folder).items() if name != "shards"}


def read_sizes(folder: str | Path) -> dict[str, np.ndarray]:
    """Shard file name -> (width, height) of its pictures, uint16 (samples, 2); empty without.

    Raises DataError where the file is damaged.
    """
    url = join(folder, SIZES)
    if not exists(url):
        return {}
    try:
        with np.load(io.BytesIO(read_bytes(url)), allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    except Exception as error:  # a damaged archive may raise anything
        raise DataError(f"{url} holds no sizes: {error!r}") from error
