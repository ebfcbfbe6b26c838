"""What a training costs: parameters, FLOPs, memory of a device, the largest batch, hours.

Everything is computed from shapes: no data, no weights, no GPU. The result is plain data.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import torch
from torch import nn

from dcar.evaluation.cost_devices import Device
from dcar.evaluation.cost_meter import BACKWARD, Meter
from dcar.evaluation.cost_steps import Step, meter_step, without_values

GIB = 2**30
FP32_BYTES = 4
SMALLEST_FITTED = 8  # peaks of fewer images are mostly at other moments of the step
REFINEMENTS = 5


@dataclass(frozen=True)
class Schedule:
    """batch: images of one device and micro-batch; late: steps before the discriminator joins.

    sharded: weights, gradients, optimizer and average in pieces over the devices (FSDP2).
    """

    steps: int
    batch: int
    accumulate: int
    devices: int
    late: int = 0
    sharded: bool = False

    @property
    def global_batch(self) -> int:
        return self.batch * self.accumulate * self.devices


@dataclass(frozen=True)
class Assumptions:
    """What shapes do not say.

    half: dtype of autocast, None for fp32. mfu: share of the device's peak rates that is reached.
    reserve: share of the device's memory kept free, for CUDA's context, workspaces, fragmentation.
    optimizer_values: fp32 values the optimizer keeps for each trained one. averages: whether the
    network is averaged over steps.
    """

    half: torch.dtype | None
    mfu: float
    reserve: float
    optimizer_values: float
    averages: bool

    def __post_init__(self) -> None:
        if not 0 < self.mfu <= 1:
            raise ValueError(f"mfu={self.mfu} is not a share in (0, 1]")
        if not 0 <= self.reserve < 1:
            raise ValueError(f"reserve={self.reserve} is not a share in [0, 1)")


def held_bytes(modules: Iterable[nn.Module]) -> int:
    """Bytes of parameters and buffers."""
    tensors = [t for module in modules for t in (*module.parameters(), *module.buffers())]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def trained_values(step: Step) -> int:
    parameters = [p for module in step.networks() for p in module.parameters()]
    return sum(parameter.numel() for parameter in parameters if parameter.requires_grad)


def parameter_counts(step: Step) -> dict[str, dict[str, int]]:
    """Trained and frozen values of each part; a part of constants alone counts its buffers."""
    counts = {}
    for name, module in step.parts().items():
        parameters = list(module.parameters())
        trained = sum(p.numel() for p in parameters if p.requires_grad)
        every = sum(tensor.numel() for tensor in parameters or module.buffers())
        counts[name] = {"trained": trained, "frozen": every - trained}
    return counts


def flops_per_sample(meter: Meter, batch: int) -> dict[str, dict[str, float]]:
    """FLOPs of one image in each part: forward, backward and recomputed, all rates together."""
    parts: dict[str, dict[str, float]] = {}
    for (name, _), flops in meter.flops.items():
        part = parts.setdefault(name, {"forward": 0.0, "backward": 0.0, "recompute": 0.0})
        for key, value in asdict(flops).items():
            part[key] += value / batch
    return parts


def rates_per_sample(meter: Meter, batch: int) -> dict[str, float]:
    """FLOPs of one image by the peak rate that bounds them."""
    rates: dict[str, float] = {}
    for (_, rate), flops in meter.flops.items():
        rates[rate] = rates.get(rate, 0.0) + flops.total / batch
    return rates


def seconds_per_sample(rates: Mapping[str, float], device: Device, mfu: float) -> float:
    return sum(flops / (getattr(device, rate) * 1e12 * mfu) for rate, flops in rates.items())


@dataclass(frozen=True)
class Standing:
    """Bytes of a device that do not depend on the batch."""

    weights: int
    frozen: int
    gradients: int
    optimizer: int
    averages: int

    @classmethod
    def of(cls, step: Step, schedule: Schedule, assumptions: Assumptions) -> "Standing":
        pieces = schedule.devices if schedule.sharded else 1
        trained = trained_values(step) * FP32_BYTES // pieces
        weights = held_bytes(step.networks())
        averages = held_bytes(step.averaged()) if assumptions.averages else 0
        return cls(
            weights=weights // pieces,
            frozen=held_bytes(step.parts().values()) - weights,
            gradients=trained,
            optimizer=int(trained * assumptions.optimizer_values),
            averages=averages // pieces,
        )

    @property
    def always(self) -> int:
        """All but the gradients, which may be freed between steps."""
        return self.weights + self.frozen + self.optimizer + self.averages

    def in_pass(self, peak: float, *, holds_gradients: bool) -> float:
        """Bytes at the fullest moment of a forward and backward pass that takes `peak` itself."""
        return self.always + peak + (self.gradients if holds_gradients else 0)

    @property
    def in_update(self) -> int:
        """Bytes while the optimizer steps: on a GPU it makes one more tensor of each at once."""
        return self.always + 2 * self.gradients


def memory(
    standing: Standing, meter: Meter, *, holds_gradients: bool
) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes by part when most are held, which add up to `total`, and the activations by part."""
    in_pass = int(standing.in_pass(meter.peak_bytes, holds_gradients=holds_gradients))
    total, gradients = max(in_pass, standing.in_update), standing.gradients
    details = {name: size for name, size in meter.peak.items() if size}
    if standing.in_update > in_pass:
        details = {"optimizer step": gradients}
    elif not holds_gradients:
        gradients = min(gradients, details.pop(BACKWARD, 0))
        if (backward := meter.peak.get(BACKWARD, 0) - gradients) > 0:
            details[BACKWARD] = backward
    parts = {
        "weights": standing.weights,
        "gradients": gradients,
        "optimizer": standing.optimizer,
        "averages": standing.averages,
        "frozen parts": standing.frozen,
        "activations": total - standing.always - gradients,
        "total": total,
    }
    return parts, details


def largest_batch(peak_of: Callable[[int], int], room: Callable[[int], float], start: int) -> int:
    """Largest batch of a device whose peak leaves `room`, 0 or more bytes; 0 where none does.

    The peak grows with the batch in straight pieces, one for each moment of the step: lines through
    two batches are followed until they give a third that is known. At most one image too small
    where two pieces meet, but never too large.
    """
    rooms = {batch: room(peak_of(batch)) for batch in (start, 2 * start)}
    for _ in range(REFINEMENTS):
        known = sorted(rooms)
        fitting = sum(rooms[batch] >= 0 for batch in known)
        first = min(max(fitting - 1, 0), len(known) - 2)  # around the limit, or nearest to it
        low, high = known[first : first + 2]
        slope = (rooms[low] - rooms[high]) / (high - low)
        found = int(high + rooms[high] // slope)
        if found < 1 or found in rooms:
            break
        rooms[found] = room(peak_of(found))
    return max((batch for batch, free in rooms.items() if free >= 0), default=0)


def hours(seconds: float, early_seconds: float, schedule: Schedule) -> float:
    """Of the whole schedule; seconds are those of a sample on one device."""
    early = min(schedule.late, schedule.steps)
    samples = schedule.batch * schedule.accumulate
    return (early * early_seconds + (schedule.steps - early) * seconds) * samples / 3600


def _one_way(
    step: Step,
    schedule: Schedule,
    device: Device,
    assumptions: Assumptions,
    early_rates: Mapping[str, float],
) -> dict[str, Any]:
    """FLOPs, memory and hours with activations kept or recomputed, as the step is set."""
    batch, held = schedule.batch, {"holds_gradients": step.holds_gradients}
    metered = cache(lambda size: meter_step(step, size, half=assumptions.half))
    standing = Standing.of(step, schedule, assumptions)
    parts, details = memory(standing, metered(batch), **held)
    limit = int(device.memory_gib * GIB * (1 - assumptions.reserve))
    rates = rates_per_sample(metered(batch), batch)
    seconds = seconds_per_sample(rates, device, assumptions.mfu)
    early = seconds_per_sample(early_rates, device, assumptions.mfu)
    spent = hours(seconds, early, schedule)
    largest = largest_batch(
        lambda size: metered(size).peak_bytes,
        lambda peak: limit - standing.in_pass(peak, **held),
        max(batch, SMALLEST_FITTED),
    )
    return {
        "flops_per_sample": flops_per_sample(metered(batch), batch),
        "rates_per_sample": rates,
        "memory": parts,
        "activations": details,
        "memory_limit": limit,
        "fits": parts["total"] <= limit,
        "largest_batch": largest if standing.in_update <= limit else 0,
        "seconds_per_step": seconds * batch * schedule.accumulate,
        "images_per_second": schedule.devices / seconds,
        "hours": spent,
        "device_hours": spent * schedule.devices,
    }


def plan(
    step: Step,
    *,
    schedule: Schedule,
    device: Device,
    assumptions: Assumptions,
    early_step: Step | None = None,
) -> dict[str, Any]:
    """The whole plan as plain data; sizes in bytes, work in FLOPs, times in seconds or hours.

    step: modules on the meta device. early_step: the step before a discriminator joins, for
    `schedule.late` steps. `ways` holds one entry with activations kept and, where the network has a
    switch for it, one with activations recomputed.
    """
    early_rates: dict[str, float] = {}
    if early_step is not None:
        with without_values(early_step):
            early_rates = rates_per_sample(meter_step(early_step, 2, half=assumptions.half), 2)
    ways = {}
    switches = step.checkpointing()
    with without_values(step):
        for name, recomputes in {"kept": False, "recomputed": True}.items():
            for module in switches:
                module.checkpoint_activations = recomputes
            if switches or not recomputes:
                ways[name] = _one_way(step, schedule, device, assumptions, early_rates)
    gradients = trained_values(step) * FP32_BYTES
    others = (schedule.devices - 1) / schedule.devices
    return {
        "schedule": {**asdict(schedule), "global_batch": schedule.global_batch},
        "device": asdict(device),
        "parameters": parameter_counts(step),
        "ways": ways,
        "gradient_bytes": gradients if schedule.devices > 1 else 0,
        # each device sends its share of the sums, and again of the results
        "ring_bytes": 0 if schedule.sharded else int(2 * others * gradients),
    }
