"""Two processes that talk to each other over gloo, for tests of what ranks agree on."""

import multiprocessing
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.toys import START

PATIENCE = 60  # seconds


def run_on_two_ranks(task: Callable[..., None], *arguments: Any) -> None:
    """Call task(rank, *arguments) in a process each; both must end well."""
    context = multiprocessing.get_context(START)
    ranks = [
        context.Process(target=task, args=(rank, *arguments), daemon=True) for rank in range(2)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(PATIENCE)
    assert [process.exitcode for process in ranks] == [0, 0]


def join(rank: int, folder: Path) -> None:
    """Into the group of two that meets at a file in the folder."""
    torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
    dist.init_process_group(
        "gloo",
        f"file://{folder}/store",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=PATIENCE),
    )
