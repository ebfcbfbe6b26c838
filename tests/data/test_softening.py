"""Softened pictures stay what they were, by chance and by that alone."""

import random

import numpy as np
from PIL import Image

from dcar.data.softening import soften
from dcar.data.views import SIDE


def picture() -> Image.Image:
    canvas = Image.new("RGB", (SIDE, SIDE), "white")
    canvas.paste((200, 30, 60), (12, 12, 50, 40))
    canvas.paste((20, 90, 160), (20, 36, 44, 58))
    return canvas


def test_the_same_chance_gives_the_same_picture() -> None:
    for seed in range(60):
        assert soften(picture(), random.Random(seed)) == soften(picture(), random.Random(seed))


def test_pictures_keep_their_size_and_most_of_what_they_show() -> None:
    clean = np.asarray(picture()).astype(float)
    away, unchanged = [], 0
    for seed in range(300):
        soft = soften(picture(), random.Random(seed))
        assert soft.size == (SIDE, SIDE) and soft.mode == "RGB"
        away.append(np.abs(np.asarray(soft) - clean).mean())
        unchanged += away[-1] == 0
    assert 20 < unchanged < 110
    assert max(away) < 40 and 2 < np.mean(away) < 15


def test_the_picture_that_is_given_stays_as_it_is() -> None:
    given = picture()
    for seed in range(60):
        soften(given, random.Random(seed))
    assert given == picture()
