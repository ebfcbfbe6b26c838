"""fp16 where Lightning would quietly compute in another precision than was asked for."""

import torch
from lightning.pytorch.plugins.precision import MixedPrecision


def is_on_cpu(accelerator: str) -> bool:
    """Whether Lightning's `accelerator`, which may be `auto`, means the CPU of this machine."""
    has_other = torch.cuda.is_available() or torch.backends.mps.is_available()
    return accelerator == "cpu" or (accelerator == "auto" and not has_other)


def precision_plugin(precision: str, accelerator: str) -> MixedPrecision | None:
    """The plugin that makes `16-mixed` real on a CPU: float16 autocast with a gradient scaler.

    Lightning takes bf16 there instead. None where its own choice is what was asked for: pass
    `precision` to the Trainer then, and otherwise the plugin in its place.
    """
    if precision == "16-mixed" and is_on_cpu(accelerator):
        return MixedPrecision("16-mixed", "cpu")
    return None
