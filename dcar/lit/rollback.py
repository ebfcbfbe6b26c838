"""Back to the state of the last checkpoint, while the data and the count of steps go on."""

from pathlib import Path
from typing import Any

from lightning import Trainer
from lightning.pytorch.utilities import rank_zero_info

from dcar.errors import CheckpointError, NonFiniteError
from dcar.lit.averaging import AverageWeights
from dcar.lit.guard import gather_over_ranks
from dcar.lit.last_checkpoint import LastCheckpoint
from dcar.models.checkpoints import read_checkpoint


def _read_last(callbacks: list[Any]) -> tuple[dict[str, Any], Path | None, str]:
    """The last checkpoint with its path, or why there is none; on all ranks or on none."""
    last = next((c for c in callbacks if isinstance(c, LastCheckpoint)), None)
    checkpoint, path, trouble = {}, None, "no callback writes a last.ckpt"
    if last is not None:
        try:
            checkpoint, path, trouble = read_checkpoint(last.path), last.path, ""
            if checkpoint["global_step"] != last.saved_step:
                trouble = f"{last.path} is of another run or a later step"
        except CheckpointError as error:
            trouble = str(error)
    troubles = [theirs for theirs in gather_over_ranks(trouble) if theirs]
    return checkpoint, path, troubles[0] if troubles else ""


def roll_back(trainer: Trainer, module: Any) -> None:
    """Weights, optimizers, averages and loss scale as `last.ckpt` has them, on every rank.

    Learning rates stay with the step. Raises NonFiniteError on all ranks where one of them finds no
    good checkpoint.
    """
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    checkpoint, path, trouble = _read_last(callbacks)
    if trouble:
        raise NonFiniteError(
            f"step {trainer.global_step} is not finite and cannot be rolled back: {trouble}; set "
            "guard.policy=skip or a smaller save_every"
        )
    trainer.strategy.load_model_state_dict(checkpoint, strict=True)
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    kept = [{key: value for key, value in group.items() if key != "params"} for group in groups]
    trainer.strategy.load_optimizer_state_dict(checkpoint)
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    for group, settings in zip(groups, kept, strict=True):
        group.update(settings)
    for callback in callbacks:
        if isinstance(callback, AverageWeights):
            callback.on_load_checkpoint(trainer, module, checkpoint)
            callback.load_state_dict(checkpoint["callbacks"][callback.state_key])
    precision = trainer.precision_plugin
    if state := checkpoint.get(type(precision).__qualname__):
        precision.load_state_dict(state)
    rank_zero_info(
        f"back to the weights of step {checkpoint['global_step']} ({path}); the data go on"
    )
