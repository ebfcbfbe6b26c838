"""Images a second from a folder of pictures to shards: the builder against PIL and tarfile.

python -m benchmarks.data_building [--images 3000] [--width 500] [--resize 256] [--processes 2]
python -m benchmarks.data_building --memory [--gigabytes 3]
The plain loop is one process and does the same: read picture and words, resize the shorter edge
with bicubic, encode as the builder does, write tars of as many samples. The builder's time has
everything in it: starting its processes, listing the folder, checksums, the manifest. Both sides
take turns; the best of each counts. CPU time is that of all processes, divided by the images.
--memory builds from one .tgz in JourneyDB's layout and prints the peak resident memory.
"""

import argparse
import io
import json
import os
import platform
import random
import resource
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import psutil
from PIL import Image

from benchmarks.jpeg_decoders import jpeg, photo
from dcar.data.build import build
from dcar.data.build_unit import BuildTask
from dcar.data.distributors import Outcome, Processes
from dcar.data.filters import Filters
from dcar.data.sources.folder import Folder
from dcar.data.sources.journeydb import JourneyDB
from dcar.data.sources.source import Source

DISTINCT = 100  # pictures drawn; each comes several times under other names
QUALITY = 95
PER_SHARD = 500


class Silent:
    def begin(self, what: str, units: int, images: int | None) -> None: ...

    def tick(self, images: int, size: int) -> None: ...

    def finished(self, outcome: Outcome) -> None: ...


class Cost(NamedTuple):
    seconds: float
    cpu: float


def run_builder(source: Source, out: Path, *, resize: int | None, processes: int) -> None:
    task = BuildTask(
        source=source,
        out=str(out),
        prefix="bench",
        samples_per_shard=PER_SHARD,
        max_shard_bytes=10**9,
        filters=Filters(resize=resize, format="jpg", quality=QUALITY),
    )
    build(task, described={}, distributor=Processes(processes), progress=Silent())


def run_plain(folder: Path, out: Path, *, resize: int) -> None:
    """One process, PIL and tarfile, nothing clever."""
    files = sorted(folder.rglob("*.jpg"))
    for start in range(0, len(files), PER_SHARD):
        with tarfile.open(out / f"plain-{start // PER_SHARD:06d}.tar", "w") as tar:
            for path in files[start : start + PER_SHARD]:
                image = Image.open(path).convert("RGB")
                scale = resize / min(image.size)
                width, height = round(image.width * scale), round(image.height * scale)
                image = image.resize((width, height), Image.Resampling.BICUBIC)
                file = io.BytesIO()
                image.save(file, "JPEG", quality=QUALITY, subsampling=0)
                facts = json.dumps({"id": path.stem, "width": width, "height": height})
                members = {"jpg": file.getvalue(), "txt": path.with_suffix(".txt").read_bytes()}
                for kind, data in {**members, "json": facts.encode()}.items():
                    info = tarfile.TarInfo(f"{path.stem}.{kind}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))


def cpu_seconds() -> float:
    """Of this process and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def measured(run: Callable[[Path], None]) -> Cost:
    with tempfile.TemporaryDirectory() as out:
        begun, cpu = time.perf_counter(), cpu_seconds()
        run(Path(out))
        return Cost(time.perf_counter() - begun, cpu_seconds() - cpu)


def drawn(width: int) -> list[bytes]:
    return [jpeg(photo(width, width * 3 // 4, seed=seed), 90) for seed in range(DISTINCT)]


def compare(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        pictures = drawn(options.width)
        for number in range(options.images):
            (folder / f"p{number:06d}.jpg").write_bytes(pictures[number % DISTINCT])
            (folder / f"p{number:06d}.txt").write_text(f"words of {number}")
        source, resize = Folder(place, val_share=0.0), options.resize
        sides: dict[str, Callable[[Path], None]] = {
            "plain, 1 process": lambda out: run_plain(folder, out, resize=resize),
            f"builder, {options.processes} processes": lambda out: run_builder(
                source, out, resize=resize, processes=options.processes
            ),
        }
        costs: dict[str, list[Cost]] = {name: [] for name in sides}
        for _ in range(options.rounds):
            for name, run in sides.items():
                costs[name].append(measured(run))
    print(f"{platform.processor() or platform.machine()}, {len(os.sched_getaffinity(0))} cores")
    print(f"{options.images} JPEGs, {options.width} wide, shorter edge to {resize}")
    best = {name: min(found) for name, found in costs.items()}
    for name, cost in best.items():
        rate, cpu = options.images / cost.seconds, min(c.cpu for c in costs[name])
        print(f"{name}: {rate:.0f} images/s, {cpu / options.images * 1e3:.2f} ms CPU an image")
    plain, ours = best.values()
    least = [min(cost.cpu for cost in found) for found in costs.values()]
    by_cpu = options.processes * least[0] / least[1]
    print(f"ratio {plain.seconds / ours.seconds:.2f}; by CPU time, on free cores, {by_cpu:.2f}")


def write_journeydb(folder: Path, size: int, width: int) -> int:
    """One .tgz of about `size` bytes with its annotations; returns the number of pictures."""
    train = folder / "data" / "train"
    (train / "imgs").mkdir(parents=True)
    pictures, rng, written = drawn(width), random.Random(0), 0
    archive, notes = train / "imgs" / "000.tgz", train / "train_anno.jsonl"
    with tarfile.open(archive, "w:gz", compresslevel=1) as tar, open(notes, "w") as lines:
        while written * len(pictures[0]) < size:
            name = f"{rng.getrandbits(128):032x}.jpg"
            info = tarfile.TarInfo(f"000/{name}")
            data = pictures[written % DISTINCT]
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
            line = {"img_path": f"./000/{name}", "prompt": f"prompt number {written}"}
            lines.write(json.dumps(line) + "\n")
            written += 1
    return written


class MemoryWatch:
    """The peak of resident memory, of any one process and of this one with its children."""

    def __init__(self) -> None:
        self.one = self.all = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "MemoryWatch":
        self._thread.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.05):
            found = []
            for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
                try:
                    found.append(process.memory_info().rss)
                except psutil.NoSuchProcess:
                    continue
            self.one, self.all = max(self.one, *found), max(self.all, sum(found))


def memory(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as place:
        count = write_journeydb(Path(place), round(options.gigabytes * 1e9), options.width)
        archive = next(Path(place).rglob("*.tgz")).stat().st_size
        with tempfile.TemporaryDirectory() as out, MemoryWatch() as watch:
            begun = time.perf_counter()
            source = JourneyDB(place)
            run_builder(source, Path(out), resize=None, processes=options.processes)
            seconds = time.perf_counter() - begun
    print(f"{count} pictures in a .tgz of {archive / 1e9:.2f} GB: {seconds:.0f} s")
    print(f"peak {watch.one / 1e6:.0f} MB in one process, {watch.all / 1e6:.0f} MB in all of them")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=3000)
    parser.add_argument("--width", type=int, default=500)
    parser.add_argument("--resize", type=int, default=256)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--gigabytes", type=float, default=3.0)
    options = parser.parse_args()
    memory(options) if options.memory else compare(options)


if __name__ == "__main__":
    main()
