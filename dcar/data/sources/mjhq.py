"""MJHQ-30K as it is downloaded: a zip of pictures and a json with their prompts and categories.

The order is by (category, id), which is that of the published gFID figures.
"""

import json
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager

from dcar.data.members import MAX_MEMBER_BYTES
from dcar.data.sources.archives import is_image, naming
from dcar.data.sources.ranges import ranges
from dcar.data.sources.source import Record, Unit
from dcar.data.storage import exists, join, open_read, read_bytes
from dcar.data.stores import shown
from dcar.errors import DataError

IMAGES, PROMPTS = "mjhq30k_imgs.zip", "meta_data.json"
_ENCRYPTED = 0x1

Place = tuple[str, str]  # (category, id)


@contextmanager
def _opened(url: str) -> Iterator[zipfile.ZipFile]:
    with open_read(url) as file, naming(url, zipfile.BadZipFile, NotImplementedError):
        yield zipfile.ZipFile(file)


def members_of(archive: zipfile.ZipFile) -> dict[Place, zipfile.ZipInfo]:
    """Pictures `<category>/<id>.jpg`, also where those folders lie in another one."""
    found = {}
    for info in archive.infolist():
        parts = info.filename.split("/")
        if is_image(info.filename) and len(parts) > 1 and ".." not in parts:
            found[parts[-2], parts[-1].partition(".")[0]] = info
    return found


def _read(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    """In memory of the declared size, whatever the member unpacks to."""
    with archive.open(info) as file:
        return file.read(info.file_size)


class MJHQ:
    """The pictures of MJHQ-30K with prompt and category, split `test`.

    path: the folder with `mjhq30k_imgs.zip` and `meta_data.json`.
    Raises FileNotFoundError naming what is missing, DataError naming what cannot be read.
    """

    captioned = True

    def __init__(self, path: str):
        self.path = path

    def prepare(self, work: str) -> None:
        """Look for the two files."""
        for name in (IMAGES, PROMPTS):
            if not exists(join(self.path, name)):
                raise FileNotFoundError(f"{self.path} holds no {name}")

    def _prompts(self) -> dict[Place, str]:
        url = join(self.path, PROMPTS)
        try:
            entries = json.loads(read_bytes(url))
            return {(str(e["category"]), name): e["prompt"] for name, e in entries.items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DataError(
                f"{shown(url)}: not a table of id -> category, prompt ({error!r})"
            ) from error

    def units(self, samples_per_shard: int) -> list[Unit]:
        """Runs of the pictures in the order of (category, id)."""
        with _opened(join(self.path, IMAGES)) as archive:
            total = len(members_of(archive).keys() | self._prompts().keys())
        return [
            Unit("test", number, stop - first, [first, stop])
            for number, (first, stop) in enumerate(ranges(total, samples_per_shard))
        ]

    def read(self, unit: Unit) -> Iterator[Record]:
        """Records in order; a prompt without a picture or the reverse is dropped."""
        first, stop = unit.reference
        prompts = self._prompts()
        with _opened(join(self.path, IMAGES)) as archive:
            members = members_of(archive)
            for place in sorted(members.keys() | prompts.keys())[first:stop]:
                info, prompt = members.get(place), prompts.get(place)
                reason = _reason(info, prompt)
                yield Record(
                    key="/".join(place),
                    image=_read(archive, info) if info and not reason else b"",
                    caption=prompt,
                    facts={"id": place[1], "category": place[0]},
                    dropped=reason,
                )


def _reason(info: zipfile.ZipInfo | None, prompt: str | None) -> str | None:
    if info is None:
        return "no image"
    if prompt is None:
        return "no annotation"
    if info.flag_bits & _ENCRYPTED:
        return "encrypted"
    return "file too large" if info.file_size > MAX_MEMBER_BYTES else None
