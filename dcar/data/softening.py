"""What makes a clean picture look generated: softer, noisier, in other light. S side in pixels."""

import io
import random

import numpy as np
from PIL import Image, ImageFilter


def soften(picture: Image.Image, rng: random.Random) -> Image.Image:
    """Blur, shrinking, JPEG, light, noise and a lost patch, each only now and then; RGB, same size.

    About one picture in four comes back as it was.
    """
    if rng.random() < 0.3:
        picture = _blurred(picture, rng)
    if rng.random() < 0.15:
        picture = _through_jpeg(picture, rng)
    is_lit, is_noisy, is_patched = (rng.random() < share for share in (0.5, 0.15, 0.1))
    if not (is_lit or is_noisy or is_patched):
        return picture
    pixels = np.asarray(picture, dtype=np.float32)  # (S, S, 3)
    if is_lit:
        pixels = _lit(pixels, rng)
    if is_noisy:
        draws = np.random.Generator(np.random.PCG64(rng.getrandbits(64)))
        pixels = pixels + draws.standard_normal(pixels.shape, np.float32) * rng.uniform(1, 8)
    if is_patched:
        pixels = _patched(pixels, rng)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _blurred(picture: Image.Image, rng: random.Random) -> Image.Image:
    if rng.random() < 0.5:
        return picture.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.0)))
    width, height = (round(edge * rng.uniform(0.5, 0.9)) for edge in picture.size)
    small = picture.resize((width, height), Image.Resampling.BILINEAR)
    return small.resize(picture.size, Image.Resampling.BILINEAR)


def _through_jpeg(picture: Image.Image, rng: random.Random) -> Image.Image:
    file = io.BytesIO()
    picture.save(file, "jpeg", quality=rng.randint(50, 95))
    return Image.open(file).convert("RGB")


def _lit(pixels: np.ndarray, rng: random.Random) -> np.ndarray:
    """Contrast, saturation and the level of each colour, up to an eighth."""
    grey = pixels.mean(axis=2, keepdims=True)
    pixels = grey + (pixels - grey) * rng.uniform(0.75, 1.2)
    levels = np.array([rng.uniform(0.92, 1.08) for _ in range(3)], np.float32)
    contrast = rng.uniform(0.85, 1.1)
    return 255 - (255 - pixels * levels) * contrast  # white stays nearly white


def _patched(pixels: np.ndarray, rng: random.Random) -> np.ndarray:
    """One rectangle of an even colour."""
    height, width, _ = pixels.shape
    tall, wide = (round(edge * rng.uniform(0.1, 0.3)) for edge in (height, width))
    top, left = rng.randint(0, height - tall), rng.randint(0, width - wide)
    pixels = pixels.copy()
    pixels[top : top + tall, left : left + wide] = [rng.randint(0, 255) for _ in range(3)]
    return pixels
