import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dcar.models.generator import HybridGenerator
from dcar.models.masking import halton_rank
from dcar.models.noise import ImageNoise
from dcar.models.residual_head import FlowResidualHead, ResidualHead
from dcar.models.sampler import SamplerSettings, Tokens, draw_residual, sample
from dcar.models.transformer import MaskedTransformer
from tests.toys import fixed_per_step

CODES, CHANNELS, OFFICIAL = 11, 3, SamplerSettings()


def build(*, kind: type | None = ResidualHead) -> HybridGenerator:
    torch.manual_seed(1)
    transformer = MaskedTransformer(
        num_codes=CODES, dim=16, depth=2, heads=2, text_dim=6, text_tokens=9
    )
    for layer in (transformer.output, *transformer.caption_projection.children()):
        torch.nn.init.normal_(layer.weight, std=0.5)  # captions matter, codes differ
    head = None
    if kind is not None:
        head = kind(channels=CHANNELS, dim=16, width=8, depth=1, scale=0.2, sample_steps=4)
        torch.nn.init.normal_(head.denoiser.output.weight, std=0.3)
        torch.nn.init.normal_(head.denoiser.output_modulation.weight, std=0.3)
    return HybridGenerator(transformer=transformer, residual_head=head)


def captions(batch: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    lengths = torch.randint(1, 8, (batch, 1), generator=generator)
    return torch.randn(batch, 7, 6, generator=generator), torch.arange(7) < lengths


def draw(generator: HybridGenerator, batch: int = 3, **changes: Any) -> Tokens:
    text, text_mask = captions(batch)
    arguments = {"grid": (3, 4), "seeds": list(range(batch)), "settings": OFFICIAL} | changes
    text, text_mask = arguments.pop("text", text), arguments.pop("text_mask", text_mask)
    return sample(generator, text, text_mask, **arguments)


def same(one: Tokens, two: Tokens) -> bool:
    assert one.residual is not None and two.residual is not None
    return torch.equal(one.ids, two.ids) and torch.allclose(one.residual, two.residual, atol=1e-5)


GENERATOR = build()


@settings(deadline=None, max_examples=100)
@given(
    grid=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    steps=st.integers(1, 30),
    seed=st.integers(0, 2**63 - 1),
    batch=st.integers(1, 3),
    guidance=st.sampled_from([0.0, 1.0, 4.5]),
    decay=st.sampled_from(["constant", "linear", "power-cosine"]),
    selection=st.sampled_from(["confidence", "halton", "random"]),
    count_from=st.sampled_from(["first_row", "per_row"]),
)
def test_every_token_is_fixed_exactly_once_and_none_is_left(
    grid: tuple[int, int],
    steps: int,
    seed: int,
    batch: int,
    guidance: float,
    decay: str,
    selection: str,
    count_from: str,
) -> None:
    times_fixed = torch.zeros(batch, *grid, dtype=torch.long)
    counts, seen = [], []

    def record(step: int, ids: Tensor, newly_fixed: Tensor) -> None:
        times_fixed.add_(newly_fixed)
        counts.append(newly_fixed.flatten(1).sum(1).tolist())
        seen.append((ids, newly_fixed))

    options = SamplerSettings(
        steps=steps,
        guidance=guidance,
        guidance_decay=decay,
        selection=selection,
        count_from=count_from,
    )
    seeds = [(seed + image) % 2**63 for image in range(batch)]
    tokens = draw(GENERATOR, batch, grid=grid, seeds=seeds, settings=options, on_step=record)
    assert bool((times_fixed == 1).all())
    assert bool(((tokens.ids >= 0) & (tokens.ids < CODES)).all())
    expected = fixed_per_step(grid[0] * grid[1], steps)
    assert counts == [[count] * batch for count in expected]
    for ids, newly_fixed in seen:  # what was fixed never changes again
        assert torch.equal(ids[newly_fixed], tokens.ids[newly_fixed])


@pytest.mark.parametrize("kind", [ResidualHead, FlowResidualHead])
def test_an_image_depends_on_its_seed_and_not_on_its_batch(kind: type) -> None:
    generator = build(kind=kind)
    text, text_mask = captions(3)
    together = draw(generator, seeds=[7, 8, 9])
    alone = draw(generator, 1, text=text[1:2], text_mask=text_mask[1:2], seeds=[8])
    assert together.ids.shape == (3, 3, 4)
    assert together.residual is not None and together.residual.shape == (3, CHANNELS, 3, 4)
    assert same(Tokens(together.ids[1:2], together.residual[1:2]), alone)
    assert not same(together, draw(generator, seeds=[17, 18, 19]))


def test_the_global_generator_has_no_part_in_sampling() -> None:
    first = draw(GENERATOR)
    torch.manual_seed(77)
    assert same(first, draw(GENERATOR))


def test_guidance_zero_is_the_model_without_an_unconditional_half() -> None:
    generator = build()
    expected = draw(generator, settings=replace(OFFICIAL, guidance=0.0))
    assert not same(expected, draw(generator))
    generator.transformer.null_text.fill_(math.nan)
    for decay in ("constant", "linear", "power-cosine"):
        plain = replace(OFFICIAL, guidance=0.0, guidance_decay=decay)
        assert same(expected, draw(generator, settings=plain))


def test_linear_guidance_runs_its_first_step_without_the_unconditional_half() -> None:
    generator, first = build(), []
    generator.transformer.null_text.fill_(math.nan)

    def keep_first(step: int, ids: Tensor, newly_fixed: Tensor) -> None:
        if step == 0:
            first.append(ids)

    for guidance in (0.0, 4.5):
        options = replace(OFFICIAL, guidance=guidance, guidance_decay="linear")
        draw(generator, settings=options, on_step=keep_first)
    assert torch.equal(*first)


@pytest.mark.parametrize("condition", ["last_step", "extra_forward"])
def test_the_residual_is_guided_from_the_null_caption_to_the_prompt(condition: str) -> None:
    generator, (text, text_mask) = build(), captions(3)
    options = replace(OFFICIAL, steps=1, residual_guidance=2.0, residual_condition=condition)
    tokens = draw(generator, settings=options)
    seen = tokens.ids if condition == "extra_forward" else torch.full((3, 3, 4), CODES)
    null = generator.transformer.null_text[:7].expand_as(text)
    noise = ImageNoise([0, 1, 2], torch.device("cpu"))
    noise.rand(1, 2, 12)  # what unmasking draws
    expected = generator.residual_head.sample(
        generator.transformer(seen, text, text_mask).hidden,
        hidden_uncond=generator.transformer(seen, null, text_mask).hidden,
        guidance=2.0,
        noise=noise,
    )
    assert torch.allclose(tokens.residual.flatten(2).mT, expected, atol=1e-5)
    unguided = draw(generator, settings=replace(options, residual_guidance=0.0))
    assert torch.equal(tokens.ids, unguided.ids) and not same(tokens, unguided)


def test_one_step_without_noise_is_the_greedy_guess_of_the_guided_model() -> None:
    generator, (text, text_mask) = build(), captions(3)
    ids = torch.full((3, 3, 4), CODES)
    null = generator.transformer.null_text[:7].expand_as(text)
    logits = generator.transformer(ids, text, text_mask).logits
    unconditional = generator.transformer(ids, null, text_mask).logits
    expected = (5.5 * logits - 4.5 * unconditional).argmax(2)
    assert torch.equal(
        draw(generator, settings=replace(OFFICIAL, steps=1)).ids.flatten(1), expected
    )


def test_padding_of_the_captions_changes_nothing() -> None:
    text, text_mask = captions(3)
    longer = torch.nn.functional.pad(text, (0, 0, 0, 2), value=50.0)
    padded = torch.nn.functional.pad(text_mask, (0, 2))
    assert same(draw(GENERATOR), draw(GENERATOR, text=longer, text_mask=padded))


def test_an_empty_caption_samples_like_any_other() -> None:
    empty = torch.zeros(3, 7, dtype=torch.bool)
    tokens = draw(GENERATOR, text_mask=empty)
    assert tokens.residual is not None and tokens.residual.isfinite().all()


def test_the_null_caption_is_seen_in_the_length_of_the_prompt_or_in_full() -> None:
    results = {}
    for null_mask in ("prompt", "full"):
        for value in (0.0, 5.0):  # change the last rows of the null caption, beyond the prompts
            generator = build()
            generator.transformer.null_text[7:] = value
            options = replace(OFFICIAL, null_mask=null_mask)
            results[null_mask, value] = draw(generator, settings=options)
    assert same(results["prompt", 0.0], results["prompt", 5.0])
    assert not same(results["full", 0.0], results["full", 5.0])


@pytest.mark.parametrize(
    "changes",
    [
        {"confidence": "log_prob"},
        {"selection": "halton"},
        {"selection": "random"},
        {"softmax_annealing": False},
        {"randomize_temperature": 9.0},
        {"guidance_decay": "linear"},
        {"schedule": "cosine"},
        {"residual_temperature": 0.0},
        {"residual_steps": 2},
        {"residual_clip": 0.0},
        {"residual_guidance": 0.0},
    ],
)
def test_every_option_changes_the_sample(changes: dict[str, Any]) -> None:
    wide = {"grid": (8, 8), "seeds": [0, 1, 2]}
    expected = draw(GENERATOR, **wide)
    changed = draw(GENERATOR, **wide, settings=replace(OFFICIAL, **changes))
    assert not same(expected, changed)


def test_halton_selection_fixes_the_same_places_in_every_image() -> None:
    places = []
    options = replace(OFFICIAL, selection="halton", steps=4)
    draw(GENERATOR, settings=options, on_step=lambda step, ids, fixed: places.append(fixed))
    rank, done = halton_rank(3, 4).view(3, 4), 0
    for fixed, count in zip(places, fixed_per_step(12, 4), strict=True):
        expected = (rank >= done) & (rank < done + count)
        assert torch.equal(fixed, expected.expand(3, 3, 4))
        done += count


def test_which_tokens_are_fixed_first_does_not_follow_from_their_ids() -> None:
    generator, first = build(), []
    torch.nn.init.zeros_(generator.transformer.output.weight)  # every id alike: noise decides

    def keep_first(step: int, ids: Tensor, newly_fixed: Tensor) -> None:
        if step == 0:
            first.append(ids[newly_fixed].float())

    draw(generator, grid=(16, 16), on_step=keep_first)
    assert first[0].mean().item() == pytest.approx((CODES - 1) / 2, abs=2)


@pytest.mark.parametrize("count_from", ["first_row", "per_row"])
def test_editing_leaves_given_tokens_and_their_residuals(count_from: str) -> None:
    keep = torch.rand(3, 3, 4) < torch.tensor([0.1, 0.5, 0.9])[:, None, None]
    given_ids = torch.randint(CODES, (3, 3, 4))
    given_residual = torch.randn(3, CHANNELS, 3, 4)
    fixed: list[Tensor] = []
    tokens = draw(
        GENERATOR,
        settings=replace(OFFICIAL, count_from=count_from, steps=4),
        initial_ids=given_ids.masked_fill(~keep, CODES),
        initial_residual=given_residual,
        on_step=lambda step, ids, newly_fixed: fixed.append(newly_fixed.flatten(1).sum(1)),
    )
    per_step, missing = torch.stack(fixed), (~keep).flatten(1).sum(1)
    assert torch.equal(per_step.sum(0), missing)
    assert torch.equal((per_step > 0).sum(0), missing.clamp(max=4))  # each step fixes something
    assert torch.equal(tokens.ids[keep], given_ids[keep])
    assert bool((tokens.ids < CODES).all())
    assert tokens.residual is not None
    kept = keep[:, None].expand_as(given_residual)
    assert torch.equal(tokens.residual[kept], given_residual[kept])
    assert not bool((tokens.residual == given_residual)[~kept].any())


def test_an_edited_image_does_not_depend_on_how_much_others_change() -> None:
    text, text_mask = captions(2)
    ids = torch.randint(CODES, (2, 3, 4))
    ids[0], ids[1, 0, :3] = CODES, CODES
    options = replace(OFFICIAL, count_from="per_row", steps=6)
    both = draw(GENERATOR, 2, settings=options, initial_ids=ids, seeds=[4, 5])
    alone = draw(
        GENERATOR,
        1,
        settings=options,
        initial_ids=ids[1:],
        seeds=[5],
        text=text[1:],
        text_mask=text_mask[1:],
    )
    assert both.residual is not None
    assert same(Tokens(both.ids[1:], both.residual[1:]), alone)


def test_new_residuals_can_be_drawn_for_tokens_that_stay() -> None:
    ids, residual = torch.randint(CODES, (3, 3, 4)), torch.randn(3, CHANNELS, 3, 4)
    keep = torch.zeros(3, 3, 4, dtype=torch.bool)
    keep[:, 1] = True
    tokens = draw(GENERATOR, initial_ids=ids, initial_residual=residual, keep_residual=keep)
    assert torch.equal(tokens.ids, ids)
    assert tokens.residual is not None
    assert torch.equal(tokens.residual[:, :, 1], residual[:, :, 1])
    assert not bool((tokens.residual == residual)[:, :, 0].any())


def test_settings_of_ids_play_no_part_in_residuals_of_finished_ones() -> None:
    ids, drawn = draw(GENERATOR).ids, []
    for steps in (1, 9):
        given = replace(OFFICIAL, steps=steps, guidance=steps, residual_guidance=1.0)
        drawn.append(
            draw_residual(GENERATOR, *captions(3), ids=ids, seeds=range(3), settings=given)
        )
    assert torch.equal(*drawn)


def test_discrete_tokens_alone_have_no_residual() -> None:
    hybrid, bare = build(), build(kind=None)
    bare.transformer.load_state_dict(hybrid.transformer.state_dict())
    expected = draw(hybrid).ids
    assert draw(bare).residual is None
    assert torch.equal(draw(bare).ids, expected)
    without = draw(hybrid, settings=replace(OFFICIAL, residual_refinement=False))
    assert without.residual is None
    assert torch.equal(without.ids, expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grid": (0, 4)}, "grid"),
        ({"grid": (3, 4.0)}, "grid"),
        ({"seeds": [1, 2]}, "seeds has 2"),
        ({"seeds": [1, 2, -3]}, "seeds has -3"),
        ({"seeds": [1, 2, 0.5]}, "seeds has 0.5"),
        ({"text": torch.zeros(3, 7, 5)}, "text "),
        ({"text": torch.zeros(3, 10, 6)}, "text has 10"),
        ({"text_mask": torch.ones(3, 6, dtype=torch.bool)}, "text_mask"),
        ({"text_mask": torch.ones(3, 7)}, "text_mask"),
        ({"initial_ids": torch.zeros(3, 4, 4, dtype=torch.long)}, "initial_ids"),
        ({"initial_ids": torch.zeros(3, 3, 4)}, "initial_ids"),
        ({"initial_ids": torch.full((3, 3, 4), CODES + 1)}, "initial_ids"),
        ({"initial_residual": torch.zeros(3, 2, 3, 4)}, "initial_residual"),
        ({"initial_residual": torch.zeros(3, 3, 3, 4)}, "initial_residual"),
        ({"keep_residual": torch.ones(3, 3, 4, dtype=torch.bool)}, "keep_residual"),
        (
            {"initial_residual": torch.zeros(3, 3, 3, 4), "keep_residual": torch.ones(3, 3, 4)},
            "keep_residual",
        ),
    ],
)
def test_arguments_that_do_not_fit_are_refused_by_name(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        draw(GENERATOR, **changes)


def test_residuals_to_keep_need_a_head() -> None:
    with pytest.raises(ValueError, match="initial_residual"):
        draw(build(kind=None), initial_residual=torch.zeros(3, 3, 3, 4))


def test_captions_may_come_in_bf16_as_t5_gives_them() -> None:
    text, text_mask = captions(3)
    unguided = replace(OFFICIAL, guidance=0.0, residual_guidance=0.0)
    half, whole = text.bfloat16(), text.bfloat16().float()
    drawn = [draw(GENERATOR, text=t, text_mask=text_mask, settings=unguided) for t in (half, whole)]
    assert same(*drawn) and draw(GENERATOR, text=half, text_mask=text_mask).ids.shape == (3, 3, 4)


@pytest.mark.parametrize(
    "changes",
    [
        {"residual_refinement": False},
        {"residual_guidance": 0.0},
        {"residual_guidance": 0.0, "guidance_decay": "power-cosine"},
        {"residual_guidance": 2.0},
    ],
)
def test_an_image_with_one_token_to_draw_may_stand_beside_one_with_many(changes: dict) -> None:
    """Its only step is the first, which a rising guidance leaves unguided."""
    options = replace(OFFICIAL, **{"guidance_decay": "linear", "steps": 4} | changes)
    ids = torch.zeros(3, 3, 4, dtype=torch.int64)
    ids[0, 0, 0] = ids[1, :2] = ids[2, 1, 1] = CODES  # the mask id
    tokens = draw(GENERATOR, settings=options, initial_ids=ids)
    assert bool((tokens.ids < CODES).all() and (tokens.ids == ids)[ids < CODES].all())


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (ResidualHead, {"residual_steps": 2000}, "residual_steps 2000 is above the head's 1000"),
        (FlowResidualHead, {"residual_clip": 1.0}, "residual_clip must be null or 0"),
    ],
)
def test_what_the_head_cannot_do_is_refused_before_anything_is_drawn(
    kind: type, changes: dict, message: str
) -> None:
    steps: list[int] = []
    options = {"settings": replace(OFFICIAL, **changes), "on_step": lambda *at: steps.append(at[0])}
    with pytest.raises(ValueError, match=message):
        draw(build(kind=kind), **options)
    assert steps == []
