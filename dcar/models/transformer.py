"""The masked text-to-image transformer: PixArt blocks without time modulation (DC-AR section 3.2).

B batch, H W token grid, N = H*W tokens, D width, L text length, E text width, K codebook size.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class TransformerOutput:
    hidden: Tensor  # (B, N, D), output of the last block, before the last layer norm
    logits: Tensor  # (B, N, K)


@dataclass(frozen=True)
class TextContext:
    """What the blocks read of the captions: computed once per prompt, used at every step."""

    keys_values: list[tuple[Tensor, Tensor]]  # per block, each (B, heads, L, D / heads)
    mask: Tensor  # (B, 1, 1, L), True = attend

    def first(self, batch: int) -> "TextContext":
        """The context of the first `batch` rows."""
        kept = [(keys[:batch], values[:batch]) for keys, values in self.keys_values]
        return TextContext(kept, self.mask[:batch])


def _axis_code(coordinate: Tensor, dim: int) -> Tensor:
    """Sine and cosine of coordinates (N,) at dim / 2 frequencies: (N, dim)."""
    half = torch.arange(dim // 2, device=coordinate.device, dtype=torch.float32)
    angle = coordinate[:, None] * torch.exp(half * (-math.log(10000.0) / (dim // 2)))
    return torch.cat([angle.sin(), angle.cos()], dim=1)  # (N, dim)


def position_codes(
    height: int, width: int, dim: int, *, base_grid: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Fixed 2-D sine-cosine codes (N, D); every axis spans [0, base_grid) whatever the grid.

    A grid of half the side therefore holds the even-index subset of the larger one's codes, so that
    weights carry over between resolutions. The column comes first, as in PixArt.
    """
    rows = torch.arange(height, device=device, dtype=torch.float32) * (base_grid / height)
    columns = torch.arange(width, device=device, dtype=torch.float32) * (base_grid / width)
    column_code = _axis_code(columns.repeat(height), dim // 2)
    row_code = _axis_code(rows.repeat_interleave(width), dim // 2)
    return torch.cat([column_code, row_code], dim=1)  # (N, D)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """Scaled dot-product attention over (B, heads, N, D / heads); mask True = attend.

    The fused kernel, but for training in bf16 on a CPU: its backward pass there takes four times as
    long as that of the two products written out (torch 2.13), a fifth of a small model's step.
    """
    is_cpu_bf16 = value.dtype == torch.bfloat16 and value.device.type == "cpu"
    if not (is_cpu_bf16 and torch.is_grad_enabled()):
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)  # (B, heads, N, L)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return scores.softmax(-1).to(value) @ value


class Mlp(nn.Module):
    def __init__(self, in_dim: int, inner_dim: int, out_dim: int):
        super().__init__()
        self.inner = nn.Linear(in_dim, inner_dim)
        self.output = nn.Linear(inner_dim, out_dim)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.output(F.gelu(self.inner(hidden), approximate="tanh"))


class SelfAttention(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.query_norm = nn.LayerNorm(dim)
        self.key_norm = nn.LayerNorm(dim)
        self.output = nn.Linear(dim, dim)

    def forward(self, hidden: Tensor) -> Tensor:
        query, key, value = self.qkv(hidden).chunk(3, dim=-1)
        # the norms cover the full width, before the heads are split
        query, key = self.query_norm(query), self.key_norm(key)
        query, key, value = (
            rearrange(part, "b n (h d) -> b h n d", h=self.heads) for part in (query, key, value)
        )
        mixed = attend(query, key, value)
        return self.output(rearrange(mixed, "b h n d -> b n (h d)"))


class CrossAttention(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(dim, dim)
        self.key_value = nn.Linear(dim, 2 * dim)
        self.output = nn.Linear(dim, dim)

    def project(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, heads, L, D / heads) of projected captions (B, L, D)."""
        keys, values = rearrange(
            self.key_value(text), "b l (two h d) -> two b h l d", two=2, h=self.heads
        )
        return keys, values

    def forward(self, hidden: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        query = rearrange(self.query(hidden), "b n (h d) -> b h n d", h=self.heads)
        mixed = attend(query, keys, values, mask)
        return self.output(rearrange(mixed, "b h n d -> b n (h d)"))


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, mlp_ratio: float):
        super().__init__()
        self.attention_norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.attention = SelfAttention(dim, heads)
        self.cross_attention = CrossAttention(dim, heads)
        self.mlp_norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), dim)

    def forward(self, hidden: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        hidden = hidden + self.attention(self.attention_norm(hidden))
        # the query is not normalised, as in PixArt
        hidden = hidden + self.cross_attention(hidden, keys, values, mask)
        return hidden + self.mlp(self.mlp_norm(hidden))


class MaskedTransformer(nn.Module):
    """Token ids with masked positions, and captions, to hidden states and logits over the codebook.

    ids (B, H, W) int64 in [0, K], K being the mask id; text (B, L, E) with L <= text_tokens;
    text_mask (B, L) bool, True = a real token. The grid may have any size and need not be square.
    `null_text` (text_tokens, E) stands for a dropped caption: fixed random rows that depend on
    `null_seed` alone, saved with the weights, never trained. embedding_std and caption_std scale
    what tokens and captions start with beside the position codes; the defaults are the authors',
    larger ones suit trainings of minutes. Source: DC-AR section 3.2.
    """

    null_text: Tensor

    def __init__(
        self,
        *,
        num_codes: int,
        dim: int,
        depth: int,
        heads: int,
        text_dim: int,
        text_tokens: int,
        mlp_ratio: float = 4.0,
        base_grid: int = 16,
        null_seed: int = 0,
        checkpoint_activations: bool = False,
        embedding_std: float = 0.02,
        caption_std: float = 0.02,
    ):
        super().__init__()
        if dim % heads:
            raise ValueError(f"dim {dim} is not a multiple of heads {heads}")
        if dim % 4:
            raise ValueError(f"dim {dim} is not a multiple of 4, which the 2-D position codes need")
        self.num_codes, self.dim, self.base_grid = num_codes, dim, base_grid
        self.text_dim, self.text_tokens = text_dim, text_tokens
        self.checkpoint_activations = checkpoint_activations
        self.token_embedding = nn.Embedding(num_codes + 1, dim)
        self.caption_projection = Mlp(text_dim, dim, dim)
        self.blocks = nn.ModuleList(Block(dim, heads, mlp_ratio) for _ in range(depth))
        self.output_norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.output = nn.Linear(dim, num_codes)
        self.register_buffer("null_text", self._random_text(null_seed))
        self.initialize_weights(embedding_std, caption_std)

    @property
    def mask_id(self) -> int:
        return self.num_codes

    def initialize_weights(self, embedding_std: float, caption_std: float) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.token_embedding.weight, std=embedding_std)
        for layer in (self.caption_projection.inner, self.caption_projection.output):
            nn.init.normal_(layer.weight, std=caption_std)
        # zero logits: training starts at the cross-entropy of a uniform guess, log(K)
        nn.init.zeros_(self.output.weight)

    def encode_text(self, text: Tensor, text_mask: Tensor) -> TextContext:
        """Everything the blocks need of captions (B, L, E), to reuse while the captions stay."""
        text = text.to(self.null_text.dtype)  # T5 may give bf16, whatever precision this runs in
        caption = self.caption_projection(text)  # (B, L, D)
        keys_values = [block.cross_attention.project(caption) for block in self._blocks()]
        return TextContext(keys_values, _attention_mask(text_mask))

    def forward_context(self, ids: Tensor, context: TextContext) -> TransformerOutput:
        hidden = self.token_embedding(ids.flatten(1))  # (B, N, D)
        hidden = hidden + self._positions(ids).to(hidden.dtype)
        for block, (keys, values) in zip(self._blocks(), context.keys_values, strict=True):
            hidden = self._run(block, hidden, keys, values, context.mask)
        logits = self.output(self.output_norm(hidden))  # (B, N, K)
        return TransformerOutput(hidden, logits)

    def forward(self, ids: Tensor, text: Tensor, text_mask: Tensor) -> TransformerOutput:
        return self.forward_context(ids, self.encode_text(text, text_mask))

    def _blocks(self) -> Iterable[Block]:
        return cast(Iterable[Block], self.blocks)  # or what wraps one, such as torch.compile's

    def _positions(self, ids: Tensor) -> Tensor:
        height, width = ids.shape[1:]
        return position_codes(
            height, width, self.dim, base_grid=self.base_grid, device=ids.device
        )  # (N, D)

    def _run(
        self, block: Block, hidden: Tensor, keys: Tensor, values: Tensor, mask: Tensor
    ) -> Tensor:
        if self.checkpoint_activations and torch.is_grad_enabled():
            return checkpoint(block, hidden, keys, values, mask, use_reentrant=False)
        return block(hidden, keys, values, mask)

    def _random_text(self, seed: int) -> Tensor:
        generator = torch.Generator("cpu").manual_seed(seed)
        text = torch.randn(self.text_tokens, self.text_dim, generator=generator, device="cpu")
        return text.to(torch.get_default_device()) / math.sqrt(self.text_dim)


def _attention_mask(text_mask: Tensor) -> Tensor:
    """(B, L) to (B, 1, 1, L). A caption without any real token reads its first row, not nothing."""
    is_empty = ~text_mask.any(dim=1, keepdim=True)  # (B, 1)
    is_first = torch.arange(text_mask.shape[1], device=text_mask.device) == 0  # (L,)
    return (text_mask | (is_empty & is_first))[:, None, None, :]  # (B, 1, 1, L)
