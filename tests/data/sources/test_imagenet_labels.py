"""Classes of validation pictures from every form of list."""

import tarfile
from pathlib import Path

import pytest

from dcar.data.sources.imagenet_labels import parse_labels, validation_wnids
from dcar.errors import DataError
from tests.layouts import (
    ILSVRC_IDS,
    VAL_WNIDS,
    WNIDS,
    imagenet_devkit,
    kaggle_val_labels,
    tar_bytes,
    write,
)

IN_ORDER = [wnid for _, wnid in sorted(VAL_WNIDS.items())]


def test_kaggle_s_csv_is_found_in_the_folder(tmp_path: Path) -> None:
    kaggle_val_labels(tmp_path)
    assert validation_wnids(str(tmp_path), None, WNIDS) == VAL_WNIDS


def test_the_devkit_is_found_packed_and_unpacked(tmp_path: Path) -> None:
    packed = imagenet_devkit(tmp_path / "a")
    assert validation_wnids(str(tmp_path / "a"), None, WNIDS) == VAL_WNIDS
    with tarfile.open(packed) as tar:
        tar.extractall(tmp_path / "b", filter="data")
    assert validation_wnids(str(tmp_path / "b"), None, WNIDS) == VAL_WNIDS


@pytest.mark.parametrize(
    "lines",
    [
        IN_ORDER,
        [str(WNIDS.index(wnid)) for wnid in IN_ORDER],
        [f"ILSVRC2012_val_{n + 1:08d}.JPEG {WNIDS.index(w)}" for n, w in enumerate(IN_ORDER)][::-1],
        [f"ILSVRC2012_val_{n + 1:08d}.JPEG,{w}" for n, w in enumerate(IN_ORDER)],
    ],
    ids=["wnids", "numbers from 0", "val.txt of Caffe", "csv"],
)
def test_a_list_that_is_named_is_read(tmp_path: Path, lines: list[str]) -> None:
    write(tmp_path / "list.txt", "\n".join(lines) + "\n")
    assert validation_wnids("nowhere", str(tmp_path / "list.txt"), WNIDS) == VAL_WNIDS


def test_numbers_from_1_are_not_taken_for_sorted_wnids(tmp_path: Path) -> None:
    """ILSVRC's own ground truth counts so, in another order: read wrongly it would train badly."""
    write(tmp_path / "truth.txt", "".join(f"{ILSVRC_IDS[wnid]}\n" for wnid in IN_ORDER))
    with pytest.raises(DataError, match=r"truth\.txt: number 1 .*ILSVRC ids and need .*meta\.mat"):
        validation_wnids("nowhere", str(tmp_path / "truth.txt"), WNIDS)


def test_numbers_of_no_class_are_an_error(tmp_path: Path) -> None:
    write(tmp_path / "list.txt", "0\n7\n")
    with pytest.raises(DataError, match="number 7 names no class"):
        validation_wnids("nowhere", str(tmp_path / "list.txt"), WNIDS)


@pytest.mark.parametrize("text", ["", "n01440764\ncat\n"])
def test_what_is_no_list_of_classes_is_an_error(tmp_path: Path, text: str) -> None:
    write(tmp_path / "list.txt", text)
    with pytest.raises(DataError, match=r"list\.txt"):
        validation_wnids("nowhere", str(tmp_path / "list.txt"), WNIDS)


def test_a_devkit_without_its_list_is_an_error(tmp_path: Path) -> None:
    write(tmp_path / "ILSVRC2012_devkit_t12.tar.gz", tar_bytes([("a.txt", b"")], "w:gz"))
    with pytest.raises(DataError, match=r"devkit_t12\.tar\.gz: holds no ILSVRC2012_validation"):
        validation_wnids(str(tmp_path), None, WNIDS)


def test_without_any_list_the_error_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"LOC_val_solution\.csv.*val_labels=FILE"):
        validation_wnids(str(tmp_path), None, WNIDS)


def test_blank_lines_and_the_header_are_no_pictures() -> None:
    text = "ImageId,PredictionString\n\nILSVRC2012_val_00000002,n01440764 1 2 3 4\n\n"
    assert parse_labels(text) == {"ILSVRC2012_val_00000002": "n01440764"}
