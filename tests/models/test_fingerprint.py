"""Fingerprints: what changes them and what does not."""

import pytest
import torch
from torch import nn

from dcar.models.fingerprint import fingerprint, tokenizer_fingerprint
from tests.toys import toy_tokenizer


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 2)


def test_equal_weights_have_equal_fingerprints_wherever_they_lie_in_memory() -> None:
    one, two = linear(), linear()
    two.weight.data = two.weight.data.T.contiguous().T  # the same values, other strides
    assert fingerprint(one) == fingerprint(two)
    assert len(fingerprint(one)) == 64


def buffer(name: str, tensor: torch.Tensor) -> nn.Module:
    module = nn.Module()
    module.register_buffer(name, tensor)
    return module


@pytest.mark.parametrize(
    "changed",
    [
        ("ids", torch.tensor([[1, 2], [3, 5]], dtype=torch.int32)),
        ("ids", torch.tensor([[1, 2, 3, 4]], dtype=torch.int32)),
        ("ids", torch.tensor([[1, 2], [3, 4]], dtype=torch.int32).view(torch.float32)),
        ("codes", torch.tensor([[1, 2], [3, 4]], dtype=torch.int32)),
    ],
    ids=["value", "shape", "dtype", "name"],
)
def test_a_change_of_any_kind_changes_the_fingerprint(changed: tuple[str, torch.Tensor]) -> None:
    before = fingerprint(buffer("ids", torch.tensor([[1, 2], [3, 4]], dtype=torch.int32)))
    assert fingerprint(buffer(*changed)) != before


def test_scalars_and_half_precision_have_fingerprints() -> None:
    module = nn.Module()
    module.register_buffer("steps", torch.tensor(3))
    module.register_buffer("scale", torch.ones(2, dtype=torch.bfloat16))
    before = fingerprint(module)
    module.steps += 1
    assert fingerprint(module) != before


def test_a_tokenizer_s_is_that_of_encoder_and_quantizer_but_not_of_the_decoder() -> None:
    tokenizer = toy_tokenizer()
    before = tokenizer_fingerprint(tokenizer)
    with torch.no_grad():
        next(tokenizer.decoder.parameters()).add_(1)
    assert tokenizer_fingerprint(tokenizer) == before
    with torch.no_grad():
        tokenizer.quantizer.codebook[0, 0] += 1
    changed = tokenizer_fingerprint(tokenizer)
    assert changed != before
    with torch.no_grad():
        next(tokenizer.encoder.parameters()).add_(1)
    assert tokenizer_fingerprint(tokenizer) not in (before, changed)


def test_encoding_does_not_change_it() -> None:
    tokenizer = toy_tokenizer().eval()
    before = tokenizer_fingerprint(tokenizer)
    tokenizer.encode(torch.zeros(1, 3, 32, 32))
    assert tokenizer_fingerprint(tokenizer) == before
