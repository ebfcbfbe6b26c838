"""Shards: same bytes each time, nothing half written, nothing executed, every change noticed."""

import io
import os
import pickle
import random
import tarfile
from pathlib import Path

import pytest

from dcar.data.shards import (
    DataError,
    count_samples,
    expand,
    read_manifest,
    read_shard,
    verify,
    write_manifest,
    write_shards,
)


def samples(count: int) -> list[dict[str, bytes | str]]:
    return [
        {"__key__": f"a/{i:03d}", "webp": bytes([i]) * 700, "txt": f"caption {i}".encode()}
        for i in range(count)
    ]


def folder_of(tmp_path: Path, count: int = 10, per_shard: int = 4) -> Path:
    entries = write_shards(samples(count), tmp_path / "set", "train", per_shard)
    write_manifest(tmp_path / "set", {"train": entries})
    return tmp_path / "set"


def plant(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_what_was_written_is_read_back_in_order(tmp_path):
    folder = folder_of(tmp_path)
    read = [raw for path in expand(folder / "train-*.tar") for raw in read_shard(path)]
    assert read == samples(10)


def test_the_same_samples_give_the_same_bytes(tmp_path):
    first = write_shards(samples(9), tmp_path / "one", "train", 4)
    assert write_shards(samples(9), tmp_path / "two", "train", 4) == first
    assert [entry.samples for entry in first] == [4, 4, 1]


def test_a_writer_that_fails_leaves_no_shard(tmp_path):
    def failing():
        yield from samples(5)
        raise OSError("the source broke")

    with pytest.raises(OSError, match="the source broke"):
        write_shards(failing(), tmp_path, "train", 100)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_neither_shard_nor_leftovers(tmp_path, monkeypatch):
    def full(descriptor: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        write_shards(samples(3), tmp_path, "train", 3)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "sample",
    [
        {"__key__": "../up", "txt": b"x"},
        {"__key__": "/root", "txt": b"x"},
        {"__key__": "dotted.name", "txt": b"x"},
        {"__key__": "fine", "pyd": b"x"},
        {"__key__": "fine", "txt": "not bytes"},
    ],
)
def test_a_sample_no_reader_would_take_is_refused_by_the_writer(tmp_path, sample):
    with pytest.raises(ValueError):
        write_shards([sample], tmp_path, "train", 1)


def test_an_untouched_folder_verifies(tmp_path):
    assert verify(folder_of(tmp_path)) == []


def test_verify_names_every_truncated_and_every_flipped_shard(tmp_path):
    folder = folder_of(tmp_path)
    path = folder / "train-000001.tar"
    whole, rng = path.read_bytes(), random.Random(0)
    for _ in range(60):
        path.write_bytes(whole[: rng.randrange(len(whole))])
        assert [problem.split(":")[0] for problem in verify(folder)] == [path.name]
        place = rng.randrange(len(whole))
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert [problem.split(":")[0] for problem in verify(folder)] == [path.name]


def test_verify_names_a_missing_shard_and_a_wrong_count(tmp_path):
    folder = folder_of(tmp_path)
    (folder / "train-000000.tar").unlink()
    entries = list(read_manifest(folder).values())
    wrong = [
        entry if entry.samples != 2 else type(entry)(**{**vars(entry), "samples": 3})
        for entry in entries
    ]
    write_manifest(folder, {"train": wrong})
    assert [problem.split(":")[0] for problem in verify(folder)] == [
        "train-000000.tar",
        "train-000002.tar",
    ]


def test_braces_and_globs_name_the_same_shards(tmp_path):
    folder = folder_of(tmp_path)
    assert expand(f"{folder}/train-{{000000..000002}}.tar") == expand(f"{folder}/train-*.tar")
    assert len(expand([folder / "train-000000.tar", folder / "train-000002.tar"])) == 2


@pytest.mark.parametrize("url", ["pipe:touch {0}", "http://host/a.tar", "s3://b/a.tar", "file:{0}"])
def test_urls_are_refused_and_no_shell_runs(tmp_path, url):
    marker = tmp_path / "ran"
    with pytest.raises(ValueError, match="no URL scheme"):
        expand(url.format(marker))
    with pytest.raises(ValueError, match="no URL scheme"):
        list(read_shard(url.format(marker)))
    assert not marker.exists()


@pytest.mark.parametrize("pattern", ["none-*.tar", "none.tar", "train-{000000..000009}.tar"])
def test_a_pattern_without_shards_is_an_error_that_names_it(tmp_path, pattern):
    folder = folder_of(tmp_path)
    with pytest.raises(FileNotFoundError) as error:
        expand(str(folder / pattern))
    assert pattern in str(error.value)


class Payload:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_members_of_other_types_are_neither_run_nor_returned(tmp_path):
    poison = pickle.dumps(Payload(tmp_path / "ran"))
    names = ("a.pyd", "a.pickle", "a.pth", "a.npy", "a.txt.pickle", "a.TXT")
    path = plant(tmp_path / "x.tar", dict.fromkeys(names, poison))
    assert [set(raw) for raw in read_shard(path)] == [{"__key__", "txt"}]
    assert not (tmp_path / "ran").exists()


def test_links_and_paths_that_climb_out_write_nothing(tmp_path):
    inside = tmp_path / "inside"
    inside.mkdir()
    with tarfile.open(inside / "x.tar", "w") as tar:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE):
            info = tarfile.TarInfo("link.txt")
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        info = tarfile.TarInfo("../out.txt")
        info.size = 1
        tar.addfile(info, io.BytesIO(b"x"))
    before = sorted(tmp_path.rglob("*"))
    assert [raw["__key__"] for raw in read_shard(inside / "x.tar")] in ([], ["../out"])
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("content", [b"", b"<html>503</html>" * 200, b"\0" * 100])
def test_what_is_no_tar_is_an_error_that_names_the_file(tmp_path, content):
    (tmp_path / "x.tar").write_bytes(content)
    with pytest.raises(DataError, match="x.tar"):
        list(read_shard(tmp_path / "x.tar"))


def test_a_member_named_twice_is_an_error(tmp_path):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        for _ in range(2):
            tar.addfile(tarfile.TarInfo("a.txt"), io.BytesIO(b""))
    with pytest.raises(DataError, match="x.tar"):
        list(read_shard(path))


def test_counts_come_from_the_manifest_or_from_reading(tmp_path):
    folder = folder_of(tmp_path)
    paths = expand(folder / "train-*.tar")
    assert count_samples(paths) == [4, 4, 2]
    (folder / "manifest.json").unlink()
    assert count_samples(paths) == [4, 4, 2]


def test_a_broken_manifest_is_an_error(tmp_path):
    folder = folder_of(tmp_path)
    (folder / "manifest.json").write_text('{"shards": [{"name": "a"}]}')
    with pytest.raises(DataError, match="manifest"):
        read_manifest(folder)
