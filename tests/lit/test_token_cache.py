"""Tokens kept from one epoch to the next."""

import torch

from dcar.lit.token_cache import TokenCache
from tests.toys import ToyImages, collate, toy_masked_generator, toy_trainer


def test_tokens_made_once_are_found_again_under_autocast() -> None:
    cache, ids, residual = TokenCache(), torch.arange(8).view(2, 2, 2), torch.randn(2, 4, 2, 2)
    cache.put(["a", "b"], ids, residual)
    assert cache.missing(["b", "c", "a"]) == [1]
    with torch.autocast("cpu", torch.bfloat16):
        found, its_residual = cache.get(["b", "a"], torch.device("cpu"))
    assert torch.equal(found, ids.flip(0)) and torch.equal(
        its_residual, residual.flip(0).half().float()
    )


def test_cached_tokens_are_those_of_the_tokenizer() -> None:
    module = toy_masked_generator(cache_tokens=True)
    module._trainer = toy_trainer(1)
    batch = collate([ToyImages(4)[index] for index in range(4)])
    first = module.on_after_batch_transfer(dict(batch), 0)
    module.tokenizer.module.encoder = None  # from now on only the cache can answer
    second = module.on_after_batch_transfer(dict(batch), 0)
    assert torch.equal(first["ids"], second["ids"])
    assert torch.equal(first["residual"], second["residual"])


def test_of_a_batch_only_images_not_seen_yet_are_tokenised() -> None:
    module = toy_masked_generator(cache_tokens=True)
    module._trainer = toy_trainer(1)
    images = [ToyImages(4)[index] | {"key": "a", "place": str(index)} for index in range(4)]
    module.on_after_batch_transfer(dict(collate(images[:2])), 0)
    encoder, seen = module.tokenizer.module.encoder, []
    encoder.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    mixed = module.on_after_batch_transfer(dict(collate(images[::-1])), 0)
    assert seen == [2]  # rows 0 and 1 of this batch are images 3 and 2
    alone = module.tokenizer.encode(collate(images[::-1])["image"])
    assert torch.equal(mixed["ids"], alone.ids)
    torch.testing.assert_close(mixed["residual"], alone.residual.half().float(), rtol=0, atol=1e-3)
