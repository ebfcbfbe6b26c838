"""Random numbers that a resumed training draws as the one that was stopped would have."""

import logging
import random
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn

log = logging.getLogger(__name__)

States = dict[str, Any]


def random_states(device: torch.device) -> States:
    """The states of Python's, numpy's and torch's generators, as tensors and plain containers."""
    version, words, gauss = random.getstate()
    numpy_state: Any = np.random.get_state()
    _, keys, position, has_gauss, cached = numpy_state
    states: States = {
        "python": [version, list(words), gauss],
        "numpy": [keys.tolist(), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def restore_random_states(states: States, device: torch.device) -> None:
    """Undo all draws since `random_states` gave `states`; a GPU's where both have one."""
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    keys, *rest = states["numpy"]
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(states["torch"].cpu())
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"].cpu(), device)


def seed_generators(key: str, device: torch.device) -> None:
    """Begin all generators anew, that of `device` too, with numbers that `key` alone decides."""
    seed = random.Random(key).getrandbits(63)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)  # `torch.manual_seed` takes a while for GPUs not used
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


class RandomStates(Callback):
    """Makes what draws from the global generators, as dropout does, resume bit-equal.

    This project's own draws need no help: they are functions of seed and step. So is, here, the
    state in which every batch begins (of seed, number of the batch and rank), however much loaders
    and validations have drawn before. Between two batches data may be augmented in this process:
    for that, checkpoints hold the states of every rank, and validation is undone. With another
    number of ranks these are not restored, and a warning says so.
    """

    def __init__(self) -> None:
        self.saved: States | None = None  # of this rank, from the checkpoint
        self.after_batch: States | None = None

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        seed, number = getattr(pl_module, "seed", 0), trainer.fit_loop.total_batch_idx
        seed_generators(f"{seed}/{number}/{trainer.global_rank}", pl_module.device)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        self.after_batch = random_states(pl_module.device)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING and self.after_batch is not None:
            restore_random_states(self.after_batch, pl_module.device)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        own = random_states(pl_module.device)
        every: list[Any] = [own] * trainer.world_size
        if trainer.world_size > 1:
            dist.all_gather_object(every, own)
        checkpoint["random_states"] = every

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        every = checkpoint.get("random_states", [])
        if len(every) == trainer.world_size:
            self.saved = every[trainer.global_rank]
        elif every and trainer.is_global_zero:
            log.warning(
                "the checkpoint holds the random states of %d processes, these are %d: what draws "
                "from them draws other numbers from here on",
                len(every),
                trainer.world_size,
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Data loaders are next to draw: what they do at the start of an epoch."""
        if self.saved is not None:
            restore_random_states(self.saved, pl_module.device)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """In the middle of an epoch they had drawn before the checkpoint was saved."""
        if self.saved is not None and not trainer.is_last_batch:
            restore_random_states(self.saved, pl_module.device)
        self.saved = None
