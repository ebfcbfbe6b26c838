"""Shared fixtures: one thread per process, a fixed seed, nothing from the network."""

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of children; ranks are forked, with one thread each

import pytest
import torch

torch.set_num_threads(1)

# README.md's commands take as long as all other slow tests.
LONGEST = Path(__file__).with_name("test_readme.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest file first, so that no process is left alone with it at the end."""
    items.sort(key=lambda item: item.path != LONGEST)


@pytest.fixture(autouse=True)
def _deterministic() -> None:
    torch.manual_seed(0)
