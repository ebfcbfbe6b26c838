"""Pictures to input: the range, the crops, and every kind of file that people have."""

import io
import random
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from dcar.data.transforms import ImageTooLarge, ImageTransform, read_image, resize_adm


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_black_is_minus_one_and_white_is_one():
    transform = ImageTransform(4)
    for colour, value in (("black", -1.0), ("white", 1.0)):
        out = transform(Image.new("RGB", (4, 4), colour), random.Random(0))
        assert out.dtype == torch.float32
        assert torch.equal(out, torch.full((3, 4, 4), value))


def test_channels_rows_and_columns_keep_their_places():
    pixels = np.zeros((2, 2, 3), dtype=np.uint8)
    pixels[0, 1, 2] = 255  # top right, blue
    out = ImageTransform(2)(Image.fromarray(pixels), random.Random(0))
    assert (out == 1).nonzero().tolist() == [[2, 0, 1]]


@pytest.mark.parametrize("crop", ["center", "random", "adm"])
@pytest.mark.parametrize("size", [(40, 90), (90, 40), (16, 16), (5, 7), (33, 32)])
def test_every_crop_gives_the_asked_size(crop, size):
    out = ImageTransform(16, crop=crop, flip=True)(noise(*size), random.Random(0))
    assert out.shape == (3, 16, 16)
    assert out.abs().max() <= 1


def test_the_centre_crop_takes_the_middle():
    image = Image.new("RGB", (30, 10), "black")
    image.paste("white", (10, 0, 20, 10))
    assert ImageTransform(10)(image, random.Random(0)).min() == 1


def test_the_adm_crop_halves_with_a_box_then_goes_bicubic():
    image = noise(100, 70)
    small = image.resize((50, 35), Image.Resampling.BOX)  # 70 >= 2 * 32, 35 is not
    expected = small.resize((round(50 * 32 / 35), 32), Image.Resampling.BICUBIC)
    assert resize_adm(image, 32).tobytes() == expected.tobytes()
    left = (expected.width - 32) // 2
    centre = np.asarray(expected.crop((left, 0, left + 32, 32)))
    out = ImageTransform(32, crop="adm")(image, random.Random(0))
    assert torch.allclose(
        (out + 1) * 127.5, torch.from_numpy(centre.copy()).permute(2, 0, 1).float()
    )


def test_random_crop_and_flip_follow_the_generator_alone():
    transform = ImageTransform(8, crop="random", flip=True)
    image = noise(30, 20)
    outs = [transform(image, random.Random(seed)) for seed in range(12)]
    assert all(torch.equal(transform(image, random.Random(s)), out) for s, out in enumerate(outs))
    assert len({out.numpy().tobytes() for out in outs}) > 6


def test_a_flip_mirrors_left_to_right_half_of_the_time():
    transform = ImageTransform(8, flip=True)
    image = noise(8, 8)
    plain = ImageTransform(8)(image, random.Random(0))
    outs = [transform(image, random.Random(seed)) for seed in range(400)]
    flipped = sum(torch.equal(out, plain.flip(2)) for out in outs)
    assert flipped + sum(torch.equal(out, plain) for out in outs) == 400
    assert 150 < flipped < 250


def test_alpha_is_laid_over_white():
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (255, 0, 0, 128))
    rgb = read_image(encoded(image))
    assert rgb.getpixel((0, 0)) == (255, 255, 255)
    assert rgb.getpixel((1, 0)) == (255, 127, 127)


def test_a_transparent_palette_colour_is_white():
    image = Image.new("P", (2, 1), 0)
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    rgb = read_image(encoded(image, transparency=0))
    assert [rgb.getpixel((x, 0)) for x in range(2)] == [(255, 255, 255), (200, 100, 50)]


def test_16_bit_grey_is_scaled_not_clipped():
    grey = Image.fromarray(np.array([[0, 32768, 65535]], dtype=np.uint16))
    rgb = read_image(encoded(grey))
    assert [rgb.getpixel((x, 0))[0] for x in range(3)] == [0, 128, 255]


@pytest.mark.parametrize("mode", ["L", "LA", "1", "CMYK", "P"])
def test_every_mode_becomes_rgb(mode):
    image = noise(8, 8).convert(mode)
    rgb = read_image(encoded(image, "JPEG" if mode == "CMYK" else "PNG"))
    assert (rgb.mode, rgb.size) == ("RGB", (8, 8))


def test_a_cmyk_jpeg_keeps_its_colour():
    red = Image.new("RGB", (8, 8), (255, 0, 0)).convert("CMYK")
    pixel = read_image(encoded(red, "JPEG", quality=100)).getpixel((4, 4))
    assert pixel[0] > 240 and max(pixel[1:]) < 15


def test_exif_turns_the_picture_upright():
    image = Image.new("RGB", (8, 4), "black")
    image.paste("white", (0, 0, 4, 4))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held on its side
    upright = read_image(encoded(image, "JPEG", exif=exif, quality=100))
    assert upright.size == (4, 8)
    assert upright.getpixel((2, 1))[0] > 200 and upright.getpixel((2, 6))[0] < 50


def test_an_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    assert read_image(data).getpixel((0, 0)) == (255, 0, 0)


def huge_png(side: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def test_too_many_pixels_are_refused_from_the_header():
    with pytest.raises(ImageTooLarge, match="9000 x 9000"):  # no pixel data there to decode
        read_image(huge_png(9000))


def test_a_strip_that_would_grow_huge_when_resized_is_refused():
    with pytest.raises(ImageTooLarge, match="1 x 30000"):
        ImageTransform(64)(Image.new("RGB", (1, 30000)), random.Random(0))


def test_one_pixel_is_a_picture():
    assert ImageTransform(8)(Image.new("RGB", (1, 1), "white"), random.Random(0)).min() == 1


@pytest.mark.parametrize("data", [b"", b"<html>", encoded(noise(40, 40), "JPEG")[:300]])
def test_a_broken_file_raises(data):
    with pytest.raises((OSError, ValueError)):
        read_image(data)


def test_formats_off_the_list_are_not_opened():
    with pytest.raises(OSError):
        read_image(encoded(noise(4, 4), "BMP"))


def test_impossible_settings_are_refused():
    with pytest.raises(ValueError, match="0"):
        ImageTransform(0)
    with pytest.raises(ValueError, match="middle"):
        ImageTransform(8, crop="middle")
