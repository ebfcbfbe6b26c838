"""Which JPEG decoder, which reduction and which resize: time, and how far the pixels move.

python -m benchmarks.jpeg_decoders [--files FOLDER] [--size 256] [--repeats 7] [--quality 90]
Without --files the pictures are synthetic (see `photo`). OpenCV is shown where it is installed.
Each time is the best of the repeats, one thread; distances are from full decoding by Pillow and
Pillow's bicubic, with the file's own pixels shrunk to a half, a third, ... of their size.
"""

import argparse
import importlib
import importlib.util
import io
import math
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch
from PIL import Image, __version__

from dcar.data.images import Decoded, covering, decode, read_image
from dcar.data.transforms import resize

Decoder = Callable[[bytes], Any]
EDGES = (375, 512, 1024, 2048)  # shorter edges of the files that are timed
SHRINKINGS = (1.5, 2, 3, 4, 6, 8)


def photo(width: int, height: int, *, seed: int) -> Image.Image:
    """What JPEG meets in a photo: an amplitude of about 1 / frequency, and edges.

    500 x 375 of them come to some 90 KB at quality 90, close to ImageNet's 110 KB.
    """
    rng = np.random.default_rng(seed)
    down, across = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)
    falling = np.maximum(np.hypot(down, across) * width, 1) ** -1.2
    waves = rng.normal(size=(2, 3, *falling.shape)) * falling
    fields = np.fft.irfft2(waves[0] + 1j * waves[1], s=(height, width))
    fields /= fields.std(axis=(1, 2), keepdims=True)
    mixing = np.array([[1, 0.35, 0.2], [1, 0, -0.25], [1, -0.35, 0.3]])  # more light than colour
    image = np.einsum("cf,fhw->hwc", mixing, fields)
    rows, columns = np.mgrid[:height, :width]
    for _ in range(12):
        y, x, angle = rng.uniform(0, height), rng.uniform(0, width), rng.uniform(0, np.pi)
        along = (rows - y) * np.cos(angle) + (columns - x) * np.sin(angle)
        aside = (columns - x) * np.cos(angle) - (rows - y) * np.sin(angle)
        radius = rng.uniform(0.04, 0.3) * width
        inside = along**2 + (aside / 0.4) ** 2 < radius**2
        image[inside] = image[inside] * rng.uniform(0.2, 1) + rng.normal(size=3)
    return Image.fromarray((127 + 52 * image).clip(0, 255).astype(np.uint8))


def jpeg(image: Image.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def race(
    works: Mapping[str, Callable[[Any], Any]], items: list[Any], repeats: int
) -> dict[str, float]:
    """Milliseconds an item of each, best of the repeats; they take turns."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            begun = time.perf_counter()
            for item in items:
                work(item)
            times[name].append((time.perf_counter() - begun) / len(items) * 1e3)
    return {name: min(spent) for name, spent in times.items()}


def opencv() -> dict[str, Decoder]:
    """OpenCV's decoders, none where it is not installed."""
    if importlib.util.find_spec("cv2") is None:
        return {}
    cv2 = importlib.import_module("cv2")
    cv2.setNumThreads(1)

    def reading(flag: int) -> Decoder:
        return lambda data: cv2.imdecode(np.frombuffer(data, np.uint8), flag)

    half = cv2.IMREAD_REDUCED_COLOR_2
    return {"OpenCV": reading(cv2.IMREAD_COLOR_RGB), "OpenCV, reduced to 1/2": reading(half)}


def decoders(size: int) -> dict[str, Decoder]:
    def pillow(data: bytes) -> np.ndarray:
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))

    def draft(data: bytes) -> np.ndarray:
        image = Image.open(io.BytesIO(data))
        image.draft("RGB", (2 * size, 2 * size))
        return np.asarray(image)

    def three_quarters(data: bytes) -> np.ndarray:
        height, width, *_ = simplejpeg.decode_jpeg_header(data)
        return simplejpeg.decode_jpeg(data, min_height=height * 3 // 4, min_width=width * 3 // 4)

    return {
        "Pillow": pillow,
        "Pillow, draft": draft,
        "simplejpeg": lambda data: decode(data, cover=None),
        "simplejpeg, reduced (ours)": lambda data: decode(data, cover=(size, size)),
        "simplejpeg, 3/4": three_quarters,
        **opencv(),
    }


def resizers(size: int) -> dict[str, Callable[[Decoded], Any]]:
    def pillow(picture: Decoded, gap: float | None = None) -> np.ndarray:
        height, width = covering(picture.height, picture.width, (size, size))
        image = Image.fromarray(picture.pixels)
        bicubic = Image.Resampling.BICUBIC
        return np.asarray(image.resize((width, height), bicubic, reducing_gap=gap))

    def pillow_box(picture: Decoded) -> np.ndarray:
        side = min(picture.height, picture.width)
        left, top = (picture.width - side) / 2, (picture.height - side) / 2
        box = (left, top, left + side, top + side)
        image = Image.fromarray(picture.pixels)
        return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=box))

    return {
        "Pillow bicubic": pillow,
        "Pillow bicubic, reducing_gap 2": lambda picture: pillow(picture, 2.0),
        "Pillow bicubic of the centre box": pillow_box,
        "PyTorch bicubic (ours)": lambda picture: resize(
            picture, covering(picture.height, picture.width, (size, size))
        ),
    }


def psnr(first: np.ndarray, second: np.ndarray) -> float:
    error = float(np.mean((first.astype(float) - second) ** 2))
    return 10 * math.log10(255**2 / error) if error else 99.0


def distances(images: list[Image.Image], quality: int, shrinking: float) -> dict[str, list[float]]:
    """PSNR of each way to shrink a JPEG; last, of the JPEG to the picture it was made from."""
    found: dict[str, list[float]] = {}
    for image in images:
        data = jpeg(image, quality)
        whole = decode(data, cover=None)
        size = round(image.height / shrinking), round(image.width / shrinking)
        bicubic = Image.Resampling.BICUBIC
        wanted = np.asarray(read_image(data).resize(size[::-1], bicubic))
        found.setdefault("in full", []).append(psnr(wanted, resize(whole, size)))
        for reduction in (2, 4, 8):
            if reduction > shrinking:
                break
            rows, columns = -(-image.height // reduction), -(-image.width // reduction)
            pixels = simplejpeg.decode_jpeg(
                data, min_height=rows, min_width=columns, min_factor=reduction
            )
            reduced = Decoded(pixels, image.height, image.width, reduction)
            name = f"at 1/{reduction}, {shrinking / reduction:g} x the size"
            found.setdefault(name, []).append(psnr(wanted, resize(reduced, size)))
        original = np.asarray(image.resize(size[::-1], bicubic))
        found.setdefault("the JPEG itself", []).append(psnr(original, wanted))
    return found


def table(title: str, spent: Mapping[str, float]) -> None:
    print(f"\n{title}")
    first = next(iter(spent.values()))
    for name, milliseconds in spent.items():
        print(f"  {name:34s} {milliseconds:7.2f} ms  {first / milliseconds:5.2f} x")


def times(images: list[Image.Image], *, size: int, quality: int, repeats: int) -> None:
    for edge in EDGES:
        sized = [image.resize(covering(*image.size, (edge, edge))) for image in images]
        files = [jpeg(image, quality) for image in sized]
        kilobytes = sum(map(len, files)) / len(files) / 1e3
        spent = race(decoders(size), files, repeats)
        table(f"decoding, shorter edge {edge}, {kilobytes:.0f} KB", spent)
        wholes = [decode(data, cover=None) for data in files]
        table(f"resizing, shorter edge {edge} to {size}", race(resizers(size), wholes, repeats))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=Path)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--quality", type=int, default=90)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.files:
        files = sorted(path for path in options.files.iterdir() if path.is_file())
        images = [read_image(path.read_bytes()) for path in files]
    else:
        images = [photo(1000, 750, seed=seed) for seed in range(10)]
    machine = platform.processor() or platform.machine()
    print(f"{machine}, one thread; Pillow {__version__}, PyTorch {torch.__version__}")
    print(f"{len(images)} pictures, JPEG quality {options.quality}, shorter edge to {options.size}")
    times(images, size=options.size, quality=options.quality, repeats=options.repeats)
    print("\nPSNR to full decoding and Pillow's bicubic, dB: mean (worst)")
    for shrinking in SHRINKINGS:
        print(f"  shrunk {shrinking:g} times")
        for name, values in distances(images, options.quality, shrinking).items():
            print(f"    {name:26s} {np.mean(values):5.1f} ({min(values):.1f})")


if __name__ == "__main__":
    main()
