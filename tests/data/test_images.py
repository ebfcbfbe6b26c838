"""Bytes to pixels: every kind of file that people have, the decoders' agreement, the limits."""

import io
import math
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from dcar.data import images
from dcar.data.images import ImageTooLarge, decode, image_size, read_image, read_pixels
from dcar.data.transforms import resize


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def waves(width: int, height: int) -> Image.Image:
    """Smooth colours with some detail, as a photo has more of low frequencies than of high ones."""
    rows, columns = np.mgrid[:height, :width] / 10
    waves = [np.sin(columns), np.sin(rows + columns / 3), np.cos(rows * 2) * np.cos(columns * 2)]
    return Image.fromarray((127.5 + 127.5 * np.stack(waves, -1)).astype(np.uint8))


def png(
    width: int, height: int, *, bits: int, colour: int, rows: bytes, extra: bytes = b""
) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + header + extra + pixels + chunk(b"IEND", b"")


def chunk(kind: bytes, data: bytes) -> bytes:
    body = kind + data
    return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))


def turned(image: Image.Image, orientation: int, kind: str = "JPEG", **options) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(image, kind, exif=exif, **options)


def psnr(first: np.ndarray, second: np.ndarray) -> float:
    return 10 * math.log10(255**2 / np.mean((first.astype(float) - second) ** 2))


# Kinds of files


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


def test_16_bit_colour_is_scaled_not_clipped():
    levels = struct.pack(">6H", 0, 32768, 65535, 1000, 40000, 255)
    data = png(2, 1, bits=16, colour=2, rows=b"\0" + levels)
    wanted = np.array([[0, 128, 255], [4, 156, 1]])
    assert np.abs(read_pixels(data)[0].astype(int) - wanted).max() <= 1


@pytest.mark.parametrize("mode", ["L", "LA", "1", "CMYK", "P"])
def test_every_mode_becomes_rgb(mode):
    image = noise(8, 8).convert(mode)
    rgb = read_image(encoded(image, "JPEG" if mode == "CMYK" else "PNG"))
    assert (rgb.mode, rgb.size) == ("RGB", (8, 8))


def test_a_cmyk_jpeg_keeps_its_colour():
    red = Image.new("RGB", (8, 8), (255, 0, 0)).convert("CMYK")
    data = encoded(red, "JPEG", quality=100)
    assert b"Adobe" in data  # which is to say, inverted
    pixel = read_pixels(data)[4, 4]
    assert pixel[0] > 240 and pixel[1:].max() < 15
    mixed = encoded(noise(16, 16).convert("CMYK"), "JPEG")  # simplejpeg would mix other colours
    assert np.array_equal(read_pixels(mixed), np.asarray(read_image(mixed)))


def test_a_ycck_jpeg_keeps_its_colour():
    inverted = np.full((8, 8, 4), (255, 0, 0, 255), dtype=np.uint8)  # no cyan, no black: red
    encode = images.simplejpeg.encode_jpeg
    data = encode(inverted, quality=100, colorspace="CMYK", colorsubsampling="444")
    assert images.simplejpeg.decode_jpeg_header(data)[2] == "YCCK" and b"Adobe" in data
    pixel = read_pixels(data)[4, 4]
    assert pixel[0] > 240 and pixel[1:].max() < 15


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_the_picture_upright(orientation):
    upright = Image.new("RGB", (32, 16), "black")
    upright.paste("white", (0, 0, 16, 8))  # the corner at the top left
    steps = {  # from upright to how a camera stores it, by the table of the EXIF standard
        1: [],
        2: [Image.Transpose.FLIP_LEFT_RIGHT],
        3: [Image.Transpose.ROTATE_180],
        4: [Image.Transpose.FLIP_TOP_BOTTOM],
        5: [Image.Transpose.ROTATE_90, Image.Transpose.FLIP_TOP_BOTTOM],
        6: [Image.Transpose.ROTATE_90],
        7: [Image.Transpose.ROTATE_90, Image.Transpose.FLIP_LEFT_RIGHT],
        8: [Image.Transpose.ROTATE_270],
    }
    stored = upright
    for step in steps[orientation]:
        stored = stored.transpose(step)
    data = turned(stored, orientation, quality=100, subsampling=0)
    assert image_size(data) == (32, 16)
    for pixels in (np.asarray(read_image(data)), read_pixels(data)):
        assert pixels.shape == (16, 32, 3)
        assert np.abs(pixels.astype(int) - np.asarray(upright)).max() < 50


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_exif_of_other_files_counts_too(kind):
    data = turned(noise(8, 4), 6, kind)
    assert image_size(data) == read_image(data).size == (4, 8)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_exif_that_cannot_be_read_leaves_the_picture_as_it_is():
    image = noise(16, 8)
    exif = Image.Exif()
    exif[0x0112] = 6
    broken = exif.tobytes()[:-8]
    data = encoded(image, "JPEG", exif=broken)
    assert image_size(data) == read_image(data).size == (16, 8)


@pytest.mark.parametrize("kind", ["WEBP", "PNG"])
def test_an_animation_gives_its_first_frame(kind):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True)
    assert read_image(data).getpixel((0, 0)) == (255, 0, 0)


def test_one_pixel_is_a_picture():
    for kind in ("PNG", "JPEG", "WEBP"):
        data = encoded(Image.new("RGB", (1, 1), "white"), kind)
        assert image_size(data) == (1, 1)
        assert read_pixels(data).tolist() == [[[255, 255, 255]]]


def test_a_strip_of_30000_pixels_is_a_picture():
    data = encoded(Image.new("RGB", (30000, 2), "white"), "JPEG")
    assert image_size(data) == (30000, 2)
    assert read_pixels(data).shape == (2, 30000, 3)


# Refusals


@pytest.mark.parametrize("read", [read_image, read_pixels])
def test_too_many_pixels_are_refused_from_the_header(read):
    huge = png(9000, 9000, bits=8, colour=0, rows=b"")  # no pixel data there to decode
    with pytest.raises(ImageTooLarge, match="9000 x 9000"):
        read(huge)
    with pytest.raises(ImageTooLarge, match="40 x 30"):
        read(encoded(noise(40, 30), "JPEG"), max_pixels=1000)


def test_more_pixels_than_pillow_opens_are_too_large_as_well():
    huge = png(30000, 30000, bits=8, colour=0, rows=b"")
    for read in (read_image, read_pixels, image_size):
        with pytest.raises(ImageTooLarge, match="900000000"):
            read(huge)


@pytest.mark.parametrize("read", [read_image, read_pixels])
@pytest.mark.parametrize("data", [b"", b"<html>", encoded(noise(40, 40), "JPEG")[:300]])
def test_a_broken_file_raises(data, read):
    with pytest.raises((OSError, ValueError)):
        read(data)


@pytest.mark.parametrize("share", [0.3, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_part_of_a_picture_raises(kind, share):
    data = encoded(noise(64, 64), kind)
    part = data[: int(len(data) * share)]
    for read in (read_image, read_pixels):
        with pytest.raises((OSError, ValueError, SyntaxError)):
            read(part)


def test_a_jpeg_that_ends_early_inside_is_broken():
    data = encoded(noise(64, 64), "JPEG")
    middle = len(data) // 2
    damaged = data[:middle] + b"\xff\xd9" + data[middle + 2 :]
    assert read_image(damaged).size == (64, 64)  # Pillow says nothing
    with pytest.raises(ValueError, match="premature end"):
        read_pixels(damaged)


def test_formats_off_the_list_are_not_opened():
    for kind in ("BMP", "GIF", "TIFF"):
        with pytest.raises(OSError):
            read_image(encoded(noise(4, 4), kind))
        with pytest.raises(ValueError, match="no WebP, PNG or JPEG"):
            image_size(encoded(noise(4, 4), kind))


# Sizes from the header


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_size_needs_no_pixels(kind):
    data = encoded(noise(70, 50), kind)
    assert image_size(data) == (70, 50)
    if kind != "WEBP":  # whose container states its length
        assert image_size(data[:700]) == (70, 50)


@pytest.mark.parametrize("data", [b"", b"<html>", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"])
def test_a_size_of_nothing_is_a_value_error(data):
    with pytest.raises(ValueError, match="no WebP, PNG or JPEG"):
        image_size(data)


# The fast path

JPEGS = {
    "4:4:4": {"subsampling": 0},
    "4:2:2": {"subsampling": 1},
    "4:2:0": {"subsampling": 2},
    "progressive": {"progressive": True},
    "rgb": {"keep_rgb": True},
}


@pytest.mark.parametrize("options", JPEGS.values(), ids=JPEGS)
def test_simplejpeg_and_pillow_give_the_same_pixels(options, monkeypatch):
    data = encoded(waves(101, 67), "JPEG", quality=85, **options)
    fast = read_pixels(data)
    assert np.array_equal(fast, np.asarray(read_image(data)))
    monkeypatch.setattr(images, "simplejpeg", None)
    assert np.array_equal(fast, read_pixels(data))
    assert fast.dtype == np.uint8 and fast.flags.c_contiguous and fast.flags.writeable


def test_a_grey_jpeg_has_three_equal_channels():
    data = encoded(waves(33, 20).convert("L"), "JPEG")
    pixels = read_pixels(data)
    assert np.array_equal(pixels, np.asarray(read_image(data)))
    assert (pixels == pixels[..., :1]).all()


def test_a_jpeg_that_simplejpeg_does_not_know_is_left_to_pillow():
    data = bytearray(encoded(waves(48, 48), "JPEG", subsampling=0))
    data[data.index(b"\xff\xc0") + 11] = 0x31  # luma sampled three times as often: rare, but legal
    with pytest.raises(ValueError):
        images.simplejpeg.decode_jpeg(bytes(data))
    assert read_pixels(bytes(data)).shape == (48, 48, 3)


@pytest.mark.parametrize(
    ("size", "cover", "reduction"),
    [
        ((512, 512), None, 1),
        ((512, 512), (128, 128), 2),  # twice the size wanted is left
        ((510, 512), (128, 128), 1),  # just short of it
        ((1030, 2001), (128, 128), 4),
        ((1030, 2001), (64, 250), 4),  # 2001 / 4 >= 2 * 250: the longer edge decides
        ((1030, 2001), (64, 251), 2),
        ((1030, 2001), (16, 16), 8),
        ((1030, 2001), (1, 1), 8),
    ],
)
def test_a_jpeg_is_reduced_to_no_less_than_twice_the_size_wanted(size, cover, reduction):
    data = encoded(Image.new("RGB", size[::-1]), "JPEG")
    picture = decode(data, cover=cover)
    assert (picture.height, picture.width, picture.reduction) == (*size, reduction)
    assert picture.pixels.shape == (*(-(-edge // reduction) for edge in size), 3)


def test_only_upright_jpegs_are_reduced():
    for data in (turned(waves(400, 300), 6), encoded(waves(300, 400), "PNG")):
        picture = decode(data, cover=(20, 20))
        assert (picture.reduction, picture.pixels.shape) == (1, (400, 300, 3))


@pytest.mark.parametrize("size", [(512, 400), (513, 399), (519, 401)])
def test_a_reduced_jpeg_shrinks_to_what_the_whole_one_does(size):
    data = encoded(waves(*size), "JPEG", quality=90)
    wanted = (50, 64)
    whole = resize(decode(data, cover=None), wanted)
    reduced = decode(data, cover=(50, 64))
    assert reduced.reduction in (2, 4)
    assert psnr(whole, resize(reduced, wanted)) > 44


def test_too_large_is_too_large_even_when_it_would_be_reduced():
    with pytest.raises(ImageTooLarge, match="9000 x 9000"):
        decode(png(9000, 9000, bits=8, colour=0, rows=b""), cover=(8, 8))
    with pytest.raises(ImageTooLarge, match="640 x 480"):
        decode(encoded(waves(640, 480), "JPEG"), cover=(8, 8), max_pixels=640 * 480 - 1)


def test_stray_bytes_which_flipped_bits_leave_too_make_a_jpeg_broken() -> None:
    data = encoded(waves(40, 30), "JPEG", quality=95)
    with pytest.raises(ValueError, match="extraneous bytes"):
        read_pixels(data[:-2] + b"abc" + data[-2:])
