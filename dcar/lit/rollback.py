"""Back to the state of the last checkpoint, while the data and the count of steps go on."""

from typing import Any

from lightning import Trainer
from lightning.pytorch.utilities import rank_zero_warn

from dcar.lit.averaging import AverageWeights
from dcar.lit.guard import NonFiniteError
from dcar.lit.last_checkpoint import LastCheckpoint
from dcar.models.checkpoints import read_checkpoint


def roll_back(trainer: Trainer, module: Any) -> None:
    """Weights, optimizers, averages and loss scale as `last.ckpt` has them, on every rank.

    Raises NonFiniteError where no checkpoint has been written yet.
    """
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    last = next((c for c in callbacks if isinstance(c, LastCheckpoint)), None)
    if last is None or not last.path.is_file():
        raise NonFiniteError(
            f"a step at {trainer.global_step} is not finite and there is no checkpoint to roll "
            "back to: set module.guard.policy=skip or a smaller save_every"
        )
    checkpoint = read_checkpoint(last.path)
    trainer.strategy.load_model_state_dict(checkpoint, strict=True)
    trainer.strategy.load_optimizer_state_dict(checkpoint)
    for callback in callbacks:
        if isinstance(callback, AverageWeights):
            callback.on_load_checkpoint(trainer, module, checkpoint)
            callback.load_state_dict(checkpoint["callbacks"][callback.state_key])
    precision = trainer.precision_plugin
    precision.load_state_dict(checkpoint.get(type(precision).__qualname__, {}))
    rank_zero_warn(
        f"back to the weights of step {checkpoint['global_step']} ({last.path}); the data go on",
        stacklevel=2,
    )
