"""Keeps `best.ckpt`, the best validation so far, over kills and moves too."""

import logging
from copy import deepcopy
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from dcar.errors import CheckpointError
from dcar.models.checkpoints import read_checkpoint

log = logging.getLogger(__name__)


class BestCheckpoint(ModelCheckpoint):
    """Saves `folder/best.ckpt` where `monitor` is the best so far; mode: min or max.

    A resumed run takes the best score from `best.ckpt` itself: what the resumed checkpoint knows of
    it is from before the validation of its own step, and the best may have been found there.
    """

    def __init__(self, *, folder: str | Path, monitor: str, mode: str):
        super().__init__(
            folder, filename="best", monitor=monitor, mode=mode, enable_version_counter=False
        )

    @property
    def state_key(self) -> str:
        """As checkpoints have it that were written when Lightning's own class did this."""
        return super().state_key.replace(type(self).__name__, ModelCheckpoint.__name__, 1)

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        known = checkpoint["callbacks"].get(self.state_key) or {}
        if state := self._own_record(trainer.ckpt_path, checkpoint["global_step"], known):
            checkpoint["callbacks"][self.state_key] = state

    def _own_record(self, resumed: Any, step: int, known: dict[str, Any]) -> dict[str, Any] | None:
        """This callback's state in `best.ckpt`; None where that is none of the resumed run's.

        It is where it was written at the resumed step, or holds the score that is known of.
        """
        path = Path(str(self.dirpath)) / "best.ckpt"
        is_own = resumed is not None and Path(resumed).resolve().parent == path.resolve().parent
        if not (is_own and path.is_file()):
            return None
        try:
            best = read_checkpoint(path, mapped=True)
        except CheckpointError as error:
            log.warning("the best so far is not known: %s", error)
            return None
        state = deepcopy(best["callbacks"].get(self.state_key))  # the file will be replaced
        if state is None:
            return None
        is_known = known.get("best_model_score") == state["best_model_score"]
        if best["global_step"] != step and not (is_known and best["global_step"] < step):
            return None
        here = str(path)  # the folder may have moved since
        return {
            **state,
            "dirpath": self.dirpath,
            "best_model_path": here,
            "kth_best_model_path": here,
            "best_k_models": {here: state["best_model_score"]},
        }
