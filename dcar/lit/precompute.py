"""Images to tokens once, and how training knows that tokens are those of its own tokenizer.

B batch, S image side, C latent channels, H W latent grid, L text length, E text width.
"""

import io
import random
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from lightning import LightningModule
from torch import Tensor

from dcar.data.members import BadSample, Raw
from dcar.data.samples import decode
from dcar.data.transforms import ImageTransform
from dcar.errors import CheckpointError, NonFiniteError
from dcar.models.fingerprint import fingerprint, tokenizer_fingerprint
from dcar.models.tokenizer import HybridTokenizer

MAX_CODES = 2**16  # ids are stored as uint16
DIGITS = 12  # of a fingerprint, in messages

Facts = dict[str, Any]


def npy(array: np.ndarray) -> bytes:
    """The array as a .npy file."""
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()


class ImageDecoder:
    """Raw samples to `key`, `caption` and `image` (3, S, S) in [-1, 1], the same every time.

    captioned: whether a sample without words is a bad one.
    Raises ValueError for a transform that draws at random: tokens are made once.
    """

    def __init__(self, transform: ImageTransform, *, captioned: bool):
        if transform.is_random:
            raise ValueError(
                f"crop={transform.crop!r} with flip={transform.flip} is drawn at random: "
                "tokens are made once, from 'center' or 'adm' without flip"
            )
        self.transform, self.captioned = transform, captioned

    def __call__(self, raw: Raw) -> dict[str, Any]:
        sample = decode(raw, self.transform, captioned=self.captioned)
        if sample.pixels is None:
            raise BadSample("no image")
        image = self.transform.finish(sample.pixels, random.Random(0))  # (3, S, S), draws nothing
        return {"key": sample.key, "caption": sample.caption, "image": image}


def describe_text(encoder: Any) -> Facts:
    """What text embeddings depend on, as plain data."""
    return {
        "name": encoder.model.name_or_path or type(encoder).__name__,
        "fingerprint": fingerprint(encoder),
        "max_tokens": encoder.max_tokens,
        "attend_to_padding": getattr(encoder, "attend_to_padding", False),
    }


def describe_tokens(
    *, tokenizer: HybridTokenizer, text_encoder: Any, size: int, checkpoint: str, module: str
) -> Facts:
    """What tokens depend on, as plain data: facts of a manifest.

    text_encoder: None without text embeddings. size: S in pixels. checkpoint, module: where the
    tokenizer's weights are from and who trained them.
    """
    made_by = {"checkpoint": checkpoint, "module": module}
    return {
        "kind": "tokens",
        "size": size,
        "downsample": tokenizer.downsample,
        "num_codes": tokenizer.num_codes,
        "tokenizer": {"fingerprint": tokenizer_fingerprint(tokenizer), **made_by},
        "text": None if text_encoder is None else describe_text(text_encoder),
    }


def check_tokens(theirs: Facts, ours: Facts) -> None:
    """Refuse token shards that a training run cannot use.

    theirs: facts of their manifest, with `folder`. ours: `describe_tokens` of the run. Raises
    CheckpointError naming both tokenizers, sizes or text encoders. A `text` of None is no conflict.
    """
    folder = theirs["folder"]
    made, have = theirs["tokenizer"], ours["tokenizer"]
    if made["fingerprint"] != have["fingerprint"]:
        raise CheckpointError(
            f"the tokens in {folder} were made by the tokenizer {_named(made)}, this run has "
            f"{_named(have)}: give the tokenizer_from that made them, or make tokens with this one "
            "(--exp=data/precompute)"
        )
    if theirs["size"] != ours["size"]:
        raise CheckpointError(
            f"the tokens in {folder} are of {theirs['size']} px images, this run's are of "
            f"{ours['size']} px"
        )
    if theirs["text"] and ours["text"]:
        _check_text(folder, theirs["text"], ours["text"])


def _check_text(folder: str, theirs: Facts, ours: Facts) -> None:
    for fact in ("fingerprint", "max_tokens", "attend_to_padding"):
        if theirs[fact] != ours[fact]:
            raise CheckpointError(
                f"the text embeddings in {folder} are of {theirs['name']}, this run's text encoder "
                f"is {ours['name']}; they differ in {fact}: {theirs[fact]} there, {ours[fact]} here"
            )


def _named(tokenizer: Facts) -> str:
    digits = tokenizer["fingerprint"][:DIGITS]
    return f"{tokenizer['checkpoint']} ({tokenizer['module']}, {digits})"


class TokenPredictor(LightningModule):
    """Batches of images (B, 3, S, S) to raw samples that hold tokens, with the images' keys.

    Members: `ids.npy` uint16 (H, W); `residual.npy` float16 (C, H, W), continuous minus discrete
    latents; with a text encoder `text.npy` float16 (tokens of this caption, E); `txt`, the caption.
    Raises ValueError for more than 65,536 codes, and for a text encoder that is yet to be trained.
    """

    def __init__(self, *, tokenizer: HybridTokenizer, text_encoder: Any = None):
        super().__init__()
        if tokenizer.num_codes > MAX_CODES:
            raise ValueError(
                f"the tokenizer has {tokenizer.num_codes} codes, ids are stored as numbers below "
                f"{MAX_CODES}"
            )
        if text_encoder is not None and text_encoder.trainable:
            raise ValueError(
                f"{type(text_encoder).__name__} is trained with the generator, so its embeddings "
                "change: text embeddings are kept for a frozen text encoder only"
            )
        self.tokenizer = tokenizer.eval().requires_grad_(False)
        self.text_encoder = text_encoder

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[Raw]:
        if not batch["key"]:
            return []
        latents = self.tokenizer.encode(batch["image"])
        columns = [self._ids(latents.ids), self._residuals(latents.residual, batch["key"])]
        if self.text_encoder is not None:
            columns.append(self._texts(batch["caption"]))
        names = ("ids.npy", "residual.npy", "text.npy")
        samples: list[Raw] = []
        for key, caption, *arrays in zip(batch["key"], batch["caption"], *columns, strict=True):
            members = {name: npy(array) for name, array in zip(names, arrays, strict=False)}
            samples.append({"__key__": key, **members, "txt": caption.encode()})
        return samples

    def _ids(self, ids: Tensor) -> Iterable[np.ndarray]:
        return ids.cpu().numpy().astype(np.uint16)

    def _residuals(self, residual: Tensor, keys: list[str]) -> Iterable[np.ndarray]:
        half = residual.half()
        if not torch.isfinite(half).all():
            raise NonFiniteError(
                f"a residual between {keys[0]} and {keys[-1]} is not finite: try precision=32-true"
            )
        return half.cpu().numpy()

    def _texts(self, captions: list[str]) -> Iterable[np.ndarray]:
        text, mask = self.text_encoder(captions)  # (B, L, E), (B, L)
        lengths = mask.sum(1).tolist()
        half = text.half().cpu().numpy()
        return [rows[:length] for rows, length in zip(half, lengths, strict=True)]
