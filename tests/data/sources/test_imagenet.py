"""ImageNet's three layouts give the same pictures with the same labels."""

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest

from dcar.data.index import read_shard
from dcar.data.members import MAX_MEMBER_BYTES
from dcar.data.samples import image_bytes
from dcar.data.sources.imagenet import LICENCE, ImageNet
from dcar.data.sources.source import Record
from dcar.errors import DataError
from tests.layouts import (
    CMYK,
    PNG,
    TRAIN_NAMES,
    VAL_WNIDS,
    WNIDS,
    imagenet_devkit,
    imagenet_folders,
    imagenet_kaggle,
    imagenet_parquet,
    imagenet_picture,
    imagenet_tars,
    kaggle_val_labels,
    tar_bytes,
    write,
)
from tests.source_runs import build_shards, first_batch, records

TRAIN = {name: wnid for wnid, names in TRAIN_NAMES.items() for name in names}


def tars_with_devkit(folder: Path) -> str:
    imagenet_devkit(folder)
    return imagenet_tars(folder)


LAYOUTS: dict[str, Callable[[Path], str]] = {
    "tars": tars_with_devkit,
    "folders": imagenet_folders,
    "kaggle": imagenet_kaggle,
    "parquet": imagenet_parquet,
}


@pytest.fixture(params=LAYOUTS)
def layout(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return LAYOUTS[request.param](tmp_path / "in")


def expected(name: str, wnid: str) -> Record:
    facts = {"id": f"{name}.JPEG", "wnid": wnid, "licence": LICENCE}
    return Record(name, imagenet_picture(name), label=WNIDS.index(wnid), facts=facts)


def test_every_picture_comes_once_with_its_label(layout: str, tmp_path: Path) -> None:
    found = records(ImageNet(layout), tmp_path / "work")
    assert set(found) == {"train", "val"}
    for split, pictures in (("train", TRAIN), ("val", VAL_WNIDS)):
        assert len(found[split]) == len(pictures)
        by_key = {record.key: record for record in found[split]}
        assert by_key == {name: expected(name, wnid) for name, wnid in pictures.items()}


def test_the_order_is_the_same_twice_and_mixes_the_classes(layout: str, tmp_path: Path) -> None:
    first, again = (records(ImageNet(layout), tmp_path / work) for work in ("a", "b"))
    assert first == again
    labels = [record.label for record in first["train"]]
    assert all(len(set(labels[start : start + 8])) >= 3 for start in range(0, 24, 8))
    assert [record.key for record in first["val"]] == sorted(VAL_WNIDS)


def test_raw_files_become_training_batches(layout: str, tmp_path: Path) -> None:
    report = build_shards(ImageNet(layout), tmp_path / "out")
    assert {split: tally.samples for split, tally in report.splits.items()} == {
        "train": len(TRAIN),
        "val": len(VAL_WNIDS),
    }
    stored = {
        str(raw["__key__"]): raw
        for path in sorted((tmp_path / "out").glob("set-train-*.tar"))
        for raw in read_shard(path)
    }
    assert "png" in stored[PNG] and "jpg" in stored[CMYK]
    assert image_bytes(stored[CMYK]) == imagenet_picture(CMYK)
    assert stored[PNG]["cls"] == b"1"
    batch = first_batch(tmp_path / "out", captioned=False)
    assert batch["image"].shape == (4, 3, 32, 32)
    assert set(batch["key"]) <= set(TRAIN)


def test_tars_and_folders_make_the_same_shards(tmp_path: Path) -> None:
    for name in ("tars", "folders", "kaggle"):
        build_shards(ImageNet(LAYOUTS[name](tmp_path / name)), tmp_path / f"out-{name}")
    shards = [
        {path.name: path.read_bytes() for path in (tmp_path / f"out-{name}").glob("*.tar")}
        for name in ("tars", "folders", "kaggle")
    ]
    assert len(shards[0]) == 7 and shards[0] == shards[1] == shards[2]


def test_classes_that_number_their_pictures_alike_keep_them_all(tmp_path: Path) -> None:
    for wnid in WNIDS:
        for number in range(3):
            picture = imagenet_picture(TRAIN_NAMES[wnid][number])
            write(tmp_path / f"in/train/{wnid}/{number:04d}.JPEG", picture)
    write(tmp_path / f"in/train/{WNIDS[0]}/alone.JPEG", imagenet_picture("alone"))
    found = records(ImageNet(str(tmp_path / "in")), tmp_path / "work")["train"]
    keys = [f"{wnid}/{number:04d}" for wnid in WNIDS for number in range(3)]
    assert sorted(record.key for record in found) == sorted([*keys, "alone"])
    ids = {record.key: (record.facts["id"], record.label) for record in found}
    assert ids[keys[-1]] == (f"{keys[-1]}.JPEG", 3) and ids["alone"] == ("alone.JPEG", 0)
    report = build_shards(ImageNet(str(tmp_path / "in")), tmp_path / "out")
    assert (report.splits["train"].samples, report.splits["train"].dropped) == (13, {})


def test_a_file_that_is_too_large_is_counted_and_not_read(tmp_path: Path) -> None:
    folder = Path(imagenet_folders(tmp_path / "in"))
    with open(folder / f"train/{WNIDS[0]}/{TRAIN_NAMES[WNIDS[0]][0]}.JPEG", "r+b") as file:
        file.truncate(MAX_MEMBER_BYTES + 1)
    found = records(ImageNet(str(folder)), tmp_path / "work")["train"]
    (large,) = [record for record in found if record.dropped]
    assert (large.key, large.dropped) == (TRAIN_NAMES[WNIDS[0]][0], "file too large")
    assert large.image == b""


def test_units_are_about_as_long_and_not_too_long(layout: str) -> None:
    source = ImageNet(layout)
    source.prepare(str(Path(layout).parent / "work"))
    units = source.units(5)
    assert [unit.number for unit in units if unit.split == "train"] == list(
        range(sum(unit.split == "train" for unit in units))
    )
    assert all(3 <= (unit.samples or 0) <= 5 for unit in units)


def test_one_split_is_enough(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    kaggle_val_labels(folder)
    (Path(imagenet_tars(folder)) / "ILSVRC2012_img_train.tar").unlink()
    found = records(ImageNet(str(folder)), tmp_path / "work")
    assert set(found) == {"val"}
    assert {r.key: WNIDS[r.label or 0] for r in found["val"]} == VAL_WNIDS


def test_a_table_that_is_there_is_not_made_again(tmp_path: Path) -> None:
    source = ImageNet(tars_with_devkit(tmp_path / "in"))
    source.prepare(str(tmp_path / "work"))
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "work").iterdir()}
    source.prepare(str(tmp_path / "work"))
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "work").iterdir()} == before
    assert len(before) == 2


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    write(tmp_path / "readme.txt", "nothing here")
    source = ImageNet(str(tmp_path))
    source.prepare(str(tmp_path / "work"))
    with pytest.raises(FileNotFoundError, match=r"ILSVRC2012_img_train\.tar.*train-\*\.parquet"):
        source.units(5)
    imagenet_tars(tmp_path)
    with pytest.raises(FileNotFoundError, match="LOC_val_solution.csv"):
        source.prepare(str(tmp_path / "work"))


def test_a_picture_that_the_list_leaves_out_is_named(tmp_path: Path) -> None:
    labels = Path(kaggle_val_labels(tmp_path / "labels"))
    labels.write_text(labels.read_text().replace("00000003", "00000009"))
    imagenet_tars(tmp_path / "in")
    source = ImageNet(str(tmp_path / "in"), val_labels=str(labels))
    with pytest.raises(DataError, match=r"ILSVRC2012_val_00000003\.JPEG.* not in the list"):
        source.prepare(str(tmp_path / "work"))


def test_a_class_that_only_validation_has_is_named(tmp_path: Path) -> None:
    folder = Path(imagenet_folders(tmp_path / "in"))
    shutil.rmtree(folder / "train" / WNIDS[0])
    with pytest.raises(DataError, match=f"{WNIDS[0]} is a class of val and not of train"):
        ImageNet(str(folder)).prepare(str(tmp_path / "work"))


def test_a_tar_that_is_cut_short_is_named_before_anything_is_built(tmp_path: Path) -> None:
    folder = Path(tars_with_devkit(tmp_path / "in"))
    path = folder / "ILSVRC2012_img_train.tar"
    path.write_bytes(path.read_bytes()[:20000])
    with pytest.raises(DataError, match=r"ILSVRC2012_img_train\.tar: broken or cut short"):
        ImageNet(str(folder)).prepare(str(tmp_path / "work"))
    assert not list((tmp_path / "work").glob("*"))


def test_a_tar_without_pictures_is_named(tmp_path: Path) -> None:
    write(tmp_path / "ILSVRC2012_img_train.tar", tar_bytes([("a.txt", b"")]))
    with pytest.raises(DataError, match=r"ILSVRC2012_img_train\.tar: holds no pictures"):
        ImageNet(str(tmp_path)).prepare(str(tmp_path / "work"))


def test_tars_are_read_from_a_store_as_from_disk(tmp_path: Path) -> None:
    folder = Path(tars_with_devkit(tmp_path / "in"))
    store = fsspec.filesystem("memory")
    for path in folder.iterdir():
        store.pipe_file(f"/imagenet/{path.name}", path.read_bytes())
    there = ImageNet("memory://imagenet")
    there.prepare("memory://imagenet-work")
    here = ImageNet(str(folder))
    here.prepare(str(tmp_path / "work"))
    units = zip(there.units(5), here.units(5), strict=True)
    assert [list(there.read(a)) == list(here.read(b)) for a, b in units] == [True] * 7
    assert Counter(unit.split for unit in here.units(5)) == {"train": 5, "val": 2}
