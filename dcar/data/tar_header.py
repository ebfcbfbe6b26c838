"""Headers of tar archives from strangers, read without trust."""

import tarfile

BLOCK = 512  # bytes, of which a tar is made
MAX_LONG_NAME = 2**20  # bytes of a header that lengthens the next one
_LONG_NAMES = (b"x", b"g", b"X", b"L", b"K")  # PAX, Solaris and GNU


class StrictHeader(tarfile.TarInfo):
    """A header that says what is wrong with it.

    The stock class takes a damaged or missing header for the end of the archive, reads names of any
    length into memory, and walks backwards over negative sizes. Raises tarfile.ReadError.
    """

    @classmethod
    def frombuf(cls, buf: bytes, encoding: str, errors: str) -> "StrictHeader":  # type: ignore[override]
        try:
            header = super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if buf == bytes(BLOCK):
                raise  # the true end
            raise tarfile.ReadError(str(error)) from error
        if header.size < 0 or (header.type in _LONG_NAMES and header.size > MAX_LONG_NAME):
            raise tarfile.ReadError(f"a header of {header.size} bytes")
        return header

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> "StrictHeader":
        header = super().fromtarfile(tarfile_)
        if header.size < 0:  # by a PAX record, of which `frombuf` knows nothing
            raise tarfile.ReadError(f"{header.name} has {header.size} bytes")
        return header
