"""Words of messages agree with their numbers."""

import pytest

from dcar.data.wording import amount


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0 shards"), (1, "1 shard"), (2, "2 shards"), (12000, "12,000 shards")]
)
def test_one_is_no_plural(number: int, text: str) -> None:
    assert amount(number, "shard") == text
