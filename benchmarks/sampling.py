"""Seconds from prompt to PNG: one picture at a time and in batches, by sampling steps.

python -m benchmarks.sampling [--model mini] [--steps 1 4 12 32] [--batch 1 16] [--rounds 7]
The model is loaded and has drawn once before the clock starts; loading is told apart. Within a
round every setting takes its turn; the median of the rounds counts. The PNG is in the time.
"""

import argparse
import io
import os
import platform
import statistics
import time

import torch

from dcar.pipeline import DCARPipeline

PROMPT = "a blue whale, 3d style"


def png_seconds(pipeline: DCARPipeline, batch: int, steps: int, seed: int) -> float:
    """For `batch` pictures of one prompt."""
    start = time.perf_counter()
    for picture in pipeline([PROMPT] * batch, seeds=seed, steps=steps, batch_size=batch):
        picture.save(io.BytesIO(), "png")
    return time.perf_counter() - start


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", default="mini")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 4, 8, 12, 32])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--rounds", type=int, default=7)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> dict[tuple[int, int], float]:
    """Print a line a setting; returns seconds a picture by (batch, steps)."""
    options = parse(arguments)
    start = time.perf_counter()
    pipeline = DCARPipeline.from_pretrained(
        options.model, device=options.device, precision=options.precision
    )
    png_seconds(pipeline, 1, 1, 0)
    loading = time.perf_counter() - start
    settings = [(batch, steps) for batch in options.batch for steps in options.steps]
    seconds: dict[tuple[int, int], list[float]] = {setting: [] for setting in settings}
    for seed in range(options.rounds + 1):
        for batch, steps in settings:
            spent = png_seconds(pipeline, batch, steps, seed)
            if seed:  # the first round only warms up
                seconds[batch, steps].append(spent / batch)
    machine = platform.processor() or platform.machine()
    threads = f"{torch.get_num_threads()} threads of {len(os.sched_getaffinity(0))} cores"
    print(
        f"{options.model} on {options.device} ({machine}), {threads}, PyTorch {torch.__version__}"
    )
    print(f"loading and the first picture: {loading:.2f} s")
    print("batch | steps | seconds a picture, median (quickest to slowest)")
    for (batch, steps), times in seconds.items():
        spread = f"({min(times):.3f} to {max(times):.3f})"
        print(f"{batch:5} | {steps:5} | {statistics.median(times):.3f} {spread}")
    return {setting: statistics.median(times) for setting, times in seconds.items()}


if __name__ == "__main__":
    main()
