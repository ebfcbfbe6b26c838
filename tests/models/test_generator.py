import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from dcar.models.draws import Draws
from dcar.models.generator import HybridGenerator
from dcar.models.residual_head import ResidualHead
from dcar.models.sampler import SamplerSettings, sample
from dcar.models.transformer import MaskedTransformer
from tests.ranks import join, run_on_two_ranks

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


def build(*, has_head: bool = True, **changes: Any) -> HybridGenerator:
    transformer = MaskedTransformer(
        num_codes=12, dim=16, depth=2, heads=2, text_dim=6, text_tokens=9
    )
    head = ResidualHead(channels=3, dim=16, width=8, depth=1, scale=0.2)
    torch.nn.init.normal_(transformer.output.weight, std=0.3)
    torch.nn.init.normal_(head.denoiser.output.weight, std=0.3)
    torch.nn.init.normal_(head.denoiser.output_modulation.weight, std=0.3)
    return HybridGenerator(
        transformer=transformer, residual_head=head if has_head else None, **changes
    )


def data(batch: int = 4) -> Inputs:
    ids = torch.randint(12, (batch, 3, 4))
    text_mask = torch.arange(7) < torch.randint(1, 8, (batch, 1))
    return ids, 0.2 * torch.randn(batch, 3, 3, 4), torch.randn(batch, 7, 6), text_mask


def test_the_published_generator_has_671_263_680_parameters() -> None:
    with torch.device("meta"):
        generator = HybridGenerator(
            transformer=MaskedTransformer(
                num_codes=16384, dim=1152, depth=28, heads=16, text_dim=768, text_tokens=300
            ),
            residual_head=ResidualHead(channels=32, dim=1152),
        )
    assert sum(weight.numel() for weight in generator.parameters()) == 671_263_680


def test_the_loss_is_the_token_loss_plus_the_weighted_residual_loss() -> None:
    terms = build(residual_weight=3.0).losses(*data(), Draws(0))
    assert set(terms) == {"loss", "token", "residual", "accuracy"}
    assert all(term.shape == () for term in terms.values())
    assert torch.allclose(terms["loss"], terms["token"] + 3 * terms["residual"])


@pytest.mark.parametrize("positions", ["all", "masked"])
def test_a_head_that_is_told_codes_gets_those_of_its_positions(positions: str) -> None:
    generator = build(residual_positions=positions)
    generator.residual_head = head = ResidualHead(
        channels=3, dim=16, width=8, depth=1, scale=0.2, num_codes=12
    )
    torch.nn.init.normal_(head.denoiser.output.weight)
    torch.nn.init.normal_(head.denoiser.output_modulation.weight)
    ids, residual, text, text_mask = data(1)
    generator.losses(ids, residual, text, text_mask, Draws(0))["residual"].backward()
    assert head.code_embedding is not None and head.code_embedding.weight.grad is not None
    met = (head.code_embedding.weight.grad != 0).any(1)
    assert met.any() and not met[[code not in ids for code in range(12)]].any()
    tokens = sample(generator, text, text_mask, grid=(3, 4), seeds=[0], settings=SamplerSettings())
    assert tokens.residual is not None and tokens.residual.isfinite().all()


def test_a_head_that_is_told_another_codebook_is_refused() -> None:
    transformer = build().transformer
    head = ResidualHead(channels=3, dim=16, width=8, depth=1, num_codes=11)
    with pytest.raises(ValueError, match="told 11 codes, the transformer has 12"):
        HybridGenerator(transformer=transformer, residual_head=head)


@pytest.mark.parametrize("is_training", [True, False])
def test_the_token_loss_is_cross_entropy_weighed_and_smoothed_in_training_alone(
    is_training: bool,
) -> None:
    generator = build(label_smoothing=0.2, unmasked_weight=0.3).train(is_training)
    ids, residual, text, text_mask = data()
    mask = generator._draw_mask(ids, Draws(0))
    visible = ids.masked_fill(mask.view_as(ids), 12)
    logits = generator.transformer(visible, text, text_mask).logits.flatten(0, 1)
    smoothing, weight = (0.2, 0.3) if is_training else (0.0, 0.0)
    each = F.cross_entropy(logits, ids.flatten(), label_smoothing=smoothing, reduction="none")
    weights = torch.where(mask.flatten(), 1.0, weight)
    terms = generator.losses(ids, residual, text, text_mask, Draws(0), caption_drop=0.0)
    assert torch.allclose(terms["token"], (each * weights).sum() / weights.sum())
    right = logits.argmax(1) == ids.flatten()
    assert torch.allclose(terms["accuracy"], right[mask.flatten()].float().mean())


def test_without_a_head_the_token_loss_is_the_loss() -> None:
    terms = build(has_head=False).losses(*data(), Draws(0))
    assert set(terms) == {"loss", "token", "accuracy"}
    assert torch.equal(terms["loss"], terms["token"])


def test_training_starts_at_the_loss_of_a_uniform_guess() -> None:
    generator = build()
    torch.nn.init.zeros_(generator.transformer.output.weight)
    terms = generator.losses(*data(), Draws(0))
    assert terms["token"].item() == pytest.approx(math.log(12), abs=1e-5)


@pytest.mark.parametrize("positions", ["all", "masked"])
def test_what_is_told_of_a_part_is_the_mean_of_its_own_tokens(positions: str) -> None:
    """The loss is a share of the step's, larger where more tokens are masked than elsewhere."""
    generator = build(residual_positions=positions, unmasked_weight=0.0)
    torch.nn.init.zeros_(generator.transformer.output.weight)
    parts = [generator.losses(*data(), Draws(0, part=part, parts=2)) for part in range(2)]
    for terms in parts:
        assert terms["token"].item() == pytest.approx(math.log(12), abs=1e-5)
        assert 0 <= terms["accuracy"] <= 1
    shares = [(terms["loss"] - terms["residual"]).item() for terms in parts]
    if positions == "all":
        assert shares[0] != pytest.approx(shares[1], abs=1e-2)
        assert sum(shares) / 2 == pytest.approx(math.log(12), abs=1e-5)
    else:  # all loss terms are shares of the same tokens
        ratios = [terms["loss"] / (terms["token"] + terms["residual"]) for terms in parts]
        assert sum(ratios).item() / 2 == pytest.approx(1, abs=1e-5)


def test_ids_at_masked_positions_do_not_leak_into_the_hidden_states() -> None:
    generator, (ids, residual, text, text_mask) = build(), data()
    mask = generator._draw_mask(ids, Draws(5)).view_as(ids)
    other = torch.where(mask, (ids + 1) % 12, ids)
    first = generator.losses(ids, residual, text, text_mask, Draws(5))
    second = generator.losses(other, residual, text, text_mask, Draws(5))
    assert torch.equal(first["residual"], second["residual"])
    assert not torch.allclose(first["token"], second["token"])
    visible = torch.where(mask, ids, (ids + 1) % 12)
    third = generator.losses(visible, residual, text, text_mask, Draws(5))
    assert not torch.allclose(first["residual"], third["residual"])


def test_residuals_never_enter_the_transformer() -> None:
    generator, (ids, residual, text, text_mask) = build(), data()
    first = generator.losses(ids, residual, text, text_mask, Draws(1))
    second = generator.losses(ids, residual + 1, text, text_mask, Draws(1))
    assert torch.equal(first["token"], second["token"])
    assert not torch.allclose(first["residual"], second["residual"])


def test_a_dropped_caption_leaves_its_length_but_not_its_words() -> None:
    generator, (ids, residual, text, text_mask) = build(), data()
    kept, dropped = (
        generator.losses(ids, residual, text, text_mask, Draws(2), caption_drop=drop)["token"]
        for drop in (0.0, 1.0)
    )
    assert not torch.allclose(kept, dropped)
    words = generator.losses(ids, residual, -text, text_mask, Draws(2), caption_drop=1.0)
    assert torch.equal(words["token"], dropped)
    length = generator.losses(ids, residual, text, ~text_mask, Draws(2), caption_drop=1.0)
    assert not torch.allclose(length["token"], dropped)
    null = generator.transformer.null_text[:7].expand_as(text)
    as_null = generator.losses(ids, residual, null, text_mask, Draws(2), caption_drop=0.0)
    assert torch.equal(as_null["token"], dropped)


def test_captions_are_dropped_image_by_image_at_the_given_rate() -> None:
    generator = build(caption_drop=0.25)
    text = torch.ones(4000, 7, 6)
    kept = (generator._drop_captions(text, 0.25, Draws(0)) == 1).flatten(1)
    assert torch.equal(kept.all(1), kept.any(1))
    assert kept.all(1).float().mean().item() == pytest.approx(0.75, abs=0.03)


def test_accuracy_counts_masked_tokens_alone() -> None:
    generator, (ids, residual, text, text_mask) = build(), data()
    torch.nn.init.zeros_(generator.transformer.output.weight)
    generator.transformer.output.bias.data[5] = 9.0
    mask = generator._draw_mask(ids, Draws(0)).view_as(ids)
    right = torch.where(mask, 5, 4)
    assert generator.losses(right, residual, text, text_mask, Draws(0))["accuracy"] == 1
    wrong = torch.where(mask, 4, 5)
    assert generator.losses(wrong, residual, text, text_mask, Draws(0))["accuracy"] == 0


def test_the_residual_loss_trains_the_backbone_too() -> None:
    generator = build()
    generator.losses(*data(), Draws(0))["residual"].backward()
    assert bool(generator.transformer.blocks[0].attention.qkv.weight.grad.any())
    assert generator.transformer.output.weight.grad is None  # read before the output layer


def test_the_head_alone_learns_from_whole_pictures() -> None:
    """Its loss is that of hidden states in which every token is seen, whatever would be masked."""
    generator, (ids, residual, text, text_mask) = build(caption_drop=1.0), data()
    with torch.no_grad():
        seen = generator.transformer(ids, text, text_mask).hidden
        target = rearrange(residual, "b c h w -> b (h w) c")
        draws = Draws(0)
        draws.rand(len(ids), 1, 1)  # that of the captions comes first
        expected = generator.residual_head.loss(target, seen, draws, ids=ids.flatten(1))
        given = (ids, residual, text, text_mask)
        losses = generator.losses(*given, Draws(0), caption_drop=0.0, head_alone=True)
        dropped = generator.losses(*given, Draws(0), head_alone=True)
    assert losses["loss"] == losses["residual"] == expected
    assert dropped["loss"] != expected


def test_without_the_residual_s_term_the_others_are_the_same() -> None:
    generator, given = build().eval(), data()
    with torch.no_grad():
        whole = generator.losses(*given, Draws(0), caption_drop=0.0)
        alone = generator.losses(*given, Draws(0), caption_drop=0.0, tokens_alone=True)
    assert alone.keys() == whole.keys() - {"residual"}
    assert all(torch.equal(alone[name], whole[name]) for name in ("token", "accuracy"))
    torch.testing.assert_close(
        alone["loss"], whole["loss"] - generator.residual_weight * whole["residual"]
    )


def test_the_residual_loss_can_be_kept_to_masked_positions() -> None:
    generator, (ids, residual, text, text_mask) = build(residual_positions="masked"), data()
    mask = generator._draw_mask(ids, Draws(0)).view_as(ids)[:, None]
    first = generator.losses(ids, residual, text, text_mask, Draws(0))["residual"]
    elsewhere = residual + (~mask) * 1.0
    second = generator.losses(ids, elsewhere, text, text_mask, Draws(0))["residual"]
    assert torch.equal(first, second)


def gradients(generator: HybridGenerator, inputs: Inputs, draws: Draws) -> list[Tensor]:
    generator.zero_grad()
    generator.losses(*inputs, draws)["loss"].backward()
    return [weight.grad.clone() for weight in generator.parameters()]


def gradients_on_rank(rank: int, folder: Path, generator: HybridGenerator, inputs: Inputs) -> None:
    join(rank, folder)
    ids, residual, text, text_mask = (part[rank::2] for part in inputs)
    own = gradients(generator, (ids, residual, text, text_mask), Draws(11, rank=rank, world=2))
    torch.save(own, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("positions", ["all", "masked"])
def test_gradients_of_two_ranks_average_to_those_of_one_process(
    tmp_path: Path, positions: str
) -> None:
    generator, inputs = build(residual_positions=positions, caption_drop=0.5), data()
    whole = gradients(generator, inputs, Draws(11))  # masks of 12 and 19 tokens
    run_on_two_ranks(gradients_on_rank, tmp_path, generator, inputs)
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for one, *split in zip(whole, *parts, strict=True):
        assert torch.allclose(one, sum(split) / 2, atol=1e-5)


@pytest.mark.parametrize("positions", ["all", "masked"])
def test_gradients_of_two_parts_of_a_step_average_to_those_of_the_whole(positions: str) -> None:
    generator, inputs = build(residual_positions=positions, caption_drop=0.5), data()
    whole = gradients(generator, inputs, Draws(11))
    parts = [
        gradients(generator, tuple(i.chunk(2)[part] for i in inputs), Draws(11, part=part, parts=2))
        for part in range(2)
    ]
    for one, *split in zip(whole, *parts, strict=True):
        assert torch.allclose(one, sum(split) / 2, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"caption_drop": 1.5}, "caption_drop 1.5"),
        ({"label_smoothing": -0.1}, "label_smoothing -0.1"),
        ({"mask_schedule": "sine"}, "mask_schedule 'sine'"),
        ({"residual_positions": "some"}, "residual_positions 'some'"),
    ],
)
def test_impossible_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**changes)
