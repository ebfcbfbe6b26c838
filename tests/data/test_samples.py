"""Samples: where words and picture are found, and the reasons for which a sample is bad."""

import io
import json

import pytest
from PIL import Image

from dcar.data.samples import BadSample, decode, find, read_caption
from dcar.data.shards import write_shards
from dcar.data.transforms import ImageTransform

TRANSFORM = ImageTransform(8, max_pixels=1000)


def picture(side: int = 8, colour: str = "red", kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), colour).save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "kind, written", [("png", "PNG"), ("jpg", "JPEG"), ("jpeg", "JPEG"), ("webp", "WEBP")]
)
def test_a_sample_is_its_key_caption_and_pixels(kind, written):
    raw = {"__key__": "k", kind: picture(kind=written), "txt": " a caf\u00e9 ".encode()}
    sample = decode(raw, TRANSFORM, captioned=True)
    assert (sample.key, sample.caption, sample.pixels.shape) == ("k", "a caf\u00e9", (8, 8, 3))
    assert sample.pixels[0, 0, 0] > 240


@pytest.mark.parametrize(
    "members, reason",
    [
        ({"txt": b"words"}, "no image"),
        ({"txt": b"words", "png": picture()[:40]}, "broken image"),
        ({"txt": b"words", "png": b"<html>"}, "broken image"),
        ({"txt": b"words", "png": picture(40)}, "image too large"),
        ({"png": picture()}, "no caption"),
        ({"png": picture(), "txt": b"  "}, "no caption"),
        ({"png": picture(), "txt": b"\xff\xfe"}, "caption is not UTF-8"),
        ({"png": picture(), "txt": b"word " * 10000}, "caption too long"),
        ({"png": picture(), "json": b"{"}, "broken json"),
        ({"png": picture(), "json": b'{"caption": 3}'}, "no caption"),
        ({"png": picture(), "json": b"[1]"}, "no caption"),
    ],
)
def test_each_fault_has_its_reason(members, reason):
    with pytest.raises(BadSample, match=f"^{reason}$"):
        decode({"__key__": "k", **members}, TRANSFORM, captioned=True)


def test_the_caption_may_be_in_the_json():
    assert (
        read_caption({"json": json.dumps({"caption": "a cat"}).encode()}, required=True) == "a cat"
    )


def test_pictures_without_words_are_fine_where_none_are_needed():
    assert decode({"__key__": "k", "png": picture()}, TRANSFORM, captioned=False).caption == ""


def test_find_brings_the_picture_and_caption_of_each_key(tmp_path):
    rows = [
        {"__key__": f"s/{colour}", "png": picture(5, colour), "txt": colour.encode()}
        for colour in ("red", "lime", "blue")
    ]
    write_shards(rows, tmp_path, "x", 2)
    found = find(tmp_path / "x-*.tar", ["s/blue", "s/red"])
    assert list(found) == ["s/blue", "s/red"]
    image, caption = found["s/blue"]
    assert (image.size, image.getpixel((0, 0)), caption) == ((5, 5), (0, 0, 255), "blue")
    with pytest.raises(KeyError, match="s/none"):
        find(tmp_path / "x-*.tar", ["s/none", "s/red"])
