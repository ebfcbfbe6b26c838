"""JourneyDB as it is downloaded: two hundred .tgz of pictures and an archive of annotations.

The caption is the annotators' (Task2), else the prompt. No prompt is in both train and val.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from dcar.data.sources.archives import GZIPPED, Member, stream_tar
from dcar.data.sources.journeydb_annotations import Annotation, annotation_of, load, spill
from dcar.data.sources.journeydb_prompts import in_share, prompt_hash
from dcar.data.sources.source import Record, Unit
from dcar.data.storage import exists, join, list_files, name_of, open_read, write_atomically

FOLDERS = {"train": "train", "val": "valid"}
# In order of preference: `repath` is the release whose paths fit the archives (spelt so there).
ANNOTATIONS = {
    "train": ("train_anno_realease_repath.jsonl", "train_anno.jsonl"),
    "val": ("valid_anno_repath.jsonl", "valid_anno.jsonl"),
}
VAL_PROMPT = "prompt is in val"
LICENCE = "JourneyDB terms: non-commercial research"


def _number(archive: str) -> str:
    """imgs/000.tgz -> 000."""
    return name_of(archive).partition(".")[0]


def _record(number: str, member: Member, note: Annotation) -> Record:
    name = name_of(member.name).partition(".")[0]
    return Record(
        key=f"{number}/{name}",
        image=member.data or b"",
        caption=note.caption or note.prompt,
        facts={
            "id": name,
            "licence": LICENCE,
            "prompt": note.prompt,
            "caption_source": "Task2.Caption" if note.caption else "prompt",
        },
        dropped="file too large" if member.data is None else None,
    )


class JourneyDB:
    """The pictures of JourneyDB with captions.

    path: the folder that was downloaded: data/{train,valid}/imgs/NNN.tgz with the annotations
        beside `imgs`, as .jsonl.tgz or unpacked. Some of the archives are enough.
    val_share: of the prompts, which become `val` where there is no `valid` folder; every picture
        of such a prompt goes there. Where there is one, pictures of train with a prompt of valid
        are dropped.
    Raises FileNotFoundError naming what is missing, DataError naming what cannot be read,
    ValueError for a share outside [0, 1).
    """

    captioned = True

    def __init__(self, path: str, *, val_share: float = 0.01):
        if isinstance(val_share, str) or not 0 <= val_share < 1:
            raise ValueError(f"val_share is {val_share}; it must be in [0, 1)")
        self.path, self.val_share = path, val_share
        self._work = ""

    def prepare(self, work: str) -> None:
        """Sort the annotations into a file per archive, once: millions of lines, minutes."""
        self._work = join(work, "annotations")
        done = join(self._work, "done")
        if exists(done):
            return
        for split, archives in self._archives().items():
            names = {_number(url) for url in archives}
            hashes = spill(self._annotations(split), names, self._work, split)
            if split == "val":
                with write_atomically(self._val_prompts()) as file:
                    np.save(file, hashes, allow_pickle=False)
        with write_atomically(done) as file:
            file.write(b"")

    def _root(self, split: str) -> str:
        inner = join(self.path, f"data/{FOLDERS[split]}")
        return inner if exists(inner) else join(self.path, FOLDERS[split])

    def _archives(self) -> dict[str, list[str]]:
        found = {}
        for split in FOLDERS:
            images = join(self._root(split), "imgs")
            files = list_files(images) if exists(images) else []
            if archives := [url for url in files if url.endswith(GZIPPED)]:
                found[split] = archives
        if not found:
            raise FileNotFoundError(f"{self.path} holds no data/train/imgs/*.tgz")
        return found

    def _annotations(self, split: str) -> str:
        names = [name + end for name in ANNOTATIONS[split] for end in (".tgz", "")]
        urls = [join(self._root(split), name) for name in names]
        if (url := next(filter(exists, urls), None)) is None:
            raise FileNotFoundError(f"{self._root(split)} holds none of {', '.join(names)}")
        return url

    def _val_prompts(self) -> str:
        return join(self._work, "val-prompts.npy")

    def units(self, samples_per_shard: int) -> list[Unit]:
        """One a .tgz; without `valid`, each .tgz makes one of train and one of val."""
        archives = self._archives()
        shared = "val" not in archives and self.val_share > 0
        splits = ("train", "val") if shared else archives
        return [
            Unit(split, number, None, self._reference(url, "train" if shared else split, shared))
            for split in splits
            for number, url in enumerate(archives["train" if shared else split])
        ]

    def _reference(self, archive: str, split: str, shared: bool) -> dict[str, Any]:
        annotations = join(self._work, f"{split}-{_number(archive)}.jsonl")
        return {"archive": archive, "annotations": annotations, "shared": shared}

    def read(self, unit: Unit) -> Iterator[Record]:
        """Records in the order of the archive."""
        archive, annotations = unit.reference["archive"], load(unit.reference["annotations"])
        val = self._val_hashes() if unit.split == "train" else frozenset()
        for member in stream_tar(archive):
            line = annotations.get(name_of(member.name))
            note = annotation_of(line) if line else Annotation(None, None)
            number = prompt_hash(note.prompt) if note.prompt else None
            if unit.reference["shared"] and unit.split != self._split(number):
                continue
            record = _record(_number(archive), member, note)
            if line is None:
                record = replace(record, dropped="no annotation")
            elif number in val:
                record = replace(record, dropped=VAL_PROMPT)
            yield record

    def _split(self, number: int | None) -> str:
        return "val" if number is not None and in_share(number, self.val_share) else "train"

    def _val_hashes(self) -> frozenset[int]:
        if not exists(self._val_prompts()):
            return frozenset()
        with open_read(self._val_prompts()) as file:
            return frozenset(np.load(file, allow_pickle=False).tolist())
