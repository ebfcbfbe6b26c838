"""One unit: its shards, its part, what is left out and why."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from dcar.data.build_unit import (
    Part,
    build_unit,
    key_digest,
    make_sample,
    part_url,
    scan_unit,
    scan_url,
)
from dcar.data.filters import Filters, Picture
from dcar.data.sources.source import Record, Unit
from tests.builds import GivenSource, picture, record, samples_of, task_of


def run(source: GivenSource, out: Path, without=None, **changes) -> Part:
    task = task_of(source, out, **changes)
    (unit,) = source.units(100)
    outcome = build_unit(task, unit, without or {})
    assert outcome.error is None
    return Part.load(part_url(task.work, unit))


def test_a_unit_of_known_length_is_one_shard_named_for_it(tmp_path: Path) -> None:
    part = run(GivenSource([[record(n) for n in range(5)]], split="val"), tmp_path)
    (shard,) = part.shards
    assert (shard.name, shard.samples) == ("toy-val-000000.tar", 5)
    assert list(samples_of(tmp_path)) == [f"k{n:03d}" for n in range(5)]
    assert part.sizes[0].tolist() == [40, 30] * 5 and part.positions.tolist() == list(range(5))
    assert part.digests.tolist() == [key_digest(f"k{n:03d}") for n in range(5)]


@pytest.mark.parametrize(
    ("limits", "lengths"),
    [
        ({"samples_per_shard": 2}, [2, 2, 1]),
        ({"max_shard_bytes": 1}, [1, 1, 1, 1, 1]),
        ({"samples_per_shard": 5}, [5]),
    ],
)
def test_a_unit_of_unknown_length_is_cut_by_samples_and_bytes(limits, lengths, tmp_path) -> None:
    source = GivenSource([[record(n) for n in range(5)]], streamed=True)
    part = run(source, tmp_path, **limits)
    assert [shard.samples for shard in part.shards] == lengths
    names = [f"toy-train-000000-{n:03d}.tar" for n in range(len(lengths))]
    assert [shard.name for shard in part.shards] == names
    assert sorted(path.name for path in tmp_path.glob("*.tar")) == names


def test_a_unit_of_known_length_is_cut_by_bytes_alone(tmp_path: Path) -> None:
    source = GivenSource([[record(n) for n in range(5)]])
    assert len(run(source, tmp_path / "a", samples_per_shard=2).shards) == 1
    more_than_one = len(record(0).image) + 4096
    part = run(source, tmp_path / "b", max_shard_bytes=more_than_one)
    names = ["toy-train-000000.tar", "toy-train-000000-001.tar", "toy-train-000000-002.tar"]
    assert [(shard.name, shard.samples) for shard in part.shards] == [
        (names[0], 2),
        (names[1], 2),
        (names[2], 1),
    ]
    assert len(samples_of(tmp_path / "b")) == 5 and [len(s) for s in part.sizes] == [4, 4, 2]


def test_a_part_of_an_older_version_has_no_examples(tmp_path: Path) -> None:
    path = tmp_path / "part.json"
    Part(dropped={"no caption": 1}).save(str(path))
    stored = json.loads(path.read_text())
    del stored["examples"]
    path.write_text(json.dumps(stored))
    assert Part.load(str(path)) == Part(dropped={"no caption": 1})


def test_each_reason_is_counted_and_the_rest_is_written(tmp_path: Path) -> None:
    records = [
        record(0),
        record(1, image=b"no picture"),
        record(2, caption=None),
        record(3, key="k000"),
        record(4, key="../up"),
        record(5, key="a.b"),
        record(6, dropped="no annotation", image=b"", caption=None),
        record(7),
        record(8),
        record(9, key="\ud83d"),
    ]
    part = run(GivenSource([records]), tmp_path, without={8: "near duplicate"})
    assert part.dropped == {
        "broken image": 1,
        "no caption": 1,
        "duplicate key": 1,
        "bad key": 3,
        "no annotation": 1,
        "near duplicate": 1,
    }
    assert list(samples_of(tmp_path)) == ["k000", "k007"] and part.positions.tolist() == [0, 7]
    assert part.examples["no caption"] == ["k002"] and part.examples["near duplicate"] == ["k008"]
    assert part.examples["bad key"] == ["../up", "a.b", "?"]


def test_the_key_of_a_broken_picture_is_free_and_that_of_a_left_out_one_is_not(tmp_path) -> None:
    broken_first = [record(0, image=b""), record(1, key="k000")]
    assert run(GivenSource([broken_first]), tmp_path / "a").positions.tolist() == [1]
    left_out_first = [record(0), record(1, key="k000")]
    part = run(GivenSource([left_out_first]), tmp_path / "b", without={0: "duplicate key"})
    assert part.dropped == {"duplicate key": 2} and part.shards == []


def test_a_source_without_captions_needs_none(tmp_path: Path) -> None:
    source = GivenSource([[record(0, caption=None, label=7), record(1)]], captioned=False)
    run(source, tmp_path)
    samples = samples_of(tmp_path)
    assert set(samples["k000"]) == {"__key__", "jpg", "json", "cls"}
    assert samples["k000"]["cls"] == b"7" and samples["k001"]["txt"] == b"words 1"


def test_members_come_in_a_fixed_order_and_json_says_where_it_is_from() -> None:
    source = record(1, label=0, facts={"id": "n01.JPEG", "licence": "CC0"}, caption="é")
    sample = make_sample(source, "é".encode(), Picture(b"data", "webp", 8, 6))
    assert list(sample) == ["__key__", "webp", "txt", "json", "cls"]
    facts = {"id": "n01.JPEG", "licence": "CC0", "width": 8, "height": 6}
    assert json.loads(sample["json"]) == facts
    plain = make_sample(record(1), None, Picture(b"data", "jpg", 8, 6))
    assert json.loads(plain["json"])["id"] == "k001" and "txt" not in plain


def test_facts_that_are_no_utf_8_are_written_with_a_mark_in_their_place() -> None:
    source = record(1, facts={"url": "\ud83d", "path": "caf\udce9.jpg", "licence": "\u00e9"})
    sample = make_sample(source, None, Picture(b"data", "jpg", 8, 6))
    facts = json.loads(bytes(sample["json"]).decode())
    assert (facts["url"], facts["path"], facts["licence"]) == ("?", "caf?.jpg", "\u00e9")


class SurprisingSource(GivenSource):
    def read(self, unit: Unit) -> Iterator[Record]:
        yield self.records[unit.number][0]
        raise ZeroDivisionError("of all things")


def test_an_error_that_nobody_foresaw_names_the_unit_and_the_place_in_the_code(tmp_path) -> None:
    source = SurprisingSource([[record(0), record(1)]])
    task, unit = task_of(source, tmp_path / "out"), Unit("train", 0, 2, 0)
    for outcome in (build_unit(task, unit, {}), scan_unit(task, unit)):
        assert outcome.name == "train-000000" and outcome.broken
        told = r"ZeroDivisionError: of all things \(test_build_unit.py, line \d+\)"
        assert re.fullmatch(told, str(outcome.error))


class IncompleteSource(GivenSource):
    def read(self, unit: Unit) -> Iterator[Record]:
        raise ImportError("needs another package")


def test_a_package_that_is_missing_is_no_failure_of_a_unit(tmp_path: Path) -> None:
    task, unit = task_of(IncompleteSource([[]]), tmp_path), Unit("train", 0, 2, 0)
    for run_unit in (lambda: build_unit(task, unit, {}), lambda: scan_unit(task, unit)):
        with pytest.raises(ImportError, match="needs another package"):
            run_unit()


def test_a_unit_that_cannot_be_written_is_not_called_broken(tmp_path: Path) -> None:
    (tmp_path / "out").write_bytes(b"a file where the folder should be")
    task = task_of(GivenSource([[record(0)]]), tmp_path / "out")
    outcome = build_unit(task, Unit("train", 0, 1, 0), {})
    assert outcome.error is not None and not outcome.broken


def test_a_failure_names_the_file_and_leaves_no_part_and_no_torn_shard(tmp_path: Path) -> None:
    marker = tmp_path / "input.tgz"
    marker.touch()
    source = GivenSource([[record(0), record(1)]], broken={0: str(marker)})
    task, unit = task_of(source, tmp_path / "out"), Unit("train", 0, 2, 0)
    outcome = build_unit(task, unit, {})
    assert outcome.error == f"{marker}: breaks off" and outcome.images == 2 and outcome.broken
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == []
    assert "breaks off" in str(scan_unit(task, unit).error)


def test_a_scan_tells_near_pictures_and_writes_no_shard(tmp_path: Path) -> None:
    small = Filters(resize=120).picture(picture(0, (480, 360))).data
    records = [record(0, image=picture(0, (480, 360))), record(1, image=small), record(2)]
    source = GivenSource([[*records, record(3, image=b"")]])
    task, unit = task_of(source, tmp_path), Unit("train", 0, 4, 0)
    assert scan_unit(task, unit).error is None
    scan = Part.load(scan_url(task.work, unit))
    first, second, third = scan.hashes
    assert (first ^ second).bit_count() <= 4 < (first ^ third).bit_count()
    assert scan.dropped == {"broken image": 1} and list(tmp_path.glob("*.tar")) == []


def test_a_part_comes_back_from_its_file(tmp_path: Path) -> None:
    part = run(GivenSource([[record(0), record(1, caption="")]]), tmp_path)
    part.hashes.append(2**64 - 1)
    part.save(str(tmp_path / "again.json"))
    assert Part.load(str(tmp_path / "again.json")) == part


@pytest.mark.parametrize("name", ["samples_per_shard", "max_shard_bytes"])
def test_an_impossible_length_is_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{name}=0"):
        task_of(GivenSource([]), tmp_path, **{name: 0})
