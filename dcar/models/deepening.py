"""A deeper transformer that starts out computing what a shallower one does."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

_BLOCK = re.compile(r"(?P<stem>(?:.*\.)?transformer\.blocks\.)(?P<index>\d+)\.(?P<leaf>.*)")
_OUTPUTS = ("attention.output.", "cross_attention.output.", "mlp.output.")


def deepen(state: Mapping[str, Tensor], depth: int) -> dict[str, Tensor]:
    """Weights of a generator, as a generator with `depth` blocks takes them.

    Every block is followed by copies of it that add nothing yet: their three output projections are
    zero. What is computed stays the same, and the copies train from the first step on. All other
    entries stay as they are. Raises ValueError where `state` has more blocks than `depth`, or none.
    Source: LLaMA Pro (arXiv 2401.02415), section 3.2, with every residual branch made zero.
    """
    found = {name: match for name in state if (match := _BLOCK.fullmatch(name))}
    given = 1 + max((int(match["index"]) for match in found.values()), default=-1)
    if not 0 < given <= depth:
        raise ValueError(f"a transformer of {given} blocks cannot be deepened to {depth}")
    sources = [block * given // depth for block in range(depth)]
    deeper = {name: tensor for name, tensor in state.items() if name not in found}
    for name, match in found.items():
        blocks = [block for block, source in enumerate(sources) if source == int(match["index"])]
        for block in blocks:
            is_silent = block != blocks[0] and match["leaf"].startswith(_OUTPUTS)
            tensor = torch.zeros_like(state[name]) if is_silent else state[name].clone()
            deeper[f"{match['stem']}{block}.{match['leaf']}"] = tensor
    return deeper
