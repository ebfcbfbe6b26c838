"""Midjourney prompts as JourneyDB has them: when two of them are the same words."""

import hashlib
import re

_LINKS = re.compile(r"^(?:\s*<?https?://\S+>?)+")
# Parameters come last. Some keyboards make a long dash of two short ones; then only known names
# count, for long dashes stand in sentences, too.
_KNOWN = "ar|aspect|c|chaos|hd|iw|niji|no|q|quality|s|seed|stop|style|stylize|test|testp|tile|v"
_PARAMETERS = re.compile(rf"(?:^|\s)(?:--[a-z]|[\u2014\u2013](?:{_KNOWN})\b).*$", re.DOTALL)


def normalised(prompt: str) -> str:
    """The words alone: without the pictures' links before and the parameters (`--ar 16:9`) after
    them, without case, space and closing punctuation that carry no meaning."""
    lower = " ".join(prompt.lower().split())
    words = _PARAMETERS.sub("", _LINKS.sub("", lower)).strip(" .,;")
    return words or lower


def prompt_hash(prompt: str) -> int:
    """64 bits of the normalised prompt: among two million prompts, a chance of one in ten million
    that two are taken for one."""
    digest = hashlib.blake2b(normalised(prompt).encode(errors="replace"), digest_size=8)
    return int.from_bytes(digest.digest(), "big")


def in_share(number: int, share: float) -> bool:
    """Whether a hash falls in a share of all hashes."""
    return number < share * 2.0**64
