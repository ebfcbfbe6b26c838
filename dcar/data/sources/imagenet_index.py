"""A table of where each picture of ImageNet lies, kept in a file and read in pieces.

It is an array of 1.3 million rows of plain bytes and numbers, about 100 MB. Training pictures are
in the order of a hash of their names: every run of rows mixes the classes, and the same pictures
come in the same order from tars as from folders.
"""

import hashlib
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from dcar.data.sources.archives import read_range
from dcar.data.storage import open_read, write_atomically

_CHUNK = 2**14


class Row(NamedTuple):
    """A picture: `size` bytes at `offset` of a file, whose path is relative to the input.

    size: -1 for a picture that is a file of its own. label: counts the sorted wnids from 0.
    """

    file: str
    offset: int
    size: int
    name: str
    wnid: str
    label: int = -1


def table(rows: Iterable[Row]) -> np.ndarray:
    """A structured array with a field for each of Row's; empty for no rows."""
    remaining = iter(rows)
    chunks = [_array([Row("", 0, 0, "", "")])[:0]]
    while chunk := list(islice(remaining, _CHUNK)):
        chunks.append(_array(chunk))
    return np.concatenate(chunks)


def _array(rows: list[Row]) -> np.ndarray:
    encoded = [
        [v.encode(errors="surrogateescape") if isinstance(v, str) else v for v in row]
        for row in rows
    ]
    columns = [np.array(column) for column in zip(*encoded, strict=True)]
    kind = [(field, column.dtype) for field, column in zip(Row._fields, columns, strict=True)]
    return np.array([tuple(row) for row in encoded], dtype=kind)


def told_apart(rows: np.ndarray) -> np.ndarray:
    """With the class before each name that is another's, too, but for suffixes."""
    stems = np.array([name.partition(b".")[0] for name in rows["name"].tolist()])
    _, inverse, counts = np.unique(stems, return_inverse=True, return_counts=True)
    if counts.max() == 1:
        return rows
    classed = np.char.add(np.char.add(rows["wnid"], b"/"), rows["name"])
    columns = {field: rows[field] for field in Row._fields}
    columns["name"] = np.where(counts[inverse] > 1, classed, rows["name"])
    apart = np.empty(len(rows), dtype=[(field, each.dtype) for field, each in columns.items()])
    for field, column in columns.items():
        apart[field] = column
    return apart


def mixed(rows: np.ndarray) -> np.ndarray:
    """In the order of a hash of the names."""
    digests = (hashlib.blake2b(name, digest_size=8).digest() for name in rows["name"].tolist())
    keys = np.frombuffer(b"".join(digests), dtype=">u8")
    return rows[np.argsort(keys, kind="stable")]


def save(url: str, rows: np.ndarray) -> None:
    """The file appears when it is whole."""
    with write_atomically(url) as file:
        np.save(file, rows, allow_pickle=False)


def _header(file: BinaryIO) -> tuple[int, np.dtype]:
    np.lib.format.read_magic(file)
    (count,), _, dtype = np.lib.format.read_array_header_1_0(file)
    return count, dtype


def count(url: str) -> int:
    """Rows in the file."""
    with open_read(url) as file:
        return _header(file)[0]


def load(url: str, first: int, stop: int) -> Iterator[Row]:
    """Rows [first, stop), in memory of those rows."""
    with open_read(url) as file:
        _, dtype = _header(file)
        start = file.tell() + first * dtype.itemsize
    rows = np.frombuffer(read_range(url, start, (stop - first) * dtype.itemsize), dtype=dtype)
    for row in rows.tolist():
        values: list[Any] = [
            v.decode(errors="surrogateescape") if isinstance(v, bytes) else v for v in row
        ]
        yield Row(*values)


def wnids(url: str) -> list[str]:
    """The sorted classes of the file's rows."""
    with open_read(url) as file:
        rows = np.load(file, allow_pickle=False)
    return [wnid.decode() for wnid in np.unique(rows["wnid"])]
