"""Everything that is wrong with one shard, found in one pass and in bounded memory.

Against the manifest: size, sha256, samples. In the tar: where it breaks off, what no file takes.
In the samples (`deep`): what a training stream would skip, under the stream's own reasons.
"""

import hashlib
import json
import tarfile
import warnings
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from dcar.data.distributors import advance
from dcar.data.images import read_pixels
from dcar.data.members import MAX_MEMBER_BYTES, BadSample, Raw, split_name
from dcar.data.samples import decoding, image_bytes, read_caption, read_tokens
from dcar.data.shards import ShardEntry
from dcar.data.storage import name_of, open_read
from dcar.data.tar_header import StrictHeader
from dcar.errors import DataError

LISTED = 100  # problems of one reason listed for a shard; the others are counted
END_OF_TAR = 1024  # zero bytes that end an archive
_CHUNK = 2**16  # bytes; tarfile copies what is left of a chunk at every read


def printable(text: str) -> str:
    """Names come from strangers: no line breaks, terminal codes or halves of characters."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong. key: of the sample or name of the member, "" for the shard itself.

    Problems of one `reason` are counted together; `detail` is what differs between them.
    """

    shard: str
    reason: str
    key: str = ""
    detail: str = ""

    def __str__(self) -> str:
        line = ": ".join(part for part in (self.shard, self.key, self.reason) if part)
        return printable(f"{line} ({self.detail})" if self.detail else line)


@dataclass
class ShardCheck:
    """What was found in one shard. counts: problems by reason, also those beyond `LISTED`.

    keys: a hash of every sample's key, uint64 (samples,).
    """

    name: str
    samples: int = 0
    size: int = 0
    sha256: str = ""
    counts: Counter[str] = field(default_factory=Counter)
    problems: list[Problem] = field(default_factory=list)
    keys: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))

    def add(self, reason: str, key: str = "", detail: str = "") -> None:
        self.counts[reason] += 1
        if self.counts[reason] <= LISTED:
            self.problems.append(Problem(self.name, reason, key, detail))


class ShardFile:
    """A file read once, front to end: how much, its sha256, where its last non-zero byte is."""

    def __init__(self, stream: BinaryIO):
        self.stream, self.digest = stream, hashlib.sha256()
        self.size, self.content, self.head, self.ended = 0, 0, b"", False

    def read(self, size: int) -> bytes:
        """Empty at the end, once: tarfile would ask on for as long as a header makes it believe."""
        data = self.stream.read(size)
        if not data and self.ended:
            raise tarfile.ReadError("unexpected end of data")
        self.ended = not data
        self.digest.update(data)
        self.head = self.head or data[:40]
        if body := data.rstrip(b"\0"):
            self.content = self.size + len(body)
        self.size += len(data)
        return data

    def drain(self) -> None:
        while not self.ended:
            self.read(_CHUNK)


def open_tar(file: ShardFile) -> tarfile.TarFile:
    """For reading front to end."""
    return tarfile.open(fileobj=cast(Any, file), mode="r|", bufsize=_CHUNK, tarinfo=StrictHeader)


def _objection(info: tarfile.TarInfo) -> str:
    """Why this member should not be there; "" for an ordinary one."""
    faults = {
        "absolute name": info.name.startswith("/"),
        "name leads out of the folder": ".." in info.name.split("/"),
        "link": info.issym() or info.islnk(),
        "device": info.isdev(),
        "sparse file": info.issparse(),
        "unknown member type": split_name(info.name) is None,
        "member too large": info.size > MAX_MEMBER_BYTES,
    }
    return next((reason for reason, is_so in faults.items() if is_so), "")


def tar_samples(tar: tarfile.TarFile, check: ShardCheck, *, deep: bool) -> Iterator[Raw]:
    """Neighbouring members of one key, as files group them; without `deep` their types alone."""
    sample: Raw = {}
    while (info := tar.next()) is not None:
        tar.members.clear()  # type: ignore[attr-defined]  # it would keep a million headers
        if info.isdir():
            continue
        named = split_name(info.name)
        if (reason := _objection(info)) or named is None:
            check.add(reason, info.name)
            continue
        key, kind = named
        if sample and key != sample["__key__"]:
            yield sample
            sample = {}
        sample.setdefault("__key__", key)
        if kind in sample:
            check.add("member twice", info.name)
            continue
        file = tar.extractfile(info) if deep else None
        sample[kind] = file.read() if file else b""
    if sample:
        yield sample


def holds_captions(raw: Raw) -> bool:
    """Whether this is a sample of a caption shard: further words for a picture elsewhere."""
    return set(raw) == {"__key__", "json"} and b'"captions"' in _bytes(raw["json"])


def sample_problems(
    raw: Raw, *, captioned: bool | None = None, size: tuple[int, int] | None = None
) -> list[str]:
    """Every reason for which a stream would skip this sample, and a class or json that cannot be
    read, of which streams need none; empty when all is good.

    captioned: whether words are required; None: unless the sample has a class or tokens.
    size: (width, height) in pixels that sizes.npz promises.
    """
    tokens = "ids.npy" in raw
    required = not (tokens or "cls" in raw) if captioned is None else captioned
    looks: list[Callable[[Raw], object]] = [
        partial(_parse, kind="json", parse=json.loads),
        partial(_parse, kind="cls", parse=int),
        partial(read_caption, required=required),
        read_tokens if tokens else partial(_open_image, promised=size),
    ]
    if holds_captions(raw):
        looks = [_read_captions]
    reasons = []
    for look in looks:
        try:
            look(raw)
        except BadSample as error:
            reasons.append(str(error))
        except RecursionError:  # json in json in json
            reasons.append("broken json")
    return list(dict.fromkeys(reasons))


def _bytes(data: bytes | str) -> bytes:
    return data if isinstance(data, bytes) else data.encode()


def _read_captions(raw: Raw) -> None:
    """`{"captions": {name: words}}`, as data/caption writes them."""
    _parse(raw, "json", json.loads)
    described = json.loads(raw["json"])
    captions = described.get("captions") if isinstance(described, dict) else None
    if not isinstance(captions, dict) or not captions:
        raise BadSample("no caption")
    for words in captions.values():
        read_caption({"txt": _bytes(words) if isinstance(words, str) else b""}, required=True)


def _parse(raw: Raw, kind: str, parse: Callable[[Any], object]) -> None:
    try:
        if kind in raw:
            parse(raw[kind])
    except (ValueError, RecursionError) as error:
        raise BadSample(f"broken {kind}") from error


def _open_image(raw: Raw, *, promised: tuple[int, int] | None) -> None:
    image = image_bytes(raw)
    # warnings: of odd metadata, which nobody reads
    with decoding(), warnings.catch_warnings(action="ignore"):
        height, width, _ = read_pixels(image).shape
    if promised is not None and (width, height) != promised:
        raise BadSample("size is not that of sizes.npz")


def check_shard(
    url: str | Path,
    entry: ShardEntry | None = None,
    sizes: np.ndarray | None = None,
    *,
    deep: bool = True,
    captioned: bool | None = None,
) -> ShardCheck:
    """Look at one shard by itself and, where `entry` is given, against the manifest's word.

    sizes: (width, height) of its pictures as sizes.npz has them, (samples, 2).
    Whatever is in the file becomes a problem of the result; nothing is raised for it.
    """
    check = ShardCheck(name_of(url))
    try:
        with open_read(str(url)) as stream:
            file = ShardFile(stream)
            _look_inside(file, check, deep=deep, captioned=captioned, sizes=sizes)
    except (OSError, DataError) as error:
        check.add("cannot be read", detail=str(error))
        return check
    check.size, check.sha256 = file.size, file.digest.hexdigest()
    if entry is not None:
        _compare(check, entry)
    return check


def _look_inside(
    file: ShardFile,
    check: ShardCheck,
    *,
    deep: bool,
    captioned: bool | None,
    sizes: np.ndarray | None,
) -> None:
    keys, last, fault, tar = array("Q"), "", "", None
    promised = iter(() if sizes is None else map(tuple, sizes.tolist()))
    try:
        with open_tar(file) as tar:
            for sample in tar_samples(tar, check, deep=deep):
                last, size = str(sample["__key__"]), next(promised, None)
                keys.append(_hash(last))
                if deep:
                    for reason in sample_problems(sample, captioned=captioned, size=size):
                        check.add(reason, last)
                advance(1, sum(map(len, sample.values())))
    except Exception as error:  # tarfile raises many kinds for what is no tar
        fault = f"{error or type(error).__name__}{last and f', after {last}'}"
    file.drain()
    check.samples, check.keys = len(keys), np.frombuffer(keys.tobytes(), np.uint64)
    if sizes is not None and len(sizes) != len(keys):
        check.add("samples are not those of sizes.npz", detail=f"{len(keys)}, not {len(sizes)}")
    end = None if tar is None else tar.offset
    _judge_end(file, check, end=end, fault=fault)


def _judge_end(file: ShardFile, check: ShardCheck, *, end: int | None, fault: str) -> None:
    """end: where tarfile stopped, None if it never started. It takes a damaged header for the end
    of the archive and says nothing; the true end is zeros and nothing but zeros."""
    if file.size == 0:
        check.add("empty file")
    elif end is None:
        check.add("no tar", detail=f"it begins with {file.head!r}")
    elif fault or file.content > end:
        check.add("breaks off", detail=fault or f"no header at byte {end}")
    elif file.size - end < END_OF_TAR:
        check.add("breaks off", detail="the end of the archive is missing")
    elif check.samples == 0:
        check.add("no samples")


def _compare(check: ShardCheck, entry: ShardEntry) -> None:
    if check.size != entry.bytes:
        check.add("size is not the manifest's", detail=f"{check.size} bytes, not {entry.bytes}")
    elif check.sha256 != entry.sha256:
        check.add("sha256 is not the manifest's", detail=f"{check.sha256}, not {entry.sha256}")
    if check.samples != entry.samples:
        detail = f"{check.samples}, not {entry.samples}"
        check.add("samples are not the manifest's", detail=detail)


def _hash(key: str) -> int:
    data = key.encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest())
