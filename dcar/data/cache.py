"""Local copies of remote shards: whole or absent, shared by processes, bounded in size."""

import hashlib
import logging
import os
import re
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any

from filelock import FileLock

from dcar.data.shards import ShardEntry
from dcar.data.storage import download, local_path, name_of, partial_name
from dcar.data.stores import SCHEMES, check_scheme, is_remote, scheme_of, shown, with_retries
from dcar.errors import DataError

ORPHAN_AGE = 3600.0  # seconds since anything was written to a partial file
OURS = re.compile(r"\.?[\w.-]+\.[0-9a-f]{16}\.shard(\.\d+\.[0-9a-f]{8}\.partial)?")
LOCKS = "locks"

log = logging.getLogger(__name__)


def default_folder() -> Path:
    """`shards` below $DCAR_CACHE, or below the user's own cache folder."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("DCAR_CACHE") or Path(home) / "dcar") / "shards"


def file_name(url: str, sha256: str = "") -> str:
    """Of the copy of a URL: a readable part, and a hash of the whole and of what it should hold."""
    name = "pipe" if scheme_of(url) == "pipe" else name_of(url)
    readable = re.sub(r"[^\w.-]+", "_", name, flags=re.ASCII).strip("._")[-80:] or "shard"
    digest = hashlib.sha256(f"{url}\n{sha256}".encode()).hexdigest()[:16]
    return f"{readable}.{digest}.shard"


def run_command(command: str, path: Path, *, timeout: float) -> None:
    """Write what a shell command prints to a file.

    Raises OSError if it exits with anything but 0 or prints nothing for `timeout` seconds.
    """
    with open(path, "wb") as output:
        process = subprocess.Popen(
            command, shell=True, stdout=output, stderr=subprocess.PIPE, start_new_session=True
        )
        size = -1
        try:
            while size != (size := path.stat().st_size):
                try:
                    _, said = process.communicate(timeout=timeout)
                    break
                except subprocess.TimeoutExpired:
                    continue
            else:
                raise TimeoutError(f"the command printed nothing for {timeout:g} s")
        finally:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
    if process.returncode:
        words = said.decode(errors="replace").strip()[-300:]
        raise OSError(f"the command's exit code is {process.returncode}: {words}")


def check_content(path: Path, promised: int | None, entry: ShardEntry | None) -> None:
    """Put a downloaded file on the disk for good. Raises OSError where it is not what was promised.

    promised: bytes, as the store said.
    """
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        size = os.fstat(file.fileno()).st_size
        if promised is not None and size != promised:
            raise OSError(f"{size} bytes came, the store promised {promised}")
        if entry is not None and size != entry.bytes:
            raise OSError(f"{size} bytes came, the manifest says {entry.bytes}")
        if entry is not None and entry.sha256:
            found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != entry.sha256:
                raise OSError(f"sha256 {found} is not the manifest's {entry.sha256}")


class ShardCache:
    """A folder on a local disk for copies of remote shards; any number of processes share it.

    Each shard is downloaded once a machine, checked, and only then appears under its name. The
    least recently used are deleted to stay within `max_bytes`, which should hold a few shards of
    each process: open what `fetch` returns at once; an open file stays readable after deletion.

    folder: by default `shards` below $DCAR_CACHE, or below the user's own cache folder.
    attempts, backoff (seconds): how often a download is tried and the first wait between.
    timeout: seconds without a byte after which an attempt has failed.
    schemes: of URLs that may be opened; "pipe" (`pipe:<shell command>`, whose output is the shard)
        only if it is named here.
    """

    def __init__(
        self,
        folder: str | Path | None = None,
        *,
        max_bytes: int = 50 * 2**30,
        attempts: int = 5,
        backoff: float = 0.5,
        timeout: float = 60.0,
        schemes: Sequence[str] = SCHEMES,
    ):
        if max_bytes < 1 or attempts < 1:
            raise ValueError(f"max_bytes={max_bytes}, attempts={attempts}: both are at least 1")
        if backoff < 0 or timeout <= 0:
            raise ValueError(f"backoff={backoff} is below 0 or timeout={timeout} is not above it")
        self.folder = default_folder() if folder is None else Path(folder)
        self.max_bytes, self.attempts, self.backoff = max_bytes, attempts, backoff
        self.timeout, self.schemes = timeout, tuple(schemes)
        self._waiting: SimpleQueue[tuple[str, ShardEntry | None]] | None = None
        self._owner = 0  # process whose thread empties the queue
        self._sweep()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_waiting": None, "_owner": 0}

    def _sweep(self) -> None:
        """Delete what killed downloads have left."""
        for path in self.folder.glob(".*.partial"):
            try:
                if OURS.fullmatch(path.name) and time.time() - path.stat().st_mtime > ORPHAN_AGE:
                    path.unlink()
            except FileNotFoundError:  # another process was faster
                continue

    def fetch(self, url: str, entry: ShardEntry | None = None) -> Path:
        """The local file that holds a shard; a local path is returned as it is, unchecked.

        Size and, where the entry gives one, sha256 are checked when the shard is downloaded; with
        an entry of another sha256 a URL is downloaded anew, without one it is taken not to change.
        Raises ValueError for a scheme that is not allowed, DataError naming the URL after the last
        attempt.
        """
        check_scheme(url, self.schemes)
        if not is_remote(url):
            return local_path(url)
        target = self.folder / file_name(url, entry.sha256 if entry else "")
        if self._is_here(target, entry):
            return target
        with self._lock(target.name):
            if not self._is_here(target, entry):
                self._download(url, entry, target)
        self._make_room(target)
        return target

    def forget(self, url: str, entry: ShardEntry | None = None) -> None:
        """Delete the copy of a remote shard that turned out to be no shard: it is fetched anew."""
        if is_remote(url):
            name = file_name(url, entry.sha256 if entry else "")
            (self.folder / name).unlink(missing_ok=True)

    def prefetch(self, url: str, entry: ShardEntry | None = None) -> None:
        """Have a shard fetched in the background, after those asked for before; never raises.

        What goes wrong is told by the `fetch` that needs the shard.
        """
        if self._waiting is None or self._owner != os.getpid():  # threads do not survive a fork
            self._waiting, self._owner = SimpleQueue(), os.getpid()
            Thread(target=self._fetch_waiting, args=(self._waiting,), daemon=True).start()
        self._waiting.put((url, entry))

    def _fetch_waiting(self, waiting: SimpleQueue[tuple[str, ShardEntry | None]]) -> None:
        while True:
            url, entry = waiting.get()
            try:
                self.fetch(url, entry)
            except Exception as error:
                log.debug("prefetch of %s: %s", shown(url), shown(str(error)))

    def _lock(self, name: str) -> FileLock:
        locks = self.folder / LOCKS
        locks.mkdir(parents=True, exist_ok=True)
        return FileLock(locks / f"{name}.lock")

    def _is_here(self, target: Path, entry: ShardEntry | None) -> bool:
        """Whether a good copy is there, which then counts as just used."""
        try:
            os.utime(target)
            return entry is None or target.stat().st_size == entry.bytes
        except FileNotFoundError:
            return False

    def _download(self, url: str, entry: ShardEntry | None, target: Path) -> None:
        partial = partial_name(target)
        try:
            with_retries(
                lambda: self._copy(url, entry, partial),
                url,
                attempts=self.attempts,
                backoff=self.backoff,
            )
            os.replace(partial, target)
        except FileNotFoundError as error:
            raise DataError(str(error)) from None
        finally:
            partial.unlink(missing_ok=True)

    def _copy(self, url: str, entry: ShardEntry | None, partial: Path) -> None:
        promised = None
        if scheme_of(url) == "pipe":
            run_command(url.removeprefix("pipe:"), partial, timeout=self.timeout)
        else:
            promised = download(url, partial, timeout=self.timeout)
        check_content(partial, promised, entry)

    def _make_room(self, kept: Path) -> None:
        """Delete the least recently used copies, but not `kept`, until the rest is small enough."""
        with self._lock("deleting"):
            stats = {
                path: path.stat()
                for path in self.folder.glob("*.shard")
                if OURS.fullmatch(path.name)
            }
            total = sum(stat.st_size for stat in stats.values())
            for path in sorted(stats, key=lambda path: stats[path].st_mtime_ns):
                if total <= self.max_bytes:
                    break
                if path != kept:
                    path.unlink(missing_ok=True)
                    total -= stats[path].st_size
