"""Filters: each reason to leave a record out, the picture's true type, resizing."""

import io

import numpy as np
import pytest
from PIL import Image

from dcar.data.filters import Filters, image_kind
from dcar.data.members import BadSample
from tests.builds import picture, record


def reason(filters: Filters, data: bytes) -> str:
    with pytest.raises(BadSample) as bad:
        filters.picture(data)
    return str(bad.value)


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


@pytest.mark.parametrize(("kind", "member"), [("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp")])
def test_a_picture_is_stored_as_it_was_found_under_its_true_type(kind: str, member: str) -> None:
    data = picture(0, kind=kind)
    stored = Filters().picture(data)
    assert (stored.data, stored.kind, stored.width, stored.height) == (data, member, 40, 30)


def test_other_types_are_broken() -> None:
    for data in (picture(0, kind="GIF"), b"", b"<html>", b"RIFF0000WAVE"):
        assert reason(Filters(), data) == "broken image"
    with pytest.raises(BadSample, match="broken image"):
        image_kind(b"II*\0")


def test_a_picture_cut_short_is_broken_unless_only_its_header_is_checked() -> None:
    data = picture(0, (300, 200))[:-400]
    assert reason(Filters(), data) == "broken image"
    assert reason(Filters(resize=100), data) == "broken image"
    assert Filters(check="header").picture(data).data == data


@pytest.mark.parametrize(
    ("filters", "kept", "left_out", "why"),
    [
        (Filters(min_size=30), (40, 30), (40, 29), "image too small"),
        (Filters(max_aspect=2.0), (80, 40), (81, 40), "image too elongated"),
        (Filters(max_aspect=2.0), (40, 80), (40, 81), "image too elongated"),
        (Filters(max_pixels=1200), (40, 30), (41, 30), "image too large"),
    ],
)
def test_sizes_have_limits(filters: Filters, kept, left_out, why: str) -> None:
    assert filters.picture(picture(0, kept)).width == kept[0]
    assert reason(filters, picture(0, left_out)) == why


def test_an_edge_that_sizes_cannot_hold_is_too_large() -> None:
    assert reason(Filters(check="header"), picture(0, (70_000, 1), "PNG")) == "image too large"


def test_size_is_what_is_shown_not_what_is_stored() -> None:
    file = io.BytesIO()
    image, exif = opened(picture(0)), Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    image.save(file, "JPEG", exif=exif)
    stored = Filters().picture(file.getvalue())
    assert (stored.width, stored.height) == (30, 40)
    small = Filters(resize=15).picture(file.getvalue())
    assert (small.width, small.height) == opened(small.data).size == (15, 20)


@pytest.mark.parametrize(("form", "kind"), [("jpg", "JPEG"), ("webp", "WEBP")])
def test_the_shorter_edge_is_resized_and_the_format_is_the_one_named(form: str, kind: str) -> None:
    data = picture(3, (900, 600))
    stored = Filters(resize=100, format=form, quality=95).picture(data)
    image = opened(stored.data)
    assert (image.format, image.size, stored.kind) == (kind, (150, 100), form)
    assert (stored.width, stored.height) == (150, 100)
    exact = opened(data).resize((150, 100), Image.Resampling.BICUBIC)
    difference = np.abs(np.asarray(image, dtype=float) - np.asarray(exact, dtype=float))
    assert difference.mean() < 3


def test_a_picture_is_never_made_larger_and_then_keeps_its_bytes() -> None:
    data = picture(0, (40, 30))
    for resize in (30, 31, 500):
        assert Filters(resize=resize).picture(data).data == data


def test_quality_is_heard() -> None:
    data = picture(3, (900, 600))
    sizes = [len(Filters(resize=200, quality=quality).picture(data).data) for quality in (30, 95)]
    assert 2 * sizes[0] < sizes[1]


def test_words_are_stripped_and_encoded() -> None:
    filters = Filters(max_caption_bytes=10)
    assert filters.caption(record(0, caption=" é \n"), required=True) == "é".encode()
    assert filters.caption(record(0, caption=" "), required=False) is None
    assert filters.caption(record(0, caption=None), required=False) is None


@pytest.mark.parametrize(
    ("caption", "why"),
    [
        (None, "no caption"),
        (" \n", "no caption"),
        ("é" * 6, "caption too long"),
        (b"\xff\xfe".decode("utf-8", "surrogateescape"), "caption is not UTF-8"),
    ],
)
def test_words_that_cannot_be_used_are_named(caption: str | None, why: str) -> None:
    with pytest.raises(BadSample, match=why):
        Filters(max_caption_bytes=11).caption(record(0, caption=caption), required=True)


@pytest.mark.parametrize(
    "settings",
    [
        {"check": "none"},
        {"format": "png"},
        {"quality": 0},
        {"quality": 101},
        {"max_aspect": 0.5},
        {"min_size": 0},
        {"resize": 0},
        {"max_pixels": 0},
        {"max_caption_bytes": 0},
    ],
)
def test_an_impossible_setting_is_named_with_its_value(settings: dict) -> None:
    ((name, value),) = settings.items()
    with pytest.raises(ValueError, match=f"{name}={value}"):
        Filters(**settings)


def test_a_picture_too_long_for_webp_is_left_out() -> None:
    tall = picture(0, (30, 5000), "PNG")
    assert Filters(resize=20, format="webp").picture(tall).height == 3333
    far_taller = picture(0, (30, 30_000), "PNG")
    assert reason(Filters(resize=20, format="webp"), far_taller) == "image too large"
    assert Filters(resize=20).picture(far_taller).height == 20_000
