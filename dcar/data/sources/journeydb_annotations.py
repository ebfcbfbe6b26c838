"""JourneyDB's annotations, millions of lines in one archive, sorted into a small file per archive
of pictures, so that each of these is read on its own."""

import json
import logging
from array import array
from collections.abc import Collection
from contextlib import ExitStack
from typing import Any, NamedTuple

import numpy as np

from dcar.data.sources.archives import stream_lines
from dcar.data.sources.journeydb_prompts import prompt_hash
from dcar.data.storage import join, open_read, write_atomically
from dcar.data.stores import shown
from dcar.errors import DataError

log = logging.getLogger(__name__)


class Annotation(NamedTuple):
    """What is said of one picture; None where nothing is."""

    prompt: str | None
    caption: str | None


def _words(value: Any) -> str | None:
    return value.strip() or None if isinstance(value, str) else None


def parse(line: bytes) -> tuple[str, str, Annotation] | None:
    """(folder, file name, annotation) of a line such as `{"img_path": "./000/ab.jpg", ...}`.

    None for a line that is broken or names no folder. `Task2` holds the caption; it is missing or
    null for some, and so is the caption in it.
    """
    try:
        entry = json.loads(line)
        folder, _, name = entry["img_path"].removeprefix("./").rpartition("/")
        task = entry.get("Task2")
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        return None
    caption = _words(task.get("Caption")) if isinstance(task, dict) else None
    if not folder:
        return None
    return folder.rpartition("/")[2], name, Annotation(_words(entry.get("prompt")), caption)


def spill(source: str, archives: Collection[str], folder: str, prefix: str) -> np.ndarray:
    """Write `<prefix>-<archive>.jsonl` below the folder for each archive; lines of others are left.

    Returns the sorted hashes of all prompts of the source, uint64. In memory of these alone.
    Raises DataError where not one line belongs to an archive.
    """
    hashes = array("Q")
    lines = used = strange = 0
    with ExitStack() as stack:
        urls = {archive: join(folder, f"{prefix}-{archive}.jsonl") for archive in archives}
        files = {a: stack.enter_context(write_atomically(url)) for a, url in urls.items()}
        for line in stream_lines(source, ".jsonl"):
            lines += 1
            if (parsed := parse(line)) is None:
                strange += 1
                continue
            archive, name, annotation = parsed
            if annotation.prompt:
                hashes.append(prompt_hash(annotation.prompt))
            if archive in files:
                files[archive].write(json.dumps([name, *annotation]).encode() + b"\n")
                used += 1
        if not used:
            raise DataError(
                f"{shown(source)}: not one of {lines} lines names a picture of an archive here; "
                "their img_path must begin with its number, as in ./000/<uuid>.jpg"
            )
    if strange:
        log.warning("%s: %d of %d lines could not be read", shown(source), strange, lines)
    return np.unique(np.frombuffer(hashes, dtype=np.uint64))


def load(url: str) -> dict[str, bytes]:
    """File name -> its line, which `annotation_of` reads when the picture comes."""
    with open_read(url) as file:
        return {json.loads(line)[0]: line for line in file}


def annotation_of(line: bytes) -> Annotation:
    return Annotation(*json.loads(line)[1:])
