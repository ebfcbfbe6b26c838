"""Batches: stacked pictures in range, padded text."""

import numpy as np
import pytest
import torch

from dcar.data.batches import collate, in_unit_range, pad_text
from dcar.data.samples import Sample
from dcar.errors import DataError


def token_sample(key: str, side: int = 2, **more: np.ndarray) -> Sample:
    ids, residual = np.zeros((side, side), np.uint16), np.zeros((4, side, side), np.float16)
    return Sample(key, "words", None, {"ids": ids, "residual": residual, **more})


def test_pictures_travel_as_bytes_and_arrive_in_the_range_of_the_models():
    images = [torch.full((3, 4, 4), shade, dtype=torch.uint8) for shade in (0, 255)]
    samples = [Sample(key, "", np.zeros((4, 4, 3), np.uint8)) for key in "ab"]
    batch = collate(samples, images, ["x", "y"])
    assert batch["key"] == ["a", "b"] and batch["caption"] == ["x", "y"]
    assert batch["image"].dtype == torch.uint8
    stored = batch
    for _ in range(2):  # a second time it changes nothing
        batch = in_unit_range(batch)
        assert stored["image"].dtype == torch.uint8
        assert batch["image"].dtype == torch.float32
        assert batch["image"].flatten(1).unique(dim=1).flatten().tolist() == [-1, 1]


def test_a_batch_of_tokens_has_no_range():
    batch = collate([token_sample("a")], [], ["x"])
    assert in_unit_range(batch) is batch


def test_text_is_padded_to_the_longest_and_masked():
    batch = pad_text([np.ones((2, 3), np.float16), np.ones((5, 3), np.float16)])
    assert batch["text"].shape == (2, 5, 3) and batch["text"].dtype == torch.float32
    assert torch.equal(batch["text_mask"].sum(1), torch.tensor([2, 5]))
    assert torch.equal(batch["text"][..., 0] > 0, batch["text_mask"])


def test_ids_above_the_range_of_signed_numbers_survive():
    sample = token_sample("a")
    sample.tokens["ids"][0, 0] = 65_535
    batch = collate([sample], [], ["x"])
    assert batch["ids"].flatten().tolist() == [65_535, 0, 0, 0]
    assert (batch["ids"].dtype, batch["residual"].dtype) == (torch.int64, torch.float32)


@pytest.mark.parametrize(
    "other",
    [token_sample("b", side=4), token_sample("b", text=np.zeros((1, 3), np.float16))],
)
def test_tokens_that_do_not_fit_together_are_an_error(other):
    with pytest.raises(DataError, match="do not fit"):
        collate([token_sample("a"), other], [], ["x", "y"])


def test_tokens_of_other_channels_or_other_text_are_an_error():
    texts = [np.zeros((2, width), np.float16) for width in (1, 3)]
    fewer = token_sample("b", residual=np.zeros((3, 2, 2), np.float16))
    worded = [token_sample(key, text=text) for key, text in zip("ab", texts, strict=True)]
    for samples in ([token_sample("a"), fewer], worded):
        with pytest.raises(DataError, match="do not fit"):
            collate(samples, [], ["x", "y"])
