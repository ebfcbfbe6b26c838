"""best.ckpt: the best validation so far, however often the run was killed and moved."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningModule, Trainer
from torch.utils.data import DataLoader

from dcar.lit.best_checkpoint import BestCheckpoint
from dcar.lit.last_checkpoint import LastCheckpoint
from tests.toys import toy_trainer

SCORES = {2: 1.0, 4: 3.0, 6: 2.0}


class Killed(Exception):
    pass


class Scored(LightningModule):
    """Its validations have the scores above; it is killed before `killed_after + 1` steps."""

    def __init__(self, killed_after: int | None = None):
        super().__init__()
        self.layer, self.killed_after = torch.nn.Linear(1, 1), killed_after
        self.automatic_optimization = False

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["dcar"] = {}

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        if self.global_step == self.killed_after:
            raise Killed
        optimizer: Any = self.optimizers()
        self.manual_backward(self.layer(batch).sum())
        optimizer.step()

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.log("val/x", SCORES[self.global_step])


def run(folder: Path, steps: int, *, resume: bool = False, killed_after: int | None = None) -> int:
    """The step of best.ckpt when the run has ended."""
    callbacks = [
        LastCheckpoint(folder=folder, every_steps=2),
        BestCheckpoint(folder=folder, monitor="val/x", mode="min"),
    ]
    trainer: Trainer = toy_trainer(
        steps,
        callbacks=callbacks,
        val_check_interval=2,
        check_val_every_n_epoch=None,
        limit_val_batches=1,
    )
    ones = torch.ones(20, 1)
    resumed = folder / "last.ckpt" if resume else None
    module = Scored(killed_after)
    try:
        loaders = DataLoader(ones), DataLoader(ones[:1])
        trainer.fit(module, *loaders, ckpt_path=resumed, weights_only=True)
    except Killed:
        pass
    return torch.load(folder / "best.ckpt", weights_only=True)["global_step"]


@pytest.mark.parametrize("moved", [False, True])
def test_a_best_that_the_resumed_checkpoint_does_not_know_yet_stays(
    tmp_path: Path, moved: bool
) -> None:
    assert run(tmp_path / "a", 6, killed_after=3) == 2
    folder = (tmp_path / "a").rename(tmp_path / "b") if moved else tmp_path / "a"
    assert run(folder, 6, resume=True) == 2


def test_a_worse_best_is_replaced_after_a_kill_too(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(SCORES, 4, 0.5)
    assert run(tmp_path, 6, killed_after=3) == 2 and run(tmp_path, 6, resume=True) == 4


def test_a_damaged_best_is_no_hindrance(tmp_path: Path, caplog) -> None:
    run(tmp_path, 6, killed_after=3)
    (tmp_path / "best.ckpt").write_bytes(b"damaged")
    assert run(tmp_path, 6, resume=True) == 6
    assert "the best so far is not known" in caplog.text


def test_a_best_of_another_run_counts_for_nothing(tmp_path: Path) -> None:
    run(tmp_path / "a", 2)
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "best.ckpt").rename(tmp_path / "b" / "best.ckpt")
    callback = BestCheckpoint(folder=tmp_path / "b", monitor="val/x", mode="min")
    own, other = (tmp_path / name / "last.ckpt" for name in "ba")
    assert callback._own_record(other, 2, {}) is None  # of another folder
    assert callback._own_record(own, 2, {}) is not None
    assert callback._own_record(own, 1, {}) is None  # of a later step
    assert callback._own_record(own, 4, {}) is None  # of a run before this one
    assert callback._own_record(own, 4, {"best_model_score": torch.tensor(1.0)}) is not None
