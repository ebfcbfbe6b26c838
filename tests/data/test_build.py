"""Builds: the same bytes however often they are stopped, every drop counted, nothing twice."""

import os
import tracemalloc
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import fsspec
import numpy as np
import pytest

from dcar.data.build import Report, Tally, left_out
from dcar.data.build_unit import Part, key_digest
from dcar.data.filters import Filters
from dcar.data.shards import read_facts, read_manifest, read_sizes
from dcar.data.sources.source import Record, Unit
from dcar.errors import DataError
from tests.builds import GivenSource, Silent, all_bytes, built, picture, record, samples_of

SIZES = ((40, 30), (24, 24), (30, 40))


def several(units: int = 4, each: int = 3) -> list[list[Record]]:
    numbers = [[unit * each + n for n in range(each)] for unit in range(units)]
    return [[record(n, image=picture(n, SIZES[n % 3])) for n in unit] for unit in numbers]


def test_a_build_leaves_shards_a_manifest_and_sizes_and_nothing_else(tmp_path: Path) -> None:
    report = built(GivenSource(several()), tmp_path)
    names = [f"toy-train-{n:06d}.tar" for n in range(4)]
    assert sorted(all_bytes(tmp_path)) == ["manifest.json", "sizes.npz", *names]
    assert list(read_manifest(tmp_path)) == names
    assert list(samples_of(tmp_path)) == [f"k{n:03d}" for n in range(12)]
    assert all(np.array_equal(read_sizes(tmp_path)[name], SIZES) for name in names)
    size = sum(path.stat().st_size for path in tmp_path.glob("*.tar"))
    assert report == Report({"train": Tally(12, 4, size, {})})
    facts = read_facts(tmp_path)
    assert facts["build"]["samples_per_shard"] == 100 and facts["build"]["resize"] is None
    assert facts["splits"]["train"]["samples"] == 12 and "pillow" in facts["versions"]


def test_a_finished_build_says_so_and_reads_nothing(tmp_path: Path) -> None:
    report = built(GivenSource(several()), tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    again = built(GivenSource([]), tmp_path)
    assert again == Report(report.splits, found=True)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_what_decides_the_bytes_may_not_change(tmp_path: Path) -> None:
    built(GivenSource(several()), tmp_path)
    with pytest.raises(ValueError, match="resize was None, is 8"):
        built(GivenSource(several()), tmp_path, filters=Filters(resize=8))
    with pytest.raises(ValueError, match="near_duplicates was None, is 4"):
        built(GivenSource(several()), tmp_path, near_duplicates=4)


class Killed(BaseException):
    """Ends a build as a signal does: nothing catches it."""


@dataclass
class DyingSource(GivenSource):
    """Dies when so many records were read."""

    lives: int = 0

    def read(self, unit: Unit) -> Iterator[Record]:
        for each in super().read(unit):
            if self.lives == 0:
                raise Killed
            self.lives -= 1
            yield each


@pytest.mark.parametrize("near_duplicates", [None, 4])
@pytest.mark.parametrize("streamed", [False, True])
def test_a_build_that_dies_again_and_again_ends_in_the_same_bytes(
    streamed: bool, near_duplicates: int | None, tmp_path: Path
) -> None:
    records = several(units=3, each=4)
    records[1][2] = record(5, key="k000")  # a key of another unit
    records[2][0] = record(3, key="near", image=records[0][1].image)
    changes = {"samples_per_shard": 2, "near_duplicates": near_duplicates}
    whole = built(GivenSource(records, streamed=streamed), tmp_path / "whole", **changes)
    deaths, report = 0, None
    while report is None:
        source = DyingSource(records, streamed=streamed, lives=5)
        try:
            report = built(source, tmp_path / "torn", **changes)
        except Killed:
            deaths += 1
            (tmp_path / "torn" / ".x.tar.1.ab.partial").touch()
    assert deaths >= 3 and report == whole
    assert all_bytes(tmp_path / "torn") == all_bytes(tmp_path / "whole")


def test_a_key_in_two_units_is_kept_in_the_first_and_counted(tmp_path: Path) -> None:
    records = several()
    records[2][1] = record(50, key="k000", caption="the later one")
    records[3][0] = record(51, key="k000")
    records[3][1] = record(52, key="k000")
    report = built(GivenSource(records), tmp_path)
    assert report.splits["train"].dropped == {"duplicate key": 3}
    assert samples_of(tmp_path)["k000"]["txt"] == b"words 0" and len(samples_of(tmp_path)) == 9


@pytest.mark.parametrize("streamed", [False, True])
def test_no_shard_is_left_of_what_repeats(streamed: bool, tmp_path: Path) -> None:
    records = several(units=3)
    records[1] = [record(10 + n, key=f"k{n:03d}") for n in range(3)]
    records[2][1:] = [record(20 + n, key=f"k{n:03d}") for n in range(2)]
    source = GivenSource(records, streamed=streamed)
    report = built(source, tmp_path, samples_per_shard=2)
    assert report.splits["train"].dropped == {"duplicate key": 5}
    assert report.splits["train"].examples == {"duplicate key": ["k000", "k001", "k002"]}
    found = built(source, tmp_path, samples_per_shard=2)  # as the manifest keeps it
    assert found.found and found.splits == report.splits
    assert sorted(path.name for path in tmp_path.glob("*.tar")) == sorted(read_manifest(tmp_path))
    assert list(samples_of(tmp_path)) == ["k000", "k001", "k002", "k006"]


def test_the_same_key_in_two_splits_is_no_repetition(tmp_path: Path) -> None:
    @dataclass
    class TwoSplits(GivenSource):
        def units(self, samples_per_shard: int) -> list[Unit]:
            return [Unit(split, 0, 3, 0) for split in ("train", "val")]

    report = built(TwoSplits([several()[0]]), tmp_path, near_duplicates=4)
    assert [(s, t.samples, t.dropped) for s, t in report.splits.items()] == [
        ("train", 3, {}),
        ("val", 3, {}),
    ]
    splits = [shard["split"] for shard in manifest_shards(tmp_path)]
    assert splits == ["train", "val"]


def manifest_shards(folder: Path) -> list[dict]:
    import json

    return json.loads((folder / "manifest.json").read_text())["shards"]


def test_near_duplicates_are_found_across_units_and_the_first_is_kept(tmp_path: Path) -> None:
    large = picture(91, (480, 360))
    small = Filters(resize=120).picture(large).data
    records = several()
    records[0][2] = record(60, key="first", image=large)
    records[1][0] = record(61, key="second", image=small)
    records[3][2] = record(62, key="third", image=large)
    report = built(GivenSource(records), tmp_path, near_duplicates=4)
    assert report.splits["train"].dropped == {"near duplicate": 2}
    keys = set(samples_of(tmp_path))
    assert "first" in keys and not keys & {"second", "third"} and len(keys) == 10


def test_a_repeated_key_drops_no_other_picture_for_looking_like_it() -> None:
    parts = [Part(), Part()]
    for part, keys, hashes in zip(parts, ("a", "ab"), ([1], [0xFFFF, 0xFFFE]), strict=True):
        part.digests.extend(map(key_digest, keys))
        part.positions.extend(range(10, 10 + len(keys)))
        part.hashes.extend(hashes)
    assert left_out(parts, distance=4) == [{}, {10: "duplicate key"}]


def test_a_unit_that_fails_is_named_after_the_others_are_finished(tmp_path: Path) -> None:
    broken = {n: str(tmp_path / f"{n}.tgz") for n in (1, 3)}
    for path in broken.values():
        Path(path).touch()
    whole = built(GivenSource(several()), tmp_path / "whole")
    source, progress = GivenSource(several(), broken=broken), Silent()
    with pytest.raises(DataError, match="2 of 4 units failed") as failed:
        built(source, tmp_path / "out", progress=progress)
    assert all(path in str(failed.value) for path in broken.values())
    assert len(progress.names) == 4 and not (tmp_path / "out" / "manifest.json").exists()
    for path in broken.values():
        Path(path).unlink()
    assert built(source, tmp_path / "out", progress=progress) == whole
    assert progress.names[4:] == ["train-000001", "train-000003"]
    assert all_bytes(tmp_path / "out") == all_bytes(tmp_path / "whole")


@pytest.mark.parametrize("near_duplicates", [None, 4])
@pytest.mark.parametrize("streamed", [False, True])
def test_a_build_goes_on_without_all_of_a_broken_unit_where_it_may(
    streamed: bool, near_duplicates: int | None, tmp_path: Path, caplog
) -> None:
    marker = tmp_path / "1.tgz"
    marker.touch()
    source = GivenSource(several(), streamed=streamed, broken={1: str(marker)})
    changes = {"near_duplicates": near_duplicates, "samples_per_shard": 2}
    with pytest.raises(DataError, match="with skip_broken=true it goes on"):
        built(source, tmp_path / "out", **changes)
    report = built(source, tmp_path / "out", skip_broken=True, **changes)
    assert report.splits["train"].dropped == {"lost with its archive": 3}
    assert report.splits["train"].samples == 9 and f"{marker}: breaks off" in caplog.text
    stored = {path.name for path in (tmp_path / "out").glob("*.tar")}
    assert stored == set(read_manifest(tmp_path / "out")) and len(samples_of(tmp_path / "out")) == 9
    built(source, tmp_path / "at once", skip_broken=True, **changes)
    assert all_bytes(tmp_path / "at once") == all_bytes(tmp_path / "out")


def test_what_cannot_be_written_is_never_left_out(tmp_path: Path) -> None:
    (tmp_path / "toy-train-000001.tar" / "a folder in its place").mkdir(parents=True)
    with pytest.raises(DataError, match="1 of 4 units failed.*train-000001: .*directory"):
        built(GivenSource(several()), tmp_path, skip_broken=True)
    assert not (tmp_path / "manifest.json").exists()


def test_an_error_that_nobody_foresaw_does_not_end_the_other_units(tmp_path: Path) -> None:
    @dataclass
    class Surprising(GivenSource):
        def read(self, unit: Unit) -> Iterator[Record]:
            yield from super().read(unit)
            if unit.number == 1:
                raise ZeroDivisionError("of all things")

    progress = Silent()
    with pytest.raises(DataError, match="1 of 4 units .*train-000001: ZeroDivisionError: of all"):
        built(Surprising(several()), tmp_path, progress=progress)
    assert len(progress.names) == 4


def test_nothing_is_left_out_of_sight_when_hashing_fails(tmp_path: Path) -> None:
    marker = tmp_path / "a.tgz"
    marker.touch()
    source = GivenSource(several(), broken={2: str(marker)})
    with pytest.raises(DataError, match="train-000002: .*a.tgz"):
        built(source, tmp_path / "out", near_duplicates=4)
    assert list((tmp_path / "out").glob("*.tar")) == []


def test_a_build_of_nothing_says_why(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds nothing"):
        built(GivenSource([]), tmp_path / "a")
    with pytest.raises(DataError, match="no sample is left.*no caption.*: 1"):
        built(GivenSource([[record(0, caption="")]]), tmp_path / "b")


def test_an_impossible_distance_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="near_duplicates=9"):
        built(GivenSource(several()), tmp_path / "out", near_duplicates=9)
    assert not (tmp_path / "out").exists()


def test_a_store_holds_the_same_bytes_as_a_local_folder(tmp_path: Path) -> None:
    records = several()
    records[1][0] = record(9, key="k000")
    marker = tmp_path / "a.tgz"
    marker.touch()
    source, out = GivenSource(records, broken={2: str(marker)}), "memory://built/toy"
    with pytest.raises(DataError):
        built(source, out)
    marker.unlink()
    built(source, out)
    assert built(source, out).found
    built(source, tmp_path / "local")
    store = fsspec.filesystem("memory")
    try:
        stored = {
            path.removeprefix("/built/toy/"): store.cat(path) for path in store.find("/built")
        }
        assert stored == all_bytes(tmp_path / "local")
    finally:
        store.rm("/built", recursive=True)


class LargeSource(GivenSource):
    """Pictures of a megabyte, made when they are read."""

    def read(self, unit: Unit) -> Iterator[Record]:
        for number in range(100):
            yield record(number, image=picture(0) + os.urandom(2**20))


@pytest.mark.slow
def test_memory_is_that_of_a_few_pictures_whatever_the_length_of_a_unit(tmp_path: Path) -> None:
    tracemalloc.start()
    try:
        built(LargeSource([[record(0)]]), tmp_path, filters=Filters(check="header"))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (tmp_path / "toy-train-000000.tar").stat().st_size > 100 * 2**20
    assert peak < 12 * 2**20
