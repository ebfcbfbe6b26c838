"""Counts of what shards hold: by split, without pixels, and with what a stream would skip."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dcar.data.shards import read_manifest, write_manifest, write_shards
from dcar.data.stats import SplitStats, bin_edges, collect, histogram, measure_shard, quantiles


def picture(width: int, height: int, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(buffer, kind, **options)
    return buffer.getvalue()


def sample(key: str, **members: bytes) -> dict[str, bytes | str]:
    return {"__key__": key, **members}


def split_of(folder: Path, split: str = "train", **options) -> SplitStats:
    found = collect(folder, processes=1, **options)
    return next(each for each in found.splits if each.split == split)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four pictures of training in two shards, one of validation."""
    train = [
        sample("a", png=picture(40, 20), txt=b"a red thing", cls=b"3"),
        sample("b", png=picture(30, 60), txt="ein schönes Rot".encode(), cls=b"3"),
        sample("c", webp=picture(16, 16, "WEBP"), txt=b"red", cls=b"4"),
        sample("d", jpg=picture(8, 8), cls=b"5"),
    ]
    shards = {
        "train": write_shards(train, tmp_path, "mine-train", 3),
        "val": write_shards([sample("e", png=picture(10, 10), txt=b"x")], tmp_path, "val", 3),
    }
    dropped = {"train": {"dropped": {"too small": 7}}, "val": {"dropped": {}}}
    write_manifest(tmp_path, shards, splits=dropped)
    return tmp_path


@pytest.mark.parametrize("spelling", ["./{name}", "{place}//{name}", "file://{place}/{name}"])
def test_a_folder_is_found_whatever_its_spelling(
    folder: Path, spelling: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)
    found = collect(spelling.format(place=folder.parent, name=folder.name), processes=1)
    assert [(split.split, split.samples) for split in found.splits] == [("train", 4), ("val", 1)]


def test_each_split_is_counted_by_itself(folder: Path) -> None:
    train, val = collect(folder, processes=1).splits
    assert [(s.split, s.shards, s.samples, s.looked) for s in (train, val)] == [
        ("train", 2, 4, 4),
        ("val", 1, 1, 1),
    ]
    assert train.bytes == sum(path.stat().st_size for path in folder.glob("mine-train-*.tar"))
    assert train.sizes.tolist() == [[40, 20], [30, 60], [16, 16], [8, 8]]
    assert train.shorter.tolist() == [20, 30, 16, 8] and train.aspect.tolist() == [2, 0.5, 1, 1]
    assert train.words.tolist() == [3, 3, 1] and train.caption_bytes.tolist() == [11, 16, 3]
    assert train.formats == {"png": 2, "webp": 1, "png named jpg": 1}
    assert train.classes == {3: 2, 4: 1, 5: 1} and not val.classes
    assert train.dropped == {"too small": 7} and not train.skipped


def test_pictures_are_measured_as_shown(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    write_shards([sample("a", jpg=picture(40, 20, "JPEG", exif=exif), txt=b"x")], tmp_path, "t", 1)
    assert split_of(tmp_path, "t").sizes.tolist() == [[20, 40]]


def test_sizes_that_are_known_are_not_read_again(folder: Path) -> None:
    entries = [e for e in read_manifest(folder).values() if e.name.startswith("mine")]
    sizes = {"mine-train-000000.tar": np.array([[5, 6], [7, 8], [9, 9]], np.uint16)}
    write_manifest(folder, {"train": entries}, sizes=sizes)
    assert split_of(folder).sizes.tolist() == [[5, 6], [7, 8], [9, 9], [8, 8]]


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"txt": b"words"}, "no image"),
        ({"txt": b"words", "png": b"<html>"}, "broken image"),
        ({"txt": b"\xff", "png": picture(8, 8)}, "caption is not UTF-8"),
        ({"png": picture(8, 8)}, "no caption"),
    ],
)
def test_what_a_stream_would_skip_is_counted_by_reason(members, reason, tmp_path: Path) -> None:
    rows = [sample("a", **members), sample("b", png=picture(8, 8), txt=b"fine")]
    write_shards(rows, tmp_path, "train", 2)
    train = split_of(tmp_path)
    assert train.skipped == {reason: 1} and train.samples == 2 and len(train.sizes) == 1


def test_pictures_above_the_limit_are_skipped(tmp_path: Path) -> None:
    large = Image.new("1", (9000, 9000))
    buffer = io.BytesIO()
    large.save(buffer, "PNG")
    write_shards([sample("a", png=buffer.getvalue(), txt=b"x")], tmp_path, "train", 1)
    assert split_of(tmp_path).skipped == {"image too large": 1}


def test_samples_lost_with_their_shard_are_counted(folder: Path) -> None:
    path = folder / "mine-train-000000.tar"
    path.write_bytes(path.read_bytes()[:3700])  # in the second sample's picture
    train = split_of(folder)
    assert train.skipped == {"lost with its shard": 2} and (train.samples, train.looked) == (4, 2)


def test_the_first_samples_of_each_shard_stand_for_a_large_set(folder: Path) -> None:
    train = split_of(folder, samples=2)
    assert (train.samples, train.looked) == (4, 3) and not train.skipped
    assert train.sizes.tolist() == [[40, 20], [30, 60], [8, 8]]
    with pytest.raises(ValueError, match="samples is 0"):
        collect(folder, samples=0)


def test_samples_beyond_those_looked_at_are_not_counted_without_a_manifest(tmp_path: Path) -> None:
    write_shards([sample(key, txt=b"x", cls=b"1") for key in "abcd"], tmp_path, "train", 3)
    train = split_of(tmp_path, samples=2)
    assert (train.samples, train.looked) == (None, 3)
    for limit in (3, None):  # the larger shard holds three
        assert split_of(tmp_path, samples=limit).samples == 4


def test_a_class_that_is_no_number_is_counted_and_costs_nothing_else(tmp_path: Path) -> None:
    write_shards([sample("a", cls=b"dog", txt=b"a dog", **{"ids.npy": b"."})], tmp_path, "train", 1)
    train = split_of(tmp_path)
    assert train.formats == {"broken cls": 1, "tokens": 1}
    assert len(train.words) == 1 and not train.skipped and not train.classes


def test_words_may_be_required_of_all(folder: Path) -> None:
    assert split_of(folder, captioned=True).skipped == {"no caption": 1}


def test_tokens_are_counted_as_such(tmp_path: Path) -> None:
    write_shards([sample("a", **{"ids.npy": b"..."})], tmp_path, "train", 1)
    train = split_of(tmp_path)
    assert train.formats == {"tokens": 1} and not train.skipped and not len(train.sizes)


def test_further_captions_count_as_words_of_no_picture(tmp_path: Path) -> None:
    words = [{"captions": {"short": "a cat", "long": "a cat on a mat"}}, {"captions": {}}]
    rows = [sample(f"k{i}", json=json.dumps(each).encode()) for i, each in enumerate(words)]
    write_shards(rows, tmp_path, "train", 2)
    train = split_of(tmp_path)
    assert train.words.tolist() == [2, 5] and train.formats == {"captions": 1}
    assert train.skipped == {"no caption": 1}


def test_quantiles_are_values_that_occur() -> None:
    found = quantiles(np.arange(101))
    assert found == {"min": 0, "p5": 5, "p25": 25, "median": 50, "p75": 75, "p95": 95, "max": 100}
    assert quantiles(np.array([1, 10]))["p25"] == 1 and quantiles(np.empty(0)) == {}


@pytest.mark.parametrize("top", [1, 7, 39, 40, 41, 500, 12345])
def test_bins_are_whole_few_and_hold_everything(top: int) -> None:
    values = np.array([0, 1, top // 2, *[top] * 3])
    edges = bin_edges(values)
    assert len(edges) <= 41 and len(set(np.diff(edges))) == 1 and edges[-1] > top
    assert histogram(values, edges).sum() == len(values)


def test_a_few_giants_do_not_stretch_the_bins() -> None:
    values = np.array([10] * 999 + [100_000])
    edges = bin_edges(values)
    assert edges[-1] == 11 and histogram(values, edges)[-1] == 1000


def test_the_summary_is_plain_json_and_adds_up(folder: Path) -> None:
    summary = json.loads(json.dumps(collect(folder, processes=1).summary()))
    train = summary["splits"]["train"]
    assert train["quantiles"]["width"]["max"] == 40 and train["quantiles"]["words"]["min"] == 1
    assert train["classes"] == {"number": 3, "samples": quantiles(np.array([1, 1, 2]))}
    for what, count in {"shorter": 4, "aspect": 4, "words": 3, "caption_bytes": 3}.items():
        drawn = train["histograms"][what]
        assert sum(drawn["counts"]) == count and len(drawn["edges"]) == len(drawn["counts"]) + 1
    assert "classes" not in summary["splits"]["val"]


def test_one_shard_is_measured_alone(folder: Path) -> None:
    shard = measure_shard(folder / "mine-train-000001.tar")
    assert (shard.name, shard.samples) == ("mine-train-000001.tar", 1)
    assert shard.size == (folder / "mine-train-000001.tar").stat().st_size


def test_a_folder_without_shards_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        collect(tmp_path)
