"""Checkpoints are whole and verifiable, or were not written: on a full disk, after a kill."""

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dcar.errors import CheckpointError
from dcar.lit import checkpoint_io
from dcar.lit.checkpoint_io import (
    DurableCheckpointIO,
    HashedFile,
    commit,
    link_durably,
    partial_path,
    save_durably,
    sweep,
)
from dcar.models.checkpoints import file_digest, known_digests, read_checkpoint

SCRIPT = Path(__file__).with_name("kill_run.py")


def checkpoint(value: float, size: int = 1000) -> dict:
    return {"dcar": {"module": "Toy"}, "weight": torch.full((size,), value)}


def value_of(path: Path) -> float:
    """Of a checkpoint that is whole and verifies."""
    return float(read_checkpoint(path)["weight"][0])


def is_verified(path: Path) -> bool:
    return known_digests(path) == [file_digest(path)]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of its own with room for two checkpoints of 100,000 values."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a filesystem is for the superuser")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_checkpoint_is_what_was_saved_and_sha256sum_agrees(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.ckpt"
    DurableCheckpointIO().save_checkpoint(checkpoint(1.0), path)
    assert value_of(path) == 1.0 and is_verified(path)
    assert sorted(file.name for file in path.parent.iterdir()) == ["a.ckpt", "a.ckpt.sha256"]
    if shutil.which("sha256sum"):
        check = ["sha256sum", "--check", "--strict", "a.ckpt.sha256"]
        assert subprocess.run(check, cwd=path.parent, capture_output=True).returncode == 0


def test_lightning_s_own_load_takes_tensors_and_plain_containers_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    DurableCheckpointIO().save_checkpoint(checkpoint(1.0), path)
    assert DurableCheckpointIO().load_checkpoint(path)["weight"][0] == 1.0
    torch.save({"path": Path("x")}, path)
    with pytest.raises(Exception, match="weights_only|WeightsUnpickler"):
        DurableCheckpointIO().load_checkpoint(path, weights_only=False)


def test_at_every_moment_of_a_commit_the_file_is_the_old_or_the_new_one_and_verifies(
    tmp_path: Path, monkeypatch
) -> None:
    """Looks at the folder as a kill before and after each call of the system would leave it."""
    path, seen = tmp_path / "a.ckpt", []
    save_durably(checkpoint(1.0), path)

    def watched(function):
        def call(*arguments):
            seen.append(value_of(path))
            result = function(*arguments)
            seen.append(value_of(path))
            return result

        return call

    for name in ("replace", "fsync", "open"):
        monkeypatch.setattr(os, name, watched(getattr(os, name)))
    save_durably(checkpoint(2.0), path)
    monkeypatch.undo()
    assert seen == sorted(seen) and set(seen) == {1.0, 2.0} and is_verified(path)


def test_a_checkpoint_without_a_digest_is_replaced_as_safely(tmp_path: Path, monkeypatch) -> None:
    path, seen = tmp_path / "a.ckpt", []
    torch.save(checkpoint(1.0), path)
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda *a: (seen.append(value_of(path)), replace(*a)))
    save_durably(checkpoint(2.0), path)
    assert seen[0] == 1.0 and value_of(path) == 2.0


def test_the_folder_is_synced_after_the_file_has_its_name(tmp_path: Path, monkeypatch) -> None:
    """Contents, rename, folder: in this order, for the file and for its digest."""
    calls, replace, fsync = [], os.replace, os.fsync

    def kind(descriptor: int) -> str:
        return Path(os.readlink(f"/proc/self/fd/{descriptor}")).name.split(".")[1]

    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append(f"sync {kind(fd)}"), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("replace"), replace(a, b)))
    folder = tmp_path / "x.folder"
    save_durably(checkpoint(1.0), folder / "a.ckpt")
    one = ["sync a", "replace", "sync folder"]
    assert calls == ["sync a", *one, "replace", "sync folder", *one]


def test_the_hash_is_of_what_was_written(tmp_path: Path) -> None:
    with open(tmp_path / "a", "wb") as file:
        hashed = HashedFile(file)
        assert hashed.write(b"abc") == 3 and hashed.write(memoryview(b"de")) == 2
    assert hashed.sha256.hexdigest() == file_digest(tmp_path / "a")


@pytest.mark.parametrize("left", [0, 100, 10_000, 390_000])
def test_when_the_disk_is_full_the_old_file_stays_and_training_goes_on(
    left: int, small_disk: Path, caplog
) -> None:
    plugin, path = DurableCheckpointIO(), small_disk / "a.ckpt"
    plugin.save_checkpoint(checkpoint(1.0, 100_000), path)
    free = shutil.disk_usage(small_disk).free
    (small_disk / "filler").write_bytes(b"x" * (free - left))
    plugin.save_checkpoint(checkpoint(2.0, 100_000), path)
    assert value_of(path) == 1.0 and is_verified(path)
    assert plugin.failures == {path: os.strerror(errno.ENOSPC)}
    assert f"{path} could not be written: No space left on device. The file that was" in caplog.text
    assert {p.name for p in small_disk.iterdir()} == {"a.ckpt", "a.ckpt.sha256", "filler"}
    (small_disk / "filler").unlink()
    plugin.save_checkpoint(checkpoint(3.0, 100_000), path)
    assert value_of(path) == 3.0 and plugin.failures == {}


def test_a_file_that_may_grow_no_further_is_as_a_full_disk(tmp_path: Path, caplog) -> None:
    plugin, path = DurableCheckpointIO(), tmp_path / "a.ckpt"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        plugin.save_checkpoint(checkpoint(1.0, 100_000), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == [] and "There is none" in caplog.text
    assert plugin.failures == {path: os.strerror(errno.EFBIG)}


def test_a_folder_that_is_read_only_is_reported_and_left_as_it_is(small_disk: Path, caplog) -> None:
    plugin, path = DurableCheckpointIO(), small_disk / "a.ckpt"
    plugin.save_checkpoint(checkpoint(1.0), path)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    plugin.save_checkpoint(checkpoint(2.0), path)
    plugin.link_checkpoint(path, small_disk / "b.ckpt")
    assert value_of(path) == 1.0 and is_verified(path)
    assert plugin.failures[path] == os.strerror(errno.EROFS)
    assert "b.ckpt could not be written: Read-only file system" in caplog.text


def test_a_folder_that_cannot_be_made_is_reported(tmp_path: Path, caplog) -> None:
    (tmp_path / "file").write_text("")
    DurableCheckpointIO().save_checkpoint(checkpoint(1.0), tmp_path / "file" / "a.ckpt")
    assert "file/a.ckpt could not be written" in caplog.text


def test_what_is_not_the_disk_s_fault_is_not_hidden(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="pickle"):
        DurableCheckpointIO().save_checkpoint({"a": lambda: None}, tmp_path / "a.ckpt")
    assert list(tmp_path.iterdir()) == []


def test_a_link_is_the_same_file_with_a_digest_of_its_own(tmp_path: Path) -> None:
    source, path = tmp_path / "step.ckpt", tmp_path / "last.ckpt"
    save_durably(checkpoint(1.0), path)
    save_durably(checkpoint(2.0), source)
    for _ in range(2):  # the second time the two are one file already
        link_durably(source, path)
        assert path.samefile(source) and value_of(path) == 2.0 and is_verified(path)
    assert len(list(tmp_path.iterdir())) == 4


def test_without_hard_links_it_is_a_copy(tmp_path: Path, monkeypatch) -> None:
    def no_links(*_) -> None:
        raise OSError(errno.EPERM, "no hard links here")

    source, path = tmp_path / "step.ckpt", tmp_path / "last.ckpt"
    save_durably(checkpoint(2.0), source)
    monkeypatch.setattr(os, "link", no_links)
    link_durably(source, path)
    assert not path.samefile(source) and value_of(path) == 2.0 and is_verified(path)


def test_removing_a_checkpoint_takes_its_digest_along(tmp_path: Path) -> None:
    plugin, path = DurableCheckpointIO(), tmp_path / "a.ckpt"
    plugin.save_checkpoint(checkpoint(1.0), path)
    plugin.remove_checkpoint(path)
    assert list(tmp_path.iterdir()) == []


def test_a_url_is_written_as_lightning_writes_it() -> None:
    plugin = DurableCheckpointIO()
    plugin.save_checkpoint(checkpoint(1.0), "memory://bucket/a.ckpt")
    assert plugin.load_checkpoint("memory://bucket/a.ckpt")["weight"][0] == 1.0
    plugin.remove_checkpoint("memory://bucket/a.ckpt")


def test_only_what_dead_processes_have_left_is_swept(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    names = [f".a.ckpt.{pid}.partial" for pid in (ended.pid, os.getpid(), os.getppid())]
    kept = [names[2], "a.ckpt", ".a.ckpt.partial", ".a.ckpt.x.partial", "a.ckpt.1.partial"]
    for name in {*names, *kept}:
        (tmp_path / name).write_bytes(b"half")
    assert {path.name for path in sweep(tmp_path)} == set(names[:2])
    assert {path.name for path in tmp_path.iterdir()} == set(kept)


def test_a_folder_that_is_not_there_has_nothing_to_sweep(tmp_path: Path) -> None:
    assert sweep(tmp_path / "nowhere") == []


def test_a_partial_file_lies_beside_its_target_and_is_known_to_the_sweep(tmp_path: Path) -> None:
    path = partial_path(tmp_path / "a.ckpt")
    assert path.parent == tmp_path and checkpoint_io.PARTIAL.fullmatch(path.name)


def test_a_kill_between_digest_and_file_does_not_make_the_old_file_look_damaged(
    tmp_path: Path, monkeypatch
) -> None:
    path, partial = tmp_path / "a.ckpt", tmp_path / "new"
    save_durably(checkpoint(1.0), path)
    torch.save(checkpoint(2.0), partial)

    class Killed(BaseException):
        pass

    replace = os.replace

    def killed(source, target) -> None:
        if target == path:
            raise Killed
        replace(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(Killed):
        commit(partial, path, file_digest(partial))
    monkeypatch.undo()
    assert len(known_digests(path)) == 2 and value_of(path) == 1.0
    save_durably(checkpoint(3.0), path)
    assert value_of(path) == 3.0 and is_verified(path)


def test_a_flipped_byte_of_a_tensor_is_found(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    save_durably(checkpoint(1.0), path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    torch.load(path, weights_only=True)  # torch itself sees nothing
    with pytest.raises(CheckpointError, match=r"damaged: its sha256 is not the one in a\.ckpt\.sh"):
        read_checkpoint(path)


@pytest.fixture
def other_disk() -> Iterator[Path]:
    """A folder on another filesystem than temporary files are on."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        pytest.skip(f"{memory} is not there to write to")
    folder = memory / f"dcar-kills-{os.getpid()}"
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.slow
def test_a_training_killed_at_any_moment_leaves_a_whole_checkpoint(
    tmp_path: Path, other_disk: Path
) -> None:
    """SIGKILLs of real trainings that save every step: at random, mid-write and mid-commit."""
    folders = [str(tmp_path / "run"), str(other_disk)]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "kills", "6", *folders],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    kills = json.loads(done.stdout.splitlines()[-1])
    for kill in kills:
        assert kill["error"] is None and kill["step"] in kill["expected"], kill
        assert kill["orphans_after_sweep"] == [], kill
    for folder in folders:
        there = [kill for kill in kills if kill["folder"] == folder]
        assert len(there) == 6 and any(kill["orphans"] for kill in there)
    assert any(kill["digests"] == 2 for kill in kills), "no kill hit the middle of a commit"
