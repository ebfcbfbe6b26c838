"""Tokens kept from one epoch to the next."""

import torch

from dcar.lit.token_cache import TokenCache


def test_tokens_made_once_are_found_again_under_autocast() -> None:
    cache, ids, residual = TokenCache(), torch.arange(8).view(2, 2, 2), torch.randn(2, 4, 2, 2)
    cache.put(["a", "b"], ids, residual)
    assert cache.missing(["b", "c", "a"]) == [1]
    with torch.autocast("cpu", torch.bfloat16):
        found, its_residual = cache.get(["b", "a"], torch.device("cpu"))
    assert torch.equal(found, ids.flip(0)) and torch.equal(
        its_residual, residual.flip(0).half().float()
    )
