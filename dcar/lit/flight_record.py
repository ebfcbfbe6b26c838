"""All that is needed to look at one bad training step again, in one file.

The file opens with `torch.load(weights_only=True)`; `--exp=debug/replay record=FILE` repeats the
step on a CPU.
"""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def largest(tensor: Tensor) -> float:
    """The largest absolute value: NaN where there is one, 0 for an empty tensor."""
    return tensor.detach().abs().amax().item() if tensor.numel() else 0.0


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for item in value:
            yield from _tensors(item)
    elif hasattr(value, "__dataclass_fields__"):
        for name in value.__dataclass_fields__:
            yield from _tensors(getattr(value, name))


@contextmanager
def output_maxima(root: nn.Module) -> Iterator[dict[str, float]]:
    """Collects, in the order of computation, the largest absolute value that each module gave."""
    maxima: dict[str, float] = {}

    def note(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            found = [largest(t) for t in _tensors(output) if t.is_floating_point()]
            kept = [maxima[name]] if name in maxima else []
            if found:
                maxima[name] = float(np.max([*found, *kept]))  # NaN wins over any number

        return hook

    handles = [m.register_forward_hook(note(name)) for name, m in root.named_modules() if name]
    try:
        yield maxima
    finally:
        for handle in handles:
            handle.remove()


def random_states() -> dict[str, Any]:
    """States of the generators of python, numpy and torch in this process, as plain containers."""
    version, words, gauss = random.getstate()
    name, keys, *rest = np.random.get_state(legacy=True)
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return {
        "python": [version, list(words), gauss],
        "numpy": [str(name), torch.from_numpy(keys.astype(np.int64)), *rest],  # type: ignore[union-attr]
        "torch": torch.get_rng_state(),
        "cuda": cuda,
    }


def _on_cpu(batch: dict[str, Any]) -> dict[str, Any]:
    """What the step needs of a batch: its pictures only where it has no tokens."""
    kept = {k: v for k, v in batch.items() if k != "image" or "ids" not in batch}
    return {k: v.detach().cpu() if isinstance(v, Tensor) else v for k, v in kept.items()}


def _repeat(module: Any) -> dict[str, float]:
    """The forward passes of the step once more, watched; gradients are left alone."""
    with torch.no_grad(), output_maxima(module) as maxima:
        for batch, batch_idx in module.window:
            for _ in module.losses(batch, batch_idx):
                pass
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
        "keys": [list(batch["key"]) for batch, _ in module.window],
        "batches": [[_on_cpu(batch), batch_idx] for batch, batch_idx in module.window],
        "losses": [loss.item() for loss in module.window_losses],
        "largest": {
            "weights": {name: largest(p) for name, p in parameters.items()},
            "gradients": {name: largest(gradient) for name, gradient in gradients.items()},
            "outputs": _repeat(module),
        },
        "scaler": {"now": module.loss_scale(), "history": list(module.guard.scales)},
        "random_states": random_states(),
        "state_dict": {name: tensor.cpu() for name, tensor in module.state_dict().items()},
    }


def write_flight_record(module: Any, sentence: str, *, finite_losses: bool) -> Path | None:
    """Write the record to the guard's folder; None where it asks for none, or has enough.

    Of several ranks those write whose own losses are not finite, or the first where all are; every
    rank repeats the forward passes, in which ranks may wait for each other.
    """
    guard = module.guard
    if guard.folder is None or guard.records < 1:
        return None
    guard.records -= 1
    record = flight_record(module, sentence)
    rank = module.trainer.global_rank
    mine = rank == 0 if finite_losses else not np.isfinite(record["losses"]).all()
    path = guard.folder / f"flight_step_{record['step']:08d}_rank_{rank}.pt"
    if mine:
        guard.folder.mkdir(parents=True, exist_ok=True)
        torch.save(record, path)
    return path
