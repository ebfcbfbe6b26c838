"""One unit of a source to finished shards: the task that a build gives to its workers.

What a unit came to is kept as `parts/<split>-<number>.json`, written once its shards are in place;
with near-duplicates, `scans/<split>-<number>.json` comes first.
"""

import hashlib
import json
import traceback
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any, TypeVar

from PIL import Image

from dcar.data.distributors import Outcome, advance
from dcar.data.duplicates import perceptual_hash
from dcar.data.filters import DUPLICATE_KEY, Filters, Picture
from dcar.data.members import BadSample, check_key
from dcar.data.shards import WORK, ShardEntry, ShardWriter
from dcar.data.sources.source import Record, Source, Unit
from dcar.data.storage import join, name_of, read_bytes, write_atomically
from dcar.errors import DataError

HASHED_EDGE = 32  # pixels; all that the hash looks at
BAD_KEY = "bad key"
SHOWN = 3  # samples left out for a reason that are told by name
T = TypeVar("T")


@dataclass(frozen=True)
class BuildTask:
    """What a worker needs besides the unit; plain data, as it travels to other machines.

    out: folder of the shards. prefix: of their names. Units are cut into shards of about
    `max_shard_bytes`, those of unknown length also into shards of `samples_per_shard`.
    """

    source: Source
    out: str
    prefix: str
    samples_per_shard: int
    max_shard_bytes: int
    filters: Filters

    def __post_init__(self) -> None:
        for name in ("samples_per_shard", "max_shard_bytes"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name}={value}; it must be at least 1")

    @property
    def work(self) -> str:
        """Folder of what is needed until the build is finished."""
        return join(self.out, WORK)


@dataclass
class Part:
    """What became of a unit.

    shards: those written. sizes: width, height, width, ... of the samples of each shard. dropped:
    samples left out, by reason; examples: keys of the first of them. positions: of the kept ones
    among the unit's records; digests, hashes: of their keys and (scans only) of their pictures, 64
    bits each.
    """

    shards: list[ShardEntry] = field(default_factory=list)
    sizes: "list[array[int]]" = field(default_factory=list)
    dropped: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)
    positions: "array[int]" = field(default_factory=lambda: array("I"))
    digests: "array[int]" = field(default_factory=lambda: array("Q"))
    hashes: "array[int]" = field(default_factory=lambda: array("Q"))

    def save(self, url: str) -> None:
        stored = {
            "shards": [asdict(shard) for shard in self.shards],
            "sizes": [sizes.tolist() for sizes in self.sizes],
            "dropped": self.dropped,
            "examples": self.examples,
            "positions": self.positions.tolist(),
            "digests": self.digests.tolist(),
            "hashes": self.hashes.tolist(),
        }
        with write_atomically(url) as file:
            file.write(json.dumps(stored).encode())

    @classmethod
    def load(cls, url: str) -> "Part":
        stored = json.loads(read_bytes(url))
        return cls(
            [ShardEntry(**shard) for shard in stored["shards"]],
            [array("H", sizes) for sizes in stored["sizes"]],
            stored["dropped"],
            stored.get("examples", {}),  # older ones have none
            *(array(kind, stored[name]) for name, kind in _ARRAYS.items()),
        )


_ARRAYS = {"positions": "I", "digests": "Q", "hashes": "Q"}


def unit_name(unit: Unit) -> str:
    return f"{unit.split}-{unit.number:06d}"


def part_url(work: str, unit: Unit) -> str:
    return join(work, f"parts/{unit_name(unit)}.json")


def scan_url(work: str, unit: Unit) -> str:
    return join(work, f"scans/{unit_name(unit)}.json")


def key_digest(key: str) -> int:
    """64 bits: a chance of one in a million that two of five million keys are taken for one."""
    return int.from_bytes(hashlib.blake2b(key.encode(errors="replace"), digest_size=8).digest())


def count(counts: dict[str, int], reason: str, times: int = 1) -> None:
    counts[reason] = counts.get(reason, 0) + times


def show(examples: dict[str, list[str]], reason: str, keys: Iterable[str]) -> None:
    """Remember keys of samples that are left out, as long as there are few."""
    shown = examples.setdefault(reason, [])
    shown += islice(keys, SHOWN - len(shown))


class UnitReader:
    """The records of a unit that are kept, and the count of those that are not.

    broken: the source could not read the unit to its end.
    """

    def __init__(self, task: BuildTask, unit: Unit, without: Mapping[int, str]):
        self.task, self.unit, self.without = task, unit, without
        self.part = Part()
        self.images = self.bytes = 0
        self.broken = False

    def kept(self, look: Callable[[bytes], T]) -> Iterator[tuple[Record, bytes | None, T]]:
        """(record, its words, what `look` makes of its picture); `look` raises BadSample."""
        seen: set[int] = set()
        for position, record in enumerate(self._records()):
            self.images, self.bytes = self.images + 1, self.bytes + len(record.image)
            advance(1, len(record.image))
            digest = key_digest(record.key)
            try:
                words = self._words(record, self.without.get(position))
                if digest in seen:
                    raise BadSample(DUPLICATE_KEY)
                looked = look(record.image)
            except BadSample as bad:
                count(self.part.dropped, str(bad))
                key = record.key.encode(errors="replace").decode()  # it may be no UTF-8
                show(self.part.examples, str(bad), [key])
                if position in self.without:  # its key stays taken, as when it was left out
                    seen.add(digest)
                continue
            seen.add(digest)
            self.part.positions.append(position)
            self.part.digests.append(digest)
            yield record, words, looked

    def _records(self) -> Iterator[Record]:
        try:
            yield from self.task.source.read(self.unit)
        except (FileNotFoundError, ImportError):
            raise
        except Exception:
            self.broken = True
            raise

    def _words(self, record: Record, without: str | None) -> bytes | None:
        if reason := record.dropped or without:
            raise BadSample(reason)
        try:
            check_key(record.key)
            record.key.encode()
        except ValueError as error:
            raise BadSample(BAD_KEY) from error
        return self.task.filters.caption(record, required=self.task.source.captioned)

    def outcome(self, error: Exception | None = None) -> Outcome:
        told = None if error is None else _told(error)
        return Outcome(unit_name(self.unit), self.images, self.bytes, told, self.broken)


def _told(error: Exception) -> str:
    """One line; with the place in the code for what no source announces."""
    name = type(error).__name__
    if isinstance(error, DataError | OSError):
        return str(error) or name
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{name}: {error} ({name_of(place.filename)}, line {place.lineno})"


class _Shards:
    """Shards of one unit, written one after the other; a context manager as its writers are."""

    def __init__(self, task: BuildTask, unit: Unit, part: Part):
        self.task, self.unit, self.part = task, unit, part
        self.writer: ShardWriter | None = None

    def __enter__(self) -> "_Shards":
        return self

    def __exit__(self, *raised: Any) -> None:
        if self.writer is not None:
            self.writer.__exit__(*raised)
            if raised[0] is None:
                self.part.shards.append(self.writer.entry)
            self.writer = None

    def write(self, sample: Mapping[str, bytes | str], size: tuple[int, int]) -> None:
        if self.writer is not None and self._is_full(self.writer):
            self.__exit__(None, None, None)
        if self.writer is None:
            self.writer = ShardWriter(join(self.task.out, self._name())).__enter__()
            self.part.sizes.append(array("H"))
        self.writer.write(sample)
        self.part.sizes[-1].extend(size)

    def _is_full(self, writer: ShardWriter) -> bool:
        if writer.size >= self.task.max_shard_bytes:
            return True
        return self.unit.samples is None and writer.samples >= self.task.samples_per_shard

    def _name(self) -> str:
        """A unit of known length is one shard as a rule, and only further ones are numbered."""
        count = len(self.part.shards)
        number = f"-{count:03d}" if count or self.unit.samples is None else ""
        return f"{self.task.prefix}-{unit_name(self.unit)}{number}.tar"


def make_sample(record: Record, words: bytes | None, picture: Picture) -> dict[str, bytes | str]:
    """Members of a sample. `json` holds the source's facts and the size of the stored picture."""
    facts = {**record.facts, "width": picture.width, "height": picture.height}
    facts.setdefault("id", record.key)
    sample: dict[str, bytes | str] = {"__key__": record.key, picture.kind: picture.data}
    if words is not None:
        sample["txt"] = words
    text = json.dumps(facts, sort_keys=True, ensure_ascii=False)
    sample["json"] = text.encode(errors="replace")  # a path or URL may be no UTF-8
    if record.label is not None:
        sample["cls"] = str(record.label).encode()
    return sample


def build_unit(task: BuildTask, unit: Unit, without: Mapping[int, str]) -> Outcome:
    """Writes the unit's shards, then its part. without: reasons by position of records left out."""
    reader = UnitReader(task, unit, without)
    try:
        with _Shards(task, unit, reader.part) as shards:
            for record, words, picture in reader.kept(task.filters.picture):
                size = (picture.width, picture.height)
                shards.write(make_sample(record, words, picture), size)
        reader.part.save(part_url(task.work, unit))
    except ImportError:  # fails every unit alike
        raise
    except Exception as error:  # of one unit, which must not end the others
        return reader.outcome(error)
    return reader.outcome()


def scan_unit(task: BuildTask, unit: Unit) -> Outcome:
    """Writes the unit's scan: what `build_unit` would keep, and the hashes of the pictures."""

    def look(data: bytes) -> int:
        task.filters.header(data)
        decoded = task.filters.decoded(data, cover=(HASHED_EDGE, HASHED_EDGE))
        return perceptual_hash(Image.fromarray(decoded.pixels))

    reader = UnitReader(task, unit, {})
    try:
        for _, _, picture_hash in reader.kept(look):
            reader.part.hashes.append(picture_hash)
        reader.part.save(scan_url(task.work, unit))
    except ImportError:
        raise
    except Exception as error:
        return reader.outcome(error)
    return reader.outcome()
