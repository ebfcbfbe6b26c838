"""Tar shards of samples: written whole or not at all, listed in a manifest, read without trust.

A sample is `{"__key__": "3d/red-apple", "webp": bytes, "txt": bytes}`; a member of the tar is
`<key>.<type>`. Only the types below are ever read, and nothing is ever unpickled or executed.
"""

import hashlib
import io
import json
import os
import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from glob import glob, has_magic
from itertools import islice
from pathlib import Path

import webdataset
from webdataset.tariterators import base_plus_ext, group_by_keys, tar_file_expander

IMAGE_TYPES = ("webp", "png", "jpg", "jpeg")
MEMBER_TYPES = (*IMAGE_TYPES, "txt", "json", "cls")
MANIFEST = "manifest.json"

Raw = dict[str, bytes | str]


class DataError(RuntimeError):
    """The data cannot be read as they must be: a shard, a sample, or too many samples."""


@dataclass(frozen=True)
class ShardEntry:
    """What the manifest says of one shard."""

    name: str
    samples: int
    bytes: int
    sha256: str


def write_shards(
    samples: Iterable[Mapping[str, bytes | str]],
    folder: str | Path,
    prefix: str,
    samples_per_shard: int,
) -> list[ShardEntry]:
    """Write `<prefix>-000000.tar`, ... and return their manifest entries.

    The bytes depend on the samples alone (no times, no users). Each shard appears under its name
    only when it is whole. Raises ValueError for a key or a member type that no reader would accept.
    """
    if samples_per_shard < 1:
        raise ValueError(f"samples_per_shard is {samples_per_shard}; it must be at least 1")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    remaining = iter(samples)
    entries: list[ShardEntry] = []
    while group := list(islice(remaining, samples_per_shard)):
        path = folder / f"{prefix}-{len(entries):06d}.tar"
        _write_atomically(path, _tar_bytes(group))
        entries.append(describe(path, len(group)))
    return entries


def _tar_bytes(samples: Sequence[Mapping[str, bytes | str]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for sample in samples:
            key = _checked_key(sample)
            for kind, data in sample.items():
                if kind == "__key__":
                    continue
                if kind not in MEMBER_TYPES or not isinstance(data, bytes):
                    raise ValueError(
                        f"{key}: member {kind!r} is not bytes of one of {MEMBER_TYPES}"
                    )
                info = tarfile.TarInfo(f"{key}.{kind}")  # mtime, uid, gid 0; no user name
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def _checked_key(sample: Mapping[str, bytes | str]) -> str:
    key = str(sample["__key__"])
    parts = key.split("/")
    if "" in parts or "." in parts or ".." in parts or "." in parts[-1]:
        raise ValueError(f"key {key!r}: a relative path without '..' and no dot in its last part")
    return key


def _write_atomically(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def describe(path: Path, samples: int) -> ShardEntry:
    """The manifest entry of a shard on disk that holds `samples` samples."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return ShardEntry(path.name, samples, path.stat().st_size, digest)


def write_manifest(
    folder: str | Path, shards: Mapping[str, list[ShardEntry]], **facts: object
) -> None:
    """`manifest.json` of a folder: shards by split, and any facts about how they were made."""
    listed = [{"split": split, **asdict(entry)} for split in shards for entry in shards[split]]
    text = json.dumps({"shards": listed, **facts}, indent=1, sort_keys=True) + "\n"
    _write_atomically(Path(folder) / MANIFEST, text.encode())


def read_manifest(folder: str | Path) -> dict[str, ShardEntry]:
    """Shard file name -> entry; empty without a manifest. Raises DataError if broken."""
    path = Path(folder) / MANIFEST
    if not path.exists():
        return {}
    try:
        shards = json.loads(path.read_text())["shards"]
        fields = ("name", "samples", "bytes", "sha256")
        return {shard["name"]: ShardEntry(*(shard[field] for field in fields)) for shard in shards}
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is no manifest: {error!r}") from error


def verify(folder: str | Path) -> list[str]:
    """One sentence per shard that is not what the manifest says; empty when all is well.

    Raises FileNotFoundError when the folder has no manifest.
    """
    folder = Path(folder)
    if not (folder / MANIFEST).exists():
        raise FileNotFoundError(f"no {MANIFEST} in {folder}")
    problems = []
    for name, entry in read_manifest(folder).items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{name}: missing")
        elif (found := describe(path, entry.samples)) != entry:
            problems.append(f"{name}: sha256 {found.sha256} is not {entry.sha256}")
        elif (count := sum(1 for _ in read_shard(path))) != entry.samples:
            problems.append(f"{name}: {count} samples, the manifest says {entry.samples}")
    return problems


def _local(url: str) -> str:
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", url):
        raise ValueError(f"{url!r}: shards are read from local files, no URL scheme is accepted")
    return url


def expand(urls: str | Path | Iterable[str | Path]) -> list[Path]:
    """Paths from one or more paths, globs ('*.tar') or brace patterns ('{000000..000003}.tar').

    Raises ValueError for anything but local files (`pipe:` would run a shell) and
    FileNotFoundError naming the pattern that matches nothing.
    """
    listed = [urls] if isinstance(urls, str | Path) else list(urls)
    paths: list[Path] = []
    for url in map(str, listed):
        if re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", url):
            raise ValueError(
                f"{url!r}: shards are read from local files, no URL scheme is accepted"
            )
        for pattern in webdataset.shardlists.expand_urls(url):
            found = sorted(glob(pattern)) if has_magic(pattern) else [pattern]
            missing = [path for path in found if not Path(path).is_file()]
            if missing or not found:
                raise FileNotFoundError(f"no shard at {(missing or [pattern])[0]} (from {url!r})")
            paths.extend(map(Path, found))
    return paths


def read_shard(path: str | Path) -> Iterator[Raw]:
    """Raw samples of one local shard, in order: `__key__` and the bytes of each known member.

    Members of other types, links and devices are passed over. Raises DataError naming the shard
    when the tar breaks off or names one member twice.
    """
    with open(_local(str(path)), "rb") as stream:
        source = [{"url": str(path), "stream": stream}]
        try:
            files = tar_file_expander(source, select_files=_is_known)
            for sample in group_by_keys(files):
                yield {kind: data for kind, data in sample.items() if kind != "__url__"}
        except (tarfile.TarError, ValueError, EOFError, OSError) as error:
            reason = next(iter(error.args), "")
            raise DataError(f"{path}: {type(error).__name__}: {reason}") from error


def _is_known(name: str) -> bool:
    _, kind = base_plus_ext(name)
    return kind is not None and kind.lower() in MEMBER_TYPES


def count_samples(paths: Sequence[Path]) -> list[int]:
    """Samples per shard: the manifest's word beside each shard, else counted by reading it once."""
    manifests = {folder: read_manifest(folder) for folder in {path.parent for path in paths}}
    return [
        manifests[path.parent][path.name].samples
        if path.name in manifests[path.parent]
        else _count(path)
        for path in paths
    ]


def _count(path: Path) -> int:
    count = 0
    try:
        for _ in read_shard(path):
            count += 1
    except DataError:
        pass  # what could be read counts; the stream reports the shard when it gets there
    return count
