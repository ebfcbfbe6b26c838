"""Folders of shards: every altered one is named, whether one process looks or several."""

import io
import os
import shutil
from pathlib import Path

import fsspec
import numpy as np
import pytest
from PIL import Image

from dcar.data.shard_check import ShardCheck
from dcar.data.shards import read_manifest, write_manifest, write_shards
from dcar.data.verify import over_processes, quiet, shard_urls, splits_of, verify
from dcar.errors import DataError


def picture(size: tuple[int, int] = (8, 8)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, "red").save(buffer, "PNG")
    return buffer.getvalue()


def samples(count: int, start: int = 0) -> list[dict[str, bytes | str]]:
    numbers = range(start, start + count)
    return [{"__key__": f"a/{i:03d}", "png": picture(), "txt": b"red"} for i in numbers]


def build(folder: Path) -> Path:
    shards = {
        "train": write_shards(samples(10), folder, "train", 4),
        "val": write_shards(samples(3), folder, "val", 4),
    }
    sizes = {entry.name: np.full((entry.samples, 2), 8) for e in shards.values() for entry in e}
    write_manifest(folder, shards, sizes=sizes)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return build(tmp_path / "set")


def named(folder: Path, **options) -> dict[str, list[str]]:
    report = verify(folder, processes=1, **options)
    return {check.name: list(check.counts) for check in report.checks if check.counts}


def test_an_untouched_folder_is_well_and_splits_may_share_keys(folder: Path) -> None:
    report = verify(folder, processes=1)
    assert report.altered == [] and report.has_manifest and list(report.lines()) == []
    assert report.summary == f"{folder}: 4 shards, 13 samples, all well"


def test_every_altered_shard_is_named_and_no_other(folder: Path) -> None:
    (folder / "train-000000.tar").unlink()
    shutil.copy(folder / "train-000001.tar", folder / "extra-000000.tar")
    whole = (folder / "train-000002.tar").read_bytes()
    (folder / "train-000002.tar").write_bytes(whole[:100] + b"x" + whole[101:])
    assert named(folder) == {
        "extra-000000.tar": ["not in the manifest"],
        "train-000000.tar": ["missing"],
        "train-000002.tar": [
            "samples are not those of sizes.npz",
            "no tar",
            "sha256 is not the manifest's",
            "samples are not the manifest's",
        ],
    }


def test_a_wrong_count_in_the_manifest_is_named(folder: Path) -> None:
    entries = list(read_manifest(folder).values())
    wrong = [
        type(e)(e.name, e.samples + (e.name == "val-000000.tar"), e.bytes, e.sha256)
        for e in entries
    ]
    write_manifest(folder, {"train": wrong[:3], "val": wrong[3:]})
    assert named(folder) == {"val-000000.tar": ["samples are not the manifest's"]}


def test_sizes_beside_the_manifest_are_compared_with_the_pictures(folder: Path) -> None:
    entries = list(read_manifest(folder).values())
    sizes = {entry.name: np.full((entry.samples, 2), 8) for entry in entries}
    sizes["train-000001.tar"][2] = 9, 8
    write_manifest(folder, {"train": entries[:3], "val": entries[3:]}, sizes=sizes)
    assert named(folder) == {"train-000001.tar": ["size is not that of sizes.npz"]}
    assert named(folder, deep=False) == {}


def test_without_a_manifest_the_tars_and_samples_are_looked_at_all_the_same(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    whole = (folder / "train-000001.tar").read_bytes()
    (folder / "train-000001.tar").write_bytes(whole[:3000])
    report = verify(folder, processes=1)
    assert not report.has_manifest and report.altered == ["train-000001.tar"]


def test_a_key_that_comes_again_in_a_split_is_named_with_its_first_place(tmp_path: Path) -> None:
    write_shards([*samples(5), *samples(2, start=8)], tmp_path, "train", 4)
    write_shards([*samples(2, start=7), *samples(2, start=3)], tmp_path, "other", 4)
    (tmp_path / "other-000000.tar").rename(tmp_path / "train-000002.tar")
    write_shards(samples(9), tmp_path, "val", 9)
    report = verify(tmp_path, processes=1)
    lines = [str(problem) for check in report.checks for problem in check.problems]
    assert lines == [
        "train-000002.tar: a/008: duplicate key (first in train-000001.tar)",
        "train-000002.tar: a/003: duplicate key (first in train-000000.tar)",
        "train-000002.tar: a/004: duplicate key (first in train-000001.tar)",
    ]


def test_a_key_that_comes_again_in_its_own_shard_is_named(tmp_path: Path) -> None:
    write_shards(samples(3), tmp_path, "a", 3)
    body = (tmp_path / "a-000000.tar").read_bytes().rstrip(b"\0")
    body += b"\0" * (-len(body) % 512)
    (tmp_path / "a-000000.tar").write_bytes(body + body + b"\0" * 1024)
    report = verify(tmp_path, processes=1)
    assert report.counts == {"duplicate key": 3} and report.checks[0].samples == 6
    assert [problem.key for problem in report.checks[0].problems] == ["a/000", "a/001", "a/002"]


def test_problems_are_grouped_by_reason_with_their_number(tmp_path: Path) -> None:
    bad = [sample | {"png": b"x"} for sample in samples(5)]
    write_shards([*bad, *({**s, "txt": b""} for s in samples(1, start=5))], tmp_path, "train", 3)
    assert list(verify(tmp_path, processes=1).lines(2)) == [
        "broken image: 5 in 2 shards",
        "  train-000000.tar: a/000: broken image",
        "  train-000000.tar: a/001: broken image",
        "  ... and 3 more",
        "no caption: 1 in 1 shard",
        "  train-000001.tar: a/005: no caption",
    ]


@pytest.mark.slow
def test_two_processes_find_what_one_finds_and_tell_how_far_they_are(folder: Path) -> None:
    (folder / "train-000001.tar").write_bytes(b"<html>")
    ticks: list[int] = []
    two = verify(folder, processes=2, tick=lambda done, size: ticks.append(done))
    one = verify(folder, processes=1)
    assert list(two.lines()) == list(one.lines()) and two.summary == one.summary
    assert ticks and ticks == sorted(ticks) and ticks[-1] <= 9


@pytest.mark.slow
def test_a_killed_process_is_an_error_and_no_hang() -> None:
    tasks = [(str(number), None, None) for number in range(3)]
    with pytest.raises(DataError, match="process"):
        list(over_processes(kill, tasks, 2, quiet))


def kill(*task: object) -> ShardCheck:
    os.kill(os.getpid(), 9)
    return ShardCheck("")


def test_small_sets_are_not_worth_other_processes(folder: Path) -> None:
    entry = read_manifest(folder)["train-000000.tar"]
    tasks = [(f"{number}", entry, None) for number in range(3)]
    pids = [check.name for check in over_processes(pid, tasks, None, quiet)]
    assert pids == [str(os.getpid())] * 3


def pid(*task: object) -> ShardCheck:
    return ShardCheck(str(os.getpid()))


def test_shards_are_the_tars_of_the_folder_itself(folder: Path) -> None:
    (folder / "deeper").mkdir()
    shutil.copy(folder / "val-000000.tar", folder / "deeper")
    names = [Path(url).name for url in shard_urls(f"{folder}/")]
    assert names == [*(f"train-00000{n}.tar" for n in range(3)), "val-000000.tar"]


@pytest.mark.parametrize(
    "spelling", ["./set", "set/", ".//set", "../{here}/set", "{place}//set", "file://{place}/set"]
)
def test_a_folder_is_found_whatever_its_spelling(
    folder: Path, spelling: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)
    spelled = spelling.format(here=folder.parent.name, place=folder.parent)
    names = sorted(path.name for path in folder.glob("*.tar"))
    assert [Path(url).name for url in shard_urls(spelled)] == names
    assert list(splits_of(spelled)) == names
    report = verify(spelled, processes=1)
    assert (len(report.checks), report.altered) == (4, [])


def test_the_folder_that_one_is_in_is_looked_at(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    assert verify(".", processes=1).altered == [] and len(shard_urls("./")) == 4


def test_the_manifest_knows_splits_better_than_names(tmp_path: Path) -> None:
    train = write_shards(samples(4), tmp_path, "mine-train", 4)
    val = write_shards(samples(4, start=3), tmp_path, "mine-val", 4)
    write_manifest(tmp_path, {"train": [*train, *val]})
    write_shards(samples(4), tmp_path, "new", 4)
    names = ["mine-train-000000.tar", "mine-val-000000.tar", "new-000000.tar"]
    assert splits_of(tmp_path) == dict(zip(names, ["train", "train", "new"], strict=True))
    assert verify(tmp_path, processes=1).counts == {"duplicate key": 1, "not in the manifest": 1}


def test_a_folder_of_a_store_is_looked_at_like_a_local_one(folder: Path) -> None:
    store = fsspec.filesystem("memory")
    store.put(str(folder), "/verify-set", recursive=True)
    try:
        assert verify("memory://verify-set", processes=1).altered == []
        store.pipe("/verify-set/val-000000.tar", b"<html>")
        assert verify("memory://verify-set", processes=1).altered == ["val-000000.tar"]
    finally:
        store.rm("/verify-set", recursive=True)


def test_a_folder_without_shards_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        verify(tmp_path)


def test_a_folder_built_without_captions_is_well_without_them(tmp_path: Path) -> None:
    bare = [{"__key__": "a", "png": picture()}]
    for captioned in (False, True):
        shards = {"train": write_shards(bare, tmp_path, "train", 4)}
        write_manifest(tmp_path, shards, build={"source": {"captioned": captioned}})
        assert (verify(tmp_path, processes=1).altered == []) is not captioned
