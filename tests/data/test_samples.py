"""Samples: where words and picture are found, and the reasons for which a sample is bad."""

import io
import json
import random
import struct
import zlib
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from dcar.data.members import BadSample
from dcar.data.samples import Sample, decode, read_caption
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


def test_a_picture_is_prepared_for_the_shape_that_is_asked_for():
    raw = {"__key__": "k", "png": picture(30)}
    assert decode(raw, TRANSFORM, captioned=False).pixels.shape == (8, 8, 3)
    assert decode(raw, TRANSFORM, captioned=False, shape=(16, 16)).pixels.shape == (16, 16, 3)


def picture_that_claims(side: int) -> bytes:
    """A small file whose header promises side x side pixels."""
    data = bytearray(picture())
    data[16:24] = struct.pack(">II", side, side)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


@pytest.mark.parametrize(
    "members, reason",
    [
        ({"txt": b"words"}, "no image"),
        ({"txt": b"words", "png": picture()[:40]}, "broken image"),
        ({"txt": b"words", "png": b"<html>"}, "broken image"),
        ({"txt": b"words", "png": picture(40)}, "image too large"),
        ({"txt": b"words", "png": picture_that_claims(30_000)}, "image too large"),
        ({"png": picture()}, "no caption"),
        ({"png": picture(), "txt": b"  "}, "no caption"),
        ({"png": picture(), "txt": b"\xff\xfe"}, "caption is not UTF-8"),
        ({"png": picture(), "txt": b"word " * 10000}, "caption too long"),
        ({"png": picture(), "json": b"{"}, "broken json"),
        ({"png": picture(), "json": b'{"caption": 3}'}, "no caption"),
        ({"png": picture(), "json": b"[1]"}, "no caption"),
        ({"png": picture(), "txt": "\u00e9".encode() * (8 * 1024 + 1)}, "caption too long"),
    ],
)
def test_each_fault_has_its_reason(members, reason):
    with pytest.raises(BadSample, match=f"^{reason}$"):
        decode({"__key__": "k", **members}, TRANSFORM, captioned=True)


def test_the_caption_may_be_in_the_json():
    assert (
        read_caption({"json": json.dumps({"caption": "a cat"}).encode()}, required=True) == "a cat"
    )
    assert (
        read_caption({"txt": b"a dog", "json": b'{"caption": "a cat"}'}, required=True) == "a dog"
    )


def test_pictures_without_words_are_fine_where_none_are_needed():
    assert decode({"__key__": "k", "png": picture()}, TRANSFORM, captioned=False).caption == ""


def npy(array: np.ndarray, **options) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


RESIDUAL = np.ones((3, 2, 2), np.float16)


def token_row(**members: bytes) -> dict:
    tokens = {
        "ids.npy": npy(np.arange(4, dtype=np.uint16).reshape(2, 2)),
        "residual.npy": npy(RESIDUAL),
    }
    named = {name.replace("_", "."): data for name, data in members.items()}
    return {"__key__": "k", "txt": b"words", **tokens, **named}


def test_tokens_are_read_as_stored_and_no_picture_is_asked_for():
    raw = token_row(text_npy=npy(np.ones((5, 8), np.float16)))
    sample = decode(raw, TRANSFORM, captioned=True, captions={"long": "l"})
    assert sample.pixels is None and sample.caption == "words" and sample.captions == {"long": "l"}
    assert {name: array.shape for name, array in sample.tokens.items()} == {
        "ids": (2, 2),
        "residual": (3, 2, 2),
        "text": (5, 8),
    }


@pytest.mark.parametrize(
    "members",
    [
        {"ids_npy": b"no"},
        {"ids_npy": npy(np.zeros((3, 3), np.uint16))},
        {"ids_npy": npy(np.zeros((2, 2), np.int64))},
        {"ids_npy": b"\x93NUMPY\x01\x00\x04\x01" + b"(" * 260},
        {"residual_npy": npy(np.full((3, 2, 2), np.nan, np.float16))},
        {"residual_npy": npy(np.zeros((3, 2, 2), "U1"))},
        {"text_npy": npy(np.zeros((2, 2, 2), np.float16))},
        {"residual_npy": npy(np.zeros((2, 2), np.float16))},
        {"residual_npy": npy(RESIDUAL)[:-1]},
        {"residual_npy": npy(np.ones((3, 2, 2), np.int64))},
        {"residual_npy": npy(RESIDUAL) + b"x"},
        {
            "residual_npy": npy(RESIDUAL).replace(
                b"(3, 2, 2), }" + b" " * 9, b"(3, 2, 2000000000), }"
            )
        },
        {"residual_npy": npy(np.array([[["x", {}]]], dtype=object), allow_pickle=True)},
    ],
)
def test_tokens_that_cannot_be_are_a_bad_sample_and_nothing_is_unpickled(members):
    with pytest.raises(BadSample, match="broken tokens"):
        decode(token_row(**members), TRANSFORM, captioned=True)


def test_captions_from_elsewhere_are_words_too():
    raw = {"__key__": "k", "png": picture()}
    sample = decode(raw, TRANSFORM, captioned=True, captions={"long": "a long one"})
    assert sample.choose_caption({"own": 1.0}, random.Random(0)) == "a long one"


def test_a_caption_is_drawn_by_weight_among_those_that_are_there():
    sample = Sample("k", "mine", None, {}, {"long": "a long one", "short": "s"})
    drawn = Counter(
        sample.choose_caption({"own": 1, "long": 3, "other": 9}, random.Random(seed))
        for seed in range(400)
    )
    assert set(drawn) == {"mine", "a long one"} and abs(drawn["mine"] - 100) < 30
    assert sample.choose_caption({"long": 0}, random.Random(0)) == "mine"  # none is wanted


def test_half_a_character_in_a_caption_is_no_text():
    raw = {"__key__": "k", "png": picture(), "json": b'{"caption": "\\ud83d cat"}'}
    with pytest.raises(BadSample, match="caption is not UTF-8"):
        decode(raw, TRANSFORM, captioned=True)


@pytest.mark.parametrize("words", [["one", "two"], 3, {"en": "a"}, None])
def test_captions_that_nobody_reads_may_be_anything(words):
    raw = {"__key__": "a", "json": json.dumps({"caption": words}).encode()}
    assert read_caption(raw, required=False) == ""
    with pytest.raises(BadSample, match="no caption"):
        read_caption(raw, required=True)
