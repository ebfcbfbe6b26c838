"""`--exp=data/verify`, `data/stats`, `data/peek`: what they print, write and exit with."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dcar.data.shards import write_manifest, write_shards
from experiments.data_inspect import drawn, stats_rows
from experiments.run import main


def picture(index: int, width: int = 12, height: int = 8) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (index, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def sample(index: int, **members: bytes) -> dict[str, bytes | str]:
    whole = {"png": picture(index), "txt": f"picture {index}".encode()} | members
    return {"__key__": f"k{index:03d}", **whole}


def build(folder: Path, *extra: dict[str, bytes | str]) -> Path:
    train = [*(sample(index) for index in range(20)), *extra]
    shards = {
        "train": write_shards(train, folder, "train", 7),
        "val": write_shards((sample(index) for index in range(100, 105)), folder, "val", 7),
    }
    write_manifest(folder, shards, splits={"train": {"dropped": {"too small": 1234}}})
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return build(tmp_path / "set")


def test_a_folder_that_is_well_exits_with_0(folder: Path, capsys) -> None:
    assert main(["--exp=data/verify", f"in={folder}"]) == 0
    assert capsys.readouterr().out == f"{folder}: 4 shards, 25 samples, all well\n"


@pytest.mark.parametrize(
    ("task", "out"), [("stats", "file"), ("verify", "folder"), ("peek", "file/sheet.png")]
)
def test_a_place_that_cannot_be_written_is_named_before_anything_is_read(
    folder: Path, task: str, out: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    assert main([f"--exp=data/{task}", f"in={folder}", f"out={tmp_path / out}"]) == 2
    printed = capsys.readouterr()
    assert f"out={tmp_path / out}" in printed.err and printed.out == ""
    assert (tmp_path / "file").read_text() == "mine"


def test_an_unfinished_build_exits_with_3(folder: Path, capsys) -> None:
    (folder / ".build").mkdir()
    (folder / ".build" / "settings.json").write_text("{}")
    assert main(["--exp=data/verify", f"in={folder}", "processes=1"]) == 3
    assert "holds an unfinished build" in capsys.readouterr().err


def test_so_do_unfinished_predictions(folder: Path, capsys) -> None:
    (folder / "manifest.json").unlink()
    (folder / ".progress").mkdir()
    (folder / ".progress" / "begun").touch()
    assert main(["--exp=data/verify", f"in={folder}", "processes=1"]) == 3
    assert f"{folder} is not finished" in capsys.readouterr().err


def test_a_changed_shard_exits_with_3_and_is_named(folder: Path, capsys, tmp_path: Path) -> None:
    path = folder / "train-000001.tar"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + b"x")
    out = tmp_path / "all.txt"
    assert main(["--exp=data/verify", f"in={folder}", "deep=false", f"out={out}"]) == 3
    printed = capsys.readouterr()
    assert "train-000001.tar: sha256 is not the manifest's" in printed.out
    assert printed.err.count("error:") == 1 and "1 shard: train-000001.tar" in printed.err
    assert out.read_text() == printed.out


def test_problems_beyond_those_shown_are_counted_and_written(tmp_path: Path, capsys) -> None:
    build(tmp_path / "set", *(sample(20 + index, png=b"x") for index in range(7)))
    out = tmp_path / "all.txt"
    assert main(["--exp=data/verify", f"in={tmp_path}/set", "show=2", f"out={out}"]) == 3
    assert "  ... and 5 more" in capsys.readouterr().out
    assert out.read_text().count(": broken image\n") == 7


def test_without_a_manifest_it_says_what_cannot_be_found(folder: Path, capsys) -> None:
    (folder / "manifest.json").unlink()
    assert main(["--exp=data/verify", f"in={folder}", "processes=1"]) == 0
    assert "no manifest.json" in capsys.readouterr().out


@pytest.mark.parametrize("task", ["verify", "stats", "peek"])
def test_a_folder_without_shards_exits_with_3_and_is_named(task: str, tmp_path, capsys) -> None:
    assert main([f"--exp=data/{task}", f"in={tmp_path}/none"]) == 3
    assert f"{tmp_path}/none" in capsys.readouterr().err


def test_stats_are_printed_and_written_as_numbers_and_as_a_chart(folder, tmp_path, capsys) -> None:
    assert main(["--exp=data/stats", f"in={folder}", f"out={tmp_path}/new/stats"]) == 0
    printed = capsys.readouterr().out
    for words in ("train", "val", "12 (12-12)", "dropped: too small", "1,234"):
        assert words in printed
    summary = json.loads((tmp_path / "new" / "stats" / "stats.json").read_text())
    assert summary["splits"]["train"]["samples"] == 20
    assert stats_rows(summary["splits"]["val"])["png files"] == "5"
    with Image.open(tmp_path / "new" / "stats" / "stats.png") as chart:
        assert chart.width > 1000


def test_a_dry_run_writes_nothing(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(["--exp=data/stats", "--dry-run", f"in={folder}", f"out={out}"]) == 0
    assert main(["--exp=data/peek", "--dry-run", f"in={folder}", f"out={out}/a.png"]) == 0
    assert not out.exists()


def test_peek_writes_a_sheet_with_its_settings_and_the_same_one_again(folder, tmp_path) -> None:
    sheets = []
    for name, seed in (("a.png", 1), ("b.png", 1), ("c.png", 2)):
        arguments = [f"in={folder}", f"out={tmp_path / name}", "samples=6", f"seed={seed}"]
        assert main(["--exp=data/peek", *arguments]) == 0
        with Image.open(tmp_path / name) as sheet:
            assert sheet.text["seed"] == str(seed) and sheet.text["samples"] == "6"
            sheets.append(np.asarray(sheet))
    assert np.array_equal(sheets[0], sheets[1]) and not np.array_equal(sheets[0], sheets[2])


def test_samples_are_drawn_from_every_shard_once_each(folder: Path) -> None:
    cells = drawn(str(folder), 1000, seed=0, split=None)
    assert [cell.key for cell in cells] == [f"k{i:03d}" for i in (*range(20), *range(100, 105))]
    assert [cell.caption for cell in cells[:2]] == ["picture 0", "picture 1"]
    assert cells[7].picture is not None and cells[7].picture.getpixel((0, 0)) == (7, 0, 0)
    keys = [
        {cell.key for cell in drawn(str(folder), 5, seed=seed, split=None)} for seed in range(40)
    ]
    assert all(len(found) == 5 for found in keys) and len(set.union(*keys)) == 25


@pytest.mark.parametrize("spelling", ["./{name}", "{place}//{name}", "file://{place}/{name}"])
def test_samples_are_found_whatever_the_spelling_of_the_folder(
    folder: Path, spelling: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)
    spelled = spelling.format(place=folder.parent, name=folder.name)
    assert len(drawn(spelled, 1000, seed=0, split=None)) == 25


def test_one_split_is_drawn_from_alone(folder: Path) -> None:
    cells = drawn(str(folder), 1000, seed=0, split="val")
    assert [cell.key for cell in cells] == [f"k{i}" for i in range(100, 105)]


def test_bad_samples_are_shown_with_their_reason(tmp_path: Path) -> None:
    bad = [sample(20, png=b"x"), sample(21, txt=b"\xff"), sample(22, png=b"\x89PNG")]
    cells = drawn(str(build(tmp_path, *bad)), 1000, seed=0, split="train")
    assert [cell.fault for cell in cells[-3:]] == [
        "broken image",
        "caption is not UTF-8",
        "broken image",
    ]
    assert all(cell.picture is None for cell in cells[-3:])


@pytest.mark.parametrize(
    ("override", "code", "message"),
    [
        ("out=a.jpg", 2, "out=a.jpg"),
        ("samples=0", 2, "samples"),
        ("columns=0", 2, "columns"),
        ("split=test", 2, "split=test"),
    ],
)
def test_impossible_settings_are_named(
    override, code, message, folder, capsys, monkeypatch
) -> None:
    monkeypatch.chdir(folder.parent)
    assert main(["--exp=data/peek", f"in={folder}", override]) == code
    assert message in capsys.readouterr().err


def test_tokens_have_no_picture_to_peek_at(tmp_path: Path, capsys) -> None:
    write_shards([{"__key__": "a", "ids.npy": b"..."}], tmp_path, "train", 1)
    assert main(["--exp=data/peek", f"in={tmp_path}", f"out={tmp_path}/a.png"]) == 3
    assert "tokens, no pictures" in capsys.readouterr().err
