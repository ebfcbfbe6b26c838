"""What can go wrong that a user can do something about; `experiments.run` makes exit codes of it.

Apart from the parts that raise it, so that whoever catches it does not import torch or Lightning.
"""

import importlib
import signal
from typing import Any


class DataError(RuntimeError):
    """The data cannot be read as they must be: a shard, a sample, or too many samples."""


class CheckpointError(RuntimeError):
    """A checkpoint or model folder cannot be used; the message says why and what to do."""


class MissingExtraError(ImportError):
    """A package that few need is not installed; the message says which extra brings it."""


class NonFiniteError(RuntimeError):
    """A loss or a gradient is NaN or infinite; the optimizer step was not taken."""


class LostRankError(RuntimeError):
    """Another process of the training has ended or does not answer; the message says how we know.

    The last checkpoint is whole; the same command with --ckpt=auto goes on from it.
    """


class Interrupted(BaseException):
    """Training stopped on a signal, after its state was saved. signum: the signal.

    requeued: SLURM was told to start the job again.
    """

    def __init__(self, signum: int, *, requeued: bool = False):
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum, self.requeued = signum, requeued

    @property
    def exit_code(self) -> int:
        """That of a process which a signal ended; 0 where the job goes on by itself."""
        return 0 if self.requeued else 128 + self.signum


def import_extra(module: str, *, extra: str, needs: str) -> Any:
    """An optional package. Raises MissingExtraError: `needs`, and the command that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(f"{needs}: pip install 'dcar-lightning[{extra}]'") from error
