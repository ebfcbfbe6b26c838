"""Switching autocast off for one part of a model."""

import torch

from dcar.models.precision import without_autocast


def test_matrix_products_stay_fp32_inside() -> None:
    matrix = torch.randn(4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert (matrix @ matrix).dtype == torch.bfloat16
        with without_autocast(matrix):
            assert (matrix @ matrix).dtype == torch.float32
        assert (matrix @ matrix).dtype == torch.bfloat16


def test_meta_tensors_need_no_autocast() -> None:
    with without_autocast(torch.empty(2, device="meta")) as context:
        assert context is None
