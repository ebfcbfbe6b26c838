"""Tasks that tests give to other processes, which find them by the name of this module."""

import os
import signal
import sys
import time
from pathlib import Path

import torch

from dcar.data import distributors
from dcar.data.distributors import Outcome, advance


def count_up(name: str, images: int) -> Outcome:
    for _ in range(images):
        advance(1, 100)
    return Outcome(name, images, 100 * images)


def surroundings() -> Outcome:
    """Whether the modules that tests.toys needs are there, and the number of threads."""
    found = "dcar.models.tokenizer" in sys.modules
    return Outcome(f"networks imported: {found}", images=torch.get_num_threads())


def fail(name: str, number: int) -> Outcome:
    time.sleep(600 * number)
    return Outcome(name, 1 // number)


def sleep_long(seconds: float) -> Outcome:
    time.sleep(seconds)
    return Outcome(f"slept {seconds}")


def write_then_sleep(folder: str, number: int) -> Outcome:
    (Path(folder) / str(os.getpid())).write_text(str(number))
    time.sleep(600)
    return Outcome("awake")


def die_while_counting(name: str) -> Outcome:
    distributors._counts.get_lock().acquire()
    os.kill(os.getpid(), signal.SIGKILL)
    return Outcome(name)
