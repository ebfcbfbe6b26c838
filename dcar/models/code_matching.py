"""A generator's codes, when its tokenizer becomes another: which of the old ones each new one is.

K codes, P pairs of an old and a new code that stand at one position of some picture.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dcar.models.generator import HybridGenerator


@dataclass(frozen=True)
class CodeMatches:
    """Pairs of codes, (P,) each, and how often one goes with the other."""

    old: Tensor  # int64
    new: Tensor  # int64
    of_new: Tensor  # share of this old code among all that the new one stands for, in (0, 1]
    of_old: Tensor  # share of this new code among all that stand for the old one, in (0, 1]
    counts: Tensor  # int64: positions

    @property
    def agreement(self) -> float:
        """Share of positions whose old code is the likeliest one of their new code, in (0, 1]."""
        most = torch.zeros(int(self.new.max()) + 1, dtype=torch.int64)
        most.scatter_reduce_(0, self.new, self.counts, "amax")
        return float(most.sum() / self.counts.sum())


def match_codes(old: Tensor, new: Tensor, *, num_codes: int) -> CodeMatches:
    """old, new: ids of the same pictures at the same positions, int64 in [0, num_codes), any shape.

    Raises ValueError for shapes that differ, and without a position.
    """
    if old.shape != new.shape or not old.numel():
        raise ValueError(f"ids {tuple(old.shape)} and {tuple(new.shape)} are of no same pictures")
    pairs, counts = torch.unique(old.flatten() * num_codes + new.flatten(), return_counts=True)
    old, new = pairs // num_codes, pairs % num_codes
    of_old, of_new = (
        counts / torch.zeros(num_codes).index_add_(0, ids, counts.float())[ids]
        for ids in (old, new)
    )
    return CodeMatches(old=old, new=new, of_new=of_new, of_old=of_old, counts=counts)


@torch.no_grad()
def match_generator(generator: HybridGenerator, matches: CodeMatches) -> None:
    """Give each new code what the generator knows of the old ones that it stands for, in place.

    Its embeddings (of the transformer, and of a residual head that is told the code) and its row of
    the output layer become the means of theirs. The bias also holds how likely an old code is this
    new one, and that a new one that stands for several is as likely as all of them together. New
    codes that were not seen keep their embeddings and become as likely as codes are on average.
    Where the new codes are the old ones in another order, the generator computes what it did
    before, in that order.
    """
    transformer, head = generator.transformer, generator.residual_head
    output = transformer.output
    average = output.weight.mean(0), output.bias.mean()
    tables = [transformer.token_embedding.weight, output.weight]
    if head is not None and head.code_embedding is not None:
        tables.append(head.code_embedding.weight)
    for table in tables:
        _replace(table, table[matches.old], matches)
    # log(of_old) for its share of what an old code was, -log(of_new) for the others of a new code:
    # the log of a sum of likelihoods, held by their geometric mean, which is what a row can hold
    shift = matches.of_old.log() - matches.of_new.log()
    _replace(output.bias, output.bias[matches.old] + shift.to(output.bias), matches)
    unseen = torch.ones(len(output.bias), dtype=torch.bool, device=output.bias.device)
    unseen[matches.new] = False
    output.weight[unseen], output.bias[unseen] = average


def _replace(table: Tensor, values: Tensor, matches: CodeMatches) -> None:
    """Rows of `table` by the means of their pairs' `values` (P, ...)."""
    weights = matches.of_new.to(table).view(-1, *[1] * (table.ndim - 1))
    means = torch.zeros_like(table).index_add_(0, matches.new, values * weights)
    seen = matches.new.unique()
    table[seen] = means[seen]
