import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dcar.models.transformer import Block, MaskedTransformer, attend, position_codes


def tiny(**changes: Any) -> MaskedTransformer:
    sizes = {"num_codes": 20, "dim": 16, "depth": 2, "heads": 2, "text_dim": 6, "text_tokens": 9}
    model = MaskedTransformer(**(sizes | changes))
    torch.nn.init.normal_(model.output.weight)
    return model


def inputs(batch: int = 2, height: int = 3, width: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    ids = torch.randint(21, (batch, height, width))
    mask = torch.arange(9) < torch.randint(1, 10, (batch, 1))
    return ids, torch.randn(batch, 9, 6), mask


def test_the_published_size_has_635_071_360_parameters() -> None:
    with torch.device("meta"):
        model = MaskedTransformer(
            num_codes=16384, dim=1152, depth=28, heads=16, text_dim=768, text_tokens=300
        )
    assert sum(weight.numel() for weight in model.parameters()) == 635_071_360


def test_the_forward_pass_is_embeddings_and_positions_through_all_blocks() -> None:
    """`hidden` is before the last norm, logits are after it (docs/method.md)."""
    model, (ids, text, mask) = tiny(), inputs()
    hidden = model.token_embedding(ids.flatten(1)) + position_codes(3, 4, 16, base_grid=16)
    caption = model.caption_projection(text)
    for block in model.blocks:
        keys, values = block.cross_attention.project(caption)
        hidden = block(hidden, keys, values, mask[:, None, None, :])
    output = model(ids, text, mask)
    assert torch.allclose(output.hidden, hidden, atol=1e-5)
    logits = model.output(F.layer_norm(hidden, (16,), eps=1e-6))
    assert torch.allclose(output.logits, logits, atol=1e-4)
    moved = model(ids.flip(2), text, mask).hidden
    assert not torch.allclose(moved.mean(1), hidden.mean(1), atol=1e-3)  # positions matter


def test_a_block_within_another_module_is_still_run() -> None:
    class Wrapped(torch.nn.Module):
        def __init__(self, inner: Block):
            super().__init__()
            self.inner = inner

        def __getattr__(self, name: str) -> Any:  # as torch.compile's
            return super().__getattr__(name) if name == "inner" else getattr(self.inner, name)

        def forward(self, *arguments: Tensor) -> Tensor:
            return self.inner(*arguments)

    model, arguments = tiny(), inputs()
    expected = model(*arguments).logits
    model.blocks[1] = Wrapped(model.blocks[1])
    assert torch.equal(model(*arguments).logits, expected)


def test_outputs_have_their_shapes_on_a_grid_that_is_not_square() -> None:
    ids, text, mask = inputs()
    output = tiny()(ids, text, mask)
    assert output.hidden.shape == (2, 12, 16)
    assert output.logits.shape == (2, 12, 20)


def test_position_codes_of_a_half_grid_are_the_even_subset_of_the_full_one() -> None:
    full = position_codes(16, 16, 32, base_grid=16).view(16, 16, 32)
    half = position_codes(8, 8, 32, base_grid=16).view(8, 8, 32)
    assert torch.equal(half, full[::2, ::2])


def test_position_codes_name_the_column_first_and_the_row_second() -> None:
    codes = position_codes(3, 5, 8, base_grid=15).view(3, 5, 8)
    assert torch.equal(codes[0, :, :4], codes[2, :, :4])
    assert torch.equal(codes[:, 0, 4:], codes[:, 3, 4:])
    frequency = torch.tensor([1.0, 0.01])
    assert torch.allclose(codes[1, 2, :2], (2 * 3 * frequency).sin())
    assert torch.allclose(codes[1, 2, 6:], (1 * 5 * frequency).cos())
    assert len(codes.view(15, 8).unique(dim=0)) == 15


def test_a_new_model_predicts_every_code_alike() -> None:
    model = MaskedTransformer(num_codes=16384, dim=8, depth=1, heads=2, text_dim=6, text_tokens=9)
    ids, text, mask = inputs()
    logits = model(ids, text, mask).logits
    loss = F.cross_entropy(logits.flatten(0, 1), torch.randint(16384, (24,)))
    assert loss.item() == pytest.approx(math.log(16384), abs=1e-4)
    assert loss.item() == pytest.approx(9.7041, abs=1e-4)


def test_captions_encoded_once_give_the_same_output_as_encoding_them_each_time() -> None:
    model, (ids, text, mask) = tiny(), inputs(3)
    context = model.encode_text(text, mask)
    assert torch.equal(model.forward_context(ids, context).logits, model(ids, text, mask).logits)
    fewer = model.forward_context(ids[:2], context.first(2)).logits
    assert torch.allclose(fewer, model(ids, text, mask).logits[:2], atol=1e-5)


def test_padding_of_captions_has_no_influence() -> None:
    model, (ids, text, _) = tiny(), inputs()
    mask = (torch.arange(9) < 4).expand(2, 9)
    expected = model(ids, text[:, :4], mask[:, :4]).logits
    text[:, 4:] = 1e3
    assert torch.allclose(model(ids, text, mask).logits, expected, atol=1e-5)


def test_a_caption_without_real_tokens_gives_finite_outputs_and_gradients() -> None:
    model, (ids, text, _) = tiny(), inputs()
    mask = torch.tensor([[False] * 9, [True] * 9])
    logits = model(ids, text, mask).logits
    logits.sum().backward()
    assert logits.isfinite().all()
    assert all(weight.grad.isfinite().all() for weight in model.parameters())
    first_only = torch.tensor([[True] + [False] * 8, [True] * 9])
    assert torch.equal(model(ids, text, first_only).logits, logits)


def reference_block(block: Block, hidden: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """The block written out: explicit softmax, one head at a time."""

    def norm(rows: Tensor) -> Tensor:
        centred = rows - rows.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    def one_head(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        weights = (query @ key.mT / math.sqrt(query.shape[-1])).softmax(-1)
        return weights @ value

    own = block.attention
    query, key, value = own.qkv(norm(hidden)).split(8, dim=-1)
    query, key = own.query_norm(query), own.key_norm(key)
    heads = [one_head(*(part[..., cut] for part in (query, key, value))) for cut in HEADS]
    hidden = hidden + own.output(torch.cat(heads, -1))
    query = block.cross_attention.query(hidden)
    heads = [one_head(query[..., cut], keys[:, i], values[:, i]) for i, cut in enumerate(HEADS)]
    hidden = hidden + block.cross_attention.output(torch.cat(heads, -1))
    inner = block.mlp.inner(norm(hidden))
    cubic = math.sqrt(2 / math.pi) * (inner + 0.044715 * inner**3)
    return hidden + block.mlp.output(0.5 * inner * (1 + cubic.tanh()))


HEADS = (slice(0, 4), slice(4, 8))


def test_a_block_equals_its_written_out_form() -> None:
    block = Block(8, 2, 4.0).double()
    for norm in (block.attention.query_norm, block.attention.key_norm):
        torch.nn.init.normal_(norm.weight)
        torch.nn.init.normal_(norm.bias)
    hidden, text = 3 + torch.randn(2, 5, 8).double(), torch.randn(2, 6, 8).double()
    keys, values = block.cross_attention.project(text)
    mask = torch.ones(2, 1, 1, 6, dtype=torch.bool)
    expected = reference_block(block, hidden, keys, values)
    assert torch.allclose(block(hidden, keys, values, mask), expected, atol=1e-10)


def test_one_set_of_weights_serves_every_grid() -> None:
    model = tiny()
    assert "null_text" in model.state_dict()
    assert not any("position" in name for name in model.state_dict())
    for side in (2, 4):
        ids, text, mask = inputs(1, side, side)
        assert model(ids, text, mask).logits.shape == (1, side * side, 20)


def test_the_null_caption_follows_its_seed_and_is_never_trained() -> None:
    first, again, other = tiny(), tiny(), tiny(null_seed=1)
    assert torch.equal(first.null_text, again.null_text)
    assert not torch.equal(first.null_text, other.null_text)
    assert "null_text" not in dict(first.named_parameters())
    wide = tiny(text_dim=768, text_tokens=300).null_text
    assert wide.std().item() == pytest.approx(768**-0.5, rel=0.02)


def test_checkpointed_activations_give_the_same_gradients() -> None:
    model, arguments = tiny(), inputs()
    grads = []
    for checkpointed in (False, True):
        model.checkpoint_activations = checkpointed
        model.zero_grad()
        model(*arguments).logits.square().sum().backward()
        grads.append([weight.grad.clone() for weight in model.parameters()])
    assert all(torch.allclose(one, two) for one, two in zip(*grads, strict=True))


@pytest.mark.parametrize("is_masked", [False, True])
def test_both_forms_of_attention_agree(is_masked: bool) -> None:
    query, key, value = (torch.randn(2, 2, 5, 8, dtype=torch.bfloat16) for _ in range(3))
    mask = torch.tensor([[True] * 5, [True] + [False] * 4])[:, None, None] if is_masked else None
    with torch.no_grad():
        fused = attend(query, key, value, mask)
    written_out = attend(query, key, value, mask)
    assert torch.allclose(fused, written_out, atol=0.03)
    exact = attend(query.float(), key.float(), value.float(), mask)
    assert torch.allclose(written_out.float(), exact, atol=0.03)


def test_attention_runs_in_the_type_of_autocast() -> None:
    model, (ids, text, mask) = tiny(), inputs()
    with torch.autocast("cpu", torch.bfloat16):
        output = model(ids, text, mask)
    assert output.logits.dtype == torch.bfloat16
    assert output.hidden.dtype == torch.float32
    assert torch.allclose(output.logits.float(), model(ids, text, mask).logits, atol=0.3)


@pytest.mark.parametrize(
    ("changes", "message"), [({"heads": 3}, "heads 3"), ({"dim": 6, "heads": 2}, "multiple of 4")]
)
def test_impossible_sizes_are_refused(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**changes)
