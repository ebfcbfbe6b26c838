"""Classes of ImageNet's validation pictures, which lie in one folder without their class.

Their names are numbered; lists of classes exist in several forms, and two of them look alike but
count differently: see `wnids_of`.
"""

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

from dcar.data.sources.archives import GZIPPED, stream_tar
from dcar.data.storage import exists, join, name_of, parent, read_bytes
from dcar.errors import DataError, import_extra

TRUTH, META = "ILSVRC2012_validation_ground_truth.txt", "meta.mat"
CANDIDATES = (
    "LOC_val_solution.csv",
    "ILSVRC2012_devkit_t12.tar.gz",
    f"ILSVRC2012_devkit_t12/data/{TRUTH}",
    TRUTH,
)
_NAMED = re.compile(r"ILSVRC2012_val_\d{8}")
_WNID = re.compile(r"n\d{8}")


def parse_labels(text: str) -> dict[str, str]:
    """Picture name without suffix -> class as the list writes it.

    A line is a class alone, in order of the pictures' numbers, or a picture and its class, as in
    Kaggle's `LOC_val_solution.csv` and Caffe's `val.txt`.
    """
    labels: dict[str, str] = {}
    for line in text.splitlines():
        words = line.replace(",", " ").split()
        if not words or words[0] == "ImageId":
            continue
        if (named := _NAMED.match(words[0])) and len(words) > 1:
            labels[named.group()] = words[1]
        else:
            labels[f"ILSVRC2012_val_{len(labels) + 1:08d}"] = words[0]
    return labels


def wnids_of(
    labels: Mapping[str, str], classes: Sequence[str], ids: Mapping[int, str], url: str
) -> dict[str, str]:
    """Picture -> wnid, from wnids, or from numbers.

    Numbers from 0 count the sorted wnids (`classes`). Numbers from 1 are ILSVRC's own ids, another
    order altogether, which only the devkit's meta.mat explains (`ids`).
    """
    if all(_WNID.fullmatch(label) for label in labels.values()):
        return dict(labels)
    if not all(label.isdecimal() for label in labels.values()):
        raise DataError(f"{url}: its classes are neither all wnids nor all whole numbers")
    numbers = {name: int(label) for name, label in labels.items()}
    names = ids if min(numbers.values()) > 0 else dict(enumerate(classes))
    if unknown := set(numbers.values()) - set(names):
        raise DataError(
            f"{url}: number {min(unknown)} names no class. Numbers from 0 count the {len(classes)} "
            f"sorted wnids of the training pictures; numbers from 1 are ILSVRC ids and need the "
            f"devkit's {META} beside the list. A list of wnids needs neither"
        )
    return {name: names[number] for name, number in numbers.items()}


def read_ids(meta: bytes) -> dict[int, str]:
    """ILSVRC id -> wnid, from the devkit's meta.mat."""
    needs = f"without a list of wnids (val_labels), reading {META} needs scipy"
    scipy_io = import_extra("scipy.io", extra="data", needs=needs)
    synsets: Any = scipy_io.loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
    return {
        int(number): str(wnid)
        for number, wnid in zip(synsets["ILSVRC2012_ID"], synsets["WNID"], strict=True)
    }


def _list_and_meta(url: str) -> tuple[bytes, bytes | None]:
    if url.lower().endswith(GZIPPED):
        wanted = stream_tar(url, lambda name: name_of(name) in (TRUTH, META))
        files = {name_of(member.name): member.data for member in wanted}
        if not (truth := files.get(TRUTH)):
            raise DataError(f"{url}: holds no {TRUTH}")
        return truth, files.get(META)
    meta = join(parent(url), META)
    return read_bytes(url), read_bytes(meta) if exists(meta) else None


def validation_wnids(folder: str, given: str | None, classes: Sequence[str]) -> dict[str, str]:
    """Picture name without suffix -> wnid, from the list that is given or lies in the folder.

    classes: the sorted wnids of the training pictures. Raises FileNotFoundError naming the lists
    that would do, DataError for one that cannot be used.
    """
    url = given or next(filter(exists, (join(folder, name) for name in CANDIDATES)), None)
    if url is None:
        raise FileNotFoundError(
            f"the validation pictures in {folder} have no classes: put one of "
            f"{', '.join(CANDIDATES)} there, or give val_labels=FILE with one wnid a line"
        )
    text, meta = _list_and_meta(url)
    labels = parse_labels(text.decode(errors="replace"))
    if not labels:
        raise DataError(f"{url}: an empty list of classes")
    numbered = any(not _WNID.fullmatch(label) for label in labels.values())
    ids = read_ids(meta) if meta and numbered else {}
    return wnids_of(labels, classes, ids, url)
