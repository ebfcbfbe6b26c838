"""The trainer, and how a run is spread over devices, from the config's trainer node."""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch.strategies import DDPStrategy, Strategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from dcar.lit.lost_ranks import NamesLostRanks
from dcar.lit.precision import precision_plugin
from dcar.lit.sharding import ShardedStrategy
from experiments.config import ConfigError

STRATEGIES = ("auto", "ddp", "fsdp2")


def make_trainer(settings: dict[str, Any], *, plugins: Sequence[Any] = (), **parts: Any) -> Trainer:
    """With `16-mixed` made real on a CPU, where Lightning would take bf16.

    Raises ConfigError for settings that Lightning or the machine has no use for.
    """
    plugin = precision_plugin(settings["precision"], settings["accelerator"])
    if plugin is not None:
        settings = {name: value for name, value in settings.items() if name != "precision"}
        plugins = [*plugins, plugin]
    try:
        return Trainer(**settings, plugins=list(plugins), **parts)
    except MisconfigurationException as error:
        raise ConfigError(f"trainer: {error}") from error


def resolve_accelerator(name: str) -> str:
    """`auto`: CUDA (or ROCm) where there is a GPU of it, else the CPU.

    Raises ConfigError for `mps`, which Lightning would take on a Mac: Apple's GPUs know no float64,
    and codebooks and metrics count in it.
    """
    if name == "mps":
        raise ConfigError(
            "trainer.accelerator=mps: Apple's GPUs know no float64, which codebooks and metrics "
            "count in; take trainer.accelerator=cpu"
        )
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"


def device_count(settings: dict[str, Any]) -> int:
    """Processes of the run: devices on each node times nodes; `auto` is every GPU, or one CPU.

    Raises ConfigError for what is no number of devices.
    """
    devices = settings["devices"]
    if devices in ("auto", -1, "-1"):
        on_cpu = settings["accelerator"] == "cpu"
        devices = 1 if on_cpu else max(1, torch.cuda.device_count())
    if isinstance(devices, str) and "," in devices:
        devices = [index for index in devices.split(",") if index.strip()]
    try:
        count = len(devices) if isinstance(devices, list) else int(devices)
    except (TypeError, ValueError):
        raise ConfigError(
            f"trainer.devices={devices} is neither a number, a list of indices, nor auto"
        ) from None
    return count * int(settings["num_nodes"])


class DataParallelStrategy(NamesLostRanks, DDPStrategy):
    """DDP for manual optimisation.

    Buffers are not sent around: codebook statistics are reduced where they arise and SyncBN has the
    same ones everywhere, while in validation ranks with another number of batches would be waited
    for. No static graph: it must see all gradients in the first backward pass, which accumulation
    and a second optimizer forbid, and where there is one optimizer no parameter goes unused.
    alternates: each backward pass reaches only some of the parameters.
    """

    def __init__(self, *, alternates: bool, timeout: timedelta):
        super().__init__(
            find_unused_parameters=alternates,
            gradient_as_bucket_view=not alternates,  # they must outlive the other's backward pass
            broadcast_buffers=False,
            timeout=timeout,
        )


def resolve_strategy(settings: dict[str, Any], *, alternates: bool) -> str | Strategy:
    """`ddp`, `fsdp2` (the generator in pieces), or `auto`: DDP where there are several processes.

    Takes `timeout_minutes`, which is not Lightning's, out of `settings`: after so long a rank that
    others wait for counts as lost. alternates: each backward pass reaches only some of the
    parameters (a network and its discriminator in turn), which DDP must be told. Raises ValueError
    for another strategy, and for fsdp2 in fp16.
    """
    name, ranks = settings["strategy"], device_count(settings)
    timeout = timedelta(minutes=float(settings.pop("timeout_minutes")))
    if name not in STRATEGIES:
        raise ValueError(f"trainer.strategy={name} is not one of {', '.join(STRATEGIES)}")
    if name == "fsdp2":
        if settings["precision"] not in ("32-true", "bf16-mixed"):
            raise ValueError(
                f"trainer.precision={settings['precision']} with trainer.strategy=fsdp2: its "
                "gradients are not scaled; take bf16-mixed or 32-true"
            )
        return ShardedStrategy(ranks=ranks, timeout=timeout)
    if name == "auto" and ranks == 1:
        return "auto"
    return DataParallelStrategy(alternates=alternates, timeout=timeout)


def syncs_batchnorm(settings: dict[str, Any]) -> bool:
    """`auto`: statistics of the batch over all ranks where there are several GPUs, not on CPUs."""
    if settings["sync_batchnorm"] != "auto":
        return bool(settings["sync_batchnorm"])
    on_gpu = torch.cuda.is_available() and settings["accelerator"] != "cpu"
    return on_gpu and device_count(settings) > 1
