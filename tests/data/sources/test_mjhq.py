"""MJHQ-30K's zip and table of prompts."""

import json
import struct
import tracemalloc
import zipfile
from collections import Counter
from pathlib import Path

import pytest

from dcar.data.sources import mjhq
from dcar.data.sources.mjhq import MJHQ
from dcar.errors import DataError
from tests.layouts import MJHQ_CATEGORIES, mjhq_id, picture
from tests.layouts import mjhq as mjhq_layout
from tests.source_runs import build_shards, records

PLACES = sorted((category, mjhq_id(category, n)) for category in MJHQ_CATEGORIES for n in range(4))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(mjhq_layout(tmp_path / "in"))


def test_pictures_come_once_by_category_and_id(folder: Path, tmp_path: Path) -> None:
    found = records(MJHQ(str(folder)), tmp_path)
    assert set(found) == {"test"}
    assert [record.key for record in found["test"]] == ["/".join(place) for place in PLACES]
    for record, (category, name) in zip(found["test"], PLACES, strict=True):
        assert record.image == picture(name)
        assert record.caption == f"a {category} picture {name[:4]}"
        assert record.facts == {"id": name, "category": category}
    assert records(MJHQ(str(folder)), tmp_path) == found


def test_raw_files_become_shards(folder: Path, tmp_path: Path) -> None:
    report = build_shards(MJHQ(str(folder)), tmp_path / "out")
    assert report.splits["test"].samples == 12 and report.splits["test"].dropped == {}
    assert len(list((tmp_path / "out").glob("set-test-*.tar"))) == 3


def test_a_prompt_without_a_picture_and_the_reverse_are_dropped(
    folder: Path, tmp_path: Path
) -> None:
    meta = json.loads((folder / "meta_data.json").read_text())
    del meta[PLACES[0][1]]
    meta["ff"] = {"category": "art", "prompt": "never drawn"}
    (folder / "meta_data.json").write_text(json.dumps(meta))
    found = records(MJHQ(str(folder)), tmp_path)["test"]
    assert Counter(r.dropped for r in found) == {None: 11, "no annotation": 1, "no image": 1}


def test_a_zip_inside_another_folder_is_read(folder: Path, tmp_path: Path) -> None:
    whole = records(MJHQ(str(folder)), tmp_path)
    with zipfile.ZipFile(folder / "mjhq30k_imgs.zip") as old:
        members = {name: old.read(name) for name in old.namelist() if name.endswith(".jpg")}
    with zipfile.ZipFile(folder / "mjhq30k_imgs.zip", "w") as new:
        for name, data in members.items():
            new.writestr(f"mjhq30k_imgs/{name}", data)
    assert records(MJHQ(str(folder)), tmp_path) == whole


def with_extra_member(folder: Path, name: str, data: bytes) -> Path:
    path = folder / "mjhq30k_imgs.zip"
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, data)
    meta = json.loads((folder / "meta_data.json").read_text())
    meta["bomb"] = {"category": "art", "prompt": "a bomb"}
    (folder / "meta_data.json").write_text(json.dumps(meta))
    return path


def test_a_member_that_declares_too_much_is_not_read(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mjhq, "MAX_MEMBER_BYTES", 2**20)
    with_extra_member(folder, "art/bomb.jpg", bytes(2**20 + 1))
    found = {record.key: record for record in records(MJHQ(str(folder)), tmp_path)["test"]}
    assert found["art/bomb"].dropped == "file too large" and found["art/bomb"].image == b""


def test_a_member_that_declares_too_little_is_an_error_and_not_unpacked(
    folder: Path, tmp_path: Path
) -> None:
    size = 64 * 2**20 + 0x123456
    path = with_extra_member(folder, "art/bomb.jpg", bytes(size))
    data = path.read_bytes()
    assert data.count(struct.pack("<I", size)) == 2  # before the member and in the directory
    path.write_bytes(data.replace(struct.pack("<I", size), struct.pack("<I", 1000)))
    tracemalloc.start()
    with pytest.raises(DataError, match=r"mjhq30k_imgs\.zip: broken.*CRC"):
        records(MJHQ(str(folder)), tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * 2**20


def test_names_that_climb_are_no_pictures(folder: Path, tmp_path: Path) -> None:
    whole = records(MJHQ(str(folder)), tmp_path / "work")
    with zipfile.ZipFile(folder / "mjhq30k_imgs.zip", "a") as archive:
        archive.writestr("../art/evil.jpg", b"x")
    assert records(MJHQ(str(folder)), tmp_path / "work") == whole
    assert not list(tmp_path.rglob("evil*"))


def test_files_that_are_cut_short_are_named(folder: Path, tmp_path: Path) -> None:
    path = folder / "mjhq30k_imgs.zip"
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match=r"mjhq30k_imgs\.zip: broken or cut short"):
        records(MJHQ(str(folder)), tmp_path)
    path.write_bytes(data[:2000] + bytes(200) + data[2200:])
    with pytest.raises(DataError, match=r"mjhq30k_imgs\.zip: broken or cut short"):
        records(MJHQ(str(folder)), tmp_path)
    path.write_bytes(data)
    for text, told in (('{"a": {"category": "art"}}', "'prompt'"), ("[" * 10**5, "recursion")):
        (folder / "meta_data.json").write_text(text)
        with pytest.raises(DataError, match=rf"meta_data\.json: not a table.*{told}"):
            records(MJHQ(str(folder)), tmp_path)


@pytest.mark.parametrize("name", ["mjhq30k_imgs.zip", "meta_data.json"])
def test_what_is_missing_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        MJHQ(str(folder)).prepare("work")
