"""Words of messages."""


def amount(number: int, noun: str) -> str:
    """`1 shard`, `12,000 shards`: for nouns whose plural ends in s."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
