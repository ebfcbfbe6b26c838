"""All that is needed to look at one bad training step again, in one file.

The file opens with `torch.load(weights_only=True)`; `--exp=debug/replay record=FILE` repeats the
step on a CPU.
"""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dcar.lit.checkpoint_io import save_durably
from dcar.lit.frozen import Frozen
from dcar.lit.guard import StepCheck, gather_over_ranks
from dcar.lit.random_states import random_states, restore_random_states
from dcar.lit.sharding import whole

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepBatch:
    """A batch of the step in progress, and the random states before it was used."""

    batch: dict[str, Any]
    index: int  # in the epoch
    random_states: dict[str, Any]


def largest(tensor: Tensor) -> float:
    """The largest absolute value: NaN where there is one, 0 for an empty tensor.

    Of a tensor that is spread over ranks all of them must ask.
    """
    values = whole(tensor.detach())
    return values.abs().amax().float().item() if values.numel() else 0.0


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for item in value:
            yield from _tensors(item)
    elif hasattr(value, "__dataclass_fields__"):
        for name in value.__dataclass_fields__:
            yield from _tensors(getattr(value, name))


def watched_modules(root: nn.Module) -> dict[str, nn.Module]:
    """Every module below `root` by name, those that it holds frozen among them."""
    modules = {name: module for name, module in root.named_modules() if name}
    for name, held in vars(root).items():
        if isinstance(held, Frozen):
            modules |= {f"{name}.{n}".rstrip("."): m for n, m in held.module.named_modules()}
    return modules


@contextmanager
def output_maxima(root: nn.Module) -> Iterator[dict[str, float]]:
    """Collects, in the order of computation, the largest absolute value that each module gave."""
    maxima: dict[str, float] = {}

    def note(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            found = [largest(t) for t in _tensors(output) if t.is_floating_point()]
            if found:
                known = maxima.get(name, 0.0)
                is_nan = any(math.isnan(value) for value in [known, *found])
                maxima[name] = math.nan if is_nan else max(known, *found)

        return hook

    handles = [m.register_forward_hook(note(name)) for name, m in watched_modules(root).items()]
    try:
        yield maxima
    finally:
        for handle in handles:
            handle.remove()


def _on_cpu(batch: dict[str, Any]) -> dict[str, Any]:
    return {k: v.detach().cpu() if isinstance(v, Tensor) else v for k, v in batch.items()}


def _repeat(module: Any) -> dict[str, float]:
    """The forward passes of the step once more, watched; they leave no trace."""
    drawn = random_states(module.device)
    with module.repeating(), torch.no_grad(), output_maxima(module) as maxima:
        for part in module.window:
            restore_random_states(part.random_states, module.device)
            for _ in module.losses(part.batch, part.index):
                pass
    restore_random_states(drawn, module.device)
    return maxima


def flight_record(module: Any, sentence: str) -> dict[str, Any]:
    """The record of the step that `module` was about to take, as tensors and plain containers."""
    parameters = dict(module.named_parameters())
    gradients = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    trainer = module.trainer
    return {
        "dcar": {"module": type(module).__name__, "config": module.plain_config},
        "run_config": module.run_config,
        "what": sentence,
        "step": trainer.global_step,
        "epoch": trainer.current_epoch,
        "rank": trainer.global_rank,
        "world_size": trainer.world_size,
        "precision": str(trainer.precision),
        "keys": [list(part.batch["key"]) for part in module.window],
        "batches": [[_on_cpu(part.batch), part.index] for part in module.window],
        "losses": [[loss.item() for loss in part] for part in module.window_losses],
        "largest": {
            "weights": {name: largest(p) for name, p in parameters.items()},
            "gradients": {name: largest(gradient) for name, gradient in gradients.items()},
            "outputs": _repeat(module),
        },
        "scaler": {"now": module.loss_scale(), "history": list(module.guard.scales)},
        "random_states": [part.random_states for part in module.window],
        "state_dict": {name: whole(t).cpu() for name, t in module.state_dict().items()},
    }


def _save(record: dict[str, Any], path: Path) -> Path | None:
    try:
        save_durably(record, path)
    except OSError as error:  # what went wrong in the training is what must be told
        log.error("no flight record at %s: %s", path, error.strerror or error)
        return None
    return path


def _writes(check: StepCheck, rank: int) -> bool:
    """Each rank with a bad loss; where all losses are finite, the first with bad gradients."""
    suspects = [i for i, is_mine in enumerate(gather_over_ranks(check.is_mine)) if is_mine]
    return rank in (suspects[:1] if check.finite_losses else suspects)


def write_flight_records(module: Any, sentence: str, check: StepCheck) -> list[Path]:
    """Write records to the guard's folder, on all ranks together; returns those of all ranks.

    None where the guard asks for none or has enough, and none in a dry run. Every rank repeats the
    forward passes, in which ranks may wait for each other.
    """
    guard, rank = module.guard, module.trainer.global_rank
    if guard.folder is None or guard.records < 1 or module.trainer.fast_dev_run:
        return []
    guard.records -= 1
    writes = _writes(check, rank)
    record = flight_record(module, sentence)
    path = guard.folder / f"flight_step_{record['step']:08d}_rank_{rank}.pt"
    written = gather_over_ranks(_save(record, path) if writes else None)
    return [path for path in written if path is not None]
