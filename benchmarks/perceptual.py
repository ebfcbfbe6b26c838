"""How much faster LPIPS trains in bfloat16 than in float32, and how far its values move.

python benchmarks/perceptual.py [--device cpu] [--size 64] [--batch 32]
Both sides run in one process, in turn; the ratio is of medians over ten passes each.
"""

import argparse
import platform
import statistics
import time

import torch
from torch import Tensor

from dcar.models.perceptual import LPIPS


def seconds(network: LPIPS, image: Tensor, target: Tensor) -> float:
    """One forward and backward pass."""
    image = image.clone().requires_grad_()
    begun = time.perf_counter()
    network(image, target).mean().backward()
    if image.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--batch", type=int, default=32)
    options = parser.parse_args()
    shape = (options.batch, 3, options.size, options.size)
    target = torch.rand(shape, device=options.device) * 2 - 1
    image = (target + 0.3 * torch.randn_like(target)).clamp(-1, 1)
    dtypes = (torch.float32, torch.bfloat16)
    networks = [LPIPS(dtype=dtype).to(options.device) for dtype in dtypes]
    rounds = [[seconds(network, image, target) for network in networks] for _ in range(12)][2:]
    full, half = (statistics.median(times) for times in zip(*rounds, strict=True))
    exact, moved = (float(network(image, target).mean()) for network in networks)
    print(
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, {shape}"
    )
    print(f"float32 {full * 1e3:.1f} ms, bfloat16 {half * 1e3:.1f} ms: {full / half:.2f} times")
    print(f"mean distance {exact:.4f} against {moved:.4f}: {abs(moved / exact - 1):.2%} apart")


if __name__ == "__main__":
    main()
