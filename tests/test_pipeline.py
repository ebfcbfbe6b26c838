"""Prompt to picture: arguments, seeds, batches, saving."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dcar.errors import NonFiniteError
from dcar.models.checkpoints import load_model
from dcar.models.sampler import SamplerSettings
from dcar.pipeline import DCARPipeline
from tests.toys import ROOT, SIZE, toy_model


@pytest.fixture(scope="module")
def pipeline() -> DCARPipeline:
    return DCARPipeline(toy_model())


def pixels(picture) -> np.ndarray:
    return np.asarray(picture)


def test_one_prompt_gives_one_rgb_picture(pipeline: DCARPipeline) -> None:
    (picture,) = pipeline("a red apple")
    assert picture.size == (SIZE, SIZE) and picture.mode == "RGB"


def test_an_image_depends_on_its_own_seed_and_prompt_alone(pipeline: DCARPipeline) -> None:
    alone = pipeline("a cat", seeds=7)[0]
    together = pipeline(["a dog", "a cat", "a rather long bird"], seeds=[1, 7, 3], batch_size=2)
    assert np.array_equal(pixels(alone), pixels(together[1]))
    for seeds in (np.int64(7), torch.tensor(7), np.array([7]), torch.tensor([7])):
        assert np.array_equal(pixels(alone), pixels(pipeline("a cat", seeds=seeds)[0]))
    assert not np.array_equal(pixels(alone), pixels(pipeline("a cat", seeds=8)[0]))


def test_other_sizes_are_multiples_of_the_downsampling(pipeline: DCARPipeline) -> None:
    (picture,) = pipeline("a", height=8, width=24)
    assert picture.size == (24, 8)


def test_a_saved_pipeline_draws_the_same_picture(pipeline: DCARPipeline, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path)
    again = DCARPipeline.from_pretrained(tmp_path)
    assert np.array_equal(pixels(pipeline("a")[0]), pixels(again("a")[0]))


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("prompts", {"prompts": []}),
        ("prompts", {"prompts": ["a", 3]}),
        ("seeds", {"seeds": [1, 2]}),
        ("seeds", {"seeds": -1}),
        ("seeds", {"seeds": np.array([1, 2])}),
        ("seeds", {"seeds": [1.5]}),
        ("seeds", {"seeds": 1.5}),
        ("seeds", {"seeds": "1"}),
        ("steps", {"steps": 0}),
        ("steps", {"steps": -1}),
        ("guidance", {"guidance": float("nan")}),
        ("height", {"height": 17}),
        ("width", {"width": -8}),
        ("batch_size", {"batch_size": 0}),
    ],
)
def test_a_bad_argument_is_named(pipeline: DCARPipeline, name: str, arguments: dict) -> None:
    with pytest.raises(ValueError, match=name):
        pipeline(**{"prompts": "a"} | arguments)


@pytest.mark.parametrize("prompt", ["", "x" * 10_000, "\x00\x1b[31m\u202e", "é" * 40])
def test_odd_prompts_still_give_a_picture(pipeline: DCARPipeline, prompt: str) -> None:
    assert pipeline(prompt)[0].size == (SIZE, SIZE)


def test_bfloat16_draws_the_same_tokens_nearly_the_same(pipeline: DCARPipeline) -> None:
    half = DCARPipeline(pipeline.model, precision="bfloat16")
    side = SIZE // pipeline.model.tokenizer.downsample
    grid, settings = (side, side), pipeline.model.sampler
    tokens = pipeline.tokens(["a red apple"], seeds=[0], grid=grid, settings=settings)
    exact, rounded = (one.decode(tokens) for one in (pipeline, half))
    assert 0 < (exact - rounded).abs().max() < 0.05
    assert half("a red apple", seeds=0)[0].size == (SIZE, SIZE)


@pytest.mark.parametrize("full", [True, False])
def test_the_head_draws_in_fp32_or_as_all_else_does(full: bool) -> None:
    model, seen = toy_model(), set()
    model = replace(model, sampler=replace(model.sampler, residual_full_precision=full))
    inner = model.generator.residual_head.denoiser.input
    inner.register_forward_hook(lambda _, inputs, output: seen.add(output.dtype))
    DCARPipeline(model, precision="bfloat16")("a cat")
    assert seen == {torch.float32 if full else torch.bfloat16}


def test_pictures_with_nan_in_them_are_an_error_that_says_what_to_do() -> None:
    model = toy_model()
    next(model.tokenizer.decoder.parameters()).data.mul_(1e8)  # beyond fp16
    assert DCARPipeline(model)("a cat")
    with pytest.raises(NonFiniteError, match="take precision=bfloat16 or float32"):
        DCARPipeline(model, precision="float16")("a cat")


def test_so_are_those_of_codes_that_were_drawn_from_nan() -> None:
    model = toy_model()
    model.sampler = SamplerSettings(steps=2, residual_refinement=False)
    model.generator.transformer.output.bias.data[3] = torch.nan
    with pytest.raises(NonFiniteError, match="made of NaN: look at the weights"):
        DCARPipeline(model)("a cat")


def test_a_picture_is_edited_as_the_page_says() -> None:
    pipeline, prompts = DCARPipeline.from_pretrained("mini"), ["a sunflower, 3d style"]
    image = pipeline.decode(pipeline.tokens(["a red apple, 3d style"], seeds=[1], grid=(8, 8)))
    page = (ROOT / "docs/method.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", page, re.S)
    named = {"pipeline": pipeline, "prompts": prompts, "image": image}
    exec(block, named)
    latents, tokens = named["latents"], named["tokens"]
    assert torch.equal(tokens.ids[:, 4:], latents.ids[:, 4:])
    assert torch.equal(tokens.residual[:, :, 4:], latents.residual[:, :, 4:])
    assert not torch.equal(tokens.ids[:, :4], latents.ids[:, :4])
    assert named["image"].shape == image.shape


@pytest.mark.parametrize("device", ["cuda:99", "nowhere"])
def test_a_device_that_is_not_there_is_named(device: str) -> None:
    with pytest.raises(ValueError, match=f"device={device}: "):
        DCARPipeline(toy_model(), device=device)


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(ValueError, match="precision='int4'"):
        DCARPipeline(toy_model(), precision="int4")


class Narrowings(TorchDispatchMode):
    """How many matrices are turned from fp32 into a narrower type."""

    def __init__(self) -> None:
        super().__init__()
        self.weights: list[int] = []
        self.known: set[int] = set()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if "_to_copy" in str(function) and arguments[0].data_ptr() in self.known:
            self.weights.append(arguments[0].data_ptr())
        return function(*arguments, **(keywords or {}))


def test_in_bfloat16_a_weight_is_narrowed_once_a_batch_and_learns_no_more_than_before() -> None:
    model = load_model("mini")
    half = DCARPipeline(model, precision="bfloat16")
    flags = [p.requires_grad for p in model.generator.parameters()]
    with Narrowings() as seen:
        seen.known = {p.data_ptr() for p in model.generator.transformer.parameters()}
        picture = half("a red apple, flat style", steps=3)[0]
    assert len(seen.weights) > 40 and len(set(seen.weights)) == len(seen.weights)
    assert [p.requires_grad for p in model.generator.parameters()] == flags
    assert picture.tobytes() == half("a red apple, flat style", steps=3)[0].tobytes()
