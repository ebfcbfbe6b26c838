"""TensorBoard's logger, for trainings that outlive a full disk."""

import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from lightning.pytorch import Trainer, loggers
from lightning.pytorch.loggers.logger import rank_zero_experiment
from torch.utils.tensorboard import SummaryWriter

log = logging.getLogger(__name__)


class ForgivingWriter:
    """TensorBoard's writer of events until one cannot be written: it says so, and writes no more.

    Errors come late, at whatever is written next, since a thread does the writing.
    """

    def __init__(self, inner: Any):
        self.inner, self.is_broken = inner, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def add_event(self, *event: Any) -> None:
        self._try(self.inner.add_event, *event)

    def flush(self) -> None:
        self._try(self.inner.flush)

    def close(self) -> None:
        self._try(self.inner.close)

    def _try(self, call: Callable[..., None], *arguments: Any) -> None:
        if self.is_broken:
            return
        try:
            call(*arguments)
        except OSError as error:
            self.is_broken = True
            log.error("TensorBoard gets nothing from here on: %s", error)


class TensorBoardLogger(loggers.TensorBoardLogger):
    """Lightning's, but an error of the disk ends the log alone, and steps are optimizer steps.

    trainer: whose steps they are; Lightning counts batches, of which a step may take several.
    """

    trainer: Trainer | None = None

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        taken = step if self.trainer is None else self.trainer.global_step
        super().log_metrics(dict(metrics), taken)

    @property
    @rank_zero_experiment
    def experiment(self) -> SummaryWriter:
        board: Any = super().experiment
        files = getattr(board, "file_writer", None)  # None between a close and what is added next
        if files is not None and not isinstance(files.event_writer, ForgivingWriter):
            files.event_writer = ForgivingWriter(files.event_writer)
        return board

    def save(self) -> None:
        with suppress(OSError):  # of the file of hyperparameters, which are none
            super().save()
