"""Predictions to shards: interleaved, interrupted, judged, listed in a manifest."""

import hashlib
import json
import signal
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from lightning import LightningDataModule, LightningModule, Trainer
from torch.utils.data import DataLoader, IterableDataset

from dcar.data.index import read_shard
from dcar.data.shards import ShardEntry, read_facts, read_manifest
from dcar.data.storage import read_bytes
from dcar.errors import DataError, Interrupted
from dcar.lit.shard_reader import Source
from dcar.lit.shard_writer import (
    SAMPLES_BEFORE_JUDGING,
    Progress,
    ShardPredictionWriter,
    differing,
    judge,
)
from tests.prediction_toys import shard_bytes

SETTINGS = {"kind": "echo", "of": {"size": 32}}
Batch = dict[str, Any]


class Echo(LightningModule):
    """Writes the key of each sample; keys with an x give nothing, a "stop" ends the process."""

    def predict_step(self, batch: Batch, batch_idx: int) -> list[dict[str, Any]]:
        if "stop" in batch["key"]:
            signal.raise_signal(signal.SIGTERM)
        if "fail" in batch["key"]:
            raise RuntimeError("told to fail")
        return [{"__key__": k, "txt": k.encode()} for k in batch["key"] if "x" not in k]


class Batches(LightningDataModule, IterableDataset):
    """The batches it is given, as a reader of `own` shards would make them."""

    def __init__(self, batches: list[Batch]):
        super().__init__()
        self.batches = batches
        self.own = sorted({batch["shard"] for batch in batches})

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)

    def predict_dataloader(self) -> DataLoader:
        return DataLoader(self, batch_size=None)


def batch(shard: str, *keys: str, last: bool = False, **bad: int) -> Batch:
    tried = len(keys) + sum(bad.values())
    return {"shard": f"{shard}.tar", "key": list(keys), "last": last, "bad": bad, "tried": tried}


def source(name: str, sha256: str = "0") -> Source:
    split = "val" if name == "b" else "train"
    return Source(f"in/emoji/{name}.tar", split, ShardEntry(f"{name}.tar", 3, 512, sha256))


def progress(
    folder: Path | str,
    settings: dict[str, Any] | None = None,
    *,
    sources: Sequence[Source] = tuple(map(source, "abcd")),
) -> Progress:
    return Progress(str(folder), settings or SETTINGS, sources=sources)


def predict(folder: Path | str, *batches: Batch, max_bad: float = 1.0) -> None:
    writer = ShardPredictionWriter(progress(folder), max_bad=max_bad, nothing_made="silence")
    trainer = Trainer(
        accelerator="cpu", devices=1, callbacks=[writer], logger=False, enable_progress_bar=False
    )
    trainer.predict(Echo(), datamodule=Batches(list(batches)), return_predictions=False)


def keys(path: Path) -> list[str]:
    return [str(raw["__key__"]) for raw in read_shard(path)]


def test_interleaved_shards_come_out_whole_and_in_order(tmp_path: Path) -> None:
    predict(
        tmp_path,
        batch("a", "1", "2"),
        batch("b", "8"),
        batch("a", "3", last=True),
        batch("b", "9", last=True),
    )
    assert keys(tmp_path / "a.tar") == ["1", "2", "3"] and keys(tmp_path / "b.tar") == ["8", "9"]
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    listed = [(shard["name"], shard["split"], shard["samples"]) for shard in manifest["shards"]]
    assert listed == [("a.tar", "train", 3), ("b.tar", "val", 2)]
    assert read_facts(tmp_path) == {**SETTINGS, "source": "emoji", "dropped": {}}


def test_a_shard_without_one_good_sample_is_finished_and_empty(tmp_path: Path) -> None:
    predict(tmp_path, batch("a", "1", last=True), batch("c", last=True, broken=2))
    assert keys(tmp_path / "c.tar") == [] and read_manifest(tmp_path)["c.tar"].samples == 0


def test_dropped_samples_are_reported_by_reason_over_all_runs(tmp_path: Path) -> None:
    predict(tmp_path, batch("a", "1", "x2", broken=2), batch("a", "3", last=True, broken=1))
    predict(tmp_path, batch("b", "4", "x5", last=True))
    assert read_facts(tmp_path)["dropped"] == {"broken": 3, "silence": 2}
    assert set(read_manifest(tmp_path)) == {"a.tar", "b.tar"}


def test_above_the_limit_there_is_no_manifest_and_every_reason_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"3 of 5 samples .* limit of 50\.0% \(broken: 1, silence"):
        predict(tmp_path, batch("a", "1", "x", "xx", "2", last=True, broken=1), max_bad=0.5)
    assert not (tmp_path / "manifest.json").exists()


def test_a_long_run_ends_early_above_the_limit(tmp_path: Path) -> None:
    """Before its first shard is finished, though not before a thousand samples."""
    few = SAMPLES_BEFORE_JUDGING // 2
    batches = [batch("a", "1", broken=few - 1), batch("a", "2", broken=few - 1)]
    with pytest.raises(DataError, match="998 of 1000"):
        predict(tmp_path, *batches, batch("a", "3", last=True), max_bad=0.9)
    assert shard_bytes(tmp_path) == {".progress/begun": b""}


@pytest.mark.parametrize(("key", "error"), [("stop", Interrupted), ("fail", RuntimeError)])
def test_what_ends_a_run_leaves_only_finished_shards(
    tmp_path: Path, key: str, error: type[BaseException]
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(error):
        predict(tmp_path, batch("a", "1", last=True), batch("b", "2"), batch("b", key))
    assert set(shard_bytes(tmp_path)) == {"a.tar", ".progress/a.tar.json", ".progress/begun"}
    assert signal.getsignal(signal.SIGTERM) == before


def test_shards_can_be_written_to_a_store() -> None:
    out = "memory://shard-writer/out"
    predict(out, batch("a", "1", "x2"), batch("b", "3", last=True), batch("a", "4", last=True))
    assert progress(out).finished() == {"a.tar", "b.tar"}
    assert {name: entry.samples for name, entry in read_manifest(out).items()} == {
        "a.tar": 2,
        "b.tar": 1,
    }
    assert read_facts(out)["dropped"] == {"silence": 1}
    entry = read_manifest(out)["a.tar"]
    assert entry.sha256 == hashlib.sha256(read_bytes(f"{out}/a.tar")).hexdigest()


def test_a_shard_is_finished_once_its_record_is_there_too(tmp_path: Path) -> None:
    predict(tmp_path, batch("a", "1", last=True), batch("b", "2", last=True))
    assert progress(tmp_path).finished() == {"a.tar", "b.tar"}
    (tmp_path / ".progress" / "a.tar.json").unlink()
    assert progress(tmp_path).finished() == {"b.tar"}
    (tmp_path / "b.tar").unlink()
    assert progress(tmp_path).finished() == set()


def test_a_folder_with_shards_of_other_settings_is_refused_with_what_differs(
    tmp_path: Path,
) -> None:
    predict(tmp_path, batch("a", "1", last=True))
    other = {**SETTINGS, "of": {"size": 64}}
    match = r"a\.tar was made with other settings: .*\(of\.size: 64 here, 32 there\)"
    with pytest.raises(ValueError, match=match):
        progress(tmp_path, other).finished()


def test_a_shard_of_another_input_is_refused_with_what_differs(tmp_path: Path) -> None:
    predict(tmp_path, batch("a", "1", last=True), batch("b", "2", last=True))
    match = r"/b\.tar was made from another .* in/emoji/b\.tar: .*\(sha256: '9' here, '0' there\)"
    with pytest.raises(ValueError, match=match):
        progress(tmp_path, sources=[source("a"), source("b", "9")]).finished()
    (tmp_path / "b.tar").unlink()  # as the error says
    assert progress(tmp_path, sources=[source("a"), source("b", "9")]).finished() == {"a.tar"}


def test_shards_of_an_earlier_input_may_lie_beside_those_of_this_one(tmp_path: Path) -> None:
    predict(tmp_path, batch("a", "1", last=True))
    assert progress(tmp_path, sources=[source("c")]).finished() == {"a.tar"}


def test_an_input_that_changes_while_it_is_read_is_not_taken_for_the_new_one(
    tmp_path: Path,
) -> None:
    path = tmp_path / "in" / "a.tar"
    path.parent.mkdir()
    path.write_bytes(b"old")
    ours = progress(tmp_path / "out", sources=[Source(str(path), "train", None)])
    writer = ShardPredictionWriter(ours, max_bad=1.0)
    shard = writer._shard("a.tar")
    path.write_bytes(b"newer")
    shard.stack.close()
    ours.add(shard.writer.entry, Counter(), 0, made_from=shard.made_from)
    with pytest.raises(ValueError, match="bytes: 5 here, 3 there"):
        ours.finished()


def test_what_a_killed_run_left_of_a_shard_goes_when_it_is_finished(tmp_path: Path) -> None:
    (tmp_path / ".progress").mkdir()
    for name in (".a.tar.77.partial", ".b.tar.77.partial", ".progress/.a.tar.json.77.partial"):
        (tmp_path / name).write_text("half")
    predict(tmp_path, batch("a", "1", last=True))
    left = {name for name in shard_bytes(tmp_path) if name.endswith(".partial")}
    assert left == {".b.tar.77.partial"}  # perhaps another run's, at work now


def test_a_rate_at_the_limit_is_accepted() -> None:
    judge(Counter(broken=1), 100, 0.01)
    with pytest.raises(DataError, match=r"2 of 100 samples .* 1\.0% \(broken: 2\)"):
        judge(Counter(broken=2), 100, 0.01)


def test_differences_are_named_to_the_last_key() -> None:
    ours, theirs = {"a": 1, "b": {"c": 2, "d": [3]}}, {"a": 1, "b": {"c": 4, "d": [3], "e": 5}}
    assert differing(ours, theirs) == ["b.c: 2 here, 4 there", "b.e: None here, 5 there"]
    assert differing({"b": None}, {"b": {"c": 4}}) == ["b: None here, {'c': 4} there"]


def test_a_record_holds_what_the_manifest_needs(tmp_path: Path) -> None:
    entry = ShardEntry("b.tar", 3, 1024, "ab")
    identity = source("b").identity()
    progress(tmp_path).add(entry, Counter(broken=1), 4, made_from=identity)
    record = json.loads((tmp_path / ".progress" / "b.tar.json").read_text())
    assert record["shard"] == {"name": "b.tar", "samples": 3, "bytes": 1024, "sha256": "ab"}
    assert record["input"] == identity
    assert (record["split"], record["dropped"], record["tried"]) == ("val", {"broken": 1}, 4)
