"""Members of tar archives, one at a time: nothing is unpacked to disk and no name is trusted.

Links, devices and sparse files are passed over, and so are names that lead out of their folder. An
archive that breaks off anywhere is a DataError that names it.
"""

import gzip
import tarfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, BinaryIO, NamedTuple, cast

from dcar.data.members import IMAGE_TYPES, MAX_MEMBER_BYTES
from dcar.data.storage import local_path, open_read, read_bytes
from dcar.data.stores import filesystem, is_remote, shown, with_retries
from dcar.data.tar_header import StrictHeader
from dcar.errors import DataError

GZIPPED = (".tgz", ".tar.gz")
_BUFFER = 2**16
_BROKEN = (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile, ValueError)


class Member(NamedTuple):
    """data: None for a member above MAX_MEMBER_BYTES, which is never read into memory."""

    name: str
    data: bytes | None


class Place(NamedTuple):
    """Where the bytes of a member lie in a plain tar."""

    name: str
    offset: int
    size: int


def safe_name(name: str) -> str | None:
    """The name without a leading `./`; None for one that is absolute, climbs, or cannot be read."""
    name = name.removeprefix("./")
    parts = name.split("/")
    climbs = "" in parts or "." in parts or ".." in parts or "\\" in name
    return None if climbs or not name.isprintable() else name


def is_image(name: str) -> bool:
    """By the suffix alone. `._name` is what macOS archivers put beside each file."""
    base = name.rpartition("/")[2]
    return base.rpartition(".")[2].lower() in IMAGE_TYPES and not base.startswith("._")


@contextmanager
def naming(url: str, *kinds: type[Exception]) -> Iterator[None]:
    """What readers raise for broken bytes -> DataError with the file's name; `kinds`: further ones.

    In the middle of a remote file the store's library raises kinds of its own.
    """
    try:
        yield
    except _BROKEN + kinds as error:
        raise DataError(
            f"{shown(url)}: broken or cut short, get it again ({type(error).__name__}: {error})"
        ) from error
    except (DataError, OSError):
        raise
    except Exception as error:
        if not is_remote(url):
            raise
        reason = shown(f"{type(error).__name__}: {error}")
        raise DataError(f"{shown(url)}: reading it failed ({reason})") from error


def read_range(url: str, offset: int, size: int) -> bytes:
    """`size` bytes of a file from `offset` on, in one request. Raises DataError for fewer."""
    if is_remote(url):
        store = filesystem(url)
        path, stop = store._strip_protocol(url), offset + size
        data: bytes = with_retries(lambda: store.cat_file(path, start=offset, end=stop), url)
    else:
        with open_read(url) as file:
            file.seek(offset)
            data = file.read(size)
    if len(data) != size:
        raise DataError(f"{shown(url)}: broken or cut short, get it again")
    return data


def read_picture(url: str) -> bytes | None:
    """A whole file; None for one above MAX_MEMBER_BYTES, which is never read into memory.

    Raises FileNotFoundError, also where the name leads through a file or to a folder.
    """
    try:
        if is_remote(url):
            store = filesystem(url)
            path = store._strip_protocol(url)
            size = with_retries(lambda: store.info(path)["size"], url)
        else:
            size = local_path(url).stat().st_size
        return read_bytes(url) if size <= MAX_MEMBER_BYTES else None
    except (NotADirectoryError, IsADirectoryError) as error:
        raise FileNotFoundError(f"no file at {shown(url)}") from error


def _regular(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    while (info := tar.next()) is not None:
        tar.members.clear()  # type: ignore[attr-defined]  # it would keep every header
        if info.isreg() and not info.issparse():
            yield info


@contextmanager
def _streamed(url: str) -> Iterator[tarfile.TarFile]:
    with open_read(url) as file, naming(url):
        zipped = gzip.GzipFile(fileobj=file) if url.lower().endswith(GZIPPED) else None
        raw = zipped or file
        with tarfile.open(fileobj=raw, mode="r|", bufsize=_BUFFER, tarinfo=StrictHeader) as tar:
            yield tar
        while zipped and zipped.read(_BUFFER):
            pass  # the checksum of all that was read comes last


def _opened(tar: tarfile.TarFile, info: tarfile.TarInfo) -> IO[bytes]:
    file = tar.extractfile(info)
    assert file is not None  # it is None for links and folders only
    return file


def stream_tar(url: str, wanted: Callable[[str], bool] = is_image) -> Iterator[Member]:
    """The files of a .tar, .tgz or .tar.gz whose name is wanted, in order, read front to back."""
    with _streamed(url) as tar:
        for info in _regular(tar):
            name = safe_name(info.name)
            if name is None or not wanted(name):
                continue
            small = info.size <= MAX_MEMBER_BYTES
            yield Member(name, _opened(tar, info).read() if small else None)


def stream_lines(url: str, suffix: str) -> Iterator[bytes]:
    """Lines of the first file with that suffix in a tar, or of a file that is no archive."""
    if not url.lower().endswith((".tar", *GZIPPED)):
        with open_read(url) as file:
            yield from file
        return
    with _streamed(url) as tar:
        for info in _regular(tar):
            if info.name.endswith(suffix):
                yield from _opened(tar, info)
                return
        raise tarfile.ReadError(f"no *{suffix} in it")


def places(file: IO[bytes], *, nested: bool = False) -> Iterator[Place]:
    """Where the files of a plain, seekable tar lie, from its headers alone.

    nested: go into the tars that it holds, too; `n01440764.tar/n01440764_18.JPEG` is a name then.
    Raises tarfile.TarError for a tar that breaks off: use it inside `naming`.
    """
    with tarfile.open(fileobj=cast(BinaryIO, file), mode="r:", tarinfo=StrictHeader) as tar:
        for info in _regular(tar):
            if (name := safe_name(info.name)) is None:
                continue
            if nested and name.endswith(".tar"):
                for inner in places(_opened(tar, info)):
                    offset = info.offset_data + inner.offset
                    yield Place(f"{name}/{inner.name}", offset, inner.size)
            else:
                yield Place(name, info.offset_data, info.size)
