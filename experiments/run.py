"""Runs an experiment: python -m experiments.run --exp=NAME [key=value ...]

Exit codes: 0 done, 1 a lost process or a bug, 2 usage or configuration, 3 data or a file, 4
non-finite training, 130 and 143 signals.
"""

import argparse
import difflib
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

from hydra.utils import get_method
from omegaconf import DictConfig, OmegaConf

from dcar.errors import (
    CheckpointError,
    DataError,
    Interrupted,
    LostRankError,
    MissingExtraError,
    NonFiniteError,
)
from experiments.config import (
    ConfigError,
    experiment_names,
    first_comment,
    load_config,
)

LOST, USAGE, DATA, NON_FINITE = 1, 2, 3, 4
EXIT_CODES: dict[type[BaseException], int] = {
    ConfigError: USAGE,
    CheckpointError: USAGE,
    MissingExtraError: USAGE,
    ValueError: USAGE,
    TypeError: USAGE,
    DataError: DATA,
    FileNotFoundError: DATA,
    FileExistsError: DATA,
    PermissionError: DATA,
    NotADirectoryError: DATA,
    IsADirectoryError: DATA,
    NonFiniteError: NON_FINITE,
    LostRankError: LOST,
}


@dataclass(frozen=True)
class RunOptions:
    """What the command line says beside the configuration. ckpt: last, best, auto, new, a path."""

    ckpt: str | None = None
    dry_run: bool = False


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    usage, _, exit_codes = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m experiments.run",
        usage=usage.partition(": ")[2],
        epilog=exit_codes,
        allow_abbrev=False,
    )
    options: dict[str, dict[str, Any]] = {
        "--exp": {"metavar": "NAME", "help": "the experiment, such as sample or quickstart"},
        "--list": {"action": "store_true", "help": "every experiment with what it reproduces"},
        "--print-config": {"action": "store_true", "help": "the complete configuration, and stop"},
        "--dry-run": {
            "action": "store_true",
            "help": "build everything, take one step, write no files",
        },
        "--ckpt": {
            "metavar": "last|best|auto|new|PATH",
            "help": "continue from a checkpoint; auto starts where there is none, new replaces it",
        },
    }
    for name, settings in options.items():
        parser.add_argument(name, **settings)
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings that --print-config shows"
    )
    known, unknown = parser.parse_known_intermixed_args(arguments)
    unknown += [override for override in known.overrides if override.startswith("-")]
    if unknown:
        raise ConfigError(_unknown_option(unknown[0], [*options]))
    return known


def _unknown_option(given: str, options: Sequence[str]) -> str:
    name, equals, _ = given.partition("=")
    if near := difflib.get_close_matches(name, options, n=1, cutoff=0.8):
        return f"unknown option {name!r}; did you mean {near[0]!r}?"
    hint = f"; settings have no dashes: {given.lstrip('-')}" if equals else ""
    return f"unknown option {name!r}{hint}"


def print_list() -> None:
    names = experiment_names()
    width = max(map(len, names)) + 2
    for name in names:
        print(f"{name:<{width}}{first_comment(name)}")


def run(arguments: Sequence[str]) -> None:
    """Parse, compose and call the experiment's task. Raises what the task raises."""
    options = parse(arguments)
    if options.list:
        return print_list()
    if options.exp is None:
        raise ConfigError("give --exp=NAME (--list shows the names)")
    config = load_config(options.exp, options.overrides)
    if options.print_config:
        return print(OmegaConf.to_yaml(config, resolve=True), end="")
    check_ckpt(config, options.ckpt)
    task = get_method(config.task)
    task(config, RunOptions(ckpt=options.ckpt, dry_run=options.dry_run))


def check_ckpt(config: DictConfig, ckpt: str | None) -> None:
    """Raises ConfigError where nothing would go on from the checkpoint."""
    if ckpt == "":
        raise ConfigError("--ckpt is empty: last, best, auto, new, or a checkpoint")
    if ckpt is None or "keep_checkpoints" in config:  # a training
        return
    if "recipe" in config:
        if ckpt == "auto":
            return
        raise ConfigError(
            f"--ckpt={ckpt}: each training of exp={config.exp} goes on from its own last "
            "checkpoint, without being told"
        )
    is_place = "ckpt" in config and ckpt not in ("last", "best", "auto", "new")
    hint = f"; did you mean ckpt={ckpt}?" if is_place else ""
    raise ConfigError(f"--ckpt={ckpt} is for trainings, and exp={config.exp} is none{hint}")


NOTICES = (
    "litlogger",
    "litmodels",
    "`fast_dev_run`",
    "weights_only",
    " available: ",
    "Automatic Mixed Precision",
    "`Trainer",
    "static graph optimizations",
)


def quieten() -> None:
    """Keep other packages' notices out of the way of this project's own lines."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", module=r"(lightning|torch|torchmetrics|transformers)\b")
    for name in ("utilities.rank_zero", "trainer.connectors.checkpoint_connector"):
        logging.getLogger(f"lightning.pytorch.{name}").addFilter(
            lambda record: not any(notice in record.getMessage() for notice in NOTICES)
        )


@contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM raises Interrupted wherever nothing that is running has its own way to stop."""

    process = os.getpid()

    def stop(signum: int, frame: FrameType | None) -> None:
        if os.getpid() != process:  # a forked child: it has nothing to tell
            os._exit(128 + signum)
        raise Interrupted(signum)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def report(stop: Interrupted) -> int:
    """Says how to go on, and gives the exit code."""
    further = "the same command goes on from here (trainings: with --ckpt=auto)"
    if stop.requeued:
        further = "the job is queued again"
    print(f"\n{stop}; {further}", file=sys.stderr)
    return stop.exit_code


def main(arguments: Sequence[str] | None = None) -> int:
    """Run and turn failures into exit codes: one line for bad input, a traceback for bugs."""
    quieten()
    try:
        with terminable():
            run(sys.argv[1:] if arguments is None else arguments)
    except Interrupted as stop:
        return report(stop)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever read the output has seen enough, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except SystemExit as stop:  # what Lightning makes of Ctrl-C before and after the training loop
        if isinstance(stop.__context__, KeyboardInterrupt):
            return 130
        raise
    except tuple(EXIT_CODES) as error:
        if os.environ.get("DCAR_TRACEBACK"):
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return next(code for kind, code in EXIT_CODES.items() if isinstance(error, kind))
    return 0


if __name__ == "__main__":
    sys.exit(main())
