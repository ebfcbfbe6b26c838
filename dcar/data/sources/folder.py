"""A folder of anybody's pictures, at any depth, with captions beside them or in one table."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import islice, starmap
from posixpath import normpath
from typing import Any, NamedTuple

from dcar.data.members import IMAGE_TYPES
from dcar.data.sources.archives import read_picture
from dcar.data.sources.caption_tables import Row, read_table
from dcar.data.sources.ranges import ranges
from dcar.data.sources.source import Record, Unit
from dcar.data.storage import exists, join, list_files, open_read, read_bytes, write_atomically
from dcar.data.stores import is_remote

SPLITS = ("train", "val")
OTHER_TYPES = ("avif", "bmp", "gif", "heic", "jp2", "jxl", "tif", "tiff")
OTHER_TYPE, OUTSIDE = "not a JPEG, PNG or WebP", "outside the folder"
NO_IMAGE, TOO_LARGE, BROKEN_JSON = "no image", "file too large", "broken json"
READERS, READ_AT_ONCE = 16, 1024  # threads that read captions; captions


class Found(NamedTuple):
    """A picture of the folder. place: its path below it. dropped: why it is left out."""

    place: str
    caption: str | None
    dropped: str | None = None


def key_of(place: str) -> str:
    """The path without its suffix, as a key of a shard: no dot in the last part, no `..`."""
    parts = [part for part in place.split("/") if part not in ("", ".", "..")]
    stem = parts[-1].rpartition(".")[0] or parts[-1]
    key = "/".join([*parts[:-1], stem.replace(".", "_")])
    return key.encode(errors="replace").decode()  # a name that is not UTF-8


def fraction(words: str) -> float:
    """A number in [0, 1) that depends on nothing but the words."""
    digest = hashlib.blake2b(words.encode(errors="surrogateescape"), digest_size=6).digest()
    return int.from_bytes(digest) / 2**48


def suffix_of(place: str) -> str:
    return place.rpartition(".")[2].lower()


class _Keys:
    """Gives each of several pictures with one key a key of its own: `a`, `a-2`, `a-3`."""

    def __init__(self) -> None:
        self._taken: set[bytes] = set()  # digests, as there may be millions

    def take(self, key: str) -> str:
        number, taken = 1, key
        while (digest := hashlib.blake2b(taken.encode(), digest_size=8).digest()) in self._taken:
            number += 1
            taken = f"{key}-{number}"
        self._taken.add(digest)
        return taken


class Folder:
    """JPEG, PNG and WebP files below a folder; a key is the path without its suffix.

    captioned: false takes pictures without words. captions: a table (CSV, TSV, JSON lines,
    parquet) with the columns `image_column` (paths below the folder) and `caption_column`; a path
    of its own or one in the folder. Without it, the words are in `<name>.txt` or, under
    "caption", in `<name>.json` beside `<name>.jpg`.
    val_share: of the captions (of the keys, where there are none) that make the split `val`;
        pictures below `train/` and `val/` are of these splits instead. A caption is never in both,
        but for those of pictures that a table lists several times: they are shared out by picture.
    Raises FileNotFoundError naming what is missing, DataError naming a table that is damaged.
    """

    def __init__(
        self,
        path: str,
        *,
        captioned: bool = True,
        captions: str | None = None,
        image_column: str = "image",
        caption_column: str = "caption",
        val_share: float = 0.01,
    ):
        if isinstance(val_share, str) or not 0 <= val_share < 1:
            raise ValueError(f"val_share is {val_share}; it must be in [0, 1)")
        if captions is not None and not captioned:
            raise ValueError(f"captions={captions} is of no use with captioned=false")
        self.path, self.captioned, self.captions = path, captioned, captions
        self.columns = {"image_column": image_column, "caption_column": caption_column}
        self.val_share = val_share
        self._index = ""

    def prepare(self, work: str) -> None:
        """Write a list of all pictures with their keys and captions, one for each split."""
        self._index = join(work, "folder")
        if exists(f"{self._index}.json"):
            return
        counts, keys = dict.fromkeys(SPLITS, 0), {split: _Keys() for split in SPLITS}
        repeated = self._repeated()
        with ExitStack() as stack:
            files = {s: stack.enter_context(write_atomically(self._list(s))) for s in SPLITS}
            for found in self._pictures():
                split, below = self._split(found, by_picture=found.place in repeated)
                row = {**found._asdict(), "key": keys[split].take(key_of(below))}
                files[split].write(json.dumps(row).encode() + b"\n")
                counts[split] += 1
        if not any(counts.values()):
            raise FileNotFoundError(f"no pictures below {self.path}")
        with write_atomically(f"{self._index}.json") as file:
            file.write(json.dumps(counts).encode())

    def _list(self, split: str) -> str:
        return f"{self._index}-{split}.jsonl"

    def _split(self, found: Found, *, by_picture: bool) -> tuple[str, str]:
        """The split of a picture, and its path below the folder of the split."""
        first, _, below = found.place.partition("/")
        if first in SPLITS and below:
            return first, below
        words = "" if by_picture else (found.caption or "").strip()
        words = words or key_of(found.place)
        return SPLITS[fraction(words) < self.val_share], found.place

    def _repeated(self) -> set[str]:
        """Pictures that the table lists several times."""
        if self.captions is None:
            return set()
        counts = Counter(place for place, _ in self._rows())
        return {place for place, times in counts.items() if times > 1}

    def _rows(self) -> Iterator[Row]:
        """Of the table; paths in the form that the folder's files have, where they lie in it."""
        assert self.captions is not None
        start = join(self.path, "x")[:-1]
        for place, caption in read_table(self._table(self.captions), **self.columns):
            whole = place.startswith("/") or is_remote(place)
            yield normpath(place.removeprefix(start) if whole else place), caption

    def _pictures(self) -> Iterator[Found]:
        if self.captions is not None:
            yield from starmap(_checked, self._rows())
            return
        places = self._places()
        pictures = iter(p for p in places if suffix_of(p) in (*IMAGE_TYPES, *OTHER_TYPES))
        names = set(places) if self.captioned else set()
        with ThreadPoolExecutor(READERS) as executor:  # captions of a store take their time
            while block := list(islice(pictures, READ_AT_ONCE)):
                yield from executor.map(lambda place: self._found(place, names), block)

    def _table(self, captions: str) -> str:
        inside = join(self.path, captions)
        for url in (captions, inside):
            if exists(url):
                return url
        raise FileNotFoundError(f"captions={captions}: no such file, nor {inside}")

    def _places(self) -> list[str]:
        """Paths of all files below the folder, sorted; hidden ones and folders are left out."""
        start = join(self.path, "x")[:-1]
        places = [url.removeprefix(start) for url in list_files(self.path)]
        return [place for place in places if "/." not in f"/{place}"]

    def _found(self, place: str, names: set[str]) -> Found:
        """With the words of the file beside it, where there is one among `names`."""
        stem = place.rpartition(".")[0]
        if f"{stem}.txt" in names:
            text = read_bytes(join(self.path, f"{stem}.txt"))
            return _checked(place, text.decode("utf-8-sig", "surrogateescape"))
        if f"{stem}.json" in names:
            try:
                described = json.loads(read_bytes(join(self.path, f"{stem}.json")))
            except (ValueError, RecursionError):
                return Found(place, None, BROKEN_JSON)
            words = described.get("caption") if isinstance(described, dict) else None
            return _checked(place, words if isinstance(words, str) else None)
        return _checked(place, None)

    def units(self, samples_per_shard: int) -> list[Unit]:
        """Runs of the pictures, by path or in the order of the table."""
        counts: dict[str, int] = json.loads(read_bytes(f"{self._index}.json"))
        found = []
        for split, total in counts.items():
            pieces = ranges(total, samples_per_shard)
            places = _line_starts(self._list(split), [first for first, _ in pieces])
            for number, ((first, stop), place) in enumerate(zip(pieces, places, strict=True)):
                found.append(Unit(split, number, stop - first, [self._list(split), place]))
        return found

    def read(self, unit: Unit) -> Iterator[Record]:
        url, start = unit.reference
        with open_read(url) as file:
            file.seek(start)
            for line in islice(file, unit.samples):
                yield self._record(json.loads(line))

    def _record(self, row: dict[str, Any]) -> Record:
        image, dropped = None, row["dropped"]
        if dropped is None:
            try:
                image = read_picture(join(self.path, row["place"]))
                dropped = TOO_LARGE if image is None else None
            except FileNotFoundError:
                dropped = NO_IMAGE
        facts = {"id": row["key"], "path": row["place"]}
        return Record(row["key"], image or b"", row["caption"], facts=facts, dropped=dropped)


def _checked(place: str, caption: str | None) -> Found:
    if place.startswith(("/", "../")):
        return Found(place, caption, OUTSIDE)
    return Found(place, caption, None if suffix_of(place) in IMAGE_TYPES else OTHER_TYPE)


def _line_starts(url: str, numbers: Iterable[int]) -> list[int]:
    """Where the lines with these numbers, in ascending order, start in a file."""
    wanted, starts, place = set(numbers), [], 0
    with open_read(url) as file:
        for number, line in enumerate(file):
            if number in wanted:
                starts.append(place)
            place += len(line)
    return starts
