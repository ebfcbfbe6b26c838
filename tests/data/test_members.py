"""Which members a shard may hold, and under which keys."""

import pytest

from dcar.data.members import check_key, split_name


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
    ],
)
def test_a_name_is_a_key_and_one_of_the_known_types(name, found):
    assert split_name(name) == found


@pytest.mark.parametrize("key", ["../up", "/root", "a//b", "a/./b", "dotted.name", ""])
def test_keys_that_would_not_come_back_are_refused(key):
    with pytest.raises(ValueError, match="key"):
        check_key(key)
    check_key("a.b/c")
