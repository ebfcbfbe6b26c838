"""One shard under the loupe: every fault has its name, and nothing that is fine has one."""

import io
import json
import os
import random
import shutil
import tarfile
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dcar.data.shard_check import LISTED, Problem, check_shard
from dcar.data.shards import read_manifest
from tests.toys import ROOT

EMOJI = ROOT / "assets" / "emoji"


def picture(kind: str = "PNG", mode: str = "RGB", size: tuple[int, int] = (8, 8), **options):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 255, (size[1], size[0], 4), np.uint8)
    image = Image.fromarray(pixels, "RGBA").convert("RGB" if mode == "I;16" else mode)
    if mode == "I;16":
        image = Image.fromarray(rng.integers(0, 65535, size[::-1], np.uint16))
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def member(name: str, data: bytes = b"", **header) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in header.items():
        setattr(info, field, value)
    return info, data


def plant(path: Path, *members: tuple[tarfile.TarInfo, bytes], format: int = tarfile.PAX_FORMAT):
    with tarfile.open(path, "w", format=format) as tar:
        for info, data in members:
            tar.addfile(info, io.BytesIO(data))
    return path


def sample(key: str = "a", **members: bytes) -> list[tuple[tarfile.TarInfo, bytes]]:
    members = {"png": picture(), "txt": b"a cat"} | members
    return [member(f"{key}.{kind}", data) for kind, data in members.items() if data is not None]


def found(path: Path, **options) -> list[tuple[str, str]]:
    return [(problem.key, problem.reason) for problem in check_shard(path, **options).problems]


@pytest.fixture(scope="module")
def emoji(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("emoji")
    for name in ("val-000000.tar", "manifest.json"):
        shutil.copy(EMOJI / name, folder)
    return folder


def test_a_shard_as_the_manifest_has_it_is_fine(emoji: Path) -> None:
    entry = read_manifest(emoji)["val-000000.tar"]
    check = check_shard(emoji / entry.name, entry)
    assert check.problems == [] and check.samples == entry.samples == len(check.keys)
    assert (check.size, check.sha256) == (entry.bytes, entry.sha256)


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_all_of_two_hundred_changes_are_named(damage: str, emoji: Path, tmp_path: Path) -> None:
    entry = read_manifest(emoji)["val-000000.tar"]
    whole, rng, path = (emoji / entry.name).read_bytes(), random.Random(0), tmp_path / entry.name
    named = 0
    for _ in range(200):
        place = rng.randrange(len(whole))
        changed = bytes([whole[place] ^ 1 << rng.randrange(8)]) + whole[place + 1 :]
        path.write_bytes(whole[:place] + (changed if damage == "flipped" else b""))
        counts = check_shard(path, entry, deep=False).counts
        reasons = {"cut": "size is not the manifest's", "flipped": "sha256 is not the manifest's"}
        named += counts[reasons[damage]] == 1
    assert named == 200


def test_without_a_manifest_every_cut_among_the_samples_is_named(emoji: Path, tmp_path) -> None:
    whole, path = (emoji / "val-000000.tar").read_bytes(), tmp_path / "a.tar"
    end = len(whole.rstrip(b"\0")) // 512 * 512 + 512 + 1024
    rng = random.Random(1)
    cuts = [512 * rng.randrange(1, end // 512) for _ in range(30)]  # no header is cut in half there
    for cut in [*cuts, *(rng.randrange(1, end) for _ in range(30)), end - 1]:
        path.write_bytes(whole[:cut])
        counts = check_shard(path, deep=False).counts
        assert counts["breaks off"] + counts["no tar"] == 1, cut
    path.write_bytes(whole[:end])
    assert not check_shard(path, deep=False).counts


def test_without_a_manifest_a_changed_header_is_named(emoji: Path, tmp_path: Path) -> None:
    whole, path = bytearray((emoji / "val-000000.tar").read_bytes()), tmp_path / "a.tar"
    with tarfile.open(emoji / "val-000000.tar") as tar:
        offset = tar.getmembers()[6].offset
    whole[offset + 5] ^= 1
    path.write_bytes(whole)
    check = check_shard(path, deep=False)
    assert check.counts == {"breaks off": 1} and check.samples == 2
    assert "bad checksum, after" in check.problems[0].detail


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty file"),
        (b"<!DOCTYPE html><html>503</html>" * 200, "no tar"),
        (b"<html>", "no tar"),
        (b"\0" * 10240, "no samples"),
        (b"\x1f\x8b" + b"\1" * 2000, "no tar"),
    ],
)
def test_what_is_no_tar_is_named(content: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(content)
    assert found(tmp_path / "a.tar") == [("", reason)]
    if b"html" in content:
        assert "<html>" in str(check_shard(tmp_path / "a.tar").problems[0])


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"txt": None}, "no caption"),
        ({"txt": b" \n"}, "no caption"),
        ({"txt": b"word " * 10_000}, "caption too long"),
        ({"txt": b"caf\xe9"}, "caption is not UTF-8"),
        ({"png": None}, "no image"),
        ({"png": b""}, "broken image"),
        ({"png": b"<html>503</html>"}, "broken image"),
        ({"png": picture("TIFF")}, "broken image"),
        ({"png": picture("JPEG", size=(64, 64))[:900]}, "broken image"),
        ({"png": picture(size=(64, 64))[:900]}, "broken image"),
        ({"png": picture("WEBP", size=(64, 64))[:900]}, "broken image"),
        ({"json": b"{"}, "broken json"),
        ({"json": b"[" * 100_000}, "broken json"),
        ({"txt": None, "json": b"[" * 100_000}, "broken json"),
        ({"cls": b"cat"}, "broken cls"),
        ({"png": None, "ids.npy": b"\x93NUMPY"}, "broken tokens"),
    ],
)
def test_a_bad_sample_is_named_with_its_reason(members, reason: str, tmp_path: Path) -> None:
    path = plant(tmp_path / "a.tar", *sample("a"), *sample("b", **members), *sample("c"))
    assert found(path) == [("b", reason)]
    assert found(path, deep=False) == []


@pytest.mark.parametrize(
    "data",
    [
        picture("JPEG", "CMYK"),
        picture("JPEG", "L"),
        picture("PNG", "I;16"),
        picture("PNG", "RGBA"),
        picture("WEBP", "RGBA"),
        picture("PNG", "P"),
        picture("PNG", "1"),
        picture("PNG", size=(1, 1)),
        picture("JPEG", size=(1, 300)),
        picture("JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\1\0\x12\1\3\0\1\0\0\0\6\0\0\0\0\0\0\0"),
        picture("WEBP", save_all=True, append_images=[Image.new("RGB", (8, 8))] * 3),
        picture("PNG", save_all=True, append_images=[Image.new("RGB", (8, 8))] * 3),
    ],
    ids="cmyk grey 16-bit alpha webp-alpha palette 1-bit 1px narrow turned animated apng".split(),
)
def test_unusual_pictures_are_fine(data: bytes, tmp_path: Path) -> None:
    assert found(plant(tmp_path / "a.tar", *sample(png=data))) == []


def test_a_picture_of_30000_pixels_a_side_is_refused_from_its_header(tmp_path: Path) -> None:
    data = bytearray(picture())
    data[16:24] = (30_000).to_bytes(4) * 2  # width and height in the IHDR chunk
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4)
    path = plant(tmp_path / "a.tar", *sample(png=bytes(data)))
    tracemalloc.start()
    assert found(path) == [("a", "image too large")]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 * 2**20


def test_words_are_required_unless_there_is_a_class_or_the_caller_says(tmp_path: Path) -> None:
    path = plant(tmp_path / "a.tar", *sample(txt=None, cls=b"7"))
    assert found(path) == [] and found(path, captioned=True) == [("a", "no caption")]
    path = plant(tmp_path / "b.tar", *sample(txt=None))
    assert found(path) == [("a", "no caption")] and found(path, captioned=False) == []


def test_all_reasons_of_a_sample_are_given(tmp_path: Path) -> None:
    path = plant(tmp_path / "a.tar", *sample(png=b"x", txt=b"\xff", cls=b"x"))
    reasons = {"broken cls", "caption is not UTF-8", "broken image"}
    assert set(found(path)) == {("a", reason) for reason in reasons}


def test_members_that_do_not_belong_are_named_and_nothing_is_written(tmp_path: Path) -> None:
    link = {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}
    strange = {
        "../up.txt": ("name leads out of the folder", {}),
        "x/../../up.txt": ("name leads out of the folder", {}),
        "/root.txt": ("absolute name", {}),
        "soft.txt": ("link", link),
        "hard.txt": ("link", link | {"type": tarfile.LNKTYPE}),
        "device.txt": ("device", {"type": tarfile.CHRTYPE}),
        "pipe.txt": ("device", {"type": tarfile.FIFOTYPE}),
        "b.pyd": ("unknown member type", {}),
        "b.pickle": ("unknown member type", {}),
        "._a.txt": ("unknown member type", {}),
        "none": ("unknown member type", {}),
    }
    members = [member(name, **header) for name, (_, header) in strange.items()]
    (tmp_path / "in").mkdir()
    path = plant(tmp_path / "in" / "a.tar", *sample("a"), *members)
    before = sorted(tmp_path.rglob("*"))
    assert found(path) == [(name, reason) for name, (reason, _) in strange.items()]
    assert sorted(tmp_path.rglob("*")) == before and check_shard(path).samples == 1


def test_a_member_twice_is_named_and_folders_are_none_of_our_business(tmp_path: Path) -> None:
    folders = [member("./", type=tarfile.DIRTYPE), member("./x", type=tarfile.DIRTYPE)]
    path = plant(tmp_path / "a.tar", *folders, *sample("x/a"), member("x/a.txt", b"a dog"))
    check = check_shard(path)
    assert check.counts == {"member twice": 1} and check.samples == 1
    assert check.problems == [Problem("a.tar", "member twice", "x/a.txt")]


def test_promises_of_gigabytes_are_not_kept(tmp_path: Path) -> None:
    """A sparse file of a terabyte, a picture of one, a name of one, tokens of one."""
    array = b"\x93NUMPY\1\0v\0" + b"{'descr': '<u2', 'fortran_order': False, 'shape': (9**12,)}"
    array = array.replace(b"9**12", str(9**12).encode()).ljust(127) + b"\n"
    tokens = plant(tmp_path / "tokens.tar", *sample("t", **{"png": None, "ids.npy": array}))
    sparse = {"GNU.sparse.major": "0", "GNU.sparse.minor": "1", "GNU.sparse.size": str(2**40)}
    info, data = member("s.txt", b"x" * 512)
    info.pax_headers = sparse | {"GNU.sparse.map": "0,512", "GNU.sparse.name": "s.txt"}
    sparse_file = plant(tmp_path / "sparse.tar", *sample("a"), (info, data))
    for name, header in (
        ("large", member("b.png", type=tarfile.REGTYPE)[0]),
        ("long", member("b.png", type=tarfile.GNUTYPE_LONGNAME)[0]),
    ):
        header.size = 2**40
        whole = plant(tmp_path / f"{name}.tar", *sample("a")).read_bytes().rstrip(b"\0")
        whole += b"\0" * (-len(whole) % 512) + header.tobuf(tarfile.GNU_FORMAT)
        (tmp_path / f"{name}.tar").write_bytes(whole)
        os.truncate(tmp_path / f"{name}.tar", 48 * 2**20)
    tracemalloc.start()
    assert found(tokens) == [("t", "broken tokens")]
    assert found(sparse_file) == [("s.txt", "sparse file")]
    assert found(tmp_path / "large.tar") == [("b.png", "member too large"), ("", "breaks off")]
    assert found(tmp_path / "long.tar") == [("", "breaks off")]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 * 2**20


def test_whole_tokens_and_further_captions_are_fine(tmp_path: Path) -> None:
    ids, residual = io.BytesIO(), io.BytesIO()
    np.save(ids, np.zeros((4, 4), np.uint16))
    np.save(residual, np.zeros((8, 4, 4), np.float16))
    arrays = {"ids.npy": ids.getvalue(), "residual.npy": residual.getvalue()}
    tokens = {"png": None, "txt": None, **arrays}
    assert found(plant(tmp_path / "tokens.tar", *sample(**tokens))) == []
    words = json.dumps({"captions": {"short": "a cat", "long": "a cat on a mat"}}).encode()
    captions = {"png": None, "txt": None, "json": words}
    assert found(plant(tmp_path / "captions.tar", *sample(**captions))) == []
    empty = json.dumps({"captions": {"short": ""}}).encode()
    assert found(plant(tmp_path / "empty.tar", *sample(**(captions | {"json": empty})))) == [
        ("a", "no caption")
    ]


def test_sizes_that_are_not_those_of_the_pictures_are_named(tmp_path: Path) -> None:
    wide = picture(size=(12, 8))
    path = plant(tmp_path / "a.tar", *sample("a", png=wide), *sample("b", png=wide))
    assert found(path, sizes=np.array([[12, 8], [12, 8]], np.uint16)) == []
    wrong = np.array([[12, 8], [8, 12]], np.uint16)
    assert found(path, sizes=wrong) == [("b", "size is not that of sizes.npz")]
    assert found(path, sizes=wrong[:1]) == [("", "samples are not those of sizes.npz")]


def test_problems_beyond_the_first_hundred_are_counted(tmp_path: Path) -> None:
    path = plant(tmp_path / "a.tar", *(member(f"{i}.pyd") for i in range(LISTED + 50)))
    check = check_shard(path)
    assert len(check.problems) == LISTED + 1  # and "no samples"
    assert check.counts["unknown member type"] == LISTED + 50


def test_names_from_strangers_print_on_one_line() -> None:
    problem = Problem("a.tar", "link", "x\n\x1b[31m\udcff.txt", "to \r")
    assert str(problem) == r"a.tar: x\n\x1b[31m\udcff.txt: link (to \r)"


def test_a_file_that_cannot_be_opened_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "a.tar").mkdir()
    assert found(tmp_path / "a.tar") == [("", "cannot be read")]


@pytest.mark.slow
def test_fifty_thousand_members_take_next_to_no_memory(tmp_path: Path) -> None:
    header = tarfile.TarInfo("0000000.txt")
    with open(tmp_path / "a.tar", "wb") as file:
        for number in range(50_000):
            header.name = f"{number:07d}.txt"
            file.write(header.tobuf())
        file.write(b"\0" * 1024)
    tracemalloc.start()
    check = check_shard(tmp_path / "a.tar", deep=False)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert check.samples == 50_000 and not check.counts
    assert peak < 4 * 2**20  # 8 bytes a sample, a few times while they are copied, and a chunk
