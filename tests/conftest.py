"""Shared fixtures: one thread per process, a fixed seed, nothing from the network."""

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of children; ranks are forked, with one thread each

import pytest
import torch

torch.set_num_threads(1)

TESTS = Path(__file__).parent
# One process is with README.md's commands as long as another is with all the rest.
LONGEST = ("test_readme.py", "experiments")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, so that no process is left alone with one at the end."""

    def rank(item: pytest.Item) -> int:
        first = item.path.relative_to(TESTS).parts[0]
        return LONGEST.index(first) if first in LONGEST else len(LONGEST)

    items.sort(key=rank)


@pytest.fixture(autouse=True)
def _deterministic() -> None:
    torch.manual_seed(0)
