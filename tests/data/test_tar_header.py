"""Tar headers: what the stock class takes in silence is an error that says what is wrong."""

import io
import tarfile

import pytest

from dcar.data.tar_header import BLOCK, MAX_LONG_NAME, StrictHeader


def opened(data: bytes) -> tarfile.TarFile:
    return tarfile.open(fileobj=io.BytesIO(data), mode="r:", tarinfo=StrictHeader)


def archive(count: int = 3) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for number in range(count):
            info = tarfile.TarInfo(f"{number}.txt")
            info.size = 1
            tar.addfile(info, io.BytesIO(b"x"))
    return file.getvalue()


def test_a_good_archive_reads_as_ever():
    names = ["0.txt", "1.txt", "2.txt"]
    assert opened(archive()).getnames() == names


def test_a_damaged_header_is_no_end_of_the_archive():
    data = bytearray(archive())
    data[2 * BLOCK + 3] ^= 1  # in the name of the second member
    with pytest.raises(tarfile.ReadError, match="checksum"):
        opened(bytes(data)).getnames()


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
def test_a_name_of_gigabytes_is_not_read(kind):
    info = tarfile.TarInfo("long")
    info.type, info.size = kind, MAX_LONG_NAME + 1
    with pytest.raises(tarfile.ReadError, match="a header of"):
        opened(info.tobuf() + bytes(4 * BLOCK))


def test_a_negative_size_does_not_walk_backwards():
    info = tarfile.TarInfo("k.txt")
    info.size = -BLOCK
    with pytest.raises(tarfile.ReadError, match="a header of -512"):
        opened(info.tobuf(tarfile.GNU_FORMAT) + bytes(2 * BLOCK))


def test_nor_does_one_of_a_pax_record():
    info = tarfile.TarInfo("k.txt")
    info.pax_headers = {"size": str(-3 * BLOCK)}
    with pytest.raises(tarfile.ReadError, match=r"k\.txt has -1536 bytes"):
        opened(info.tobuf(tarfile.PAX_FORMAT) + bytes(2 * BLOCK))
