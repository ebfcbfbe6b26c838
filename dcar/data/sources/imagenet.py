"""ImageNet as it is downloaded: ILSVRC's tars, a tree of folders, or the hub's parquet files.

Labels count the sorted wnids from 0, as everywhere in the field. Picture files pass as they are:
the one PNG that is named .JPEG and the CMYK ones, too.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np

from dcar.data.members import MAX_MEMBER_BYTES
from dcar.data.sources.archives import is_image, naming, places, read_picture, read_range
from dcar.data.sources.imagenet_index import (
    Row,
    count,
    load,
    mixed,
    save,
    table,
    told_apart,
    wnids,
)
from dcar.data.sources.imagenet_labels import validation_wnids
from dcar.data.sources.imagenet_parquet import parquet_files, parquet_units, read_parquet
from dcar.data.sources.ranges import ranges
from dcar.data.sources.source import Record, Unit
from dcar.data.storage import exists, join, list_files, name_of, open_read
from dcar.errors import DataError

LAYOUTS = (
    {"train": "ILSVRC2012_img_train.tar", "val": "ILSVRC2012_img_val.tar"},
    {"train": "train", "val": "val"},
    {"train": "ILSVRC/Data/CLS-LOC/train", "val": "ILSVRC/Data/CLS-LOC/val"},
)
PARQUET = "data/train-*.parquet"
LICENCE = "ImageNet terms of access: non-commercial research and education"


def stem(name: str) -> str:
    """The last part of a name without suffix."""
    return name_of(name).partition(".")[0]


def key_of(name: str) -> str:
    """A name without suffix: `n01440764_18`, or with its class in front, as in the table."""
    return f"{name.rpartition('/')[0]}/{stem(name)}".removeprefix("/")


def rows_of_tar(folder: str, name: str) -> Iterator[Row]:
    """Pictures of a tar and of the tars of classes that it holds, named by their wnid."""
    url = join(folder, name)
    with open_read(url) as file, naming(url):
        for place in places(file, nested=True):
            if is_image(place.name):
                wnid = stem(place.name.rpartition("/")[0])
                yield Row(name, place.offset, place.size, name_of(place.name), wnid)


def rows_of_folder(folder: str, name: str) -> Iterator[Row]:
    """Pictures `<wnid>/<name>.JPEG`, or `<name>.JPEG` where they are not sorted by class."""
    start = join(folder, name)
    for url in list_files(start):
        below = url.removeprefix(start).removeprefix("/")
        if is_image(below):
            wnid = below.partition("/")[0] if "/" in below else ""
            yield Row(f"{name}/{below}", 0, -1, name_of(below), wnid)


class ImageNet:
    """The pictures of ImageNet with their labels; no captions.

    path: the folder with what was downloaded, one of
        ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar, as they are;
        train/<wnid>/*.JPEG and val/<wnid>/*.JPEG or val/*.JPEG, also below ILSVRC/Data/CLS-LOC;
        data/train-*.parquet and data/validation-*.parquet.
        One of the two splits is enough.
    val_labels: the classes of validation pictures that are not sorted into folders, by default one
        of the lists of `imagenet_labels.CANDIDATES` in the folder.
    Keys are the names without suffix; where classes number their pictures alike, as some copies
    do, `<wnid>/<name>`.
    Raises FileNotFoundError naming what is missing, DataError naming what cannot be read.
    """

    captioned = False

    def __init__(self, path: str, *, val_labels: str | None = None):
        self.path, self.val_labels = path, val_labels
        self._tables: dict[str, str] = {}

    def prepare(self, work: str) -> None:
        """Write a table of where each picture lies, unless it is there; parquet needs none."""
        places = self._layout()
        self._tables = {split: join(work, f"imagenet-{split}.npy") for split in places}
        for split, name in places.items():
            if not exists(self._tables[split]):
                rows = self._table(split, name)
                save(self._tables[split], rows)

    def _layout(self) -> dict[str, str]:
        """split -> tar or folder of it; empty for parquet."""
        for layout in LAYOUTS:
            names = {split: name for split, name in layout.items() if self._has(name)}
            if names:
                return names
        return {}

    def _has(self, name: str) -> bool:
        return exists(join(self.path, name))

    def _table(self, split: str, name: str) -> np.ndarray:
        read = rows_of_tar if name.endswith(".tar") else rows_of_folder
        train = self._tables.get("train")
        known = wnids(train) if train and split == "val" else []
        rows = table(self._classified(read(self.path, name), known))
        if not len(rows):
            raise DataError(f"{join(self.path, name)}: holds no pictures")
        found = np.unique(rows["wnid"])
        classes = np.array(known, dtype="S") if known else found
        if len(strange := np.setdiff1d(found, classes)):
            raise DataError(f"{strange[0].decode()} is a class of {split} and not of train")
        rows["label"] = np.searchsorted(classes, rows["wnid"])
        rows = told_apart(rows)
        return mixed(rows) if split == "train" else rows[np.argsort(rows["name"], kind="stable")]

    def _classified(self, rows: Iterable[Row], known: list[str]) -> Iterator[Row]:
        labels: dict[str, str] = {}
        for row in rows:
            if not row.wnid:
                labels = labels or validation_wnids(self.path, self.val_labels, known)
                if stem(row.name) not in labels:
                    raise DataError(f"{row.name} in {self.path} is not in the list of classes")
                row = row._replace(wnid=labels[stem(row.name)])
            yield row

    def units(self, samples_per_shard: int) -> list[Unit]:
        """Training units mix the classes; every unit has about as many samples."""
        if not self._tables:
            return self._parquet_units(samples_per_shard)
        return [
            Unit(split, number, stop - first, [url, first, stop])
            for split, url in self._tables.items()
            for number, (first, stop) in enumerate(ranges(count(url), samples_per_shard))
        ]

    def _parquet_units(self, samples_per_shard: int) -> list[Unit]:
        files = parquet_files(list_files(self.path))
        if not files:
            names = [name for layout in LAYOUTS for name in layout.values()]
            raise FileNotFoundError(f"{self.path} holds none of {', '.join([*names, PARQUET])}")
        return [
            unit
            for split, urls in files.items()
            for unit in parquet_units(split, urls, samples_per_shard)
        ]

    def read(self, unit: Unit) -> Iterator[Record]:
        """Records of one unit; of tars and folders by where each picture lies."""
        url, first, stop = unit.reference
        if url.endswith(".parquet"):
            found = read_parquet(url, first, stop)
        else:
            found = (self._record(row) for row in load(url, first, stop))
        for record in found:
            yield replace(record, facts={**record.facts, "licence": LICENCE})

    def _record(self, row: Row) -> Record:
        source = join(self.path, row.file)
        if row.size < 0:
            image = read_picture(source)
        else:
            large = row.size > MAX_MEMBER_BYTES
            image = None if large else read_range(source, row.offset, row.size)
        return Record(
            key=key_of(row.name),
            image=image or b"",
            label=row.label,
            facts={"id": row.name, "wnid": row.wnid},
            dropped="file too large" if image is None else None,
        )
