"""Tensors as tiles and as pictures."""

import numpy as np
import torch

from dcar.data.transforms import to_unit_range
from dcar.evaluation.pictures import reconstruction_columns, tile, to_pil, to_uint8


def test_every_level_comes_back() -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(to_unit_range(levels)), levels)


def test_values_go_to_the_nearest_level_and_stay_in_range() -> None:
    between = torch.tensor([100.49, 100.51, -3.0, 300.0]) / 127.5 - 1
    assert to_uint8(between).tolist() == [100, 101, 0, 255]


def test_a_tile_has_one_row_an_image_and_one_column_an_entry() -> None:
    columns = [torch.full((2, 3, 4, 4), value) for value in (0.0, 1.0, 2.0)]
    columns[1][1] = 7
    grid = tile(columns)
    assert grid.shape == (3, 8, 12)
    assert (grid[:, 4:, 4:8] == 7).all() and (grid[:, :4, 8:] == 2).all()


def test_a_perfect_hybrid_path_has_a_black_error_column() -> None:
    image = torch.rand(2, 3, 4, 4) * 2 - 1
    columns = reconstruction_columns(image, image * 0, image)
    assert (columns[3] == -1).all() and torch.equal(columns[0], image)


def test_pixels_go_to_uint8_and_keep_their_place() -> None:
    image = torch.full((3, 2, 3), -1.0)
    image[0, 0, 2] = 1.0
    picture = np.asarray(to_pil(image))
    assert picture[0, 2].tolist() == [255, 0, 0] and picture.sum() == 255
