"""What a shard may hold: the closed list of member types, and how samples and data go wrong."""

IMAGE_TYPES = ("webp", "png", "jpg", "jpeg")
TOKEN_TYPES = ("ids.npy", "residual.npy", "text.npy")
MEMBER_TYPES = (*IMAGE_TYPES, "txt", "json", "cls", *TOKEN_TYPES)
MAX_MEMBER_BYTES = 256 * 2**20

Raw = dict[str, bytes | str]  # {"__key__": "3d/red-apple", "webp": bytes, "txt": bytes}


class BadSample(ValueError):
    """A sample that training goes on without; the message is the reason it is counted under."""


def split_name(name: str) -> tuple[str, str] | None:
    """(key, type) of a member's name, None where the type is not one of MEMBER_TYPES.

    As webdataset does: the key ends at the first dot of the last part, types have no case. A
    leading `./`, which some archivers write, is not part of the key.
    """
    folder, slash, last = name.removeprefix("./").rpartition("/")
    stem, _, kind = last.partition(".")
    if not stem or kind.lower() not in MEMBER_TYPES:
        return None
    return f"{folder}{slash}{stem}", kind.lower()


def check_key(key: str) -> None:
    """Raises ValueError for a key that would not come back from a shard, or leave its folder."""
    parts = key.split("/")
    if "" in parts or "." in parts or ".." in parts or "." in parts[-1]:
        raise ValueError(f"key {key!r}: a relative path without '..' and no dot in its last part")
