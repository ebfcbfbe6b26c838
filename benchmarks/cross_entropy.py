"""How much faster the generator's cross-entropy is than torch's, and how much less memory it takes.

python -m benchmarks.cross_entropy [--device cpu] [--dtype bfloat16] [--tokens 4096] [--codes 2048]
Forward and backward pass with label smoothing, both sides in one process, in turn; the ratio is of
medians over twenty passes each. On a GPU the peaks of memory beyond the logits are compared too.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dcar.models.losses import CrossEntropy

Loss = Callable[[Tensor, Tensor], Tensor]
SMOOTHING = 0.1


def ours(logits: Tensor, ids: Tensor) -> Tensor:
    return CrossEntropy.apply(logits, ids, SMOOTHING)


def torch_s(logits: Tensor, ids: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), ids, reduction="none", label_smoothing=SMOOTHING)


def measure(loss: Loss, logits: Tensor, ids: Tensor) -> tuple[float, int]:
    """Seconds of one forward and backward pass, and bytes on a GPU beyond those of before."""
    before = 0
    if logits.is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    begun = time.perf_counter()
    torch.autograd.grad(loss(logits, ids).sum(), logits)
    if not logits.is_cuda:
        return time.perf_counter() - begun, 0
    torch.cuda.synchronize()
    return time.perf_counter() - begun, torch.cuda.max_memory_allocated() - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--codes", type=int, default=2048)
    options = parser.parse_args()
    shape = (options.tokens, options.codes)
    logits = torch.randn(shape, device=options.device).to(getattr(torch, options.dtype))
    logits.requires_grad_()
    ids = torch.randint(0, options.codes, (options.tokens,), device=options.device)
    rounds = [[measure(loss, logits, ids) for loss in (torch_s, ours)] for _ in range(22)][2:]
    (slow, large), (quick, small) = (
        (statistics.median(s for s, _ in side), max(b for _, b in side))
        for side in zip(*rounds, strict=True)
    )
    machine = platform.processor() or platform.machine()
    print(f"{machine}, {torch.get_num_threads()} threads, logits {shape} in {options.dtype}")
    print(f"torch {slow * 1e3:.1f} ms, ours {quick * 1e3:.1f} ms: {slow / quick:.2f} times")
    if logits.is_cuda:
        print(f"torch {large / 2**20:.0f} MiB, ours {small / 2**20:.0f} MiB beyond the logits")


if __name__ == "__main__":
    main()
