"""What the report shows of a trained model: reconstructions, samples, one image being unmasked.

B images of side S, C latent channels, H W latent grid, K codebook size, T sampling steps.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from dcar.data.batches import in_unit_range
from dcar.evaluation.pictures import reconstruction_columns, to_pil
from dcar.evaluation.sheets import captioned_grid, save_png
from dcar.models.sampler import Tokens
from dcar.models.tokenizer import HybridTokenizer
from dcar.pipeline import DCARPipeline

COLUMN_NAMES = ("input", "discrete", "hybrid", "error x4")
MASKED, FRESH = (128, 134, 145), (255, 170, 0)  # colours of masked and of newly fixed cells
BATCH = 64


@dataclass(frozen=True)
class Examples:
    """Images (B, 3, S, S) in [-1, 1] with their captions."""

    image: Tensor
    captions: list[str]

    def __len__(self) -> int:
        return len(self.captions)

    def spread(self, count: int) -> "Examples":
        """`count` of them from all over the set, always the same ones."""
        count = min(count, len(self))
        indices = [index * len(self) // count for index in range(count)]
        return Examples(self.image[indices], [self.captions[index] for index in indices])


@dataclass(frozen=True)
class Sample:
    """A prompt, the real image it was written for, and what the model drew from it."""

    prompt: str
    seed: int
    real: Image.Image
    drawn: Image.Image


@dataclass(frozen=True)
class Frame:
    """The state after one sampling step; `picture` covers what is still masked."""

    caption: str
    picture: Image.Image


@dataclass(frozen=True)
class Pictures:
    """All that the page shows of the model."""

    rows: list[list[Image.Image]]  # reconstructions, each named by COLUMN_NAMES
    samples: dict[str, list[Sample]]  # by split, train first
    frames: list[Frame]  # of the first sample; the last is the finished picture
    counts: list[int]  # how often each of the K codes occurs in the main validation set


def read_examples(batches: Iterable[dict[str, Any]], limit: int | None = None) -> Examples:
    """All of a loader's batches, or its first `limit` images."""
    images: list[Tensor] = []
    captions: list[str] = []
    for batch in map(in_unit_range, batches):
        images.append(batch["image"])
        captions += batch["caption"]
        if limit is not None and len(captions) >= limit:
            break
    return Examples(torch.cat(images)[:limit], captions[:limit])


@torch.no_grad()
def count_codes(tokenizer: HybridTokenizer, image: Tensor) -> Tensor:
    """How often each of the K codes stands for a part of these images: (K,)."""
    device = next(tokenizer.parameters()).device
    ids = [tokenizer.encode(part.to(device)).ids.flatten() for part in image.split(BATCH)]
    return torch.bincount(torch.cat(ids), minlength=tokenizer.num_codes).cpu()


@torch.no_grad()
def reconstruct(tokenizer: HybridTokenizer, image: Tensor) -> list[list[Image.Image]]:
    """One row an image, its pictures named by COLUMN_NAMES."""
    image = image.to(next(tokenizer.parameters()).device)
    latents = tokenizer.encode(image)
    discrete = tokenizer.decode(latents.discrete)
    hybrid = tokenizer.decode(latents.continuous)
    columns = reconstruction_columns(image, discrete, hybrid)
    return [[to_pil(column[row]) for column in columns] for row in range(len(image))]


def draw_samples(
    pipeline: DCARPipeline, groups: Mapping[str, Examples]
) -> tuple[dict[str, list[Sample]], list[Frame]]:
    """Every caption drawn, in one batch with seeds 0, 1, 2...; and the first image step by step."""
    captions = [caption for examples in groups.values() for caption in examples.captions]
    history: list[tuple[Tensor, Tensor]] = []  # ids and newly fixed of the first image, (H, W)
    side = pipeline.model.size // pipeline.model.tokenizer.downsample
    tokens = pipeline.tokens(
        captions,
        seeds=range(len(captions)),
        grid=(side, side),
        on_step=lambda step, ids, fresh: history.append((ids[0].clone(), fresh[0].clone())),
    )
    drawn = [to_pil(picture) for picture in pipeline.decode(tokens)]
    real = [to_pil(picture) for examples in groups.values() for picture in examples.image]
    every = zip(captions, range(len(captions)), real, drawn, strict=True)
    samples = [Sample(*entry) for entry in every]
    grouped, start = {}, 0
    for name, examples in groups.items():
        grouped[name] = samples[start : start + len(examples)]
        start += len(examples)
    ending = "finished" if tokens.residual is None else "finished, with the residual"
    return grouped, [*unmasking_frames(pipeline, history), Frame(ending, drawn[0])]


def unmasking_frames(
    pipeline: DCARPipeline, history: Sequence[tuple[Tensor, Tensor]]
) -> list[Frame]:
    """The codes known after each step decoded, without the residual. history: see `draw_samples`.

    The decoder needs a latent everywhere: a masked place gets the mean of all codes, and its cell
    is covered in the picture.
    """
    tokenizer: Any = pipeline.model.tokenizer
    ids = torch.stack([ids for ids, _ in history])  # (T, H, W)
    masked = ids == tokenizer.num_codes
    every = torch.arange(tokenizer.num_codes, device=ids.device)[None, None]  # (1, 1, K)
    with torch.no_grad():
        known = tokenizer.lookup(ids.masked_fill(masked, 0))  # (T, C, H, W)
        mean = tokenizer.lookup(every).mean(dim=3, keepdim=True)  # (1, C, 1, 1)
        stand_in = mean - known
    decoded = pipeline.decode(Tokens(ids.masked_fill(masked, 0), stand_in * masked[:, None]))
    return [
        Frame(
            f"step {step}: {int((~hidden).sum())} of {hidden.numel()} codes",
            mark_cells(to_pil(picture), hidden, fresh),
        )
        for step, (picture, hidden, (_, fresh)) in enumerate(
            zip(decoded, masked, history, strict=True), start=1
        )
    ]


def mark_cells(
    picture: Image.Image, masked: Tensor, fresh: Tensor, *, zoom: int = 3
) -> Image.Image:
    """Enlarged; masked cells (H, W) grey, those just fixed outlined."""
    size = picture.width * zoom, picture.height * zoom
    page = picture.resize(size, Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(page)
    cell = size[0] // masked.shape[1]
    for row, column in (masked | fresh).nonzero().tolist():
        left, top = column * cell, row * cell
        box = left, top, left + cell - 1, top + cell - 1
        if masked[row, column]:
            draw.rectangle(box, fill=MASKED, outline=(112, 118, 128))
        else:
            draw.rectangle(box, outline=FRESH, width=2)
    return page


def save_pictures(pictures: Pictures, folder: Path, facts: Mapping[str, object]) -> None:
    """reconstruction.png, samples.png (real and drawn in turn) and unmasking.png."""
    cells = [cell for row in pictures.rows for cell in row]
    names = [*COLUMN_NAMES] * len(pictures.rows)
    grids = {"reconstruction": captioned_grid(cells, names, columns=len(COLUMN_NAMES))}
    every = [(split, sample) for split, group in pictures.samples.items() for sample in group]
    pairs = [picture for _, sample in every for picture in (sample.real, sample.drawn)]
    captions = [
        caption
        for split, sample in every
        for caption in (f"{split}: {sample.prompt}", f"drawn, seed {sample.seed}")
    ]
    grids["samples"] = captioned_grid(pairs, captions, columns=8)
    steps = [frame.caption for frame in pictures.frames]
    grids["unmasking"] = captioned_grid([f.picture for f in pictures.frames], steps, columns=7)
    for name, grid in grids.items():
        save_png(grid, folder / f"{name}.png", facts)
