"""JourneyDB's archives and annotations: captions, splits by prompt, odd and broken members."""

import gzip
import shutil
from collections import Counter
from pathlib import Path

import pytest

from dcar.data.index import read_shard
from dcar.data.samples import read_caption
from dcar.data.sources.journeydb import JourneyDB
from dcar.data.sources.journeydb_prompts import normalised
from dcar.data.sources.source import Record
from dcar.errors import DataError
from tests.layouts import (
    TRAIN_PROMPTS,
    VAL_PROMPTS,
    journey_name,
    journeydb,
    picture,
    tar_bytes,
    write,
)
from tests.source_runs import build_shards, first_batch, records


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(journeydb(tmp_path / "in"))


def kept(found: list[Record]) -> list[Record]:
    return [record for record in found if record.dropped is None]


def prompts(found: list[Record]) -> set[str]:
    return {normalised(record.facts["prompt"]) for record in kept(found)}


def test_every_picture_comes_once_in_the_order_of_its_archive(folder: Path, tmp_path: Path) -> None:
    found = records(JourneyDB(str(folder)), tmp_path / "work")
    assert set(found) == {"train", "val"}
    for split, name, count in (("train", "train", 7), ("val", "valid", 3)):
        expected = [
            f"{archive}/{journey_name(name, archive, number)}"
            for archive in ("000", "001")
            for number in [*range(count), 99]
        ]
        assert [record.key for record in found[split]] == expected
    first = found["train"][0]
    assert first.image == picture(journey_name("train", "000", 0))
    assert first.facts["licence"] == "JourneyDB terms: non-commercial research"
    assert records(JourneyDB(str(folder)), tmp_path / "again") == found


def test_the_caption_is_task_2_s_or_else_the_prompt(folder: Path, tmp_path: Path) -> None:
    found = records(JourneyDB(str(folder)), tmp_path / "work")["train"][:8]
    captions = [record.caption for record in found]
    assert captions[0] == "The 0th picture, described."
    assert captions[1:4] == TRAIN_PROMPTS[1:4]  # no Task2, null, and a null caption
    assert captions[6:] == [TRAIN_PROMPTS[6], None]  # a blank one, and no annotation at all
    sources = [record.facts["caption_source"] for record in found[:3]]
    assert sources == ["Task2.Caption", "prompt", "prompt"]
    assert [record.facts["prompt"] for record in found[:7]] == TRAIN_PROMPTS


def test_train_pictures_whose_prompt_is_in_val_are_dropped(folder: Path, tmp_path: Path) -> None:
    found = records(JourneyDB(str(folder)), tmp_path / "work")
    reasons = Counter(record.dropped for record in found["train"])
    assert reasons == {None: 10, "prompt is in val": 4, "no annotation": 2}
    assert prompts(found["train"]).isdisjoint(prompts(found["val"]))
    assert prompts(found["val"]) == {normalised(prompt) for prompt in VAL_PROMPTS}


def test_without_valid_a_share_of_the_prompts_becomes_val(tmp_path: Path) -> None:
    folder = journeydb(tmp_path / "in", valid=False)
    found = records(JourneyDB(folder, val_share=0.3), tmp_path / "work")
    assert prompts(found["train"]).isdisjoint(prompts(found["val"]))
    assert prompts(found["train"]) | prompts(found["val"]) == set(map(normalised, TRAIN_PROMPTS))
    assert kept(found["val"]) and len(kept(found["train"])) > len(kept(found["val"]))
    keys = [record.key for split in found.values() for record in split]
    assert len(keys) == len(set(keys)) == 16  # each picture in one of the splits, and once
    assert Counter(r.dropped for r in found["train"])["no annotation"] == 2


def test_without_valid_and_without_a_share_there_is_no_val(tmp_path: Path) -> None:
    source = JourneyDB(journeydb(tmp_path / "in", valid=False), val_share=0.0)
    source.prepare(str(tmp_path / "work"))
    assert {unit.split for unit in source.units(5)} == {"train"}


def test_raw_archives_become_training_batches(folder: Path, tmp_path: Path) -> None:
    report = build_shards(JourneyDB(str(folder)), tmp_path / "out")
    assert report.splits["train"].samples == 10
    assert report.splits["train"].dropped == {"prompt is in val": 4, "no annotation": 2}
    batch = first_batch(tmp_path / "out", captioned=True)
    assert batch["image"].shape == (4, 3, 32, 32) and all(batch["caption"])
    (shard, *_) = sorted((tmp_path / "out").glob("set-train-*.tar"))
    raw = next(read_shard(shard))
    assert read_caption(raw, required=True) == "The 0th picture, described."
    assert b'"prompt": "A red fox in the snow, oil painting --ar 16:9 --v 5"' in bytes(raw["json"])


def test_an_archive_that_is_cut_short_is_named(folder: Path, tmp_path: Path) -> None:
    path = folder / "data/train/imgs/001.tgz"
    path.write_bytes(path.read_bytes()[:-3000])
    source = JourneyDB(str(folder))
    source.prepare(str(tmp_path / "work"))
    good, bad = (unit for unit in source.units(5) if unit.split == "train")
    assert len(list(source.read(good))) == 8
    with pytest.raises(DataError, match=r"001\.tgz: broken or cut short"):
        list(source.read(bad))


def test_members_that_lead_elsewhere_are_never_written(folder: Path, tmp_path: Path) -> None:
    name = journey_name("train", "000", 0)
    evil = tar_bytes(
        [("../../evil.jpg", b"x"), (f"/{name}.jpg", b"x"), (f"./000/{name}.jpg", b"y")]
    )
    write(folder / "data/train/imgs/000.tgz", gzip.compress(evil))
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    source = JourneyDB(str(folder))
    source.prepare(str(tmp_path / "work"))
    (record,) = source.read(source.units(5)[0])
    assert record.key == f"000/{name}" and record.image == b"y"
    after = {path for path in tmp_path.rglob("*") if path.is_file()}
    assert all(tmp_path / "work" in path.parents for path in after - before)


def test_annotations_are_sorted_once_and_again_after_a_kill(folder: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    JourneyDB(str(folder)).prepare(str(work))
    files = {path: path.read_bytes() for path in (work / "annotations").iterdir()}
    assert len(files) == 6  # four of annotations, the prompts of val, and the mark
    for path in (folder / "data").glob("*/*.jsonl.tgz"):  # not looked at again
        path.unlink()
    JourneyDB(str(folder)).prepare(str(work))
    journeydb(folder)
    (work / "annotations/done").unlink()
    (work / "annotations/train-000.jsonl").unlink()
    JourneyDB(str(folder)).prepare(str(work))
    assert {path: path.read_bytes() for path in (work / "annotations").iterdir()} == files


def test_unpacked_annotations_and_a_folder_without_data_are_read_too(
    folder: Path, tmp_path: Path
) -> None:
    packed = records(JourneyDB(str(folder)), tmp_path / "work")
    annotations = folder / "data/train/train_anno_realease_repath.jsonl.tgz"
    shutil.unpack_archive(annotations, annotations.parent, "gztar", filter="data")
    annotations.unlink()
    (folder / "data").rename(tmp_path / "moved")
    assert records(JourneyDB(str(tmp_path / "moved")), tmp_path / "again") == packed


def test_what_is_missing_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"data/train/imgs/\*\.tgz"):
        JourneyDB(str(tmp_path)).prepare(str(tmp_path / "work"))
    (folder / "data/train/train_anno_realease_repath.jsonl.tgz").unlink()
    with pytest.raises(FileNotFoundError, match=r"train_anno_realease_repath\.jsonl\.tgz"):
        JourneyDB(str(folder)).prepare(str(tmp_path / "work"))


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_a_share_outside_its_range_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match=f"val_share is {share}"):
        JourneyDB("in", val_share=share)
