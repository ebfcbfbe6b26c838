"""How many processes, and which strategy."""

import pytest
from lightning.pytorch.strategies import DDPStrategy

from experiments.strategy import device_count, resolve_strategy


def settings(**changes):
    return {"devices": 1, "num_nodes": 1, "accelerator": "cpu", "strategy": "auto"} | changes


@pytest.mark.parametrize(
    ("changes", "count"),
    [
        ({}, 1),
        ({"devices": "auto"}, 1),
        ({"devices": [0, 2]}, 2),
        ({"devices": 4, "num_nodes": 2}, 8),
    ],
)
def test_processes_are_devices_times_nodes(changes: dict, count: int) -> None:
    assert device_count(settings(**changes)) == count


@pytest.mark.parametrize("alternates", [True, False])
def test_several_processes_get_ddp_that_knows_of_alternating_networks(alternates: bool) -> None:
    strategy = resolve_strategy(settings(devices=2), alternates=alternates)
    assert isinstance(strategy, DDPStrategy)
    assert strategy._ddp_kwargs["find_unused_parameters"] is alternates


def test_one_process_and_a_named_strategy_are_left_alone() -> None:
    assert resolve_strategy(settings(), alternates=True) == "auto"
    assert resolve_strategy(settings(devices=2, strategy="fsdp"), alternates=True) == "fsdp"
