"""Members of archives: in order, whole or with an error, and nothing that leads elsewhere."""

import gzip
import io
import os
import tarfile
from pathlib import Path

import fsspec
import pytest

from dcar.data.sources import archives
from dcar.data.sources.archives import (
    Member,
    Place,
    is_image,
    naming,
    places,
    read_picture,
    read_range,
    safe_name,
    stream_lines,
    stream_tar,
)
from dcar.errors import DataError
from tests.layouts import tar_bytes, write

FILES: list[tuple[str, bytes | None]] = [
    ("a/", None),
    ("a/1.jpg", b"first" * 200),
    ("./a/2.JPEG", b"second"),
    ("a/3.txt", b"words"),
    ("a/4.png", b"fourth" * 300),
]
PICTURES = [
    Member("a/1.jpg", b"first" * 200),
    Member("a/2.JPEG", b"second"),
    Member("a/4.png", b"fourth" * 300),
]


def stored(path: Path, data: bytes) -> str:
    write(path, data)
    return str(path)


@pytest.mark.parametrize(
    ("name", "mode"), [("x.tar", "w"), ("x.tgz", "w:gz"), ("x.tar.gz", "w:gz")]
)
def test_pictures_come_in_order_from_plain_and_zipped_tars(
    tmp_path: Path, name: str, mode: str
) -> None:
    assert list(stream_tar(stored(tmp_path / name, tar_bytes(FILES, mode)))) == PICTURES


def test_a_tar_is_read_from_a_store_as_from_disk() -> None:
    with fsspec.open("memory://archives/x.tgz", "wb") as file:
        file.write(tar_bytes(FILES, "w:gz"))
    assert list(stream_tar("memory://archives/x.tgz")) == PICTURES


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_every_cut_of_an_archive_is_an_error_that_names_it(tmp_path: Path, mode: str) -> None:
    whole = tar_bytes(FILES, mode)
    end = len(whole.rstrip(b"\0")) + 1 if mode == "w" else len(whole)
    step = max(end // 150, 1)
    for cut in [*range(0, end, step), end - 1]:
        path = stored(tmp_path / ("cut.tar" if mode == "w" else "cut.tgz"), whole[:cut])
        with pytest.raises(DataError, match=r"cut\.t.*broken or cut short"):
            list(stream_tar(path))


def test_a_flipped_byte_in_a_zipped_archive_is_an_error(tmp_path: Path) -> None:
    whole = bytearray(tar_bytes(FILES, "w:gz"))
    whole[len(whole) // 2] ^= 0x10
    with pytest.raises(DataError, match=r"x\.tgz"):
        list(stream_tar(stored(tmp_path / "x.tgz", bytes(whole))))


def test_the_checksum_at_the_end_is_looked_at_when_the_tar_ends_long_before(tmp_path: Path) -> None:
    data = tar_bytes(FILES) + os.urandom(3 * 2**20)
    zipped = bytearray(gzip.compress(data, mtime=0))
    zipped[-8] ^= 1
    with pytest.raises(DataError, match=r"x\.tgz.*CRC"):
        list(stream_tar(stored(tmp_path / "x.tgz", bytes(zipped))))


def test_a_web_page_in_place_of_an_archive_is_an_error(tmp_path: Path) -> None:
    for name in ("x.tar", "x.tgz"):
        with pytest.raises(DataError, match=name):
            list(stream_tar(stored(tmp_path / name, b"<html>Sign in</html>" * 100)))


def evil_tar() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name in ("../x.jpg", "/etc/x.jpg", "a/../../x.jpg", "a\\..\\x.jpg", "a//x.jpg"):
            info = tarfile.TarInfo(name)
            info.size = 4
            tar.addfile(info, io.BytesIO(b"evil"))
        kinds = (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE)
        for number, kind in enumerate(kinds):
            info = tarfile.TarInfo(f"link{number}.jpg")
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        info = tarfile.TarInfo("good.jpg")
        info.size = 4
        tar.addfile(info, io.BytesIO(b"good"))
    return file.getvalue()


def test_links_devices_and_names_that_climb_are_passed_over(tmp_path: Path) -> None:
    path = stored(tmp_path / "in" / "evil.tar", evil_tar())
    assert list(stream_tar(path)) == [Member("good.jpg", b"good")]
    with open(path, "rb") as file:
        assert [place.name for place in places(file)] == ["good.jpg"]
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [Path(path)]


def test_a_member_above_the_limit_is_named_and_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archives, "MAX_MEMBER_BYTES", 999)
    found = list(stream_tar(stored(tmp_path / "x.tar", tar_bytes(FILES))))
    assert found == [Member("a/1.jpg", None), PICTURES[1], Member("a/4.png", None)]


def test_a_name_of_a_gigabyte_is_refused_before_it_is_read(tmp_path: Path) -> None:
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 2**30
    head = info.tobuf(tarfile.GNU_FORMAT)
    with pytest.raises(DataError, match="a header of 1073741824 bytes"):
        list(stream_tar(stored(tmp_path / "x.tar", head + bytes(2**16))))


def test_a_negative_size_is_refused(tmp_path: Path) -> None:
    """It would send the stock reader backwards, to read the same again forever."""
    files = tar_bytes(FILES).rstrip(b"\0")
    info = tarfile.TarInfo("x.jpg")
    info.pax_headers = {"size": "-2560"}
    header = info.tobuf(tarfile.PAX_FORMAT)
    path = stored(tmp_path / "x.tar", files + bytes(-len(files) % 512) + header + bytes(1024))
    with open(path, "rb") as file, pytest.raises(DataError, match="x.jpg has -2560"), naming(path):
        for count, _ in enumerate(places(file)):
            assert count < 20
    with pytest.raises(DataError, match="x.jpg has -2560"):
        list(stream_tar(path))


def test_places_of_members_and_of_members_of_members(tmp_path: Path) -> None:
    inner = tar_bytes([("1.JPEG", b"one"), ("2.JPEG", b"two")])
    path = stored(tmp_path / "x.tar", tar_bytes([("n0.tar", inner), ("3.JPEG", b"three")]))
    with open(path, "rb") as file:
        found = list(places(file, nested=True))
    assert [place.name for place in found] == ["n0.tar/1.JPEG", "n0.tar/2.JPEG", "3.JPEG"]
    read = [read_range(path, place.offset, place.size) for place in found]
    assert read == [b"one", b"two", b"three"]
    with open(path, "rb") as file:
        assert [place.name for place in places(file)] == ["n0.tar", "3.JPEG"]


def test_places_of_a_tar_that_is_cut_short_are_an_error(tmp_path: Path) -> None:
    inner = tar_bytes([("1.JPEG", b"one" * 999), ("2.JPEG", b"two" * 999)])
    whole = tar_bytes([("n0.tar", inner), ("n1.tar", inner)])
    for cut in range(0, len(whole.rstrip(b"\0")), 700):
        path = stored(tmp_path / "x.tar", whole[:cut])
        with open(path, "rb") as file, pytest.raises(DataError, match=r"x\.tar"), naming(path):
            list(places(file, nested=True))


def test_a_range_of_a_file_is_read_from_a_store_as_from_disk(tmp_path: Path) -> None:
    with fsspec.open("memory://archives/range.bin", "wb") as file:
        file.write(bytes(range(100)))
    path = stored(tmp_path / "range.bin", bytes(range(100)))
    for url in (path, "memory://archives/range.bin"):
        assert read_range(url, 10, 5) == bytes(range(10, 15))
        with pytest.raises(DataError, match="range.bin: broken or cut short"):
            read_range(url, 98, 5)


def test_a_file_above_the_limit_is_not_read(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(archives, "MAX_MEMBER_BYTES", 100)
    for folder in ("memory://archives", tmp_path):
        for size in (100, 101):
            with fsspec.open(f"{folder}/{size}.jpg", "wb") as file:
                file.write(bytes(size))
        assert read_picture(f"{folder}/100.jpg") == bytes(100)
        assert read_picture(f"{folder}/101.jpg") is None


def test_what_is_no_file_is_not_found(tmp_path: Path) -> None:
    (tmp_path / "folder.jpg").mkdir()
    stored(tmp_path / "1.jpg", b"1")
    for name in ("no.jpg", "1.jpg/no.jpg", "folder.jpg"):
        with pytest.raises(FileNotFoundError):
            read_picture(str(tmp_path / name))
    with pytest.raises(FileNotFoundError):
        read_picture("memory://archives/no.jpg")


def test_lines_of_a_packed_file_are_those_of_the_file(tmp_path: Path) -> None:
    text = b"".join(b"line %d\n" % number for number in range(5000))
    packed = tar_bytes([("readme.md", b"no"), ("anno.jsonl", text)], "w:gz")
    plain = stored(tmp_path / "anno.jsonl", text)
    zipped = stored(tmp_path / "anno.jsonl.tgz", packed)
    assert list(stream_lines(plain, ".jsonl")) == list(stream_lines(zipped, ".jsonl"))
    assert list(stream_lines(zipped, ".jsonl"))[-1] == b"line 4999\n"
    with pytest.raises(DataError, match=r"anno\.jsonl\.tgz.*no \*\.csv"):
        list(stream_lines(zipped, ".csv"))


def test_a_file_that_is_not_there_is_not_called_broken(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        list(stream_tar(str(tmp_path / "x.tar")))
    with pytest.raises(ValueError, match="scheme"):
        list(stream_tar("ftp://example.com/x.tar"))


def test_errors_of_a_store_s_library_name_the_file_and_keep_the_secret() -> None:
    class ClientError(Exception): ...

    with pytest.raises(DataError, match=r"b/x\.tar.*failed \(ClientError: cut\)") as caught:
        with naming("https://user:word@b/x.tar"):
            raise ClientError("cut")
    assert "word" not in str(caught.value)
    with pytest.raises(ClientError), naming("x.tar"):
        raise ClientError("a bug")


def test_names_of_pictures_and_names_that_are_safe() -> None:
    assert [is_image(name) for name in ("a/b.JPEG", "b.webp", "._b.jpg", "a/._b.jpg", "b.txt")] == [
        *(True, True, False, False, False)
    ]
    assert safe_name("./a/b.jpg") == "a/b.jpg"
    assert safe_name("a/b\n.jpg") is None
    assert Place("a", 1, 2).offset == 1
