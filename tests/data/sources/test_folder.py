"""The folder source: which pictures, keys, captions and splits a folder gives."""

import json
import os
import pickle
import tracemalloc
from pathlib import Path

import pytest

from dcar.data.members import MAX_MEMBER_BYTES, check_key
from dcar.data.sources.folder import Folder, fraction, key_of
from dcar.data.sources.source import Record
from tests.builds import all_bytes, built, picture, samples_of


def write(path: Path, content: str | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def pictures(folder: Path, names: list[str]) -> Path:
    for number, name in enumerate(names):
        write(folder / name, picture(number))
        write((folder / name).with_suffix(".txt"), f"words {number}")
    return folder


def read(folder: Path, work: Path, *, per_unit: int = 100, **settings) -> dict[str, list[Record]]:
    """Records by split, read as workers do: from a source that was pickled."""
    source = Folder(str(folder), **settings)
    source.prepare(str(work))
    source, found = pickle.loads(pickle.dumps(source)), {}
    for unit in source.units(per_unit):
        records = list(source.read(unit))
        assert len(records) == unit.samples <= per_unit
        found.setdefault(unit.split, []).extend(records)
    return found


def test_pictures_at_any_depth_come_in_order_with_their_words_and_paths(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "in", ["b.jpg", "a/x.png", "a/deep/er/y.webp", "c.JPEG"])
    records = read(folder, tmp_path / "work", val_share=0.0)["train"]
    assert [(r.key, r.caption) for r in records] == [
        ("a/deep/er/y", "words 2"),
        ("a/x", "words 1"),
        ("b", "words 0"),
        ("c", "words 3"),
    ]
    assert records[1].image == picture(1) and records[1].facts == {"id": "a/x", "path": "a/x.png"}


@pytest.mark.parametrize("per_unit", [1, 2, 3, 100])
def test_units_of_any_length_give_the_same_records(per_unit: int, tmp_path: Path) -> None:
    folder = pictures(tmp_path / "in", [f"{n}.jpg" for n in range(7)])
    whole = read(folder, tmp_path / "a", val_share=0.4)
    cut = read(folder, tmp_path / "b", val_share=0.4, per_unit=per_unit)
    assert cut == whole and len(whole) == 2


@pytest.mark.parametrize(
    ("place", "key"),
    [
        ("a/b.jpg", "a/b"),
        ("a.d/b.c.d.jpg", "a.d/b_c_d"),
        ("/abs/../b.jpg", "abs/b"),
        ("./b..jpg", "b_"),
        ("x/.jpg", "x/_jpg"),
    ],
)
def test_a_key_is_a_path_that_a_shard_takes(place: str, key: str) -> None:
    assert key_of(place) == key
    check_key(key)


def test_pictures_whose_keys_would_be_the_same_are_told_apart(tmp_path: Path) -> None:
    names = ["a.b.jpg", "a_b-2.jpg", "a_b.jpg", "a_b.png"]
    folder = pictures(tmp_path / "in", names)
    records = read(folder, tmp_path / "work", val_share=0.0)["train"]
    assert [record.key for record in records] == ["a_b", "a_b-2", "a_b-3", "a_b-4"]


def test_hidden_files_are_no_pictures_and_other_types_are_counted(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "in", ["a.jpg", "b.gif", "._a.jpg", ".c.jpg", ".thumbs/a.jpg"])
    write(folder / "notes.md", "no picture")
    records = read(folder, tmp_path / "work", val_share=0.0)["train"]
    dropped = [(record.key, record.dropped) for record in records]
    assert dropped == [("a", None), ("b", "not a JPEG, PNG or WebP")]


def test_words_come_from_a_text_or_a_json_file_beside_the_picture(tmp_path: Path) -> None:
    captions: dict[str, bytes] = {
        "a.txt": "\ufeffwith a mark".encode(),
        "b.json": b'{"caption": "from json", "size": 3}',
        "c.json": b'{"caption": ["a", "list"]}',
        "d.json": b'{"caption": ',
        "e.txt": b"\xff",
        "g.txt": b"text before json",
        "g.json": b'{"caption": "json"}',
        "h.json": b"[]",
        "i.json": b"[" * 100_000,
    }
    for letter in "abcdefghi":
        write(tmp_path / "in" / f"{letter}.jpg", picture(0))
    for name, content in captions.items():
        write(tmp_path / "in" / name, content)
    records = read(tmp_path / "in", tmp_path / "work", val_share=0.0)["train"]
    assert [(record.caption, record.dropped) for record in records] == [
        ("with a mark", None),
        ("from json", None),
        (None, None),
        (None, "broken json"),
        ("\udcff", None),
        (None, None),
        ("text before json", None),
        (None, None),
        (None, "broken json"),
    ]


def test_captions_are_not_looked_for_where_none_are_wanted(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "in", ["a.jpg"])
    (record,) = read(folder, tmp_path / "work", val_share=0.0, captioned=False)["train"]
    assert record.caption is None and not Folder(str(folder), captioned=False).captioned


def test_folders_named_train_and_val_are_the_splits(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "in", ["train/a/1.jpg", "train/2.jpg", "val/2.jpg"])
    found = read(folder, tmp_path / "work")
    assert {split: [record.key for record in records] for split, records in found.items()} == {
        "train": ["2", "a/1"],
        "val": ["2"],
    }


def test_a_caption_is_never_in_both_splits(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    for number in range(120):
        write(folder / f"{number:03d}.jpg", picture(0))
        write(folder / f"{number:03d}.txt", f" words {number % 30} ")
    found = read(folder, tmp_path / "work", val_share=0.3)
    train, val = ({r.caption for r in found[split]} for split in ("train", "val"))
    assert not train & val and len(train | val) == 30 and 3 <= len(val) <= 16


def test_the_share_is_of_all_captions() -> None:
    share = sum(fraction(f"words {n}") < 0.1 for n in range(5000)) / 5000
    assert 0.085 < share < 0.115


def table(folder: Path, rows: list[tuple[str, str]], name: str = "captions.csv") -> None:
    write(folder / name, "\n".join(["image,caption", *(f"{i},{c}" for i, c in rows)]))


def test_a_table_says_which_pictures_in_which_order_and_missing_ones_are_counted(tmp_path) -> None:
    folder = pictures(tmp_path / "in", ["a/x.jpg", "b.jpg", "unlisted.jpg"])
    table(folder, [("b.jpg", "second"), ("gone.jpg", "no file"), ("a/x.jpg", "first")])
    records = read(folder, tmp_path / "work", val_share=0.0, captions="captions.csv")["train"]
    assert [(r.key, r.caption, r.dropped) for r in records] == [
        ("b", "second", None),
        ("gone", "no file", "no image"),
        ("a/x", "first", None),
    ]
    elsewhere = tmp_path / "elsewhere.csv"
    (folder / "captions.csv").rename(elsewhere)
    again = read(folder, tmp_path / "again", val_share=0.0, captions=str(elsewhere))["train"]
    assert again == records


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Folder(str(tmp_path / "nowhere")).prepare(str(tmp_path / "work"))
    (tmp_path / "in").mkdir()
    with pytest.raises(FileNotFoundError, match="no pictures below .*in"):
        Folder(str(tmp_path / "in")).prepare(str(tmp_path / "work"))
    with pytest.raises(FileNotFoundError, match="captions=t.csv"):
        Folder(str(tmp_path / "in"), captions="t.csv").prepare(str(tmp_path / "work"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"val_share": 1.0}, "val_share is 1.0"),
        ({"captions": "t.csv", "captioned": False}, "captions=t.csv"),
    ],
)
def test_an_impossible_setting_is_named(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Folder("x", **settings)


def test_a_list_that_was_begun_is_made_again_and_a_finished_one_is_kept(tmp_path: Path) -> None:
    folder, work = pictures(tmp_path / "in", ["a.jpg", "b.jpg"]), tmp_path / "work"
    read(folder, work)
    before = all_bytes(work)
    (work / "folder.json").unlink()
    write(work / "folder-train.jsonl", "torn")
    read(folder, work)
    assert all_bytes(work) == before
    pictures(folder, ["c.jpg"])
    read(folder, work)
    assert all_bytes(work) == before


def test_a_folder_is_built_from_raw_to_shards(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "in", [f"s.1/{n}.jpg" for n in range(6)])
    write(folder / "s.1" / "bad.jpg", b"no picture")
    write(folder / "s.1" / "bad.txt", "words")
    report = built(Folder(str(folder), val_share=0.0), tmp_path / "out", samples_per_shard=4)
    assert report.splits["train"].samples == 6
    assert report.splits["train"].dropped == {"broken image": 1}
    sample = samples_of(tmp_path / "out")["s.1/3"]
    assert sample["jpg"] == picture(3) and sample["txt"] == b"words 3"
    facts = {"id": "s.1/3", "path": "s.1/3.jpg", "width": 40, "height": 30}
    assert json.loads(sample["json"]) == facts


def test_a_name_that_is_not_utf_8_is_built_like_any_other(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "in", ["a.jpg"])
    for suffix, content in ((b".jpg", picture(7)), (b".txt", b"coffee")):
        (folder / os.fsdecode(b"caf\xe9" + suffix)).write_bytes(content)
    built(Folder(str(folder), val_share=0.0), tmp_path / "out")
    sample = samples_of(tmp_path / "out")["caf?"]
    assert sample["txt"] == b"coffee" and json.loads(sample["json"])["path"] == "caf?.jpg"


def test_a_table_gives_no_picture_from_outside_the_folder(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "in", ["a.jpg", "b/c.jpg", "d.jpg"])
    private = pictures(tmp_path, ["private.jpg"]) / "private.jpg"
    places = ["../private.jpg", "b/../../private.jpg", str(private)]
    inside = ["./a.jpg", "b/../b/c.jpg", str(folder / "d.jpg")]
    table(folder, [(place, "words") for place in (*places, *inside, "a.jpg/x.jpg", "b/no.jpg")])
    records = read(folder, tmp_path / "work", val_share=0.0, captions="captions.csv")["train"]
    dropped = ["outside the folder"] * 3 + [None] * 3 + ["no image"] * 2
    assert [record.dropped for record in records] == dropped
    assert [record.image for record in records[:3]] == [b""] * 3
    assert [record.facts["path"] for record in records[3:6]] == ["a.jpg", "b/c.jpg", "d.jpg"]
    assert [record.key for record in records[3:6]] == ["a", "b/c", "d"]


def test_a_picture_with_several_captions_is_in_one_split_alone(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "in", [f"{n}.jpg" for n in range(40)])
    rows = [(f"{n}.jpg", f"{n} has words {k}") for k in range(5) for n in range(40)]
    table(folder, [*rows, ("40.jpg", "once"), ("41.jpg", "once"), ("42.jpg", "once")])
    found = read(folder, tmp_path / "work", val_share=0.2, captions="captions.csv")
    paths = {split: {r.facts["path"] for r in records} for split, records in found.items()}
    assert not paths["train"] & paths["val"] and len(paths["train"] | paths["val"]) == 43
    assert 2 <= len(paths["val"]) <= 16
    assert {"40.jpg", "41.jpg", "42.jpg"} & paths["val"] in (set(), {"40.jpg", "41.jpg", "42.jpg"})


def test_a_file_that_is_too_large_is_counted_and_not_read(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "in", ["a.jpg", "b.jpg"])
    with open(folder / "b.jpg", "r+b") as file:
        file.truncate(MAX_MEMBER_BYTES + 1)
    tracemalloc.start()
    records = read(folder, tmp_path / "work", val_share=0.0)["train"]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [(r.dropped, len(r.image)) for r in records] == [
        (None, len(picture(0))),
        ("file too large", 0),
    ]
    assert peak < 16 * 2**20
