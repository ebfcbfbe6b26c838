"""The task of `quickstart` and its like: trainings in order, then samples, figures and a report."""

import os
import shlex
import shutil
import sys
from pathlib import Path

from hydra.utils import get_method
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from omegaconf import DictConfig

from experiments.config import ConfigError, load_config
from experiments.names import first_found
from experiments.report import write_report
from experiments.run import RunOptions


def settings_of(config: DictConfig, run: str) -> DictConfig:
    """The configuration of one of the trainings, with what the recipe says of all of them."""
    name = f"{config.recipe}/{run}"
    own = load_config(name)
    steps = own.max_steps if config.steps[run] is None else config.steps[run]
    if not isinstance(steps, int) or steps < 1:
        raise ConfigError(f"steps.{run}={steps} must be a whole number of at least 1")
    overrides = [f"max_steps={steps}", f"seed={config.seed}"]
    for phase in ("warmup_steps", "cooldown_steps"):
        if phase in own:  # shorter in proportion where fewer steps are asked for
            overrides.append(f"{phase}={min(own[phase], own[phase] * steps // own.max_steps)}")
    overrides += [f"outputs={config.outputs}", *shlex.split(config.overrides or "")]
    return load_config(name, overrides)


def is_base_there(settings: DictConfig) -> bool:
    """Of a fine-tuning; a dry run of any other training starts from random weights."""
    if settings.task == "experiments.train.train":
        return True
    return first_found(settings.init_from, settings.outputs) is not None


def recipe(config: DictConfig, options: RunOptions) -> None:
    """Run what is not done yet; each run goes on from its own last checkpoint."""
    runs = list(config.steps)
    for run in runs:  # what one of them cannot take is told before the first
        try:
            settings_of(config, run)
        except ConfigError as error:
            raise ConfigError(f"{config.recipe}/{run}: {error}") from error
    for number, run in enumerate(runs, start=1):
        settings = settings_of(config, run)
        rank_zero_info(f"[{number}/{len(runs)}] {settings.exp}: {settings.max_steps} steps")
        if options.dry_run and not is_base_there(settings):
            rank_zero_info(f"dry run: {settings.init_from} is not there yet; left out")
            continue
        get_method(settings.task)(settings, RunOptions(ckpt="auto", dry_run=options.dry_run))
    if not options.dry_run:
        finish(config, runs)


@rank_zero_only
def finish(config: DictConfig, runs: list[str]) -> None:
    """The model that the last run left, in the recipe's own folder, and a report of all runs."""
    folder = Path(config.outputs) / config.recipe
    shutil.copytree(folder / runs[-1] / "model", folder / "model", dirs_exist_ok=True)
    python = os.path.relpath(sys.executable)
    report = write_report(folder, runs=runs)
    rank_zero_info(
        f"\nreport:       {report}\n"
        f"curves:       make tensorboard\n"
        f"your picture: {python} -m experiments.run --exp=sample "
        f'ckpt={folder} prompt="a red apple, flat style" out=apple.png'
    )
