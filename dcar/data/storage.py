"""Where files are: local paths and URLs of stores, looked up, read, and written whole or not."""

import os
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from glob import glob, has_magic
from pathlib import Path
from typing import Any, BinaryIO, cast

import fsspec

from dcar.data.stores import (
    SCHEMES,
    TIMEOUT,
    WEB,
    check_scheme,
    filesystem,
    is_missing,
    is_remote,
    scheme_of,
    shown,
    with_retries,
)

Found = dict[str, dict[str, Any]]  # what fsspec knows of each name it lists


def local_path(url: str | Path) -> Path:
    """The path that a local path or a `file:` URL names."""
    if not scheme_of(url):
        return Path(url)
    return Path(str(url).partition(":")[2].removeprefix("//"))


def _address(url: str | Path) -> str:
    """A URL without its query."""
    return str(url).partition("?")[0] if scheme_of(url) in WEB else str(url)


def join(folder: str | Path, name: str) -> str:
    """The file `name`, which may be "a/b.tar", below a folder."""
    if is_remote(folder):
        return f"{_address(folder).rstrip('/')}/{name}"
    return str(local_path(folder) / name)


def parent(url: str | Path) -> str:
    """The folder of a file, without the query of the file's URL, which may be a signature."""
    if is_remote(url):
        return _address(url).rstrip("/").rpartition("/")[0]
    return str(local_path(url).parent)


def name_of(url: str | Path) -> str:
    """The last part of a path or URL, without a query."""
    return _address(url).rstrip("/").rpartition("/")[2]


def _store_of(url: str | Path, *, once: bool = True) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system and what it calls the file."""
    store = filesystem(url, once=once)
    return store, store._strip_protocol(str(url))


def _files(found: Found, scheme: str) -> list[str]:
    names = [name for name, facts in found.items() if facts["type"] == "file"]
    return sorted(f"{scheme}://{name.lstrip('/')}" for name in names)


def _local_matches(pattern: str) -> list[str]:
    path = local_path(pattern)
    if path.is_file():
        return [str(path)]
    return sorted(name for name in glob(str(path), recursive=True) if os.path.isfile(name))


def _remote_matches(pattern: str) -> list[str]:
    scheme = scheme_of(pattern)
    if scheme in WEB and "*" in _address(pattern):
        braces = "write the names with braces, such as 'train-{000000..000127}.tar'"
        raise ValueError(f"{shown(pattern)!r}: a web server cannot list its files; {braces}")
    if scheme in (*WEB, "pipe") or not has_magic(pattern):
        return [pattern]
    store, path = _store_of(pattern)
    found: Found = with_retries(lambda: store.glob(path, detail=True), pattern)
    return _files(found, scheme)


def _without_braces(url: str) -> list[str]:
    """Every URL that one with braces, or several joined by `::`, stand for."""
    if "{" not in url and "::" not in url:
        return [url]
    from webdataset.shardlists import expand_urls  # imports torch, which single files do without

    return list(expand_urls(url))


def expand(
    urls: str | Path | Iterable[str | Path], *, schemes: Sequence[str] = SCHEMES
) -> list[str]:
    """Files from paths or URLs, globs ('*.tar') or brace patterns ('{000000..000003}.tar').

    Local files and globs are looked up; a remote URL without a '*' is taken at its word. A file
    that several patterns match is given once.
    Raises ValueError for a scheme that is not one of `schemes` (`pipe:` runs a shell and is only
    taken where it is named), FileNotFoundError naming the pattern that matches nothing.
    """
    listed = [urls] if isinstance(urls, str | Path) else list(urls)
    files: list[str] = []
    for url in map(str, listed):
        for pattern in _without_braces(url):
            check_scheme(pattern, schemes)
            found = _remote_matches(pattern) if is_remote(pattern) else _local_matches(pattern)
            if not found:
                origin = "" if pattern == url else f" (from {shown(url)!r})"
                hint = ""
                if not is_remote(pattern) and local_path(pattern).is_dir():
                    hint = f": it is a folder; its shards are {join(pattern, '*.tar')}"
                raise FileNotFoundError(f"no file at {shown(pattern)}{origin}{hint}")
            files.extend(found)
    return list(dict.fromkeys(files))


def exists(url: str | Path) -> bool:
    """Whether a file or folder is there. Raises DataError if the store cannot be asked."""
    if not is_remote(url):
        return local_path(url).exists()
    store, path = _store_of(url)

    def ask() -> bool:
        try:
            store.invalidate_cache()
            store.info(path)
        except Exception as error:  # each library has its own kinds
            if is_missing(error, url):
                return False
            raise
        return True

    return with_retries(ask, url)


def _local_files(root: Path) -> Iterator[str]:
    """Links to folders are followed, but not those to a folder that they lie in.

    Raises OSError for a folder that cannot be listed: what is in it would be missed in silence.
    """

    def refuse(error: OSError) -> None:
        raise error

    def identity(place: str) -> tuple[int, int]:
        facts = os.stat(place)
        return facts.st_dev, facts.st_ino

    above = {str(root): {identity(str(root))}}  # folder -> it and those on the way to it
    for place, folders, names in os.walk(root, followlinks=True, onerror=refuse):
        yield from (os.path.join(place, name) for name in names)
        passed = above.pop(place)
        for name in list(folders):
            folder = os.path.join(place, name)
            if (own := identity(folder)) in passed:
                folders.remove(name)
            else:
                above[folder] = passed | {own}


def list_files(folder: str | Path) -> list[str]:
    """All files below a folder, sorted, as paths or URLs that begin as `folder` does.

    Links to folders are followed. Raises FileNotFoundError for no such folder, ValueError for
    http(s), which cannot list.
    """
    if not is_remote(folder):
        root = local_path(folder)
        if not root.is_dir():
            raise FileNotFoundError(f"no folder at {root}")
        return sorted(_local_files(root))
    if scheme_of(folder) in WEB:
        raise ValueError(f"{shown(folder)!r}: a web server cannot list its files")
    store, path = _store_of(folder)

    def ask() -> Found:
        store.invalidate_cache()
        return store.find(path, detail=True)

    found = _files(with_retries(ask, folder), scheme_of(folder))
    if not found:  # stores have no empty folders
        raise FileNotFoundError(f"no files below {shown(folder)}")
    return found


def open_read(url: str | Path) -> BinaryIO:
    """A file for reading, seekable where the store allows it.

    Raises FileNotFoundError, or DataError when a store cannot be reached; later reads raise what
    the store's library raises, after its own retries.
    """
    if not is_remote(url):
        return open(local_path(url), "rb")
    store, path = _store_of(url, once=False)
    return cast(BinaryIO, with_retries(lambda: store.open(path, "rb"), url))


def read_bytes(url: str | Path) -> bytes:
    """A whole file. Raises FileNotFoundError, or DataError after the last attempt."""
    if not is_remote(url):
        return local_path(url).read_bytes()
    store, path = _store_of(url)
    return with_retries(lambda: cast(bytes, store.cat_file(path)), url)


def download(url: str | Path, path: Path, *, timeout: float = TIMEOUT) -> int | None:
    """One attempt to copy a remote file; returns the size in bytes the store promised, if it did.

    Raises whatever the store's library raises, for `with_retries` to tell apart.
    """
    store = filesystem(url, timeout=timeout)
    promise = fsspec.callbacks.NoOpCallback()
    store.get_file(store._strip_protocol(str(url)), str(path), callback=promise)
    return promise.size


def partial_name(path: Path) -> Path:
    """Where to write what is to appear at `path` when it is whole; another name at each call."""
    return path.with_name(f".{path.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}.partial")


@contextmanager
def _sent_at_the_end(url: str | Path) -> Iterator[BinaryIO]:
    if scheme_of(url) in WEB:
        raise ValueError(f"{shown(url)!r}: a web server can only be read")
    store, path = _store_of(url)
    with tempfile.NamedTemporaryFile(prefix="dcar-", suffix=".partial") as file:
        yield cast(BinaryIO, file)
        file.flush()
        with_retries(lambda: store.put_file(file.name, path), url)


@contextmanager
def write_atomically(url: str | Path) -> Iterator[BinaryIO]:
    """A file that appears whole when the block ends well; after an exception nothing is left.

    Local: written beside the target, whose folder is made. Remote: written to the folder for
    temporary files and sent at the end. Raises ValueError for http(s), which can only be read,
    DataError when it cannot be sent.
    """
    if is_remote(url):
        with _sent_at_the_end(url) as file:
            yield file
        return
    path = local_path(url)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = partial_name(path)
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def remove(url: str | Path) -> None:
    """Delete a file; one that is not there is no error."""
    if not is_remote(url):
        local_path(url).unlink(missing_ok=True)
        return
    store, path = _store_of(url)
    with suppress(FileNotFoundError):
        with_retries(lambda: store.rm_file(path), url)
