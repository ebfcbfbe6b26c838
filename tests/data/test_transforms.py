"""Pictures to input: the range, the resizing, the crops, buckets."""

import io
import random

import numpy as np
import pytest
import torch
from PIL import Image

from dcar.data.images import Decoded, ImageTooLarge, read_image
from dcar.data.transforms import ImageTransform, resize, resize_adm, to_unit_range


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def prepared(transform: ImageTransform, image: Image.Image) -> np.ndarray:
    return transform.read(encoded(image))


def finished(
    transform: ImageTransform, image: Image.Image, seed: int = 0, shape=None
) -> torch.Tensor:
    return transform.finish(transform.read(encoded(image), shape), random.Random(seed), shape)


def noise(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_black_is_minus_one_and_white_is_one():
    transform = ImageTransform(4)
    for colour, value in (("black", -1.0), ("white", 1.0)):
        out = finished(transform, Image.new("RGB", (4, 4), colour))
        assert out.dtype == torch.float32
        assert torch.equal(out, torch.full((3, 4, 4), value))


def test_channels_rows_and_columns_keep_their_places():
    pixels = np.zeros((2, 2, 3), dtype=np.uint8)
    pixels[0, 1, 2] = 255  # top right, blue
    out = finished(ImageTransform(2), Image.fromarray(pixels))
    assert (out == 1).nonzero().tolist() == [[2, 0, 1]]


@pytest.mark.parametrize("crop", ["center", "random", "adm"])
@pytest.mark.parametrize("size", [(40, 90), (90, 40), (16, 16), (5, 7), (33, 32)])
def test_every_crop_gives_the_asked_size(crop, size):
    out = finished(ImageTransform(16, crop=crop, flip=True), noise(*size))
    assert out.shape == (3, 16, 16)
    assert out.abs().max() <= 1


def test_the_centre_crop_takes_the_middle():
    image = Image.new("RGB", (30, 10), "black")
    image.paste("white", (10, 0, 20, 10))
    assert finished(ImageTransform(10), image).min() == 1


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_the_adm_crop_halves_with_a_box_then_goes_bicubic(kind):
    data = encoded(noise(100, 70), kind)
    image = Image.open(io.BytesIO(data))  # by Pillow alone, step by step
    small = image.resize((50, 35), Image.Resampling.BOX)  # 70 >= 2 * 32, 35 is not
    expected = small.resize((round(50 * 32 / 35), 32), Image.Resampling.BICUBIC)
    assert resize_adm(image, (32, 32)).tobytes() == expected.tobytes()
    left = (expected.width - 32) // 2
    centre = np.asarray(expected.crop((left, 0, left + 32, 32)))
    transform = ImageTransform(32, crop="adm")
    assert np.array_equal(transform.read(data), centre)
    assert np.array_equal(prepared(transform, image), centre)
    levels = torch.from_numpy(centre.copy()).permute(2, 0, 1).float()
    assert torch.allclose((finished(transform, image) + 1) * 127.5, levels)


def test_the_adm_crop_of_a_bucket_halves_while_both_edges_are_twice_too_large():
    image = noise(100, 100)
    expected = image.resize((60, 60), Image.Resampling.BICUBIC)  # 100 >= 2 * 20, but not 2 * 60
    assert resize_adm(image, (20, 60)).tobytes() == expected.tobytes()
    assert resize_adm(image, (60, 20)).tobytes() == expected.tobytes()


@pytest.mark.parametrize("crop", ["center", "random"])
@pytest.mark.parametrize("size", [(500, 375), (37, 91), (1, 9), (64, 64)])
def test_other_crops_are_pillows_bicubic_within_two_levels(crop, size):
    image = noise(*size)
    scale = 64 / min(size)
    width, height = (round(edge * scale) for edge in size)
    expected = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    if crop == "center":
        top, left = (height - 64) // 2, (width - 64) // 2
        expected = expected[top : top + 64, left : left + 64]
    apart = np.abs(prepared(ImageTransform(64, crop=crop), image) - expected)
    assert apart.max() <= 2
    assert apart.mean() < 0.02


def test_a_file_and_its_picture_are_prepared_alike():
    data = encoded(noise(90, 61), "JPEG")
    for crop in ("center", "random", "adm"):
        transform = ImageTransform(32, crop=crop)
        assert np.array_equal(transform.read(data), prepared(transform, read_image(data)))
        assert transform.read(data).tobytes() == transform.read(data).tobytes()


@pytest.mark.parametrize("reduction", [1, 2, 4, 8])
def test_a_resized_picture_has_the_asked_size_to_the_pixel(reduction):
    rng = random.Random(0)
    for _ in range(300):
        edges = rng.randint(1, 400), rng.choice([8, 64, 392, 400])
        wanted = rng.randint(1, 60), rng.randint(1, 60)
        rows, columns = (-(-edge // reduction) for edge in edges)
        picture = Decoded(np.full((rows, columns, 3), 200, np.uint8), *edges, reduction)
        resized = resize(picture, wanted)
        assert resized.shape == (*wanted, 3)
        assert (resized == 200).all()


def test_a_picture_of_the_right_size_is_left_alone():
    image = noise(40, 32)
    assert np.array_equal(prepared(ImageTransform(32, crop="random"), image), np.asarray(image))


def test_only_the_adm_crop_decodes_a_large_jpeg_in_full():
    data = encoded(noise(400, 400), "JPEG")  # noise, which is where reducing shows
    whole = ImageTransform(32, crop="adm").read(data)
    assert np.array_equal(whole, prepared(ImageTransform(32, crop="adm"), read_image(data)))
    quick = ImageTransform(32).read(data)
    assert not np.array_equal(quick, prepared(ImageTransform(32), read_image(data)))


@pytest.mark.parametrize("size", [(30, 20), (20, 30)])
def test_random_crop_and_flip_follow_the_generator_alone(size):
    transform = ImageTransform(8, crop="random", flip=True)
    image = noise(*size)
    outs = [finished(transform, image, seed) for seed in range(12)]
    assert all(torch.equal(finished(transform, image, s), out) for s, out in enumerate(outs))
    assert len({out.numpy().tobytes() for out in outs}) > 5


def test_a_flip_mirrors_left_to_right_half_of_the_time():
    transform = ImageTransform(8, flip=True)
    image = noise(8, 8)
    plain = finished(ImageTransform(8), image)
    outs = [finished(transform, image, seed) for seed in range(400)]
    flipped = sum(torch.equal(out, plain.flip(2)) for out in outs)
    assert flipped + sum(torch.equal(out, plain) for out in outs) == 400
    assert 150 < flipped < 250


@pytest.mark.parametrize("crop", ["center", "random", "adm"])
@pytest.mark.parametrize("shape", [(32, 64), (64, 32), (24, 40), (48, 48)])
@pytest.mark.parametrize("size", [(300, 200), (30, 200), (64, 32), (800, 801)])
def test_a_bucket_is_covered_and_cut_to_its_shape(crop, shape, size):
    transform = ImageTransform(48, crop=crop)
    pixels = transform.read(encoded(Image.new("RGB", size, "white"), "JPEG"), shape)
    assert pixels.shape[0] >= shape[0] and pixels.shape[1] >= shape[1]
    assert pixels.shape[0] == shape[0] or pixels.shape[1] == shape[1]  # no smaller one covers it
    out = transform.finish(pixels, random.Random(0), shape)
    assert out.shape == (3, *shape)
    assert out.min() == 1  # no black border anywhere


def test_a_bucket_takes_the_middle_of_a_picture():
    image = Image.new("RGB", (40, 10), "black")
    image.paste("white", (10, 0, 30, 10))
    assert finished(ImageTransform(10), image, shape=(10, 20)).min() == 1
    assert finished(ImageTransform(10), image, shape=(10, 22)).min() < 1


def test_a_cut_is_bytes_and_finish_is_the_same_in_floats():
    transform = ImageTransform(16, crop="random", flip=True)
    pixels = prepared(transform, noise(50, 30))
    for seed in range(8):
        cut = transform.cut(pixels, random.Random(seed))
        assert (cut.dtype, cut.shape) == (torch.uint8, (3, 16, 16)) and cut.is_contiguous()
        assert torch.equal(to_unit_range(cut), transform.finish(pixels, random.Random(seed)))


def test_prepared_pixels_are_not_changed_by_cutting_them():
    transform = ImageTransform(16, flip=True)
    pixels = prepared(transform, noise(50, 30))
    before = pixels.copy()
    for seed in range(4):
        transform.cut(pixels, random.Random(seed)).zero_()
    assert np.array_equal(pixels, before)


def test_a_centre_crop_keeps_no_larger_picture_alive():
    pixels = prepared(ImageTransform(16), noise(160, 16))
    base = pixels
    while isinstance(base.base, np.ndarray):
        base = base.base
    assert base.size == 3 * 16 * 16


def test_a_strip_that_would_grow_huge_when_resized_is_refused():
    with pytest.raises(ImageTooLarge, match="1 x 30000"):
        finished(ImageTransform(64), Image.new("RGB", (1, 30000)))


def test_one_pixel_is_a_picture():
    assert finished(ImageTransform(8), Image.new("RGB", (1, 1), "white")).min() == 1


def test_impossible_settings_are_refused():
    with pytest.raises(ValueError, match="0"):
        ImageTransform(0)
    with pytest.raises(ValueError, match="middle"):
        ImageTransform(8, crop="middle")
