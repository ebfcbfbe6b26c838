"""Chains of checkpoints: who descends from whom, and what became of the ancestors' files."""

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from dcar.data.shard_set import ShardSet
from dcar.data.shards import write_manifest, write_shards
from dcar.errors import CheckpointError
from dcar.lit import lineage as lineage_module
from dcar.lit.checkpoint_io import save_durably
from dcar.lit.datamodule import ShardDataModule
from dcar.lit.lineage import (
    chain,
    code_version,
    data_facts,
    differences,
    digest_of,
    digest_of_files,
    model_lineage,
    portable,
    read_origin,
    run_lineage,
)
from dcar.models.weights_io import SHIPPED
from tests.shards import build, row, stream
from tests.toys import ROOT, ToyData, toy_stage, toy_trainer

CONFIG: dict[str, Any] = {
    "exp": "toy/stage1",
    "seed": 3,
    "outputs": "outputs",
    "output_dir": "outputs/toy/stage1",
    "max_steps": 10,
    "trainer": {"devices": 1, "precision": "32-true"},
}


def begin(config: dict[str, Any] = CONFIG, **settings: Any) -> dict[str, Any]:
    return run_lineage(config, **{"precision": "32-true", "world_size": 1} | settings)


def save(path: Path, lineage: dict[str, Any] | None, step: int, module: str = "Toy") -> Path:
    """A checkpoint as a training leaves it, in what matters here; each has other weights."""
    facts = {"module": module, "config": {}} | ({"lineage": lineage} if lineage else {})
    save_durably({"global_step": step, "dcar": facts, "weights": torch.full((8,), step)}, path)
    return path


def test_a_fresh_run_says_what_it_is_made_of_in_plain_data() -> None:
    lineage = begin(world_size=2)
    assert lineage["parent"] is None and lineage["ancestors"] == [] and lineage["changed"] == []
    assert (lineage["exp"], lineage["seed"], lineage["world_size"]) == ("toy/stage1", 3, 2)
    assert lineage["versions"]["torch"] == torch.__version__
    assert lineage["started"].endswith("+00:00")
    assert json.loads(json.dumps(lineage)) == lineage


def test_a_real_checkpoint_opens_with_its_lineage(tmp_path: Path) -> None:
    trainer = toy_trainer(2)
    trainer.fit(toy_stage(1), datamodule=ToyData())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    checkpoint["dcar"]["lineage"] = begin()
    torch.save(checkpoint, tmp_path / "a.ckpt")
    origin = read_origin(tmp_path / "a.ckpt")
    assert (origin.module, origin.step) == ("TokenizerStage1", 2)
    assert origin.lineage == checkpoint["dcar"]["lineage"]


def test_the_chain_goes_from_stage_to_stage_to_the_first(tmp_path: Path) -> None:
    first = save(tmp_path / "1" / "last.ckpt", begin(), 10, "Stage1")
    second = save(tmp_path / "2" / "last.ckpt", begin(init_from=first), 20, "Stage2")
    third = save(tmp_path / "3" / "last.ckpt", begin(init_from=second), 30, "Stage3")
    links = chain(third)
    assert [link.path for link in links] == [str(third), str(second), str(first)]
    assert [link.how for link in links] == [None, "init_from", "init_from"]
    assert [link.record["module"] for link in links] == ["Stage3", "Stage2", "Stage1"]
    assert [link.record["step"] for link in links] == [30, 20, 10]
    assert [link.sha256 for link in links] == [digest_of_files(p) for p in (third, second, first)]
    assert {link.standing for link in links} == {"here"}


def test_a_run_that_goes_on_overwrites_its_parent_and_the_chain_still_knows_it(
    tmp_path: Path,
) -> None:
    last = tmp_path / "last.ckpt"
    lineage = begin()
    for step in (10, 20, 30):  # killed and resumed twice
        save(last, lineage, step)
        lineage = begin(CONFIG | {"max_steps": step}, resumed=last)
    links = chain(last)
    assert [link.record["step"] for link in links] == [30, 20, 10]
    assert [link.standing for link in links] == ["here", "overwritten since", "overwritten since"]
    assert [link.how for link in links[1:]] == ["resumed", "resumed"]
    assert links[0].record["changed"] == ["max_steps: 10 -> 20"]
    assert links[1].record["changed"] == [] and links[2].record["parent"] is None


def test_a_parent_that_was_kept_under_another_name_is_found_by_its_digest(tmp_path: Path) -> None:
    last, kept = tmp_path / "last.ckpt", tmp_path / "step_00000010.ckpt"
    save(last, begin(), 10)
    os.link(last, kept)
    save(last, begin(resumed=last), 20)
    assert chain(last)[1].standing == f"kept as {kept}"


def test_a_run_that_was_moved_finds_its_parent_beside_itself(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    save(old / "last.ckpt", begin(), 10)
    os.link(old / "last.ckpt", old / "step_00000010.ckpt")
    save(old / "last.ckpt", begin(resumed=old / "last.ckpt"), 20)
    shutil.move(old, new)
    assert chain(new / "last.ckpt")[1].standing == f"kept as {new / 'step_00000010.ckpt'}"


def test_a_parent_that_is_gone_is_said_to_be(tmp_path: Path) -> None:
    parent = save(tmp_path / "1" / "last.ckpt", begin(), 10)
    child = save(tmp_path / "2" / "last.ckpt", begin(init_from=parent), 20)
    shutil.rmtree(parent.parent)
    assert [link.standing for link in chain(child)] == ["here", "no longer there"]


def test_a_checkpoint_without_lineage_ends_the_chain(tmp_path: Path) -> None:
    parent = save(tmp_path / "old.ckpt", None, 10, "Stage1")
    lineage = begin(resumed=parent)
    links = chain(save(tmp_path / "new.ckpt", lineage, 20))
    assert [link.record["step"] for link in links] == [20, 10]
    assert links[1].record == {"module": "Stage1", "step": 10} and lineage["changed"] == []


def test_a_long_chain_holds_the_settings_of_the_newest_alone(tmp_path: Path) -> None:
    last = save(tmp_path / "last.ckpt", begin(), 0)
    for step in range(1, 6):
        save(last, begin(resumed=last), step)
    lineage = read_origin(last).lineage
    assert lineage["config"]["max_steps"] == 10 and len(lineage["ancestors"]) == 5
    assert not any("config" in record or "ancestors" in record for record in lineage["ancestors"])
    assert all(record["config_sha256"] == digest_of(lineage["config"]) for record in chain_of(last))


def chain_of(path: Path) -> list[Any]:
    return [link.record for link in chain(path)]


def test_a_damaged_checkpoint_is_refused_with_its_trouble(tmp_path: Path) -> None:
    path = save(tmp_path / "a.ckpt", begin(), 10)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"a\.ckpt is damaged"):
        chain(path)
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        chain(tmp_path / "b.ckpt")


def test_other_weights_are_told_by_path_and_digest(tmp_path: Path) -> None:
    tokenizer = save(tmp_path / "stage3.ckpt", begin(), 10, "TokenizerStage3")
    lineage = begin(inputs={"tokenizer_from": tokenizer})
    assert lineage["inputs"]["tokenizer_from"] == {
        "path": str(tokenizer),
        "sha256": digest_of_files(tokenizer),
        "module": "TokenizerStage3",
        "step": 10,
    }


def test_a_resumed_run_says_that_its_tokenizer_or_data_are_others(tmp_path: Path) -> None:
    tokenizer = save(tmp_path / "stage3.ckpt", begin(), 10)
    data = [data_of(build(tmp_path / name, sizes=sizes)) for name, sizes in DATA.items()]
    inputs = {"tokenizer_from": tokenizer}
    last = save(tmp_path / "last.ckpt", begin(inputs=inputs, datamodule=data[0]), 1)
    save(tokenizer, begin(), 11)
    changed = begin(resumed=last, inputs=inputs, datamodule=data[1], world_size=4)["changed"]
    assert [line.split(": ")[0] for line in changed] == [
        "data",
        "world_size",
        "inputs.tokenizer_from",
    ]


DATA = {"few": (3, 2), "more": (3, 2, 4)}


def data_of(folder: Path) -> ShardDataModule:
    return ShardDataModule(train=lambda: stream(folder), val={})


def test_data_are_told_by_their_manifests_wherever_they_lie(tmp_path: Path) -> None:
    folder = build(tmp_path / "here", sizes=(3, 2))
    facts = begin(datamodule=data_of(folder))["data"]
    assert (facts["shards"], facts["samples"], facts["unlisted"]) == (2, 5, 0)
    shutil.copytree(folder, tmp_path / "there")
    assert begin(datamodule=data_of(tmp_path / "there"))["data"] == facts
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["shards"][0]["sha256"] = "0" * 64
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert begin(datamodule=data_of(folder))["data"]["sha256"] != facts["sha256"]


def test_shards_in_no_manifest_and_caption_shards_count_too(tmp_path: Path) -> None:
    folder = tmp_path / "bare"
    write_shards([row("k1"), row("k2")], folder, "s", 1)
    facts = data_facts([ShardSet(folder / "s*.tar")])
    assert (facts["samples"], facts["unlisted"]) == (2, 2)
    captions = [{"__key__": key, "json": b'{"captions": {"long": "x"}}'} for key in ("k1", "k2")]
    entries = write_shards(captions, tmp_path / "words", "s", 1)
    write_manifest(tmp_path / "words", {"s": entries})
    with_words = data_facts([ShardSet(folder / "s*.tar", captions=tmp_path / "words")])
    assert with_words["sha256"] != facts["sha256"]


def test_the_hash_of_a_config_is_that_of_any_machine() -> None:
    here = CONFIG | {
        "module": {"init_from": "outputs/a/last.ckpt", "folder": "outputs/toy/stage1/x"},
        "data": {"urls": f"{ROOT}/assets/a.tar", "num_workers": 0, "cache": True},
        "loggers": {"tensorboard": {}},
    }
    there = here | {
        "exp": "other",
        "outputs": "/big/runs",
        "output_dir": "/big/runs/other",
        "module": {"init_from": "/big/runs/a/last.ckpt", "folder": "/big/runs/other/x"},
        "data": {"urls": f"{ROOT}/assets/a.tar", "num_workers": 8, "cache": False},
        "trainer": {"devices": 8, "precision": "32-true"},
        "loggers": {},
    }
    assert begin(here)["config_sha256"] == begin(there)["config_sha256"]
    assert portable(here)["data"] == {"urls": "<code>/assets/a.tar"}
    other = there | {"trainer": {"devices": 8, "precision": "16-mixed"}}
    assert begin(other)["config_sha256"] != begin(there)["config_sha256"]


def test_differences_name_keys_from_the_top_down() -> None:
    old = {"a": {"b": 1, "c": [1, 2]}, "steps": 3, "gone": True}
    new = {"a": {"b": 2, "c": [1, 2]}, "steps": 4}
    assert differences(old, new) == ["gone: True -> none", "steps: 3 -> 4", "a.b: 1 -> 2"]
    assert differences({"x": "a" * 64}, {"x": "b" * 64}) == [f"x: {'a' * 12} -> {'b' * 12}"]


def git(folder: Path, *arguments: str) -> None:
    who = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    subprocess.run(["git", *who, *arguments], cwd=folder, check=True, capture_output=True)


@pytest.mark.skipif(shutil.which("git") is None, reason="git is missing")
def test_code_is_its_commit_and_whether_it_was_changed_since(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lineage_module, "CODE", tmp_path)
    assert code_version()["commit"] is code_version()["dirty"] is None
    (tmp_path / "dcar").mkdir()
    (tmp_path / "dcar" / "a.py").write_text("a = 1\n")
    git(tmp_path, "init")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "first")
    assert len(code_version()["commit"]) == 40 and code_version()["dirty"] is False
    (tmp_path / "notes.txt").write_text("no code")
    assert code_version()["dirty"] is False
    (tmp_path / "dcar" / "a.py").write_text("a = 2\n")
    assert code_version()["dirty"] is True


def test_a_digest_is_taken_from_beside_the_file_unless_it_is_being_replaced(
    tmp_path: Path,
) -> None:
    path = save(tmp_path / "a.ckpt", None, 1)
    true = digest_of_files(path)
    sidecar = tmp_path / "a.ckpt.sha256"
    sidecar.write_text(f"{'1' * 64}  a.ckpt\n")
    assert digest_of_files(path) == "1" * 64
    sidecar.write_text(f"{'1' * 64}  a.ckpt\n{true}  a.ckpt\n")
    assert digest_of_files(path) == true
    sidecar.unlink()
    assert digest_of_files(path) == true


def test_a_model_folder_goes_back_to_the_checkpoint_it_was_made_of(tmp_path: Path) -> None:
    first = save(tmp_path / "1.ckpt", begin(), 10)
    last = save(tmp_path / "2.ckpt", begin(init_from=first), 20)
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"lineage": model_lineage(last)}))
    links = chain(folder)
    assert links[0].record["started"] == links[1].record["started"]
    assert [link.how for link in links] == [None, "exported", "init_from"]
    assert [link.record["module"] for link in links] == ["model folder", "Toy", "Toy"]
    assert [link.record["step"] for link in links] == [20, 20, 10]
    tuned = save(tmp_path / "3.ckpt", begin(init_from=folder), 5)
    assert [link.path for link in chain(tuned)[1:]] == [str(folder), str(last), str(first)]
    assert {link.standing for link in chain(tuned)} == {"here"}
    (folder / "config.json").write_text("{}")
    assert chain(tuned)[1].standing == "overwritten since"


def test_the_shipped_model_is_told_by_its_name_and_not_by_a_place_of_this_machine(
    tmp_path: Path,
) -> None:
    child = save(tmp_path / "last.ckpt", begin(init_from=SHIPPED / "mini"), 10)
    links = chain(child)
    assert (links[1].path, links[1].standing) == ("mini", "here")


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is no model folder"):
        chain(tmp_path)
