"""Annotation lines, as they are and as they should not be, sorted by archive."""

import json
from pathlib import Path

import pytest

from dcar.data.sources.journeydb_annotations import (
    Annotation,
    annotation_of,
    load,
    parse,
    spill,
)
from dcar.data.sources.journeydb_prompts import prompt_hash
from dcar.errors import DataError
from tests.layouts import journey_line, tar_bytes, write

BOTH = {"Task2": {"Caption": "A fox."}}


@pytest.mark.parametrize(
    ("tasks", "caption"),
    [
        (BOTH, "A fox."),
        ({}, None),
        ({"Task2": None}, None),
        ({"Task2": {}}, None),
        ({"Task2": {"Caption": None}}, None),
        ({"Task2": {"Caption": "  "}}, None),
        ({"Task2": {"Caption": ["A fox."]}}, None),
        ({"Task2": "A fox."}, None),
    ],
)
def test_a_caption_may_be_missing_in_every_way(
    tasks: dict[str, object], caption: str | None
) -> None:
    line = journey_line("./000/ab.jpg", "fox", **tasks)
    assert parse(line.encode()) == ("000", "ab.jpg", Annotation("fox", caption))


@pytest.mark.parametrize("path", ["./007/ab.jpg", "007/ab.jpg", "./imgs/007/ab.jpg"])
def test_the_archive_is_the_last_folder_of_the_path(path: str) -> None:
    """str.strip('./') would take more than the prefix."""
    parsed = parse(journey_line(path, "fox").encode())
    assert parsed is not None and parsed[:2] == ("007", "ab.jpg")
    hidden = parse(journey_line("./000/.ab.jpg.", "fox").encode())
    assert hidden is not None and hidden[1] == ".ab.jpg."


@pytest.mark.parametrize(
    "line",
    [b"{", b"[]", b"null", b'{"prompt": "no path"}', b'{"img_path": 7}', b'{"img_path": "a.jpg"}']
    + [b"[" * 100_000, b"\xff\xfe"],
)
def test_lines_that_say_nothing_are_passed_over(line: bytes) -> None:
    assert parse(line) is None


def test_lines_are_sorted_by_archive_and_prompts_are_remembered(tmp_path: Path) -> None:
    lines = [
        journey_line("./001/b.jpg", "B --v 5", **BOTH),
        journey_line("./000/a.jpg", "a"),
        "{broken\n",
        journey_line("./001/c.jpg", "b"),
        journey_line("./199/d.jpg", "elsewhere"),
        json.dumps({"img_path": "./000/e.jpg", "prompt": None}) + "\n",
    ]
    source = tmp_path / "anno.jsonl.tgz"
    write(source, tar_bytes([("anno.jsonl", "".join(lines).encode())], "w:gz"))
    hashes = spill(str(source), ["000", "001"], str(tmp_path / "work"), "train")
    assert hashes.tolist() == sorted(map(prompt_hash, ("a", "b", "elsewhere")))
    assert sorted(path.name for path in (tmp_path / "work").iterdir()) == [
        *("train-000.jsonl", "train-001.jsonl"),
    ]
    stored = load(str(tmp_path / "work/train-001.jsonl"))
    assert {name: annotation_of(line) for name, line in stored.items()} == {
        "b.jpg": Annotation("B --v 5", "A fox."),
        "c.jpg": Annotation("b", None),
    }
    other = load(str(tmp_path / "work/train-000.jsonl"))
    assert annotation_of(other["e.jpg"]) == Annotation(None, None)


def test_annotations_of_the_release_without_archives_are_refused(tmp_path: Path) -> None:
    """Its paths name no archive; every picture would be dropped."""
    write(tmp_path / "train_anno.jsonl", journey_line("./a.jpg", "a") * 3)
    with pytest.raises(DataError, match=r"train_anno\.jsonl: not one of 3 lines"):
        spill(str(tmp_path / "train_anno.jsonl"), ["000"], str(tmp_path / "work"), "train")
    assert not list((tmp_path / "work").iterdir())


def test_an_archive_that_is_cut_short_leaves_nothing(tmp_path: Path) -> None:
    text = "".join(journey_line(f"./000/{n}.jpg", f"prompt {n}") for n in range(2000)).encode()
    packed = tar_bytes([("anno.jsonl", text)], "w:gz")
    write(tmp_path / "anno.jsonl.tgz", packed[: len(packed) // 2])
    with pytest.raises(DataError, match=r"anno\.jsonl\.tgz: broken or cut short"):
        spill(str(tmp_path / "anno.jsonl.tgz"), ["000"], str(tmp_path / "work"), "train")
    assert not list((tmp_path / "work").iterdir())
