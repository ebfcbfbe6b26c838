"""Loaders in a Trainer: checkpoints hold where the data are, for any number of ranks."""

from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from dcar.data.batches import Batch
from tests.shards import UNEVEN, build, keys, loader_of, same, take

BATCHES = sum(UNEVEN) // 3  # an epoch of one rank


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return build(tmp_path_factory.mktemp("uneven"))


class Recorder(lightning.LightningModule):
    """Remembers the batches it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.batches: list[Batch] = []

    def training_step(self, batch: Batch) -> Tensor:
        self.batches.append(batch | {"image": batch["image"].clone()})
        return (self.weight * batch["image"].float()).mean()

    def validation_step(self, batch: Batch) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(
    folder: Path,
    root: Path,
    *,
    steps: int,
    workers: int = 0,
    ckpt: Path | None = None,
    **options: Any,
) -> Recorder:
    module = Recorder()
    saving = ModelCheckpoint(root, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=steps,
        callbacks=[saving],
        default_root_dir=root,
        logger=False,
        val_check_interval=5,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loaders = (loader_of(folder, workers, **options), loader_of(folder, shuffle=False))
    trainer.fit(module, *loaders, ckpt_path=ckpt)
    return module


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("workers, stops", [(0, (1, 6, 12, 13, 14)), (2, (6,))])
def test_lightning_resumes_at_exactly_the_next_batch(shards, tmp_path, workers, stops):
    straight = fit(shards, tmp_path / "straight", steps=18, workers=workers)
    assert len(straight.batches) == 18
    for stop in stops:
        saved = tmp_path / "straight" / f"step={stop}.ckpt"
        resumed = fit(shards, tmp_path / f"from{stop}", steps=18, workers=workers, ckpt=saved)
        assert len(resumed.batches) == 18 - stop
        rest = zip(resumed.batches, straight.batches[stop:], strict=True)
        assert all(same(*pair) for pair in rest)
        state = torch.load(saved, weights_only=True)["loops"]["fit_loop"]["state_dict"]
        (loader_state,) = state["combined_loader"]
        assert (loader_state["epoch"], loader_state["batches"]) == divmod(stop, BATCHES)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("before, after", [(2, 1), (1, 2), (1, 4)])
def test_lightning_goes_on_with_other_ranks(shards, tmp_path, before, after):
    """As the trainer of each rank would: the epoch ends with what was left, the next is whole."""
    seen: list[str] = []
    for rank in range(before):
        seen += keys(fit(shards, tmp_path / f"r{rank}", steps=3, rank=rank, world=before).batches)
    saved = tmp_path / "r0" / "step=3.ckpt"
    left = (sum(UNEVEN) // before * before - len(seen)) // (3 * after)
    full = sum(UNEVEN) // after * after // (3 * after)
    for rank in range(after):
        steps = 3 + left + full
        options = {"rank": rank, "world": after}
        run = fit(shards, tmp_path / f"then{rank}", steps=steps, ckpt=saved, **options)
        seen += keys(run.batches[:left])
        fresh = loader_of(shards, **options)
        take(fresh, full)
        assert keys(run.batches[left:]) == keys(fresh)
    assert len(seen) == len(set(seen))
