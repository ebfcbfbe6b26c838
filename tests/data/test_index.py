"""Indexes: any sample by its position, nothing followed or inflated, breaks and doubles named."""

import io
import logging
import os
import pickle
import random
import tarfile
from pathlib import Path

import psutil
import pytest

from dcar.data.index import ShardIndex, count_samples, read_shard
from dcar.data.members import BadSample
from dcar.data.shards import write_shards
from dcar.errors import DataError


def samples(count: int) -> list[dict[str, bytes | str]]:
    return [
        {"__key__": f"a/{i:03d}", "webp": bytes([i]) * 700, "txt": f"caption {i}".encode()}
        for i in range(count)
    ]


def shard(folder: Path, count: int = 10) -> Path:
    write_shards(samples(count), folder, "s", count)
    return folder / "s-000000.tar"


def plant(path: Path, members: list[tuple[str, bytes]], **header) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for field, value in header.items():
                setattr(info, field, value)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_samples_are_read_in_any_order(tmp_path):
    index, expected = ShardIndex(shard(tmp_path)), samples(10)
    assert len(index) == 10 and index.broken is None
    for position in random.Random(0).sample(range(10), 10):
        assert index.read(position) == expected[position]
        assert index.find(str(expected[position]["__key__"])) == position
    assert index.find("a/999") is None


def test_a_shard_is_read_in_its_order(tmp_path):
    assert list(read_shard(shard(tmp_path))) == samples(10)


def test_spans_hold_their_samples_and_no_more(tmp_path):
    path = shard(tmp_path)
    index, whole = ShardIndex(path), path.read_bytes()
    offset, size = index.span(3, 5)
    part = whole[offset : offset + size]
    assert bytes([3]) * 700 in part and part.endswith(b"caption 4")
    assert bytes([2]) * 700 not in part and bytes([5]) * 700 not in part


def test_what_is_read_soon_is_asked_for_up_to_the_end_of_the_shard(tmp_path, monkeypatch):
    index, asked = ShardIndex(shard(tmp_path)), []
    monkeypatch.setattr(os, "posix_fadvise", lambda *request: asked.append(request[1:3]))
    index.advise(3, 5)
    index.advise(8, 10_000)
    index.advise(10, 20)
    assert asked == [index.span(3, 5), index.span(8, 10)]


def test_no_file_stays_open_that_nobody_reads(tmp_path):
    good, bad = shard(tmp_path), tmp_path / "page.tar"
    bad.write_bytes(b"<html>" * 500)
    assert len(list(read_shard(good))) == count_samples(good) == 10
    with pytest.raises(DataError) as kept:  # with the frames that hold what they had opened
        ShardIndex(bad)
    held = {Path(file.path).name for file in psutil.Process().open_files()}
    assert kept.value and not held & {good.name, bad.name}


def test_every_cut_is_noticed_and_leaves_the_samples_before_it(tmp_path):
    path = shard(tmp_path)
    whole, rng = path.read_bytes(), random.Random(1)
    end = len(whole.rstrip(b"\0"))
    for _ in range(60):
        cut = rng.randrange(1, end)
        path.write_bytes(whole[:cut])
        try:
            index = ShardIndex(path)
        except DataError:
            assert cut < 512 + 700 + 512 + 512
            continue
        assert index.broken
        for position in range(len(index) - 1):
            assert index.read(position) == samples(10)[position]
        if len(index):  # whole members of the last one, no part of one
            assert index.read(len(index) - 1).items() <= samples(10)[len(index) - 1].items()
        with pytest.raises(DataError, match="s-000000.tar"):
            list(read_shard(path))


@pytest.mark.parametrize("content", [b"", b"<html>503</html>" * 100, b"\x1f\x8b" + b"x" * 2000])
def test_what_is_no_tar_is_named(tmp_path, content):
    path = tmp_path / "page.tar"
    path.write_bytes(content)
    with pytest.raises(DataError, match="page.tar"):
        ShardIndex(path)
    assert count_samples(path) == 0


def test_a_header_damaged_in_the_middle_is_no_end_of_archive(tmp_path):
    path = shard(tmp_path)
    data = bytearray(path.read_bytes())
    data[3 * (512 + 1024 + 512 + 512) + 148] ^= 1  # checksum of the fourth sample's first header
    path.write_bytes(data)
    index = ShardIndex(path)
    assert len(index) == 3 and "checksum" in str(index.broken)


def test_an_archive_that_just_stops_is_broken_after_its_last_sample(tmp_path):
    path = shard(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[: 10 * (512 + 1024 + 512 + 512)])
    index = ShardIndex(path)
    assert len(index) == 10 and "empty header" in str(index.broken)


def test_members_of_other_types_links_and_devices_are_passed_over(tmp_path):
    path = tmp_path / "odd.tar"
    with tarfile.open(path, "w") as tar:
        for name, kind in [
            ("k0.webp", tarfile.SYMTYPE),
            ("k0.jpg", tarfile.LNKTYPE),
            ("k0.txt", tarfile.CHRTYPE),
            ("k0.cls", tarfile.DIRTYPE),
        ]:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        for name in ("k1.pickle", "k1.txt", "../k2.txt", "/k3.txt"):
            info = tarfile.TarInfo(name)
            info.size = 1
            tar.addfile(info, io.BytesIO(b"x"))
    before = sorted(Path(tmp_path).rglob("*"))
    raws = list(read_shard(path))
    assert [raw["__key__"] for raw in raws] == ["k1", "../k2", "/k3"]
    assert set(raws[0]) == {"__key__", "txt"}
    assert sorted(Path(tmp_path).rglob("*")) == before


class Payload:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_pickles_are_neither_run_nor_returned(tmp_path):
    poison = pickle.dumps(Payload(tmp_path / "ran"))
    names = ("a.pyd", "a.pickle", "a.pth", "a.npy", "a.txt.pickle", "a.TXT")
    path = plant(tmp_path / "x.tar", [(name, poison) for name in names])
    assert [set(raw) for raw in read_shard(path)] == [{"__key__", "txt"}]
    assert not (tmp_path / "ran").exists()


def test_a_sparse_file_is_not_inflated(tmp_path):
    path = tmp_path / "sparse.tar"
    info = tarfile.TarInfo("k.jpg")
    info.type, info.size = tarfile.GNUTYPE_SPARSE, 0
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        tar.addfile(info)
        plain = tarfile.TarInfo("k.txt")
        plain.size = 1
        tar.addfile(plain, io.BytesIO(b"x"))
    assert [set(raw) for raw in read_shard(path)] == [{"__key__", "txt"}]


def test_a_member_given_twice_makes_the_one_sample_bad(tmp_path):
    path = plant(tmp_path / "d.tar", [("a.txt", b"1"), ("a.txt", b"2"), ("b.txt", b"3")])
    index = ShardIndex(path)
    with pytest.raises(BadSample, match="member twice"):
        index.read(0)
    assert index.read(1) == {"__key__": "b", "txt": b"3"}
    with pytest.raises(DataError, match="d.tar: a: member twice"):
        list(read_shard(path))


def test_a_member_of_gigabytes_is_refused_from_its_header(tmp_path):
    path = tmp_path / "big.tar"
    info = tarfile.TarInfo("k.jpg")
    info.size = 2**30
    with open(path, "wb") as file:
        file.write(info.tobuf())
        file.truncate(512 + 2**30 + 1024)  # a hole: no gigabyte is written
    with pytest.raises(BadSample, match="member too large"):
        ShardIndex(path).read(0)


@pytest.mark.slow
def test_sixty_thousand_members_take_bounded_memory(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    path, block = tmp_path / "many.tar", b"\0" * 512
    with open(path, "wb") as file:
        for number in range(60_000):
            info = tarfile.TarInfo(f"{number:07d}.txt")
            file.write(info.tobuf(tarfile.USTAR_FORMAT))
        file.write(block * 2)
    process = psutil.Process(os.getpid())
    before = process.memory_info().rss
    index = ShardIndex(path)
    assert len(index) == 60_000
    assert process.memory_info().rss - before < 20 * 2**20


@pytest.mark.parametrize("content", [b"", b"no tar at all", b"\0" * 10_240])
def test_a_shard_without_samples_is_warned_of(tmp_path, caplog, content):
    path = tmp_path / "a.tar"
    path.write_bytes(content)
    assert count_samples(path) == 0 and str(path) in caplog.text
