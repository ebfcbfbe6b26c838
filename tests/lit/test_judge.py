"""Training the judge: what is measured on which set, that it learns, and that it is taken up."""

from functools import partial
from pathlib import Path

import pytest
import torch

from dcar.data.stream import ShardStream
from dcar.data.transforms import ImageTransform
from dcar.data.views import ViewSet
from dcar.lit.averaging import AverageWeights
from dcar.lit.checkpoint_io import DurableCheckpointIO
from dcar.lit.judge import JudgeData, JudgeTraining, hits
from dcar.lit.last_checkpoint import LastCheckpoint
from dcar.models.judge import IGNORED, Judge, Verdict
from tests.toys import ROOT, toy_trainer, weights

EMOJI = ROOT / "assets/emoji"
CONCEPTS = EMOJI / "concepts.json"


@pytest.fixture(scope="module")
def data() -> JudgeData:
    """Trains on one shard of val, is measured on one of heldout."""
    some = partial(ViewSet, f"{EMOJI}/val-000000.tar", concepts=CONCEPTS, seed=0)
    drawings = partial(
        ShardStream,
        f"{EMOJI}/heldout-000000.tar",
        transform=ImageTransform(64),
        batch_size=64,
        seed=0,
        shuffle=False,
    )
    return JudgeData(
        train=some,
        batch_size=8,
        drawings={"heldout": drawings},
        scenes={"scenes": partial(some, kinds={"equal": 1}), "halves": some},
        scene_views=12,
    )


def module() -> JudgeTraining:
    torch.manual_seed(0)
    shape = {"side": 32, "look": {"side": 32, "widths": [8, 8]}}
    hidden = {"concept": 32, "style": 16, "count": 16}
    return JudgeTraining(
        judge=partial(Judge, **shape, hidden=hidden),
        concepts=CONCEPTS,
        smoothing=0.1,
        weights={"concept": 1.0, "style": 0.5, "count": 0.5},
        val_names=["heldout", "scenes", "halves"],
        optimizer=partial(torch.optim.AdamW, lr=3e-3),
    )


def test_only_what_has_a_label_is_counted() -> None:
    concept = torch.tensor([[9.0, 1, 0, 0, 0, 0, 5], [0, 9, 8, 7, 6, 5, 4], [9, 0, 0, 0, 0, 0, 0]])
    verdict = Verdict(concept, torch.eye(3)[:, :2], torch.eye(4)[:3])
    labels = {
        "concept": torch.tensor([6, 6, IGNORED]),
        "style": torch.tensor([0, 0, 0]),
        "count": torch.tensor([IGNORED] * 3),
    }
    found = {name: hit.tolist() for name, hit in hits(verdict, labels).items()}
    assert found["concept_top1"] == [False, False] and found["concept_top5"] == [True, False]
    assert found["style_top1"][:2] == [True, False] and found["count"] == []


def test_every_view_that_is_asked_for_is_measured_once(data: JudgeData) -> None:
    """Twelve in batches of at most eight."""
    numbers = [number for batch in data.val_dataloader()[1] for number in batch["number"]]
    assert numbers == list(range(12))


def test_labels_of_drawings_are_those_of_their_keys(data: JudgeData) -> None:
    judge, batch = module(), next(iter(data.val_dataloader()[0]))
    labels = judge.labels_of(batch)
    assert set(labels["count"].tolist()) == {0}
    for key, concept, style in zip(batch["key"], labels["concept"], labels["style"], strict=True):
        assert key == f"{judge.network.styles[style]}/{judge.network.concepts[concept]}"
    view = next(iter(data.train_dataloader()))
    assert judge.labels_of(view)["count"] is view["count"]


@pytest.mark.slow
def test_it_learns_and_is_measured_on_every_set(data: JudgeData) -> None:
    judge = module()
    first = next(iter(data.train_dataloader()))

    def loss() -> float:
        batch = judge.on_after_batch_transfer(first, 0)
        return next(judge.losses(batch, 0)).loss.item()

    before = loss()
    settings = {"limit_val_batches": 1.0, "check_val_every_n_epoch": None}
    trainer = toy_trainer(
        12, val_check_interval=12, callbacks=[AverageWeights(decay=0.9)], **settings
    )
    judge.train()
    trainer.fit(judge, datamodule=data)
    judge.train()
    assert loss() < before - 0.5
    logged = set(trainer.callback_metrics)
    for name in ("heldout", "scenes"):
        metrics = ("concept_top1", "concept_top5", "style_top1", "count")
        assert {f"{name}/{metric}" for metric in metrics} <= logged
    assert 0 <= float(trainer.callback_metrics["heldout/style_top1"]) <= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_levels_of_views_that_come_again_are_kept_in_half_precision(dtype: torch.dtype) -> None:
    judge = module()
    judge.keeps_levels = True
    image = torch.rand(3, 3, 64, 64) * 2 - 1
    seen: list[int] = []
    judge.network.levels.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        judge.levels({"image": image[:2], "number": [7, 8]})
        pooled, placed = judge.levels({"image": image[[2, 1, 0]], "number": [9, 8, 7]})
    assert pooled.dtype == placed.dtype == torch.float32
    assert seen == [2, 1]  # view 9 alone was new
    for ours, theirs in zip((pooled, placed), judge.network.levels(image[[2, 1, 0]]), strict=True):
        torch.testing.assert_close(ours, theirs.half().float(), rtol=1e-2, atol=1e-3)


def test_the_names_must_be_those_of_the_sets(data: JudgeData) -> None:
    judge = module()
    judge.val_names = ("heldout",)
    with pytest.raises(ValueError, match="data.val holds .*'halves'"):
        toy_trainer(1).fit(judge, datamodule=data)


@pytest.mark.slow
def test_a_stopped_training_goes_on_to_the_same_weights(data: JudgeData, tmp_path: Path) -> None:
    def run(steps: int, folder: Path, resume: Path | None = None) -> dict[str, torch.Tensor]:
        judge = module()
        callbacks = [AverageWeights(decay=0.9), LastCheckpoint(folder=folder, every_steps=1)]
        plugins = [DurableCheckpointIO()]
        trainer = toy_trainer(steps, callbacks=callbacks, plugins=plugins)
        trainer.fit(judge, datamodule=data, ckpt_path=resume, weights_only=True)
        return weights(judge)

    whole = run(5, tmp_path / "whole")
    run(3, tmp_path / "part")
    resumed = run(5, tmp_path / "part", tmp_path / "part" / "last.ckpt")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
