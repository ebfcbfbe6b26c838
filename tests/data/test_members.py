"""Which members a shard may hold, and under which keys."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from webdataset.tariterators import base_plus_ext

from dcar.data.members import MEMBER_TYPES, check_key, split_name


@pytest.mark.parametrize(
    "name, found",
    [
        ("a/b.jpg", ("a/b", "jpg")),
        ("./000/x.JPEG", ("000/x", "jpeg")),
        ("n01440764/n01440764_10026.JPEG", ("n01440764/n01440764_10026", "jpeg")),
        ("k.ids.npy", ("k", "ids.npy")),
        ("k.npy", None),
        ("k.pyd", None),
        ("k.pickle", None),
        ("k.jpg.pickle", None),
        ("README", None),
        ("a/.jpg", None),
    ],
)
def test_a_name_is_a_key_and_one_of_the_known_types(name, found):
    assert split_name(name) == found


PART = st.text("ab._-~é ", min_size=1, max_size=6).filter(lambda part: part[0] != ".")


@given(st.lists(PART, min_size=1, max_size=3), st.sampled_from([*MEMBER_TYPES, "PNG", "pyd"]))
def test_keys_are_those_of_webdataset(parts: list[str], kind: str) -> None:
    name = f"{'/'.join(parts)}.{kind}"
    key, theirs = base_plus_ext(name)
    is_known = theirs.lower() in MEMBER_TYPES
    assert split_name(name) == ((key, theirs.lower()) if is_known else None)


@pytest.mark.parametrize("key", ["../up", "/root", "a//b", "a/./b", "dotted.name", ""])
def test_keys_that_would_not_come_back_are_refused(key):
    with pytest.raises(ValueError, match="key"):
        check_key(key)
    check_key("a.b/c")
