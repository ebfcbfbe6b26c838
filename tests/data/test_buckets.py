"""Aspect buckets: which shapes there are, and which one a picture gets."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcar.data.buckets import Buckets


def test_the_buckets_of_256_px():
    shapes = [(192, 352), (224, 288), (256, 256), (288, 224), (352, 192)]
    assert Buckets(area=256).shapes == shapes


@given(
    side=st.integers(1, 40),
    multiple=st.sampled_from([1, 8, 16, 32, 64]),
    max_ratio=st.floats(1, 8),
)
def test_shapes_are_multiples_of_about_one_area_and_mirrored(side, multiple, max_ratio):
    area = side * multiple
    shapes = Buckets(area=area, multiple=multiple, max_ratio=max_ratio).shapes
    assert (area, area) in shapes
    assert shapes == sorted(set(shapes)) == sorted((width, height) for height, width in shapes)
    for height, width in shapes:
        assert height % multiple == width % multiple == 0
        assert max(height, width) <= max_ratio * min(height, width)
        assert abs(height * width - area**2) <= min(height, width) * multiple / 2


@given(st.lists(st.tuples(st.integers(1, 65535), st.integers(1, 65535)), min_size=1, max_size=30))
def test_a_picture_goes_to_the_nearest_aspect_ratio(sizes):
    buckets = Buckets(area=512)
    found = buckets.assign(np.array(sizes, dtype=np.uint16))
    ratios = np.array([np.log(height / width) for height, width in buckets.shapes])
    for (width, height), index in zip(sizes, found, strict=True):
        away = np.abs(ratios - np.log(height / width))
        assert away[index] == pytest.approx(away.min())


def test_width_comes_first_in_sizes_and_height_first_in_shapes():
    buckets = Buckets(area=256)
    wide, tall = buckets.assign(np.array([[500, 375], [375, 500]]))
    assert buckets.shapes[wide] == (224, 288)
    assert buckets.shapes[tall] == (288, 224)


def test_a_picture_of_no_size_is_a_square():
    buckets = Buckets(area=256)
    (index,) = buckets.assign(np.zeros((1, 2), dtype=np.uint16))
    assert buckets.shapes[index] == (256, 256)


def test_no_pictures_get_no_buckets():
    assert Buckets(area=256).assign(np.empty((0, 2), dtype=np.uint16)).shape == (0,)


def test_one_bucket_takes_everything():
    found = Buckets(area=64, multiple=64).assign(np.array([[9, 1], [1, 9]]))
    assert found.tolist() == [0, 0]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"area": 250}, "250.*32"),
        ({"area": 0}, "0.*32"),
        ({"area": 256, "multiple": 0}, "0"),
        ({"area": 256, "max_ratio": 0.5}, "0.5"),
        ({"area": 256, "max_ratio": float("nan")}, "nan"),
    ],
)
def test_impossible_settings_are_refused(settings, named):
    with pytest.raises(ValueError, match=named):
        Buckets(**settings)
