"""Memory of streaming over time: the training process and its data workers, in shares of pages.

    python -m benchmarks.data_memory [--seconds 300] [--workers 2] [--images 20000] [--urls URLS]

Streams 256 px batches again and again, from shards of its own (the pictures of
`benchmarks.data_loading`) or from `--urls`, and prints the memory (PSS: shared pages are divided by
those who share them) of all processes ten times on the way. Flat means: the second half of the time
is within 2 % of the first after the warm-up.
"""

import argparse
import os
import platform
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

from benchmarks.data_loading import make_shards
from dcar.data.loader import ShardLoader
from dcar.data.stream import ShardStream
from dcar.data.transforms import ImageTransform


def megabytes() -> float:
    """Of this process and those it has started."""
    itself = psutil.Process(os.getpid())
    total = 0
    for process in [itself, *itself.children(recursive=True)]:
        try:
            total += process.memory_full_info().pss
        except psutil.NoSuchProcess:  # a worker that ended with its epoch
            continue
    return total / 2**20


def batches(urls: str, workers: int) -> Iterator[torch.Tensor]:
    """Epoch after epoch."""
    stream = ShardStream(
        urls,
        transform=ImageTransform(256, crop="random", flip=True),
        batch_size=64,
        seed=0,
        shuffle=True,
        captioned=False,
        buffer=5000,
    )
    loader = ShardLoader(stream, num_workers=workers)
    while True:
        for batch in loader:
            yield batch["image"]


def measure(urls: str, *, workers: int, seconds: float) -> None:
    begun, images, marks = time.perf_counter(), 0, []
    for batch in batches(urls, workers):
        images += len(batch)
        elapsed = time.perf_counter() - begun
        if elapsed > seconds * len(marks) / 10:
            marks.append(megabytes())
            print(f"{elapsed:5.0f} s {images:8d} images {marks[-1]:7.0f} MiB", flush=True)
        if elapsed > seconds:
            break
    first, second = max(marks[2:6]), max(marks[6:])
    print(f"peak {max(marks):.0f} MiB; second half to first {second / first:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--urls")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{platform.processor() or platform.machine()}, {options.workers} workers")
    with tempfile.TemporaryDirectory() as name:
        urls = options.urls
        if urls is None:
            print(make_shards(Path(name), options.images))
            urls = f"{name}/*.tar"
        measure(urls, workers=options.workers, seconds=options.seconds)


if __name__ == "__main__":
    main()
