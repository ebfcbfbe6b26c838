"""`--exp=debug/replay`: a training step that was not finite, once more on the CPU and in words."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from dcar.errors import CheckpointError
from dcar.lit.base import BaseModule
from dcar.lit.flight_record import largest, output_maxima
from dcar.lit.random_states import restore_random_states
from dcar.models.checkpoints import COMPONENTS, load_strictly, read_checkpoint
from dcar.models.precision import without_autocast
from experiments.components import build
from experiments.config import ConfigError
from experiments.run import RunOptions

TARGETS = (
    *COMPONENTS,
    "dcar.lit.fine_tuning.LoraGenerator",
    "dcar.lit.generator.MaskedARGenerator",
    "dcar.lit.judge.JudgeTraining",
    "dcar.lit.tokenizer.TokenizerStage1",
    "dcar.lit.tokenizer.TokenizerStage2",
    "dcar.lit.tokenizer.TokenizerStage3",
    "dcar.models.discriminator.PatchDiscriminator",
    "dcar.models.judge.Judge",
    "dcar.models.lora.LoraSettings",
    "dcar.models.losses.TokenizerCriterion",
    "dcar.models.perceptual.LPIPS",
    "experiments.fine_tune.find_base",
    "experiments.fine_tune.find_drawer",
    "hydra.utils.get_object",
)
OBJECTS = ("torch.bfloat16", "torch.float16", "torch.float32")  # for hydra.utils.get_object
PRECISIONS = {"32-true": None, "16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}
NOT_NEEDED = ("optimizer", "schedule", "metrics", "guard")  # by losses and gradients
SHOWN = 4  # names in a list
PRECISION_ADVICE = {
    "16-mixed": "a value leaves the range of fp16, whose largest is 65,504: "
    "trainer.precision=bf16-mixed or 32-true takes this step",
    "bf16-mixed": "bf16 rounds to 8 bits, which is too coarse here: trainer.precision=32-true "
    "takes this step",
}


@dataclass
class RecordedPlace:
    """Stands where a module looks for its trainer: the place of one recorded step."""

    global_rank: int
    world_size: int
    current_epoch: int
    global_step: int
    datamodule: None = None
    fast_dev_run: bool = False
    sanity_checking: bool = False


@dataclass(frozen=True)
class Repetition:
    """One step on the CPU. losses: of each batch, one an optimizer; largest values by name."""

    precision: str
    losses: list[list[float]]
    outputs: dict[str, float]
    gradients: dict[str, float]

    @property
    def is_finite(self) -> bool:
        values = [value for losses in self.losses for value in losses]
        return all(map(math.isfinite, [*values, *self.gradients.values()]))


def check_names(node: Any, allowed: Sequence[str]) -> None:
    """A record may be a stranger's: refuse classes outside a fixed table, and interpolations.

    Raises CheckpointError that says how to allow what is the user's own.
    """
    if isinstance(node, Mapping):
        target = node.get("_target_")
        is_object = target == "hydra.utils.get_object"
        name = node.get("path") if is_object else target
        if target is not None and name not in (OBJECTS if is_object else allowed):
            raise CheckpointError(
                f"the record names {name!r}: refused; where you trust it, add allow=[{name}]"
            )
        for value in node.values():
            check_names(value, allowed)
    elif isinstance(node, list | tuple):
        for value in node:
            check_names(value, allowed)
    elif isinstance(node, str) and "${" in node:
        raise CheckpointError(f"the record holds the interpolation {node!r}: refused")


def module_config(run_config: dict[str, Any], *, allow: Sequence[str] = ()) -> DictConfig:
    """What builds the module for one step: without files that its recorded weights make needless.

    Raises CheckpointError for names that are not in the table of this file or in `allow`.
    """
    node = {k: v for k, v in run_config["module"].items() if k not in NOT_NEEDED}
    for name in ("init_from", "tokenizer_from"):
        if name in node:
            node[name] = None
    if "fid_images" in node:
        node["fid_images"] = 0
    if "tokenizer" in node and "tokenizer" in run_config:  # a fine-tuning names its model here
        node["tokenizer"] = run_config["tokenizer"]
    node["val_names"] = []
    check_names(node, (*TARGETS, *allow))
    return OmegaConf.create(node)


def read_record(path: str | Path) -> dict[str, Any]:
    """A flight record, on the CPU. Raises CheckpointError where the file is something else."""
    record = read_checkpoint(path)
    if "batches" not in record or "module" not in record.get("run_config", {}):
        raise CheckpointError(f"{path} is no flight record of an experiment")
    return record


def build_module(record: dict[str, Any], *, allow: Sequence[str] = ()) -> BaseModule:
    """The module of the training as it was before the step, but for its weights."""
    node = module_config(record["run_config"], allow=allow)
    module: BaseModule = build(node, optimizer=partial(torch.optim.SGD, lr=0.0))
    place = RecordedPlace(record["rank"], record["world_size"], record["epoch"], record["step"])
    module.trainer = place  # type: ignore[assignment]
    module.on_fit_start()
    return module


def autocast(precision: str) -> AbstractContextManager[Any]:
    dtype = PRECISIONS[precision]
    return nullcontext() if dtype is None else torch.autocast("cpu", dtype, cache_enabled=False)


def repeat(module: BaseModule, record: dict[str, Any], precision: str) -> Repetition:
    """Forward and backward passes of the recorded step from its weights, batches and draws."""
    load_strictly(module, record["state_dict"], source="the record")
    module.zero_grad(set_to_none=True)
    scale = record["scaler"]["now"] if precision == "16-mixed" else None
    losses: list[list[float]] = []
    with module.repeating(), output_maxima(module) as outputs, autocast(precision):
        for (batch, index), states in zip(record["batches"], record["random_states"], strict=True):
            restore_random_states(states, torch.device("cpu"))
            losses.append([])
            for part in module.losses(dict(batch), index):
                losses[-1].append(part.loss.item())
                with without_autocast(part.loss):
                    (part.loss / module.accumulate * (scale or 1.0)).backward()
    found = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
    gradients = {name: largest(gradient / (scale or 1.0)) for name, gradient in found.items()}
    return Repetition(precision, losses, outputs, gradients)


def not_finite(values: Mapping[str, float]) -> list[str]:
    return [name for name, value in values.items() if not math.isfinite(value)]


def _shown(names: Sequence[str]) -> str:
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")


def _named(names: Sequence[str]) -> str:
    return f": {_shown(names)}" if names else ""


def _numbers(losses: Sequence[Sequence[float]]) -> str:
    return " | ".join(", ".join(f"{loss:.6g}" for loss in part) for part in losses)


def bad_inputs(record: dict[str, Any]) -> list[str]:
    """Entries of the batches that hold a NaN or an infinity, with the keys of their samples."""
    found = []
    for batch, _ in record["batches"]:
        for name, value in batch.items():
            if isinstance(value, Tensor) and value.is_floating_point():
                rows = (~value.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
                if rows:
                    found.append(f"{name} of {_shown([str(batch['key'][row]) for row in rows])}")
    return found


def describe_record(record: dict[str, Any]) -> Iterator[str]:
    """What the record says, line by line."""
    rank = f", rank {record['rank']} of {record['world_size']}" * (record["world_size"] > 1)
    yield f"{record['what']}: {record['dcar']['module']} in {record['precision']}{rank}"
    keys = [str(key) for part in record["keys"] for key in part]
    yield f"  samples: {_shown(keys)}"
    inputs = bad_inputs(record)
    yield f"  inputs: {'NOT FINITE: ' + '; '.join(inputs) if inputs else 'finite'}"
    weights = not_finite(record["largest"]["weights"])
    yield f"  weights before the step: {'NOT FINITE: ' + _shown(weights) if weights else 'finite'}"
    gradients = record["largest"]["gradients"]
    bad = not_finite(gradients)
    yield f"  recorded gradients not finite: {len(bad)} of {len(gradients)}" + _named(bad)
    if record["scaler"]["now"] is not None:
        yield f"  loss scale: {record['scaler']['now']:g}"
    yield f"  losses: {_numbers(record['losses'])}"


def describe_repetition(repetition: Repetition) -> Iterator[str]:
    """What came of the step on this CPU, line by line."""
    outputs, gradients = repetition.outputs, repetition.gradients
    yield f"on this CPU in {repetition.precision}:"
    yield f"  losses: {_numbers(repetition.losses)}"
    if bad := not_finite(outputs):
        yield f"  first output that is not finite: {bad[0]} ({outputs[bad[0]]})"
    finite = {name: value for name, value in outputs.items() if math.isfinite(value)}
    top = sorted(finite, key=finite.__getitem__, reverse=True)[:SHOWN]
    yield f"  largest finite outputs: {', '.join(f'{name} {finite[name]:.4g}' for name in top)}"
    bad = not_finite(gradients)
    yield f"  gradients not finite: {len(bad)} of {len(gradients)}" + _named(bad)


def conclusion(record: dict[str, Any], repeated: Repetition, reference: Repetition) -> str:
    """Whether the step is reproduced, and what it would have taken."""
    if repeated.is_finite:
        others = " or in what the other ranks had" * (record["world_size"] > 1)
        return (
            f"not reproduced: in {repeated.precision} on this CPU the step is finite; look at "
            + (f"the recorded outputs and gradients, for the fault may lie in the device{others}")
        )
    if reference.is_finite:
        advice = PRECISION_ADVICE[repeated.precision]
        return f"reproduced, and finite in fp32: {advice}"
    if inputs := bad_inputs(record):
        return f"reproduced, also in fp32: the data are not finite: {'; '.join(inputs)}"
    if not_finite(record["largest"]["weights"]):
        return (
            "reproduced, also in fp32: the weights were not finite before the step; go on from an "
            "older checkpoint, or with guard.policy=rollback"
        )
    return "reproduced, also in fp32: this is no matter of precision"


def replay(config: DictConfig, options: RunOptions) -> list[Repetition]:
    """Repeat the recorded step in its precision and in fp32, and print what is found.

    Returns the repetitions, one where both precisions are the same. Raises CheckpointError for a
    file that is no record or that names a class which is not allowed, ConfigError for a precision
    that a CPU does not have.
    """
    record = read_record(config.record)
    precision = str(config.precision or record["precision"])
    if precision not in PRECISIONS:
        raise ConfigError(f"precision={precision} is not one of {', '.join(PRECISIONS)}")
    module = build_module(record, allow=config.allow)
    done = [repeat(module, record, one) for one in dict.fromkeys((precision, "32-true"))]
    for line in describe_record(record):
        print(line)
    for repetition in done:
        for line in describe_repetition(repetition):
            print(line)
    print(conclusion(record, done[0], done[-1]))
    return done
