"""Predictions to shards, one output shard for each input shard, in a run that may be killed."""

import json
import signal
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from glob import escape
from types import FrameType
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info

from dcar.data.build_folder import changes
from dcar.data.members import Raw
from dcar.data.shards import (
    BEGUN,
    MANIFEST,
    RECORDS,
    ShardEntry,
    ShardWriter,
    write_manifest,
)
from dcar.data.storage import (
    exists,
    is_remote,
    join,
    list_files,
    local_path,
    name_of,
    parent,
    read_bytes,
    remove,
    write_atomically,
)
from dcar.data.stores import shown
from dcar.data.wording import amount
from dcar.errors import DataError, Interrupted
from dcar.lit.last_checkpoint import STOP_SIGNALS
from dcar.lit.shard_reader import Source

SAMPLES_BEFORE_JUDGING = 1000  # a rate of bad samples means nothing on fewer

Settings = Mapping[str, Any]


def judge(dropped: Counter[str], tried: int, max_bad: float) -> None:
    """Raises DataError where more than `max_bad` of the samples tried were dropped."""
    if dropped.total() > max_bad * tried:
        reasons = ", ".join(f"{reason}: {times}" for reason, times in sorted(dropped.items()))
        raise DataError(
            f"{dropped.total()} of {tried} samples could not be used, more than the limit of "
            f"{max_bad:.1%} ({reasons})"
        )


def differing(ours: Any, theirs: Any) -> list[str]:
    """What differs between two plain settings, as `tokenizer.fingerprint: 1 here, 2 there`."""
    return [
        f"{name}: {here!r} here, {there!r} there" for name, here, there in changes(ours, theirs)
    ]


class Progress:
    """Which shards of an output folder are finished: each has a record, written after the shard.

    So a shard without one was not finished, or nothing is known of it, and it is made again.
    settings: of the run, as plain data, kept in every record and in the manifest: one folder holds
        shards of one settings only.
    sources: the input, at least one shard. Each record says what its shard was made from.
    """

    def __init__(self, folder: str, settings: Settings, *, sources: Sequence[Source]):
        self.folder, self.sources = folder, {source.name: source for source in sources}
        self.source = name_of(parent(sources[0].url))
        self.settings = json.loads(json.dumps(settings))
        self.begun = join(join(folder, RECORDS), BEGUN)

    def check_folder(self) -> None:
        """Raises ValueError where the folder holds shards that nothing of this kind has written."""
        if not (self._records() or exists(self.begun)):
            there = {name_of(url) for url in self._files()}
            if theirs := sorted(there & {*self.sources, MANIFEST}):
                raise ValueError(
                    f"{join(self.folder, theirs[0])} was not written by this command: give another "
                    "folder"
                )

    def mark(self) -> None:
        """From now on shards of the folder that lack a record were not finished."""
        with write_atomically(self.begun) as file:
            file.write(b"")

    def _files(self) -> list[str]:
        try:
            return list_files(self.folder)
        except FileNotFoundError:
            return []

    def finished(self) -> set[str]:
        """Names of the shards that need not be made again.

        Raises ValueError for a shard that was made of another input, and as `_records` does.
        """
        records = {record["shard"]["name"]: record for record in self._records()}
        there = {name for name in records if exists(join(self.folder, name))}
        for name in sorted(there & self.sources.keys()):
            if lines := differing(self.sources[name].identity(), records[name].get("input")):
                raise ValueError(
                    f"{join(self.folder, name)} was made from another shard of this name than "
                    f"{shown(self.sources[name].url)}: delete it to make it again, or give another "
                    f"folder ({'; '.join(lines)})"
                )
        return there

    def _records(self) -> list[dict[str, Any]]:
        """Raises ValueError naming what differs where other settings made one of the shards."""
        folder = join(self.folder, RECORDS)
        urls = list_files(folder) if exists(folder) else []
        records = [json.loads(read_bytes(url)) for url in urls if url.endswith(".json")]
        for record in records:
            if lines := differing(self.settings, record["settings"]):
                raise ValueError(
                    f"{join(self.folder, record['shard']['name'])} was made with other settings: "
                    f"give another folder ({'; '.join(lines)})"
                )
        return records

    def add(
        self, entry: ShardEntry, dropped: Counter[str], tried: int, *, made_from: Settings
    ) -> None:
        """Write the record of a finished shard. made_from: identity of its input when begun."""
        record = {
            "shard": asdict(entry),
            "input": made_from,
            "split": self.sources[entry.name].split,
            "source": self.source,
            "dropped": dict(sorted(dropped.items())),
            "tried": tried,
            "settings": self.settings,
        }
        with write_atomically(self._url(entry.name)) as file:
            file.write(json.dumps(record, indent=1, sort_keys=True).encode() + b"\n")
        self._sweep(entry.name)

    def _sweep(self, name: str) -> None:
        """Delete what killed runs have left of a shard that is finished now."""
        if not is_remote(self.folder):
            for path in local_path(self.folder).rglob(f".{escape(name)}.*partial"):
                path.unlink(missing_ok=True)

    def finish(self, *, max_bad: float) -> None:
        """Write the manifest over all shards of the folder, also those of earlier runs.

        Raises DataError, and writes none, where too many samples were dropped.
        """
        records = self._records()
        dropped = sum((Counter(record["dropped"]) for record in records), Counter())
        judge(dropped, sum(record["tried"] for record in records), max_bad)
        shards: dict[str, list[ShardEntry]] = {}
        for record in records:
            shards.setdefault(record["split"], []).append(ShardEntry(**record["shard"]))
        sources = sorted({record["source"] for record in records})
        facts = {**self.settings, "source": ", ".join(sources), "dropped": dropped}
        write_manifest(self.folder, shards, **facts)
        remove(self.begun)
        samples = sum(record["shard"]["samples"] for record in records)
        rank_zero_info(
            f"{self.folder}: {amount(samples, 'sample')} in {amount(len(records), 'shard')}, "
            f"{dict(dropped)} dropped"
        )

    def _url(self, name: str) -> str:
        return join(join(self.folder, RECORDS), f"{name}.json")


@dataclass
class OpenShard:
    """A shard that is being written."""

    writer: ShardWriter
    stack: ExitStack
    made_from: Settings
    dropped: Counter[str] = field(default_factory=Counter)
    tried: int = 0


class ShardPredictionWriter(Callback):
    """Writes what `predict_step` returns: raw samples, for batches of a ShardReader.

    Shards may come interleaved, as several workers send them. A batch of n keys may give fewer
    samples; those missing are dropped as `nothing_made`. After the last batch all ranks wait, and
    the first writes the manifest. Ctrl-C and SIGTERM raise Interrupted, leaving nothing half done.
    max_bad: share of dropped samples above which the run ends with DataError.
    """

    def __init__(self, progress: Progress, *, max_bad: float, nothing_made: str = "nothing made"):
        self.progress, self.max_bad, self.nothing_made = progress, max_bad, nothing_made
        self.open: dict[str, OpenShard] = {}
        self.dropped: Counter[str] = Counter()
        self.tried = self.finished = 0
        self.handlers: dict[int, Any] = {}

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.begun = time.perf_counter()
        self.progress.mark()
        for number in STOP_SIGNALS:  # Lightning takes note of SIGTERM and predicts on
            self.handlers[number] = signal.signal(number, self._stop)

    def _stop(self, signum: int, frame: FrameType | None) -> None:
        self._restore_handlers()
        raise Interrupted(signum)

    def _restore_handlers(self) -> None:
        while self.handlers:
            number, handler = self.handlers.popitem()
            signal.signal(number, handler)

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        shard = self._shard(batch["shard"])
        for sample in outputs:
            shard.writer.write(sample)
        self._count(shard, batch, outputs)
        if self.tried >= SAMPLES_BEFORE_JUDGING:
            judge(self.dropped, self.tried, self.max_bad)
        if batch["last"]:
            self._finish(batch["shard"], of=len(trainer.datamodule.own))  # type: ignore[attr-defined]

    def _shard(self, name: str) -> OpenShard:
        if name not in self.open:
            made_from = self.progress.sources[name].identity()
            stack = ExitStack()
            writer = stack.enter_context(ShardWriter(join(self.progress.folder, name)))
            self.open[name] = OpenShard(writer, stack, made_from)
        return self.open[name]

    def _count(self, shard: OpenShard, batch: Mapping[str, Any], outputs: Sequence[Raw]) -> None:
        dropped = Counter(batch["bad"])
        if missing := len(batch["key"]) - len(outputs):
            dropped[self.nothing_made] += missing
        shard.dropped += dropped
        self.dropped += dropped
        shard.tried += batch["tried"]
        self.tried += batch["tried"]

    def _finish(self, name: str, *, of: int) -> None:
        shard = self.open[name]
        shard.stack.close()
        del self.open[name]
        self.progress.add(shard.writer.entry, shard.dropped, shard.tried, made_from=shard.made_from)
        self.finished += 1
        seconds = time.perf_counter() - self.begun
        left = seconds / self.finished * (of - self.finished)
        rank_zero_info(
            f"{shard.writer.url}: {amount(shard.writer.samples, 'sample')}, "
            f"{shard.dropped.total()} dropped "
            f"({self.finished} of this rank's {of} shards, {self.tried / seconds:.1f} samples/s, "
            f"{timedelta(seconds=round(left))} left)"
        )

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.strategy.barrier("all shards are written")
        if trainer.is_global_zero:
            self.progress.finish(max_bad=self.max_bad)
        self._restore_handlers()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._restore_handlers()
        while self.open:
            shard = self.open.popitem()[1]
            shard.stack.__exit__(type(exception), exception, exception.__traceback__)
        launcher = trainer.strategy.launcher
        if launcher is not None:  # the ranks that this one started would wait for it
            launcher.kill(signal.SIGTERM)
