"""Samples to a batch. B images, S side, C latent channels, H W latent grid, L text rows, E width.

Batch keys, used by every module:
  key        list[str]                   name of the sample, of which two shards may have the same
  place      list[str]                   where it lies, by which all samples of its set differ
  caption    list[str]
  image      (B, 3, S, S) uint8          (B, 3, height, width) of a bucket; from `in_unit_range`,
                                         which training calls on the device, float32 in [-1, 1]
or, from shards of tokens, in place of `image`:
  ids        (B, H, W) int64
  residual   (B, C, H, W) float32
  text       (B, L, E) float32           where the shards hold it
  text_mask  (B, L) bool
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dcar.data.samples import Sample
from dcar.data.transforms import to_unit_range
from dcar.errors import DataError

Batch = dict[str, Any]


def collate(samples: Sequence[Sample], images: Sequence[Tensor], captions: list[str]) -> Batch:
    """A batch of pictures (images: uint8 (3, height, width)), or of tokens where no sample has one.

    Raises DataError for tokens that do not fit together, or tokens among pictures.
    """
    batch: Batch = {
        "key": [sample.key for sample in samples],
        "place": [sample.place for sample in samples],
        "caption": captions,
    }
    if not any(sample.tokens for sample in samples):
        stacked = torch.stack(list(images)) if images else torch.empty(0, dtype=torch.uint8)
        return batch | {"image": stacked}
    shapes = {_shape(sample) for sample in samples}
    if len(shapes) > 1:
        raise DataError(f"one batch holds {' and '.join(sorted(shapes))}: they do not fit")
    return batch | _tokens(samples)


def _shape(sample: Sample) -> str:
    """What has to be alike in a batch: (C, H, W), and the width of the text."""
    if not sample.tokens:
        return "a picture"
    text = sample.tokens.get("text")
    words = "" if text is None else f" with text {text.shape[1]} wide"
    return f"tokens {sample.tokens['residual'].shape}{words}"


def _tokens(samples: Sequence[Sample]) -> Batch:
    ids = np.stack([sample.tokens["ids"] for sample in samples]).astype(np.int64)
    residual = np.stack([sample.tokens["residual"] for sample in samples]).astype(np.float32)
    batch: Batch = {"ids": torch.from_numpy(ids), "residual": torch.from_numpy(residual)}
    if "text" in samples[0].tokens:
        batch |= pad_text([sample.tokens["text"] for sample in samples])
    return batch


def pad_text(texts: Sequence[np.ndarray]) -> Batch:
    """Text embeddings of (rows, E) each -> `text` (B, L, E) and its `text_mask` (B, L)."""
    lengths = torch.tensor([len(text) for text in texts])
    text = torch.zeros(len(texts), int(lengths.max()), texts[0].shape[1])  # (B, L, E)
    for row, embedding in zip(text, texts, strict=True):
        row[: len(embedding)] = torch.from_numpy(embedding.astype(np.float32))
    mask = torch.arange(text.shape[1]) < lengths[:, None]  # (B, L)
    return {"text": text, "text_mask": mask}


def in_unit_range(batch: Batch) -> Batch:
    """The batch with its pictures, if it has any, as float32 in [-1, 1].

    Bytes are a quarter of what goes from workers to the trainer and on to the device.
    """
    image = batch.get("image")
    if image is None or image.dtype != torch.uint8:
        return batch
    return {**batch, "image": to_unit_range(image)}
