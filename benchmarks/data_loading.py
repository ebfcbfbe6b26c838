"""Images a second from local shards to batches: ours, webdataset with PIL, and decoding alone.

python -m benchmarks.data_loading [--images 3000] [--size 256] [--batch 64] [--workers 1 2]
Every side reads the same files, resizes the shorter edge with bicubic, cuts a square at random,
mirrors half of them and hands over float32 batches in [-1, 1]; webdataset is used as its
documentation shows, with PIL. "Decoding alone" is our `read` and `finish` over the files in memory,
in as many processes. The sides take turns, each process has one thread, the best rate counts; the
clock starts when every worker has delivered. CPU time is that of all processes from start to end,
divided by the images: it says the same where other programs take turns on the cores.
"""

import argparse
import multiprocessing
import platform
import random
import resource
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import webdataset
from PIL import Image
from torch import Tensor

from benchmarks.jpeg_decoders import jpeg, photo
from dcar.data.index import read_shard
from dcar.data.loader import ShardLoader
from dcar.data.shards import write_manifest, write_shards
from dcar.data.stream import ShardStream
from dcar.data.transforms import ImageTransform

SHARDS = 8
DISTINCT = 200  # pictures drawn; each comes several times under other names
WARM_UP = 3  # batches a worker that the clock does not count: start-up, and what lay ready


class Rates(NamedTuple):
    images_per_second: float
    cpu_milliseconds: float  # an image, all processes


def cpu_seconds() -> float:
    """Of this process and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def make_shards(folder: Path, images: int) -> str:
    """Shards of JPEGs like ImageNet's in size; -> what they are."""
    sizes = [(500, 375), (500, 333), (375, 500), (400, 300)]
    files = [jpeg(photo(*sizes[n % 4], seed=n), 90) for n in range(min(DISTINCT, images))]
    samples: Iterator[dict[str, bytes | str]] = (
        {"__key__": f"{n:06d}", "jpg": files[n % len(files)], "txt": b"a picture"}
        for n in range(images)
    )
    entries = write_shards(samples, folder, "train", -(-images // SHARDS))
    write_manifest(folder, {"train": entries})
    kilobytes = sum(map(len, files)) / len(files) / 1e3
    return (
        f"{images} synthetic JPEGs ({len(files)} distinct) of 400 x 300 to 500 x 375, quality 90, "
        f"{kilobytes:.0f} KB, in {len(entries)} shards"
    )


def steady_rate(batches: Iterable[Tensor], workers: int) -> float:
    """Images a second from when every worker runs to the last batch."""
    begun, images = 0.0, 0
    for number, batch in enumerate(batches):
        if number >= WARM_UP * workers:
            images += len(batch)
        if number == WARM_UP * workers - 1:
            begun = time.perf_counter()
    return images / (time.perf_counter() - begun)


def ours(folder: Path, *, size: int, batch: int, workers: int) -> float:
    stream = ShardStream(
        sorted(folder.glob("*.tar")),
        transform=ImageTransform(size, crop="random", flip=True),
        batch_size=batch,
        seed=0,
        shuffle=True,
    )
    loader = ShardLoader(stream, num_workers=workers)
    return steady_rate((each["image"] for each in loader), workers)


def pil_to_tensor(image: Image.Image, size: int) -> Tensor:
    """The usual transforms, written out in PIL and NumPy."""
    image = image.convert("RGB")
    scale = size / min(image.size)
    width, height = (round(edge * scale) for edge in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = random.randint(0, width - size), random.randint(0, height - size)
    image = image.crop((left, top, left + size, top + size))
    if random.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()  # (3, S, S)
    return pixels.to(torch.float32).div_(127.5).sub_(1)


def plain_webdataset(folder: Path, *, size: int, batch: int, workers: int) -> float:
    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    samples = (
        webdataset.WebDataset(urls, shardshuffle=100)
        .shuffle(1000)
        .decode("pil")
        .to_tuple("jpg", "txt")
        .map_tuple(lambda image: pil_to_tensor(image, size), str)
        .batched(batch, partial=False)
    )
    loader = webdataset.WebLoader(samples, batch_size=None, num_workers=workers)
    return steady_rate((images for images, _ in loader), workers)


def _decode(files: list[bytes], size: int, barrier: Any, spent: "SimpleQueue[float]") -> None:
    torch.set_num_threads(1)
    transform, rng = ImageTransform(size, crop="random", flip=True), random.Random(0)
    for data in files[:50]:
        transform.finish(transform.read(data), rng)
    barrier.wait()
    begun = time.perf_counter()
    for data in files:
        transform.finish(transform.read(data), rng)
    spent.put(time.perf_counter() - begun)


def decoding_alone(files: list[bytes], *, size: int, workers: int) -> float:
    """The same work without reading, batching and moving between processes."""
    context = multiprocessing.get_context("fork")  # shares `files`
    barrier, spent = context.Barrier(workers), context.SimpleQueue()
    processes = [
        context.Process(target=_decode, args=(files[n::workers], size, barrier, spent))
        for n in range(workers)
    ]
    for process in processes:
        process.start()
    slowest = max(spent.get() for _ in processes)
    for process in processes:
        process.join()
    return len(files) / slowest


def stored(folder: Path) -> Iterator[bytes]:
    for path in sorted(folder.glob("*.tar")):
        for raw in read_shard(path):
            yield bytes(raw["jpg"])  # type: ignore[arg-type]  # only keys are text


def compare(folder: Path, *, workers: int, size: int, batch: int, repeats: int) -> None:
    files = list(stored(folder))
    options = {"size": size, "workers": workers}
    sides: dict[str, Callable[[], float]] = {
        "ours": lambda: ours(folder, batch=batch, **options),
        "webdataset and PIL": lambda: plain_webdataset(folder, batch=batch, **options),
        "decoding alone": lambda: decoding_alone(files, **options),
    }
    found: dict[str, list[Rates]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, side in sides.items():
            before = cpu_seconds()
            rate = side()
            spent = (cpu_seconds() - before) / len(files) * 1e3
            found[name].append(Rates(rate, spent))
    report(found, workers)


def report(found: dict[str, list[Rates]], workers: int) -> None:
    print(f"\n{workers} worker{'s' * (workers > 1)}: images a second, CPU ms an image; best (all)")
    for name, rates in found.items():
        listed = ", ".join(f"{rate.images_per_second:.0f}" for rate in rates)
        print(
            f"  {name:19s} {max(rate.images_per_second for rate in rates):6.0f} "
            f"{min(rate.cpu_milliseconds for rate in rates):6.2f} ms  ({listed})"
        )
    for other, bar in (("webdataset and PIL", "1.5"), ("decoding alone", "0.85")):
        rate = [max(each.images_per_second for each in found[name]) for name in ("ours", other)]
        cpu = [min(each.cpu_milliseconds for each in found[name]) for name in ("ours", other)]
        print(
            f"  ours to {other:19s} {rate[0] / rate[1]:.2f} x as fast (bar: {bar}), "
            f"{cpu[1] / cpu[0]:.2f} x by CPU time"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=3000)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    if options.images < 2 * WARM_UP * max(options.workers) * options.batch:
        parser.error(f"--images {options.images} are too few to measure after the warm-up")
    torch.set_num_threads(1)
    machine = platform.processor() or platform.machine()
    print(f"{machine}, {multiprocessing.cpu_count()} cores; PyTorch {torch.__version__}")
    with tempfile.TemporaryDirectory() as name:
        print(make_shards(Path(name), options.images))
        print(f"to {options.size} px, batches of {options.batch}")
        for workers in options.workers:
            compare(
                Path(name),
                workers=workers,
                size=options.size,
                batch=options.batch,
                repeats=options.repeats,
            )


if __name__ == "__main__":
    main()
