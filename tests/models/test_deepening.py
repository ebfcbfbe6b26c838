"""A deeper transformer computes what the shallower one did, and every block of it can learn."""

import pytest
import torch

from dcar.models.deepening import deepen
from dcar.models.transformer import MaskedTransformer


def transformer(depth: int) -> MaskedTransformer:
    torch.manual_seed(depth)
    network = MaskedTransformer(
        num_codes=8, dim=16, depth=depth, heads=2, text_dim=8, text_tokens=4, base_grid=4
    )
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.3)
    return network


def deepened(shallow: MaskedTransformer, depth: int) -> MaskedTransformer:
    deep = transformer(depth)
    state = {f"transformer.{k}": v for k, v in shallow.state_dict().items()}
    state["residual_head.scale"] = torch.ones(())
    deeper = deepen(state, depth)
    assert torch.equal(deeper.pop("residual_head.scale"), torch.ones(()))
    deep.load_state_dict({k.removeprefix("transformer."): v for k, v in deeper.items()})
    return deep


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 9, (2, 4, 4), generator=generator)
    return ids, torch.randn(2, 4, 8, generator=generator), torch.ones(2, 4, dtype=torch.bool)


@pytest.mark.parametrize("depth", [2, 3, 4, 7])
def test_the_deeper_one_computes_the_same(depth: int) -> None:
    shallow = transformer(2)
    deep = deepened(shallow, depth)
    assert len(deep.blocks) == depth
    torch.testing.assert_close(deep(*inputs()).logits, shallow(*inputs()).logits)


def test_all_blocks_learn_from_the_first_step_on() -> None:
    deep = deepened(transformer(2), 5)
    deep(*inputs()).logits.square().mean().backward()
    for index, block in enumerate(deep.blocks):
        for part in ("attention", "cross_attention", "mlp"):
            gradient = block.get_submodule(part).output.weight.grad
            assert gradient is not None and gradient.abs().max() > 0, (index, part)


def test_what_cannot_be_deepened_is_refused() -> None:
    state = {f"transformer.{k}": v for k, v in transformer(3).state_dict().items()}
    with pytest.raises(ValueError, match="3 blocks cannot be deepened to 2"):
        deepen(state, 2)
    with pytest.raises(ValueError, match="0 blocks"):
        deepen({"transformer.output.bias": torch.zeros(8)}, 2)
