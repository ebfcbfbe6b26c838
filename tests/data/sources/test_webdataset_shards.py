"""Shards that others have written: timm's, img2dataset's, 1d-tokenizer's, and hand-made ones."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dcar.data.sources.webdataset_shards import WebDatasetShards, split_of
from dcar.errors import DataError
from tests.layouts import (
    TRAIN_NAMES,
    WNIDS,
    hand_made_shards,
    imagenet_picture,
    img2dataset_shards,
    picture,
    tar_bytes,
    timm_shards,
    tokenizer_1d_shards,
    write,
    write_wds,
)
from tests.source_runs import build_shards, first_batch, records


def read(folder: Path | str, **settings: Any) -> dict[str, list[Any]]:
    return records(WebDatasetShards(str(folder), **settings), Path("unused"))


def test_timm_s_shards_have_classes_and_no_words(tmp_path: Path) -> None:
    source = WebDatasetShards(timm_shards(tmp_path))
    found = records(source, tmp_path)
    assert source.captioned is False
    assert {split: len(records) for split, records in found.items()} == {"train": 24, "val": 8}
    first = found["train"][0]
    name = TRAIN_NAMES[WNIDS[0]][0]
    assert first.key == f"imagenet1k-train-0000/{name}" and first.image == imagenet_picture(name)
    assert first.label == 0 and first.caption is None
    assert first.facts == {"id": name, "filename": f"{name}.JPEG"}


def test_img2dataset_s_shards_have_words_and_addresses(tmp_path: Path) -> None:
    source = WebDatasetShards(img2dataset_shards(tmp_path))
    found = records(source, tmp_path)["train"]
    assert source.captioned is True
    assert [r.key for r in found] == [
        f"{s:05d}/{s:05d}{n:04d}" for s in (0, 1) for n in (0, 1, 2, 4)
    ]
    assert found[0].image == picture("000000000") and found[0].caption == "caption number 000000000"
    assert found[0].facts == {"id": "000000000", "url": "https://example.com/000000000.jpg"}


def test_keys_that_count_from_0_in_each_shard_stay_apart(tmp_path: Path) -> None:
    found = read(tokenizer_1d_shards(tmp_path))
    assert len(found["train"]) == 6 and len(found["val"]) == 4
    assert all(len({r.key for r in split}) == len(split) for split in found.values())
    assert found["train"][0].key == "imagenet-train-000000/00000000"


def test_prefixes_and_capitals_of_hand_made_shards_are_understood(tmp_path: Path) -> None:
    found = read(hand_made_shards(tmp_path))["test"]
    assert [r.key for r in found] == [f"pictures-test-0/{n:03d}" for n in range(4)]
    assert [r.caption for r in found] == [f"words {n}" for n in range(4)]
    assert [r.image for r in found] == [
        picture(str(n), kind="PNG" if n == 2 else "JPEG") for n in range(4)
    ]


@pytest.mark.parametrize("layout", [timm_shards, img2dataset_shards, tokenizer_1d_shards])
def test_others_shards_become_training_batches(
    layout: Callable[[Path], str], tmp_path: Path
) -> None:
    source = WebDatasetShards(layout(tmp_path / "in"))
    report = build_shards(source, tmp_path / "out")
    assert all(not tally.dropped for tally in report.splits.values())
    batch = first_batch(tmp_path / "out", captioned=source.captioned)
    assert batch["image"].shape == (4, 3, 32, 32)
    assert all(batch["caption"]) is source.captioned


@pytest.mark.parametrize(
    "pattern",
    ["imagenet1k-train-{0000..0001}.tar", "imagenet1k-train-*.tar", "imagenet1k-train-0000.tar"],
)
def test_patterns_name_the_same_shards_as_the_folder(tmp_path: Path, pattern: str) -> None:
    whole = read(timm_shards(tmp_path))["train"]
    found = read(tmp_path / pattern)
    assert set(found) == {"train"}
    assert found["train"] == whole[: len(found["train"])] and len(found["train"]) in (12, 24)


def test_folders_tell_shards_and_splits_apart(tmp_path: Path) -> None:
    for folder in ("train", "validation"):
        write_wds(tmp_path / folder / "00000.tar", [{"__key__": "0", "jpg": b"x", "txt": folder}])
    found = read(tmp_path)
    assert {split: [r.key for r in rs] for split, rs in found.items()} == {
        "train": ["train/00000/0"],
        "val": ["validation/00000/0"],
    }
    with pytest.raises(ValueError, match="two shards are named 00000"):
        read(f"{tmp_path}/*/00000.tar")


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("imagenet-train-000000", "train"),
        ("imagenet1k-validation-00", "val"),
        ("imagenet-val-000000", "val"),
        ("cc_valid/00000", "val"),
        ("Test-0001", "test"),
        ("00000", "train"),
        ("interval-0000", "train"),
        ("latest-0000", "train"),
    ],
)
def test_the_name_of_a_shard_says_its_split(name: str, split: str) -> None:
    assert split_of(name) == split


def test_a_split_can_be_given(tmp_path: Path) -> None:
    found = read(timm_shards(tmp_path), split="all")
    assert set(found) == {"all"} and len(found["all"]) == 32


@pytest.mark.parametrize(
    ("settings", "caption"),
    [
        ({}, "alt text"),
        ({"caption_key": "long"}, "the long one"),
        ({"caption_key": "x"}, "alt text"),
    ],
)
def test_an_entry_of_the_json_can_be_the_caption(
    tmp_path: Path, settings: dict[str, str], caption: str
) -> None:
    sample = {"__key__": "0", "jpg": b"x", "txt": "alt text"}
    described = {"caption": "short", "long": "the long one", "license": "CC0", "similarity": 0.3}
    write_wds(tmp_path / "0.tar", [{**sample, "json": described}])
    (record,) = read(tmp_path, **settings)["train"]
    assert record.caption == caption and record.facts == {"id": "0", "license": "CC0"}
    (kept,) = read(tmp_path, keep=["similarity"])["train"]
    assert kept.facts == {"id": "0", "similarity": 0.3}


def test_without_txt_the_json_has_the_caption(tmp_path: Path) -> None:
    write_wds(tmp_path / "0.tar", [{"__key__": "0", "jpg": b"x", "json": {"caption": "short"}}])
    assert read(tmp_path)["train"][0].caption == "short"


def test_odd_samples_are_dropped_or_left_to_the_builder(tmp_path: Path) -> None:
    members: list[tuple[str, bytes | None]] = [
        *[("a.jpg", b"x"), ("a.cls", b"seven"), ("a.txt", b"a")],
        *[("b.txt", b"no picture"), ("b.json", b"{broken"), ("c.jpg", b""), ("c.txt", b"c")],
        *[("d.jpg", b"x"), ("d.txt", b"caf\xe9"), ("d.json", b"[" * 100_000)],
        *[("../e.jpg", b"x"), ("/f.jpg", b"x"), ("g.h.jpg", b"x"), ("i.pickle", b"x")],
    ]
    write(tmp_path / "0.tar", tar_bytes(members))
    found = read(tmp_path)["train"]
    assert [(r.key, r.dropped) for r in found] == [
        ("0/a", "class is no number"),
        ("0/b", "no image"),
        ("0/c", "no image"),
        ("0/d", None),
    ]
    assert found[3].caption == "caf\udce9"
    with pytest.raises(DataError, match="caption is not UTF-8: 1 of train"):
        build_shards(WebDatasetShards(str(tmp_path)), tmp_path / "out")


def test_a_shard_with_a_member_twice_or_cut_short_is_named(tmp_path: Path) -> None:
    write(tmp_path / "x-0.tar", tar_bytes([("a.jpg", b"x"), ("./a.JPG", b"y")]))
    with pytest.raises(DataError, match=r"x-0\.tar: member a\.JPG twice"):
        read(tmp_path)
    whole = tar_bytes([("a.jpg", b"x" * 4000), ("b.jpg", b"x" * 4000)])
    write(tmp_path / "x-0.tar", whole[:6000])
    with pytest.raises(DataError, match=r"x-0\.tar: broken or cut short"):
        read(tmp_path)


def test_a_folder_without_shards_is_named(tmp_path: Path) -> None:
    write(tmp_path / "readme.txt", "")
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        read(tmp_path)
    with pytest.raises(ValueError, match="runs a shell"):
        read("pipe:cat {0..1}.tar")


def test_units_count_from_0_in_each_split(tmp_path: Path) -> None:
    source = WebDatasetShards(timm_shards(tmp_path))
    units = source.units(100)
    assert [(unit.split, unit.number) for unit in units] == [("train", 0), ("train", 1), ("val", 0)]
    assert Counter(unit.samples for unit in units) == {None: 3}


def test_an_address_with_half_a_letter_in_it_keeps_its_sample(tmp_path: Path) -> None:
    members = [("1.jpg", picture("1")), ("1.txt", b"words"), ("1.json", b'{"url": "\\ud83d"}')]
    write(tmp_path / "in" / "a.tar", tar_bytes(members))
    report = build_shards(WebDatasetShards(str(tmp_path / "in")), tmp_path / "out")
    assert report.splits["train"].samples == 1 and report.splits["train"].dropped == {}
