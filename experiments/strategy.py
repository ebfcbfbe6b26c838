"""How a training is spread over devices, from the config's trainer node."""

from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy, Strategy


def device_count(settings: dict[str, Any]) -> int:
    """Processes of the run: devices on each node times nodes; `auto` is every GPU, or one CPU."""
    devices = settings["devices"]
    if devices in ("auto", -1, "-1"):
        on_cpu = settings["accelerator"] == "cpu"
        devices = 1 if on_cpu else max(1, torch.cuda.device_count())
    count = len(devices) if isinstance(devices, list) else int(devices)
    return count * int(settings["num_nodes"])


def resolve_strategy(settings: dict[str, Any], *, alternates: bool) -> str | Strategy:
    """`auto` with several processes is DDP.

    alternates: each backward pass reaches only some of the parameters (a network and its
        discriminator in turn), which DDP must be told.
    """
    if settings["strategy"] != "auto" or device_count(settings) == 1:
        return str(settings["strategy"])
    return DDPStrategy(find_unused_parameters=alternates)
