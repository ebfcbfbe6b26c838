"""A resumed training draws the random numbers that one never stopped would have drawn."""

import logging
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.utils.data import DataLoader

from dcar.lit.checkpoint_io import DurableCheckpointIO
from dcar.lit.last_checkpoint import LastCheckpoint
from dcar.lit.random_states import (
    RandomStates,
    random_states,
    restore_random_states,
    seed_generators,
)
from dcar.models.checkpoints import read_checkpoint
from tests.toys import ToyData, ToyImages, collate, toy_stage, toy_trainer

CPU = torch.device("cpu")


def draw() -> list[float]:
    """Of Python's and numpy's generators also half of a pair of normal numbers."""
    python = [random.random(), random.gauss(0, 1)]
    return [*python, float(np.random.rand()), float(np.random.randn()), float(torch.rand(()))]


def test_what_is_restored_draws_the_same_numbers_again(tmp_path: Path) -> None:
    draw()  # now half a pair of normal numbers waits in each of the two
    torch.save(random_states(CPU), tmp_path / "states")
    first = draw()
    draw()
    restore_random_states(torch.load(tmp_path / "states", weights_only=True), CPU)
    assert draw() == first


class Crops(DataLoader):
    """Four batches, moved about by the global generator; an epoch draws first, as torch's does."""

    def __init__(self) -> None:
        super().__init__(ToyImages(16), 4)
        self.taken = 0

    def __iter__(self):
        torch.rand(())
        self.taken %= 4
        return self._batches()

    def _batches(self):
        while self.taken < 4:
            batch = collate([self.dataset[self.taken * 4 + index] for index in range(4)])
            self.taken += 1
            yield batch | {"image": batch["image"].roll(int(torch.randint(8, ())), dims=-1)}

    def state_dict(self) -> dict[str, int]:
        return {"taken": self.taken}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.taken = state["taken"]


class CroppedData(ToyData):
    def train_dataloader(self):
        return Crops()


class Seen(Callback):
    """A number of each generator after every batch."""

    def __init__(self) -> None:
        self.numbers: list[list[float]] = []

    def on_train_batch_end(self, *args) -> None:
        self.numbers.append(draw())


def dropout_stage():
    """A tokenizer in whose decoder dropout draws from the global generator."""
    module = toy_stage(1)
    drop = nn.Dropout(0.5)
    module.network.decoder.register_forward_hook(lambda m, inputs, out: drop(out))
    return module


def run(folder: Path, steps: int, *, resume: Path | None = None, states=True, data=None, **more):
    """A training that begins with the generators in a state that a resumed one does not have."""
    module, seen = dropout_stage(), Seen()
    seed_generators(f"at the start of a run resumed from {resume}", CPU)
    last = LastCheckpoint(folder=folder, every_steps=1, keep=9)
    trainer = toy_trainer(
        steps,
        callbacks=[seen, *([RandomStates()] if states else []), last],
        plugins=[DurableCheckpointIO()],
        **{"limit_val_batches": 1, "val_check_interval": 2} | more,
    )
    trainer.fit(module, datamodule=data or ToyData(), ckpt_path=resume)
    return module, seen.numbers


def are_equal(one, other) -> bool:
    return all(torch.equal(t, other.state_dict()[n]) for n, t in one.state_dict().items())


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Six steps of epochs of four, with dropout and augmentation; every one saved."""
    folder = tmp_path_factory.mktemp("straight")
    return folder, *run(folder, 6, data=CroppedData())


@pytest.mark.parametrize("at", [2, 3, 4])  # at a validation, between two, at the end of an epoch
def test_stopping_and_resuming_is_bit_equal(at: int, straight, tmp_path: Path) -> None:
    folder, module, numbers = straight
    path = folder / f"step_{at:08d}.ckpt"
    resumed, more = run(tmp_path, 6, resume=path, data=CroppedData())
    assert more == numbers[at:] and are_equal(module, resumed)


def test_dropout_goes_on_whatever_a_loader_draws_by_itself(tmp_path: Path) -> None:
    """This one draws with its first batch, which comes later in a resumed run."""
    module, _ = run(tmp_path / "a", 4)
    resumed, _ = run(tmp_path / "b", 4, resume=tmp_path / "a" / "step_00000003.ckpt")
    assert are_equal(module, resumed)


def test_without_it_dropout_differs_after_a_resume(tmp_path: Path) -> None:
    """So the tests above can fail."""
    module, _ = run(tmp_path / "a", 2, states=False)
    path = tmp_path / "a" / "step_00000001.ckpt"
    resumed, _ = run(tmp_path / "b", 2, states=False, resume=path)
    assert not are_equal(module, resumed)


def test_how_often_a_training_validates_changes_nothing_in_it(tmp_path: Path) -> None:
    often, numbers = run(tmp_path / "a", 3, val_check_interval=1, data=CroppedData())
    seldom, same = run(tmp_path / "b", 3, val_check_interval=3, data=CroppedData())
    assert numbers == same and are_equal(often, seldom)


def test_every_batch_and_every_seed_has_numbers_of_its_own(tmp_path: Path) -> None:
    callback, seen = RandomStates(), []
    trainer = toy_trainer(1)
    for seed, number in [(0, 0), (0, 1), (1, 0)]:
        trainer.fit_loop.epoch_loop.batch_progress.total.ready = number + 1
        callback.on_train_batch_start(trainer, toy_stage(1, seed=seed), {}, 0)
        seen += draw()
    assert len(set(seen)) == 15
    seed_generators("0/0/1", CPU)  # as the second rank does it
    assert draw() != seen[:5]


def test_a_checkpoint_holds_one_entry_a_rank_and_opens_safely(straight) -> None:
    (states,) = read_checkpoint(straight[0] / "last.ckpt")["random_states"]
    assert sorted(states) == ["numpy", "python", "torch"]


def test_with_another_number_of_ranks_nothing_is_restored_and_that_is_said(caplog) -> None:
    callback, trainer = RandomStates(), toy_trainer(1)
    states = random_states(CPU)
    with caplog.at_level(logging.WARNING):
        callback.on_load_checkpoint(trainer, toy_stage(1), {"random_states": [states, states]})
    assert callback.saved is None and "of 2 processes, these are 1" in caplog.text


def test_a_checkpoint_without_them_resumes(tmp_path: Path) -> None:
    toy_trainer(1, callbacks=[LastCheckpoint(folder=tmp_path, every_steps=1)]).fit(
        toy_stage(1), datamodule=ToyData()
    )
    _, numbers = run(tmp_path / "again", 2, resume=tmp_path / "last.ckpt")
    assert len(numbers) == 1
