"""How many processes, and which strategy."""

from datetime import timedelta
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy

from dcar.lit.sharding import ShardedStrategy
from experiments.config import ConfigError, load_config
from experiments.strategy import (
    device_count,
    make_trainer,
    resolve_accelerator,
    resolve_strategy,
    syncs_batchnorm,
)


def settings(**changes: Any) -> dict[str, Any]:
    return {
        "devices": 1,
        "num_nodes": 1,
        "accelerator": "cpu",
        "strategy": "auto",
        "precision": "32-true",
        "sync_batchnorm": "auto",
        "timeout_minutes": 2,
    } | changes


def test_fp16_on_a_cpu_is_fp16_in_every_trainer() -> None:
    """Lightning alone would take bf16 and say so in a warning."""
    given = settings(precision="16-mixed") | {"sync_batchnorm": False}
    given.pop("timeout_minutes")
    trainer = make_trainer(given, logger=False)
    with trainer.precision_plugin.forward_context():
        assert torch.get_autocast_dtype("cpu") == torch.float16
    assert make_trainer(given | {"precision": "32-true"}, logger=False).precision == "32-true"


@pytest.mark.parametrize(
    ("changes", "count"),
    [
        ({}, 1),
        ({"devices": "auto"}, 1),
        ({"devices": [0, 2]}, 2),
        ({"devices": "0,2,3"}, 3),
        ({"devices": "1,"}, 1),
        ({"devices": "2"}, 2),
        ({"devices": 4, "num_nodes": 2}, 8),
    ],
)
def test_processes_are_devices_times_nodes(changes: dict[str, Any], count: int) -> None:
    assert device_count(settings(**changes)) == count


@pytest.mark.parametrize("devices", ["two", None, "1.5"])
def test_what_is_no_number_of_devices_is_named(devices: object) -> None:
    with pytest.raises(ConfigError, match=f"trainer.devices={devices} is neither a number"):
        device_count(settings(devices=devices))


def test_auto_is_never_an_apple_gpu_which_knows_no_float64() -> None:
    assert resolve_accelerator("auto") == ("cuda" if torch.cuda.is_available() else "cpu")
    assert resolve_accelerator("gpu") == "gpu"
    with pytest.raises(ConfigError, match="take trainer.accelerator=cpu"):
        resolve_accelerator("mps")


@pytest.mark.parametrize("alternates", [True, False])
@pytest.mark.parametrize("name", ["auto", "ddp"])
def test_several_processes_get_ddp_that_knows_of_alternating_networks(
    name: str, alternates: bool
) -> None:
    given = settings(num_nodes=2, strategy=name)
    strategy = resolve_strategy(given, alternates=alternates)
    assert isinstance(strategy, DDPStrategy)
    assert strategy._ddp_kwargs["find_unused_parameters"] is alternates
    assert strategy._ddp_kwargs["broadcast_buffers"] is False
    assert strategy._timeout == timedelta(minutes=2)
    assert "timeout_minutes" not in given  # or Lightning would refuse it


def test_one_process_needs_no_strategy() -> None:
    assert resolve_strategy(settings(), alternates=True) == "auto"


def test_fsdp2_spreads_the_weights_over_all_processes() -> None:
    given = settings(devices=2, num_nodes=3, strategy="fsdp2", precision="bf16-mixed")
    strategy = resolve_strategy(given, alternates=False)
    assert isinstance(strategy, ShardedStrategy)
    assert (strategy._data_parallel_size, strategy._tensor_parallel_size) == (6, 1)
    assert strategy._timeout == timedelta(minutes=2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strategy": "fsdp"}, "trainer.strategy=fsdp is not one of auto, ddp, fsdp2"),
        ({"strategy": "fsdp2", "precision": "16-mixed"}, "precision=16-mixed.*take bf16-mixed"),
    ],
)
def test_what_does_not_work_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve_strategy(settings(devices=2, **changes), alternates=False)


@pytest.mark.parametrize(
    ("changes", "gpus", "synced"),
    [
        ({"accelerator": "gpu", "devices": 2}, 2, True),
        ({"accelerator": "auto", "devices": "auto"}, 2, True),
        ({"accelerator": "auto", "devices": 1, "num_nodes": 2}, 1, True),
        ({"accelerator": "auto", "devices": 1}, 2, False),
        ({"accelerator": "cpu", "devices": 2}, 2, False),  # torch has it for GPUs alone
        ({"accelerator": "auto", "devices": 2}, 0, False),
        ({"accelerator": "gpu", "devices": 2, "sync_batchnorm": False}, 2, False),
    ],
)
def test_batch_statistics_are_shared_between_gpus(
    changes: dict[str, Any], gpus: int, synced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert syncs_batchnorm(settings(**changes)) is synced


@pytest.mark.parametrize("name", ["tokenizer/stage2", "smoke/pretrain_256"])
def test_every_training_has_the_keys_that_are_read_here(name: str) -> None:
    given = load_config(name).trainer
    assert set(settings()) <= set(given)
