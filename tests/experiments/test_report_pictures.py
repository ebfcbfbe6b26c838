"""What the report shows of a model: the same pictures as the model's own, in the right places."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dcar.evaluation.pictures import to_pil
from dcar.pipeline import DCARPipeline
from experiments.report_pictures import (
    FRESH,
    MASKED,
    Examples,
    Pictures,
    count_codes,
    draw_samples,
    mark_cells,
    read_examples,
    reconstruct,
    save_pictures,
)
from tests.toys import CODES, SIZE, ToyData, toy_model


@pytest.fixture(scope="module")
def pipeline() -> DCARPipeline:
    return DCARPipeline(toy_model())


@pytest.fixture(scope="module")
def examples() -> Examples:
    return read_examples(ToyData(4, count=6).train_dataloader())


@pytest.fixture(scope="module")
def drawn(pipeline: DCARPipeline, examples: Examples):
    return draw_samples(pipeline, {"train": examples.spread(2), "val": examples.spread(3)})


def test_a_whole_loader_is_read_or_its_first_images(examples: Examples) -> None:
    assert examples.image.shape == (6, 3, SIZE, SIZE)
    assert examples.captions == [f"toy {index}" for index in range(6)]
    few = read_examples(ToyData(4, count=6).train_dataloader(), limit=3)
    assert few.captions == examples.captions[:3] and torch.equal(few.image, examples.image[:3])


def test_examples_are_spread_over_the_whole_set(examples: Examples) -> None:
    half = examples.spread(3)
    assert half.captions == ["toy 0", "toy 2", "toy 4"]
    assert torch.equal(half.image, examples.image[::2])
    assert examples.spread(100).captions == examples.captions


def test_every_latent_is_counted_once(pipeline: DCARPipeline, examples: Examples) -> None:
    tokenizer = pipeline.model.tokenizer
    counts = count_codes(tokenizer, examples.image)
    ids = tokenizer.encode(examples.image).ids
    assert counts.shape == (CODES,) and counts.sum() == ids.numel()
    assert counts[ids[0, 0, 0]] == (ids == ids[0, 0, 0]).sum()


def test_a_row_is_input_discrete_hybrid_error(pipeline: DCARPipeline, examples: Examples) -> None:
    tokenizer = pipeline.model.tokenizer
    rows = reconstruct(tokenizer, examples.image)
    latents = tokenizer.encode(examples.image)
    assert len(rows) == 6 and rows[2][0] == to_pil(examples.image[2])
    assert rows[2][1] == to_pil(tokenizer.decode(latents.discrete)[2])
    assert rows[2][2] == to_pil(tokenizer.decode(latents.continuous)[2])


def test_samples_are_the_pipeline_s_own_with_seeds_in_order(pipeline, examples, drawn) -> None:
    groups, _ = drawn
    assert [len(group) for group in groups.values()] == [2, 3]
    sample = groups["val"][1]
    assert (sample.prompt, sample.seed) == ("toy 2", 3)
    assert sample.real == to_pil(examples.image[2])
    (alone,) = pipeline(sample.prompt, seeds=[sample.seed])
    difference = np.asarray(alone).astype(int) - np.asarray(sample.drawn).astype(int)
    assert np.abs(difference).max() <= 1


def test_frames_cover_what_is_unknown_and_end_with_the_sample(drawn) -> None:
    groups, frames = drawn
    assert frames[-1].picture == groups["train"][0].drawn
    grey = [int((np.asarray(frame.picture) == MASKED).all(-1).sum()) for frame in frames[:-1]]
    assert len(grey) == 3 and grey[0] > grey[1] > grey[2] == 0
    known, _, every = frames[-2].caption.removeprefix("step 3: ").partition(" of ")
    assert every == f"{known} codes"


def test_the_last_step_shows_exactly_the_codes(pipeline, examples) -> None:
    """With every code known the frame is the plain decoding, enlarged, beside the outlines."""
    _, frames = draw_samples(pipeline, {"train": examples.spread(1)})
    tokens = pipeline.tokens(["toy 0"], seeds=[0], grid=_grid(pipeline))
    plain = to_pil(pipeline.decode(type(tokens)(tokens.ids, None))[0])
    plain = np.asarray(plain.resize(frames[-2].picture.size, Image.Resampling.BICUBIC))
    shown = np.asarray(frames[-2].picture)
    inside = ~(shown == FRESH).all(-1)
    assert inside.mean() > 0.2 and np.array_equal(shown[inside], plain[inside])


def _grid(pipeline: DCARPipeline) -> tuple[int, int]:
    side = SIZE // pipeline.model.tokenizer.downsample
    return side, side


def test_cells_are_marked_where_they_are() -> None:
    masked, fresh = torch.zeros(2, 2, dtype=torch.bool), torch.zeros(2, 2, dtype=torch.bool)
    masked[0, 1] = fresh[1, 0] = True
    page = mark_cells(Image.new("RGB", (16, 16), "blue"), masked, fresh)
    assert page.size == (48, 48)
    assert page.getpixel((36, 12)) == MASKED
    assert page.getpixel((0, 24)) == FRESH and page.getpixel((12, 36)) == (0, 0, 255)
    assert page.getpixel((12, 12)) == page.getpixel((36, 36)) == (0, 0, 255)


def test_the_files_carry_the_facts(pipeline, examples, drawn, tmp_path: Path) -> None:
    rows = reconstruct(pipeline.model.tokenizer, examples.spread(2).image)
    save_pictures(Pictures(rows, *drawn, counts=[1]), tmp_path / "new", {"run": "generator"})
    for name in ("reconstruction", "samples", "unmasking"):
        with Image.open(tmp_path / "new" / f"{name}.png") as picture:
            assert picture.text["run"] == "generator"
