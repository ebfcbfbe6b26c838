"""Keeps `last.ckpt` current, and ends a run cleanly when it is told to stop or its data fail."""

import logging
import os
import re
import signal
import subprocess
import time
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch.distributed.constants import default_pg_timeout

from dcar.data.storage import is_remote
from dcar.errors import CheckpointError, DataError, Interrupted, NonFiniteError
from dcar.lit.checkpoint_io import DurableCheckpointIO, link_durably, sweep
from dcar.models.checkpoints import digest_path

log = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
STEP_FILE = re.compile(r"step_(\d{8,})\.ckpt")
PATIENCE = timedelta(minutes=5)  # of a rank whose data failed: the others are at most a batch away


def step_files(folder: Path) -> dict[int, Path]:
    """The checkpoints `step_00001000.ckpt` of a folder by their step, in ascending order."""
    found = ((STEP_FILE.fullmatch(path.name), path) for path in folder.glob("step_*.ckpt"))
    return dict(sorted((int(match[1]), path) for match, path in found if match))


def requeue(job: str) -> bool:
    """Tell SLURM to start the job again; whether it has agreed."""
    try:
        subprocess.run(["scontrol", "requeue", job], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", None) or error
        log.error("SLURM job %s is not started again: %s", job, reason)
        return False
    return True


class Ranks:
    """Small agreements of all ranks on the CPU, so that no GPU is waited for.

    timeout: after which a rank that does not answer counts as lost. Every call raises RuntimeError
    where a rank is lost.
    """

    def __init__(self, world: int, timeout: timedelta = default_pg_timeout):
        self.group = dist.new_group(backend="gloo", timeout=timeout) if world > 1 else None

    def largest(self, value: int, patience: timedelta | None = None) -> int:
        """patience: how long to wait for the others, where that is not the timeout."""
        if self.group is None:
            return value
        tensor = torch.tensor(value)
        try:
            work = dist.all_reduce(tensor, dist.ReduceOp.MAX, self.group, async_op=True)
            work.wait() if patience is None else work.wait(patience)
        except RuntimeError as error:
            raise RuntimeError(f"another process of this training is lost: {error}") from error
        return int(tensor)

    def gather(self, value: Any) -> list[Any]:
        values: list[Any] = [value]
        if self.group is not None:
            values *= dist.get_world_size(self.group)
            dist.all_gather_object(values, value, group=self.group)
        return values


class LastCheckpoint(Checkpoint):
    """Saves `folder/step_00001000.ckpt` every `every_steps` steps, which is `last.ckpt` as well.

    Also at the last step; on Ctrl-C and SIGTERM; in a SLURM job on SIGUSR1, and the job is queued
    again; and where the data of a rank fail (a process that reads them is killed, too many samples
    are bad; a gradient that is half accumulated is then lost). The last `keep` of the step files
    stay. What ends one rank ends all of them.

    On a signal the step in progress is finished (and validation, if it is running), the checkpoint
    is written and `Interrupted` is raised. A second Ctrl-C or SIGTERM ends the process at once.
    Raises CheckpointError where the checkpoint of the last step or of a signal cannot be written.
    """

    def __init__(self, *, folder: str | Path, every_steps: int, keep: int = 2):
        if every_steps < 1:
            raise ValueError(f"every_steps={every_steps} must be at least 1")
        if keep < 1:
            raise ValueError(f"keep={keep} must be at least 1")
        if is_remote(str(folder)):
            raise ValueError(f"folder={folder}: checkpoints are kept in a local folder, not a URL")
        self.folder, self.every_steps, self.keep = Path(folder), every_steps, keep
        self.path = self.folder / "last.ckpt"
        self.signum = 0
        self.saved_step = -1
        self.handlers: dict[int, Any] = {}
        self.ranks: Ranks | None = None  # while training
        self.is_fetching = False  # the next event of every rank is a batch, or that there is none
        self.position: Any = None  # of the data, where this rank is ahead of one whose data failed

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        timeout = getattr(trainer.strategy, "_timeout", None) or default_pg_timeout
        self.ranks = Ranks(trainer.world_size, timeout)
        resumed = trainer.ckpt_path is not None and self.path.exists()
        self.saved_step = trainer.global_step if self.ranks.largest(int(resumed)) else -1
        if trainer.is_global_zero:
            sweep(self.folder)
        for number in (*STOP_SIGNALS, *([signal.SIGUSR1] if "SLURM_JOB_ID" in os.environ else [])):
            self.handlers[number] = signal.signal(number, self._remember)
        # Lightning asks all ranks for a SIGTERM before each batch, which waits for the GPU; the
        # signals are ours here
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]

    def _remember(self, signum: int, frame: FrameType | None) -> None:
        self.signum = max(self.signum, signum)
        if signum in STOP_SIGNALS:
            for number in STOP_SIGNALS:  # the system's own way works inside a collective too
                signal.signal(number, signal.SIG_DFL)
            rank_zero_info("\nfinishing this step and saving; press Ctrl-C again to stop at once")

    def _restore_handlers(self) -> None:
        while self.handlers:
            number, handler = self.handlers.popitem()
            signal.signal(number, handler)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.is_fetching = True

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        if self._agree_on_data(trainer, failed=False):
            raise DataError("another process of this training cannot read its data; it says why")

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        accumulate = getattr(pl_module, "accumulate", 1)
        if (batch_idx + 1) % accumulate == 0 or trainer.is_last_batch:  # no gradient is half done
            is_last = trainer.global_step == trainer.max_steps
            if trainer.global_step % self.every_steps == 0 or is_last:
                self._save(trainer, must=is_last)
            self._stop_if_told(trainer)
        self.is_fetching = True

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.is_fetching = False

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.ranks is not None:
            if not getattr(pl_module, "window", []):  # else the step in progress is finished first
                self._stop_if_told(trainer)
            self.is_fetching = True

    def _agree_on_data(self, trainer: Trainer, *, failed: bool) -> bool:
        """Whether a rank's data failed; then all ranks save, as of before this batch."""
        assert self.ranks is not None
        self.is_fetching = False
        if not self.ranks.largest(int(failed), PATIENCE if failed else None):
            return False
        # the failing rank has not counted the batch that the others have read ahead
        position = trainer.fit_loop.on_save_checkpoint() if failed else None
        self.position = next(p for p in self.ranks.gather(position) if p is not None)
        if trainer.global_step > 0:
            self._save(trainer)
        return True

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self.position is not None:
            loops = checkpoint["loops"]["fit_loop"]
            loops["state_dict"].update(self.position)
            for counts in loops["epoch_loop.batch_progress"].values():
                if isinstance(counts, dict):
                    counts["ready"] = counts["started"]  # but for the batch that was read ahead

    def _stop_if_told(self, trainer: Trainer) -> None:
        assert self.ranks is not None
        signum = self.ranks.largest(self.signum)
        if not signum:
            return
        self._save(trainer, must=True)
        requeued = False
        if signum not in STOP_SIGNALS:
            asked = trainer.is_global_zero and requeue(os.environ["SLURM_JOB_ID"])
            requeued = bool(self.ranks.largest(int(asked)))
        raise Interrupted(signum, requeued=requeued)

    def _save(self, trainer: Trainer, *, must: bool = False) -> None:
        """Save this step unless it is saved. must: raise where that fails, on every rank."""
        assert self.ranks is not None
        step = trainer.global_step
        if step == self.saved_step:
            return
        path = self.folder / f"step_{step:08d}.ckpt"
        trainer.save_checkpoint(path)
        failure = self._publish(trainer, path) if trainer.is_global_zero else ""
        if self.ranks.largest(len(failure)):
            if must:
                raise CheckpointError(f"{path} is not saved: {failure or 'see the first process'}")
        else:
            self.saved_step = step

    def _publish(self, trainer: Trainer, path: Path) -> str:
        """Make `last.ckpt` the file just saved and drop older ones; why that is not possible."""
        plugin = trainer.strategy.checkpoint_io
        if not isinstance(plugin, DurableCheckpointIO):
            link_durably(path, self.path)
        elif path not in plugin.failures:
            plugin.link_checkpoint(path, self.path)
        failures = getattr(plugin, "failures", {})
        failure = failures.get(path) or failures.get(self.path) or ""
        if not failure:
            self._drop_others(int(path.stem.removeprefix("step_")))
        return failure

    def _drop_others(self, step: int) -> None:
        """Keep the last `keep`; those of later steps are of a run that this one has replaced."""
        files = step_files(self.folder)
        kept = [number for number in files if number <= step][-self.keep :]
        for number in set(files) - set(kept):
            if number > step:
                rank_zero_info(f"{files[number]} is of an earlier run and goes")
            try:
                files[number].unlink(missing_ok=True)
                digest_path(files[number]).unlink(missing_ok=True)
            except OSError as error:
                log.warning("%s stays: %s", files[number], error)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop_if_told(trainer)
        self._restore_handlers()
        self.ranks = None

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        try:
            if isinstance(exception, DataError) and self.ranks is not None:
                self._save_after_data_failed(trainer)
        finally:
            self._restore_handlers()
            self.ranks = None
        if isinstance(exception, DataError | Interrupted | CheckpointError | NonFiniteError):
            self._let_the_first_process_end_first(trainer)

    def _save_after_data_failed(self, trainer: Trainer) -> None:
        is_fitting = trainer.state.fn == TrainerFn.FITTING
        if trainer.world_size == 1:
            if is_fitting and trainer.global_step > 0:
                self._save(trainer)
        elif self.is_fetching:
            try:
                self._agree_on_data(trainer, failed=True)
            except RuntimeError as error:  # a rank is gone: the last periodic checkpoint stands
                log.error("no checkpoint of this step: %s", " ".join(str(error).split()))

    def _let_the_first_process_end_first(self, trainer: Trainer) -> None:
        """Lightning kills the first process when one that it has launched ends with an error.

        Then the exit code would not say why. Processes launched otherwise have nothing to wait for.
        """
        environment = getattr(trainer.strategy, "cluster_environment", None)
        if trainer.local_rank == 0 or not isinstance(environment, LightningEnvironment):
            return
        parent, until = os.getppid(), time.monotonic() + 10
        while os.getppid() == parent and time.monotonic() < until:
            time.sleep(0.1)
