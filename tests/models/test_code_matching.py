"""A generator whose tokenizer becomes another starts from what it knew of the old codes."""

import pytest
import torch

from dcar.models.code_matching import match_codes, match_generator
from tests.toys import CODES, toy_model


def test_codes_in_another_order_give_the_same_generator_in_that_order() -> None:
    model = toy_model()
    generator, text_encoder = model.generator.eval(), model.text_encoder.eval()
    ids = torch.randint(CODES, (64, 4, 4), generator=torch.Generator().manual_seed(0))
    order = torch.randperm(CODES, generator=torch.Generator().manual_seed(1))
    assert len(ids.unique()) == CODES
    text, mask = text_encoder(["a cat", "a dog"])
    shown = ids[:2].clone()
    shown[:, 0] = generator.transformer.mask_id
    renamed = torch.where(shown == CODES, shown, order[shown.clamp(max=CODES - 1)])
    with torch.no_grad():
        before = generator.transformer(shown, text, mask)
        matches = match_codes(ids, order[ids], num_codes=CODES)
        assert matches.agreement == 1
        match_generator(generator, matches)
        after = generator.transformer(renamed, text, mask)
    torch.testing.assert_close(after.hidden, before.hidden)
    torch.testing.assert_close(after.logits[..., order], before.logits)
    assert not torch.equal(after.logits, before.logits)


def test_a_code_that_becomes_two_is_as_likely_as_both_together() -> None:
    """Code 0 becomes 0 in three of four places and 15, not used before, in the fourth."""
    generator = toy_model().generator
    transformer = generator.transformer
    old = torch.arange(CODES - 1).repeat(4)
    new = torch.where((old == 0) & (torch.arange(len(old)) < CODES - 1), CODES - 1, old)
    hidden = torch.randn(5, transformer.dim, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = transformer.output(hidden)
        match_generator(generator, match_codes(old, new, num_codes=CODES))
        after = transformer.output(hidden)
    torch.testing.assert_close(after[:, 1:-1], before[:, 1:-1])
    torch.testing.assert_close(after[:, [0, -1]].logsumexp(1), before[:, 0])
    torch.testing.assert_close((after[:, 0] - after[:, -1]).exp(), torch.full((5,), 3.0))
    table = transformer.token_embedding.weight
    torch.testing.assert_close(table[0], table[CODES - 1])


def test_two_codes_that_become_one_are_averaged_by_how_often_they_were() -> None:
    generator = toy_model().generator
    table = generator.transformer.token_embedding.weight
    before = table.detach().clone()
    old, new = torch.tensor([0, 1, 1, 1, 2]), torch.tensor([7, 7, 7, 7, 2])
    matches = match_codes(old, new, num_codes=CODES)
    assert matches.agreement == pytest.approx(4 / 5)
    match_generator(generator, matches)
    torch.testing.assert_close(table[7].detach(), before[0] / 4 + before[1] * 3 / 4)
    others = [code for code in range(CODES + 1) if code != 7]
    torch.testing.assert_close(table[others].detach(), before[others])  # the mask's row too


def test_two_codes_that_become_one_are_as_likely_as_both_together() -> None:
    """Codes 0 and 1, equally often and equally likely, become 7; codes beyond 2 are not seen."""
    generator = toy_model().generator
    output = generator.transformer.output
    hidden = torch.randn(5, generator.transformer.dim, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        output.weight.normal_(generator=torch.Generator().manual_seed(1))
        output.bias.normal_(generator=torch.Generator().manual_seed(2))
        output.weight[1], output.bias[1] = output.weight[0], output.bias[0]
        before = output(hidden)
        old, new = torch.tensor([0, 1, 2]), torch.tensor([7, 7, 2])
        match_generator(generator, match_codes(old, new, num_codes=CODES))
        after = output(hidden)
    torch.testing.assert_close(after[:, 7], before[:, :2].logsumexp(1))
    torch.testing.assert_close(after[:, 2], before[:, 2])
    unseen = [code for code in range(CODES) if code not in (2, 7)]
    average = before.mean(1, keepdim=True)
    torch.testing.assert_close(after[:, unseen], average.expand(-1, len(unseen)))


def test_a_head_that_is_told_codes_learns_the_new_ones() -> None:
    generator = toy_model().generator
    head = generator.residual_head
    head.code_embedding = torch.nn.Embedding(CODES, 16)
    before = head.code_embedding.weight.detach().clone()
    old = torch.arange(CODES)
    match_generator(generator, match_codes(old, old.roll(1), num_codes=CODES))
    torch.testing.assert_close(head.code_embedding.weight.detach()[old.roll(1)], before)


def test_ids_of_other_pictures_are_refused() -> None:
    with pytest.raises(ValueError, match="are of no same pictures"):
        match_codes(torch.zeros(2, 4).long(), torch.zeros(2, 3).long(), num_codes=CODES)
    with pytest.raises(ValueError, match="are of no same pictures"):
        match_codes(torch.zeros(0).long(), torch.zeros(0).long(), num_codes=CODES)
