"""Where each sample of a local shard lies, so that any of them is read without its neighbours."""

import logging
import os
import tarfile
from array import array
from collections.abc import Iterator
from pathlib import Path

from dcar.data.members import MAX_MEMBER_BYTES, MEMBER_TYPES, BadSample, Raw, split_name
from dcar.data.tar_header import StrictHeader
from dcar.errors import DataError

log = logging.getLogger(__name__)


class ShardIndex:
    """The samples of one shard, from a pass over its headers; the file stays open for reading.

    Links, devices, sparse files and members of other types are passed over. Neighbouring members
    of one key make a sample.

    keys: one a sample, in the order of the shard.
    broken: why the rest of the shard cannot be read, None for a shard that is whole.
    Raises DataError where the file is no tar at all, OSError where it cannot be opened.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.keys: list[str] = []
        self.broken: str | None = None
        self._bad: dict[int, str] = {}
        self._positions: dict[str, int] | None = None
        self._firsts = array("q")  # of each sample: its first member below
        self._kinds, self._offsets, self._sizes = array("B"), array("q"), array("q")
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115  # closed with the index
        try:
            self._scan()
        except BaseException:
            self.close()
            raise

    def __len__(self) -> int:
        return len(self.keys)

    def close(self) -> None:
        self._file.close()

    def __del__(self) -> None:
        if hasattr(self, "_file"):  # not where it could not be opened
            self.close()

    def _scan(self) -> None:
        length = os.fstat(self._file.fileno()).st_size
        try:
            with (
                open(self.path, "rb") as headers,
                tarfile.open(fileobj=headers, mode="r:", tarinfo=StrictHeader) as tar,
            ):
                while (info := tar.next()) is not None:
                    tar.members.clear()  # type: ignore[attr-defined]  # it would keep every header
                    if info.offset_data + info.size > length:
                        raise tarfile.ReadError("unexpected end of data")
                    if info.isreg() and not info.issparse():
                        self._add(info)
        except tarfile.TarError as error:
            if not self.keys:
                raise DataError(f"{self.path}: {type(error).__name__}: {error}") from error
            self.broken = str(error)

    def _add(self, info: tarfile.TarInfo) -> None:
        if (named := split_name(info.name)) is None:
            return
        key, kind = named
        if not self.keys or self.keys[-1] != key:
            self.keys.append(key)
            self._firsts.append(len(self._kinds))
        sample, code = len(self.keys) - 1, MEMBER_TYPES.index(kind)
        if code in self._kinds[self._firsts[sample] :]:
            self._bad[sample] = "member twice"
        elif info.size > MAX_MEMBER_BYTES:
            self._bad[sample] = "member too large"
        self._kinds.append(code)
        self._offsets.append(info.offset_data)
        self._sizes.append(info.size)

    def find(self, key: str) -> int | None:
        """The position of a key, None where the shard has none of it."""
        if self._positions is None:
            self._positions = {key: position for position, key in enumerate(self.keys)}
        return self._positions.get(key)

    def span(self, first: int, stop: int) -> tuple[int, int]:
        """(offset, bytes) of the part of the file that holds samples [first, stop)."""
        members = self._members(first).start, self._members(stop - 1).stop - 1
        begin, end = (self._offsets[member] for member in members)
        return begin, end + self._sizes[members[1]] - begin

    def advise(self, first: int, stop: int) -> None:
        """Ask the system to load samples [first, stop) in one go, where it can be asked."""
        if hasattr(os, "posix_fadvise") and first < (stop := min(stop, len(self))):
            offset, size = self.span(first, stop)
            os.posix_fadvise(self._file.fileno(), offset, size, os.POSIX_FADV_WILLNEED)

    def read(self, position: int) -> Raw:
        """`__key__` and the bytes of each member. Raises BadSample, IndexError past the end."""
        if position in self._bad:
            raise BadSample(self._bad[position])
        raw: Raw = {"__key__": self.keys[position]}
        for member in self._members(position):
            self._file.seek(self._offsets[member])
            raw[MEMBER_TYPES[self._kinds[member]]] = self._file.read(self._sizes[member])
        return raw

    def _members(self, position: int) -> range:
        stop = self._firsts[position + 1] if position + 1 < len(self) else len(self._kinds)
        return range(self._firsts[position], stop)


def read_shard(path: str | Path) -> Iterator[Raw]:
    """Raw samples of one local shard, in order: `__key__` and the bytes of each known member.

    Raises DataError naming the shard when the tar breaks off or names one member twice.
    """
    index = ShardIndex(path)
    try:
        for position in range(len(index)):
            yield index.read(position)
    except BadSample as error:
        raise DataError(f"{path}: {index.keys[position]}: {error}") from error
    finally:
        index.close()
    if index.broken:
        raise DataError(f"{path}: {index.broken}")


def count_samples(path: str | Path) -> int:
    """How many samples a local shard holds before it breaks off, if it does; 0 for no tar.

    Warns of a shard without any, which nobody would open, and so miss, later.
    """
    try:
        index = ShardIndex(path)
    except DataError as error:
        log.warning("%s counts as a shard of no samples: %s", path, error)
        return 0
    index.close()
    if not len(index):
        log.warning("%s holds no sample", path)
    return len(index)
