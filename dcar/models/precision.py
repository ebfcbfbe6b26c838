"""Where numbers must be computed in fp32, whatever surrounds them, and where bf16 is quick."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor


def without_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    """Autocast off on the tensor's device; nothing on devices without autocast, such as meta."""
    kind = tensor.device.type
    if not torch.amp.is_autocast_available(kind):
        return nullcontext()
    return torch.autocast(kind, enabled=False)


def without_half(tensor: Tensor) -> AbstractContextManager[object]:
    """Autocast off where it would compute in fp16, whose largest number is 65,504."""
    kind = tensor.device.type
    if not torch.amp.is_autocast_available(kind):
        return nullcontext()
    is_half = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16
    return torch.autocast(kind, enabled=False) if is_half else nullcontext()


@contextmanager
def exact_products() -> Iterator[None]:
    """Matrix products of fp32 in fp32, where `torch.set_float32_matmul_precision` allows less."""
    allowed = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(allowed)


def quick_dtype(device: torch.device) -> torch.dtype:
    """bf16 on a GPU and on a CPU that have instructions for it; elsewhere fp32 is quicker."""
    if device.type == "cuda":
        is_quick = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        on_cpu = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        is_quick = device.type == "cpu" and on_cpu
    return torch.bfloat16 if is_quick else torch.float32
