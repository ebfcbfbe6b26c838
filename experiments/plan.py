"""The task of `--exp=plan`: what a training experiment will cost, from its configuration alone."""

import json
import shlex
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table
from torch import nn

from dcar.data.storage import write_atomically
from dcar.data.wording import amount
from dcar.evaluation.cost_devices import DEVICES, Device
from dcar.evaluation.cost_steps import (
    BytePass,
    GeneratorStep,
    Step,
    T5Pass,
    TokenizerStep,
    UnloadedLPIPS,
)
from dcar.evaluation.costs import GIB, Assumptions, Schedule
from dcar.evaluation.costs import plan as plan_costs
from dcar.lit.base import train_only
from dcar.lit.generator import MaskedARGenerator
from dcar.lit.stepping import parameter_groups
from dcar.lit.tokenizer import TokenizerModule
from dcar.models.losses import TokenizerCriterion
from dcar.models.text_encoder import DTYPES
from experiments.components import build
from experiments.config import (
    ConfigError,
    _compose,
    at_least,
    experiment_names,
    load_config,
    nearest,
)
from experiments.run import RunOptions

TRAINING = "experiments.train.train"
# Keys of the plan that are the experiment's own, by their name there.
PASSED_ON = {
    "batch_size": "batch_size",
    "accumulate": "accumulate",
    "size": "size",
    "max_steps": "max_steps",
    "precision": "trainer.precision",
}
STAND_IN = 16  # longest side of what stands in for a parameter
RATES = {"peak_tflops": "half", "tf32_tflops": "convolution", "fp32_tflops": "single"}
# The width of fp16 and bf16 is the same, and only fp16 takes a GPU's path through the attention.
PRECISIONS = {
    "auto": torch.float16,
    "16-mixed": torch.float16,
    "bf16-mixed": torch.float16,
    "32-true": None,
}
SHARDED = (
    "In pieces over the devices (FSDP2): what is put together while it computes, and the whole "
    "weights of a validation, must fit in the reserve."
)
NOTES = (
    "FLOPs are of matrix products and convolutions, 2 a multiply-add; rates are dense data-sheet "
    "peaks times mfu.",
    "Memory adds up the tensors of a training step; CUDA's context, cuDNN's workspaces, "
    "fragmentation and validation must fit in the reserve.",
    "Hours are of training steps alone: no validation, checkpoints, network or waiting for data.",
    "Captions count at their longest.",
)


def target_config(config: DictConfig) -> DictConfig:
    """The configuration of the training to plan. Raises ConfigError where `exp` names none."""
    name, known = str(config.exp), experiment_names()
    if name == "plan":
        raise ConfigError("give the training to plan: exp=NAME (--list shows the names)")
    if name not in known:
        raise ConfigError(f"no experiment exp={name}{nearest(name, known)} (--list shows them)")
    if _compose(name, []).task != TRAINING:
        raise ConfigError(f"exp={name} is no training, and only trainings can be planned")
    overrides = [
        f"{theirs}={config[ours]}" for ours, theirs in PASSED_ON.items() if config[ours] is not None
    ]
    return load_config(name, [*overrides, *shlex.split(config.overrides or "")])


def chosen_device(config: DictConfig) -> Device:
    """A device of the table, with the numbers that the configuration gives in place of its own."""
    if config.device not in DEVICES:
        suggestion = nearest(str(config.device), list(DEVICES))
        raise ConfigError(f"no device {config.device!r}{suggestion} (has {list(DEVICES)})")
    own = {rate: float(config[key]) for key, rate in RATES.items() if config[key] is not None}
    if config.memory_gib is not None:
        own["memory_gib"] = float(config.memory_gib)
    for name, value in own.items():
        if value <= 0:
            raise ConfigError(f"{name} of the device is {value}; it must be above 0")
    return replace(DEVICES[config.device], **own)


def is_sharded(target: DictConfig) -> bool:
    return str(target.trainer.strategy) == "fsdp2"


def perceptual_network(node: DictConfig | None) -> nn.Module | None:
    if node is None:
        return None
    dtype = build(node.dtype) if "dtype" in node else torch.float32
    return UnloadedLPIPS(node.net, dtype)


def tokenizer_step(config: DictConfig, *, with_gan: bool, holds_gradients: bool) -> TokenizerStep:
    stage: Any = get_class(config.module._target_)
    with torch.device("meta"):
        tokenizer = build(config.tokenizer)
        discriminator = build(config.discriminator) if with_gan else None
        criterion: dict[str, Any] = OmegaConf.to_container(config.criterion, resolve=True)  # type: ignore[assignment]
        del criterion["_target_"]
        criterion["perceptual"] = perceptual_network(config.criterion.perceptual)
        step = TokenizerStep(
            config.size,
            tokenizer,
            TokenizerCriterion(**criterion),
            discriminator,
            discrete_prob=stage.discrete_prob,
            holds_gradients=holds_gradients,
        )
    train_only(tokenizer, stage.trainable)
    return step


def text_pass(node: DictConfig) -> T5Pass | BytePass:
    if node._target_.endswith(".ByteT5TextEncoder"):
        return BytePass(build(node))
    dtype = DTYPES[node.get("dtype", "float32")]
    return T5Pass(node.name, length=node.get("max_tokens", 300), dtype=dtype)


def generator_step(
    config: DictConfig, *, encodes: bool, reads: bool, holds_gradients: bool
) -> GeneratorStep:
    with torch.device("meta"):
        return GeneratorStep(
            config.size,
            build(config.generator),
            build(config.tokenizer).eval().requires_grad_(False),
            text_pass(config.text_encoder),
            encodes=encodes,
            reads=reads,
            holds_gradients=holds_gradients,
        )


def training_steps(config: DictConfig, target: DictConfig) -> tuple[Step, Step | None, int]:
    """The step that is planned, the one before a discriminator joins, and how often that is taken.

    Raises ConfigError for a module that is neither a tokenizer's nor the generator's.
    """
    module = get_class(target.module._target_)
    holds = target.accumulate > 1 or (config.devices > 1 and not is_sharded(target))
    if issubclass(module, MaskedARGenerator):
        reads = not config.precomputed_text
        encodes = not (config.precomputed or target.module.get("cache_tokens", False))
        step = generator_step(target, encodes=encodes, reads=reads, holds_gradients=holds)
        return step, None, 0
    if not issubclass(module, TokenizerModule):
        raise ConfigError(f"exp={config.exp} trains {module.__name__}: no plan for that")
    whole = tokenizer_step(target, with_gan=True, holds_gradients=holds)
    start = int(target.module.get("discriminator_start", 0))
    if whole.discriminator is None or not start:
        return whole, None, 0
    return whole, tokenizer_step(target, with_gan=False, holds_gradients=holds), start


def optimizer_values(node: DictConfig, networks: Iterable[nn.Module]) -> float:
    """Values that the optimizer keeps for each trained one, from a real step of small parameters
    with the names and numbers of axes of the networks' own."""
    groups = parameter_groups(networks)
    trained = dict(pair for group in groups for pair in group["params"])
    small = {
        name: nn.Parameter(torch.ones([min(side, STAND_IN) for side in parameter.shape]))
        for name, parameter in trained.items()
    }
    optimizer = build(node)(
        [
            {**group, "params": [(name, small[name]) for name, _ in group["params"]]}
            for group in groups
        ]
    )
    for parameter in small.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    kept = 0.0
    for name, parameter in small.items():
        values = [value for value in optimizer.state[parameter].values() if torch.is_tensor(value)]
        share = sum(value.numel() for value in values if value.ndim) / parameter.numel()
        kept += share * trained[name].numel()
    return kept / sum(parameter.numel() for parameter in trained.values())


def planned(config: DictConfig) -> dict[str, Any]:
    """The plan as plain data, with what it was made of."""
    at_least(config, 1, "devices")
    target, device = target_config(config), chosen_device(config)
    precision = str(target.trainer.precision)
    if precision not in PRECISIONS:
        raise ConfigError(f"precision={precision}: a plan knows {', '.join(PRECISIONS)}")
    step, early_step, late = training_steps(config, target)
    callbacks = [str(node.get("_target_")) for node in target.callbacks.values()]
    plan = plan_costs(
        step,
        schedule=Schedule(
            steps=target.max_steps,
            batch=target.batch_size,
            accumulate=target.accumulate,
            devices=config.devices,
            late=late,
            sharded=is_sharded(target),
        ),
        device=device,
        assumptions=Assumptions(
            half=PRECISIONS[precision],
            mfu=config.mfu,
            reserve=config.reserve,
            optimizer_values=optimizer_values(target.optimizer, step.networks()),
            averages="dcar.lit.averaging.AverageWeights" in callbacks,
        ),
        early_step=early_step,
    )
    facts = {key: config[key] for key in ("exp", "mfu", "reserve", "precomputed")}
    return (
        facts | {"device_name": config.device, "precision": precision, "size": target.size} | plan
    )


def table(title: str, columns: list[str], rows: list[list[str]]) -> Table:
    shown = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        shown.add_column(column, justify="right" if index else "left")
    for row in rows:
        shown.add_row(*row)
    return shown


def parameter_rows(plan: dict[str, Any]) -> list[list[str]]:
    counts = plan["parameters"]
    rows = [
        [name, *(f"{value / 1e6:,.1f}" for value in row.values())] for name, row in counts.items()
    ]
    sums = (sum(row[key] for row in counts.values()) for key in ("trained", "frozen"))
    return [*rows, ["total", *(f"{value / 1e6:,.1f}" for value in sums)]]


def flop_rows(way: dict[str, Any]) -> list[list[str]]:
    parts = way["flops_per_sample"]
    rows = [
        [name, *(f"{value / 1e9:,.1f}" for value in (*part.values(), sum(part.values())))]
        for name, part in parts.items()
    ]
    sums = [
        sum(part[key] for part in parts.values()) for key in ("forward", "backward", "recompute")
    ]
    return [*rows, ["total", *(f"{value / 1e9:,.1f}" for value in (*sums, sum(sums)))]]


def memory_rows(ways: dict[str, Any]) -> list[list[str]]:
    """GiB of each part, one column a way of treating activations."""
    parts = [way["memory"] for way in ways.values()]
    details = [
        {f"  {name}": size for name, size in way["activations"].items()} for way in ways.values()
    ]
    shown = {name: [part[name] for part in parts] for name in parts[0]}
    total = shown.pop("total")
    for name in dict.fromkeys(name for detail in details for name in detail):
        shown[name] = [detail.get(name, 0) for detail in details]
    shown["total"] = total
    return [[name, *(f"{size / GIB:,.2f}" for size in sizes)] for name, sizes in shown.items()]


def summary_rows(plan: dict[str, Any]) -> list[list[str]]:
    ways = plan["ways"].values()
    limit = next(iter(ways))["memory_limit"] / GIB
    rows = {
        f"fits in {limit:,.1f} GiB": ["yes" if way["fits"] else "no" for way in ways],
        "largest batch of a device": [f"{way['largest_batch']:,}" for way in ways],
        "seconds a step": [f"{way['seconds_per_step']:,.2f}" for way in ways],
        "images a second": [f"{way['images_per_second']:,.0f}" for way in ways],
        "hours": [f"{way['hours']:,.1f}" for way in ways],
        "device hours": [f"{way['device_hours']:,.0f}" for way in ways],
    }
    return [[name, *values] for name, values in rows.items()]


def heading(plan: dict[str, Any]) -> str:
    schedule = plan["schedule"]
    devices = amount(schedule["devices"], "device")
    return (
        f"{plan['exp']} at {plan['size']} px on {schedule['devices']} x {plan['device_name']}, "
        f"{plan['precision']}: {schedule['steps']:,} steps of {schedule['global_batch']:,} images "
        f"({devices} x {schedule['batch']} x {schedule['accumulate']} "
        f"accumulated), {'in pieces over the devices' if schedule['sharded'] else 'DDP'}"
    )


def show(plan: dict[str, Any], console: Console) -> None:
    ways = plan["ways"]
    columns = [f"activations {name}" for name in ways]
    console.print(heading(plan), soft_wrap=True)
    console.print(
        table("Parameters, millions", ["part", "trained", "frozen"], parameter_rows(plan))
    )
    for name, way in ways.items():
        title = f"GFLOPs a sample, activations {name}"
        sorts = ["part", "forward", "backward", "recomputed", "total"]
        console.print(table(title, sorts, flop_rows(way)))
    console.print(table("Memory of a device, GiB", ["part", *columns], memory_rows(ways)))
    console.print(table("Estimates", ["", *columns], summary_rows(plan)))
    if plan["schedule"]["sharded"]:
        console.print(SHARDED, soft_wrap=True)
    elif plan["gradient_bytes"]:
        console.print(
            f"Each step adds up {plan['gradient_bytes'] / GIB:,.2f} GiB of gradients over the "
            f"devices; a ring sends {plan['ring_bytes'] / GIB:,.2f} GiB from each.",
            soft_wrap=True,
        )
    if len(ways) == 1:
        console.print("No part of this network has a switch to recompute its activations.")
    for note in NOTES:
        console.print(f"* {note}", soft_wrap=True)


def plan(config: DictConfig, options: RunOptions) -> dict[str, Any]:
    """Print the plan of `exp` and, with `out`, write it as JSON. Returns it as plain data.

    Sizes are in bytes, work in FLOPs, times in seconds or hours. Raises ConfigError for an
    experiment that is no training, a device that is not known, or impossible settings.
    """
    console = Console()
    with console.status(f"counting the steps of {config.exp}"):
        found = planned(config)
    show(found, console)
    if config.out and not options.dry_run:
        with write_atomically(config.out) as file:
            file.write((json.dumps(found, indent=2) + "\n").encode())
        print(config.out)
    return found
