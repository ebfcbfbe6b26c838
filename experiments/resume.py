"""Which checkpoint a training goes on from: the last good one."""

from pathlib import Path

from lightning.pytorch.utilities import rank_zero_info
from omegaconf import DictConfig

from dcar.errors import CheckpointError
from dcar.lit.checkpoint_io import sweep
from dcar.lit.last_checkpoint import step_files
from dcar.models.checkpoints import read_checkpoint
from experiments.config import ConfigError, nearest


def _glance(path: Path) -> int | CheckpointError:
    """The step of a whole checkpoint, or what is wrong with it."""
    try:
        return int(read_checkpoint(path, mapped=True)["global_step"])
    except CheckpointError as error:
        return error


def _newest_good(folder: Path) -> tuple[int, Path] | None:
    """The whole checkpoint of the latest step beside last.ckpt; of two of one step, the step's."""
    newest = None
    for path in reversed(step_files(folder).values()):
        if isinstance(step := _glance(path), int):
            newest = step, path
            break
    best = folder / "best.ckpt"
    if isinstance(step := _glance(best), int) and (newest is None or step > newest[0]):
        newest = step, best
    return newest


def _last(folder: Path) -> Path | None:
    """last.ckpt, or the newest good one in its stead, which is said; None in an empty folder.

    Raises CheckpointError where there are checkpoints and all of them are damaged.
    """
    last = folder / "last.ckpt"
    if not any(folder.glob("*.ckpt")):
        return None
    if isinstance(trouble := _glance(last), int):
        return last
    newest = _newest_good(folder)
    if newest is None:
        raise CheckpointError(
            f"{trouble}; and {folder} holds no other checkpoint that is whole: move it away to "
            "start afresh"
        )
    rank_zero_info(f"{trouble}: going on from {newest[1]}, step {newest[0]}")
    return newest[1]


def find_resume(config: DictConfig, ckpt: str | None) -> Path | None:
    """The checkpoint to go on from, after the remains of killed runs are swept away.

    `last` and `auto` fall back to the newest whole checkpoint of the run where last.ckpt is damaged
    or missing; `auto` is None where there is none at all. `new` starts afresh, and replaces what an
    earlier run has left. Raises CheckpointError where a named one is not there or damaged, and
    where all of them are; ConfigError for no word at all where there are checkpoints to lose.
    """
    folder = Path(config.output_dir) / "checkpoints"
    if ckpt is None and any(folder.glob("*.ckpt")):
        raise ConfigError(
            f"{folder} holds checkpoints of an earlier run: --ckpt=auto goes on from them, "
            "--ckpt=new replaces them, outputs=FOLDER leaves them where they are"
        )
    if ckpt in (None, "new"):
        return None
    sweep(folder)
    if ckpt in ("last", "auto"):
        found = _last(folder)
        if found is None and ckpt == "last":
            path = folder / "last.ckpt"
            raise CheckpointError(f"--ckpt last: there is no checkpoint at {path}")
        return found
    path = folder / "best.ckpt" if ckpt == "best" else Path(str(ckpt))
    if (path / "checkpoints" / "last.ckpt").is_file():  # of a run's folder
        path = path / "checkpoints" / "last.ckpt"
    if isinstance(trouble := _glance(path), CheckpointError):
        hint = "" if path.exists() else nearest(str(ckpt), ("last", "best", "auto", "new"))
        raise CheckpointError(f"--ckpt {ckpt}: {trouble}{hint}")
    return path


def finished(path: Path | None, config: DictConfig) -> bool:
    """Whether all steps are taken and what comes after them has been written."""
    if path is None or not (Path(config.output_dir) / "metrics.json").exists():
        return False
    return bool(read_checkpoint(path, mapped=True)["global_step"] >= config.max_steps)
