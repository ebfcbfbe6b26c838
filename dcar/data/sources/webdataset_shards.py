"""Tar shards that others have written, such as timm's, img2dataset's and 1d-tokenizer's.

Only pictures, `txt`, `json` and `cls` are looked at; nothing is ever unpickled.
"""

import json
import re
from collections.abc import Iterator, Sequence
from itertools import chain, groupby
from typing import Any

from dcar.data.members import IMAGE_TYPES, split_name
from dcar.data.sources.archives import GZIPPED, Member, stream_tar
from dcar.data.sources.source import Record, Unit
from dcar.data.storage import expand, join, list_files, name_of
from dcar.data.stores import shown
from dcar.errors import DataError

SHARDS = (".tar", *GZIPPED)
TYPES = (*IMAGE_TYPES, "txt", "json", "cls")
KEPT = ("url", "license", "filename")

Files = dict[str, bytes | None]  # type -> data; None for a file above the limit


def _is_read(name: str) -> bool:
    named = split_name(name)
    return named is not None and named[1] in TYPES


def _split(member: Member) -> tuple[str, str]:
    named = split_name(member.name)
    assert named is not None  # _is_read
    return named


def split_of(name: str) -> str:
    """`val` or `test` where a word of the name begins so, else `train`."""
    words = re.split(r"[^a-z]+", name.lower())
    return next(
        (split for split in ("val", "test") if any(w.startswith(split) for w in words)), "train"
    )


def samples(url: str) -> Iterator[tuple[str, Files]]:
    """(key, files) of neighbouring members with one key. Raises DataError for a member twice."""
    members = stream_tar(url, _is_read)
    for key, group in groupby(members, key=lambda member: _split(member)[0]):
        files: Files = {}
        for member in group:
            kind = _split(member)[1]
            if kind in files:
                raise DataError(f"{shown(url)}: member {member.name} twice")
            files[kind] = member.data
        yield key, files


def _below(folder: str, url: str) -> str:
    return url.removeprefix(join(folder, "x").removesuffix("x"))


def described(files: Files) -> dict[str, Any]:
    """The `json` member; {} where there is none that can be read."""
    try:
        found = json.loads(files.get("json") or b"{}")
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def words_of(files: Files, caption_key: str | None) -> str | None:
    """The `txt` member, else "caption" of the json; with a caption_key, that entry of it first.

    Bytes that are no UTF-8 stay in the text as surrogates, for the builder to find.
    """
    entry = described(files).get(caption_key or "caption")
    from_json = entry if isinstance(entry, str) else None
    text = files.get("txt")
    from_text = text.decode(errors="surrogateescape") if text is not None else None
    order = (from_json, from_text) if caption_key else (from_text, from_json)
    return next((words for words in order if words is not None), None)


class WebDatasetShards:
    """Samples of tar shards in the WebDataset layout, with whatever captions and labels they have.

    path: a folder, at any depth, or a path, glob or brace pattern of .tar files.
    split: of all shards; by default what the name of each says (`split_of`).
    caption_key: entry of the `json` member to prefer as caption.
    captioned: whether a sample without words is dropped; by default unless the first sample has a
        class and no words.
    keep: entries of the `json` member to go on with the sample.
    Keys begin with the shard's name, for many tools count from 0 again in each shard. Raises
    FileNotFoundError for no shards, DataError naming a shard that breaks off, ValueError for two
    shards of one name.
    """

    def __init__(
        self,
        path: str,
        *,
        split: str | None = None,
        caption_key: str | None = None,
        captioned: bool | None = None,
        keep: Sequence[str] = KEPT,
    ):
        self.path, self.split, self.caption_key = path, split, caption_key
        self.keep = tuple(keep)
        self.captioned = captioned is not False
        self._ask = captioned is None

    def prepare(self, work: str) -> None:
        """Look at the first sample, for whether it has words."""
        shards = self._shards()
        if self._ask:
            first = next(chain.from_iterable(map(samples, shards.values())), None)
            files: Files = first[1] if first else {}
            self.captioned = "cls" not in files or bool(words_of(files, self.caption_key))

    def _shards(self) -> dict[str, str]:
        """Name below the folder, without suffix -> URL, in order."""
        pattern = self.path.lower().endswith((*SHARDS, "*")) or "{" in self.path
        urls = expand(self.path) if pattern else list_files(self.path)
        found: dict[str, str] = {}
        for url in urls:
            end = next((suffix for suffix in SHARDS if url.lower().endswith(suffix)), None)
            if end is None:
                continue
            name = name_of(url) if pattern else _below(self.path, url)
            name = name[: -len(end)]
            if name in found:
                raise ValueError(f"two shards are named {name}: {found[name]} and {url}")
            found[name] = url
        if not found:
            raise FileNotFoundError(f"no {', '.join(SHARDS)} in {shown(self.path)}")
        return found

    def units(self, samples_per_shard: int) -> list[Unit]:
        """One a shard."""
        numbers: dict[str, int] = {}
        units = []
        for name, url in self._shards().items():
            split = self.split or split_of(name)
            numbers[split] = numbers.get(split, -1) + 1
            units.append(Unit(split, numbers[split], None, [name, url]))
        return units

    def read(self, unit: Unit) -> Iterator[Record]:
        """Records in the order of the shard."""
        name, url = unit.reference
        for key, files in samples(url):
            yield self._record(f"{name}/{key}", key, files)

    def _record(self, place: str, key: str, files: Files) -> Record:
        kind = next((kind for kind in IMAGE_TYPES if kind in files), None)
        image = files[kind] if kind else b""
        dropped = "file too large" if image is None else None if image else "no image"
        label = None
        try:
            label = int(files["cls"] or b"") if "cls" in files else None
        except ValueError:
            dropped = "class is no number"
        extra = described(files)
        facts = {"id": key} | {name: extra[name] for name in self.keep if name in extra}
        return Record(place, image or b"", words_of(files, self.caption_key), label, facts, dropped)
