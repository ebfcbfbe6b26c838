"""Checkpoints that a kill, a power cut or a full disk cannot spoil: the old one or the new, whole.

Beside each NAME lies NAME.sha256, which `read_checkpoint` compares.
"""

import errno
import hashlib
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from dcar.data.storage import is_remote
from dcar.models.checkpoints import digest_path, file_digest, known_digests

log = logging.getLogger(__name__)

PARTIAL = re.compile(r"\..+\.(\d+)\.partial")


def partial_path(path: Path) -> Path:
    """Where this process writes what will be `path`: beside it, so that a rename is enough."""
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


def sweep(folder: Path) -> list[Path]:
    """Remove what killed runs have left half-written in `folder`; returns the files removed.

    To be called before this process writes anything: a file with its own number is then an older
    process's, as numbers come again. Files of other processes that are alive stay.
    """
    orphans = []
    for path in sorted(folder.glob(".*.partial")):
        match = PARTIAL.fullmatch(path.name)
        if match and (int(match[1]) == os.getpid() or not _is_alive(int(match[1]))):
            path.unlink(missing_ok=True)
            orphans.append(path)
    return orphans


class HashedFile:
    """What `torch.save` writes to: hashes as it goes, and keeps the first error to itself.

    torch answers an exception in `write` with one of its own, "unexpected pos", without the reason.
    """

    def __init__(self, file: BinaryIO):
        self.file, self.sha256 = file, hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: bytes | memoryview) -> int:
        if self.error is None:
            try:
                self.file.write(data)
                self.sha256.update(data)
            except OSError as error:
                self.error = error
        return memoryview(data).nbytes

    def flush(self) -> None:
        """Nothing here: the file is synced once it is complete."""


def sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable, where the filesystem can do that."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            raise
    finally:
        os.close(descriptor)


@contextmanager
def partial_of(path: Path) -> Iterator[Path]:
    """The name to write `path` under; whatever happens, nothing is left of it."""
    partial = partial_path(path)
    partial.unlink(missing_ok=True)
    try:
        yield partial
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def write_digests(path: Path, digests: list[str]) -> None:
    """Replace NAME.sha256; a line for each digest, in the format of `sha256sum`."""
    target = digest_path(path)
    with partial_of(target) as partial:
        with open(partial, "wb") as file:
            file.writelines(f"{digest}  {path.name}\n".encode() for digest in digests)
            sync(file)
        os.replace(partial, target)
    sync_folder(path.parent)


def commit(partial: Path, path: Path, digest: str) -> None:
    """Put a complete file in place of `path`, which has a right digest at every moment.

    So NAME.sha256 holds both the old and the new one while the file is replaced.
    """
    if path.exists():
        known = known_digests(path) or [file_digest(path)]
        write_digests(path, list(dict.fromkeys([*known, digest])))
    else:
        write_digests(path, [digest])
    os.replace(partial, path)
    sync_folder(path.parent)
    with suppress(OSError):  # the digest of the file is among them in any case
        write_digests(path, [digest])


def save_durably(checkpoint: dict[str, Any], path: Path) -> None:
    """`torch.save` to a file that is either there, complete and verifiable, or not at all.

    Raises OSError where the disk is full or the folder cannot be written; `path` is then as before.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with partial_of(path) as partial:
        with open(partial, "wb") as file:
            hashed: Any = HashedFile(file)  # torch asks for write and flush alone
            torch.save(checkpoint, hashed)
            if hashed.error is not None:
                raise hashed.error
            sync(file)
        commit(partial, path, hashed.sha256.hexdigest())


def link_durably(source: Path, path: Path) -> None:
    """Make `path` the same file as the checkpoint `source`, a copy where there are no hard links.

    Raises OSError as `save_durably` does.
    """
    digests = known_digests(source)
    digest = digests[0] if len(digests) == 1 else file_digest(source)
    with partial_of(path) as partial:
        try:
            os.link(source, partial)
        except OSError:
            with open(source, "rb") as original, open(partial, "wb") as file:
                shutil.copyfileobj(original, file, 1 << 20)
                sync(file)
        commit(partial, path, digest)


class DurableCheckpointIO(TorchCheckpointIO):
    """Lightning's plugin: `plugins=[DurableCheckpointIO()]` makes every save of a Trainer durable.

    A save that fails for want of space or rights is logged as an error and training goes on with
    the file as it was: the other ranks wait for the one that writes, and an exception here would
    leave them waiting. `failures` says what is not written; `LastCheckpoint` raises where that is
    the last step's. Paths with a scheme (s3://...) are written by Lightning's own plugin.
    """

    def __init__(self) -> None:
        super().__init__()
        self.failures: dict[Path, str] = {}  # path -> why its last save failed

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        if is_remote(str(path)):
            return super().save_checkpoint(checkpoint, path, storage_options)
        self._try(Path(path), lambda: save_durably(checkpoint, Path(path)))

    def link_checkpoint(self, source: Path, path: Path) -> None:
        """Make `path` the same file as `source`; a failure is kept as that of a save is."""
        self._try(path, lambda: link_durably(source, path))

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = True
    ) -> dict[str, Any]:
        """Tensors and plain containers alone, whatever `weights_only` says."""
        return super().load_checkpoint(path, map_location, weights_only=True)

    def remove_checkpoint(self, path: str | Path) -> None:
        super().remove_checkpoint(path)
        if not is_remote(str(path)):
            digest_path(Path(path)).unlink(missing_ok=True)

    def _try(self, path: Path, write: Callable[[], None]) -> None:
        try:
            write()
        except OSError as error:
            self.failures[path] = f"{error.strerror or error}"
            log.error(
                "%s could not be written: %s. %s",
                path,
                self.failures[path],
                "The file that was there stays" if os.path.exists(path) else "There is none",
            )
        else:
            self.failures.pop(path, None)
