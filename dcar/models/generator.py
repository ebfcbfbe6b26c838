"""The hybrid generator: masked transformer for discrete tokens, residual head for continuous ones.

B batch, H W token grid, N = H*W, C latent channels, L text length, E text width.
Source: DC-AR section 3.2.
"""

import torch
from einops import rearrange
from torch import Tensor, nn

from dcar.models.distributed import mean_over_ranks
from dcar.models.draws import Draws
from dcar.models.losses import masked_token_loss
from dcar.models.masking import SCHEDULES, mask_ratio, training_mask
from dcar.models.residual_head import BaseResidualHead
from dcar.models.transformer import MaskedTransformer, TransformerOutput


class HybridGenerator(nn.Module):
    """Training losses of the generator; `dcar.models.sampler.sample` draws images from it.

    `residual_head` None gives the discrete-only baseline. `caption_drop` is the probability that an
    image is trained without its caption, for guidance. `residual_positions` is "all" (DC-AR) or
    "masked" (MAR). Raises ValueError for an unknown schedule or residual_positions, for a
    probability outside [0, 1], or for a head that is told another number of codes.
    """

    def __init__(
        self,
        *,
        transformer: MaskedTransformer,
        residual_head: BaseResidualHead | None = None,
        label_smoothing: float = 0.1,
        unmasked_weight: float = 0.1,
        caption_drop: float = 0.1,
        residual_weight: float = 1.0,
        mask_schedule: str = "arccos",
        residual_positions: str = "all",
    ):
        super().__init__()
        for name, value in (("caption_drop", caption_drop), ("label_smoothing", label_smoothing)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} {value} is not in [0, 1]")
        if mask_schedule not in SCHEDULES:
            raise ValueError(
                f"mask_schedule {mask_schedule!r} is not one of {', '.join(SCHEDULES)}"
            )
        if residual_positions not in ("all", "masked"):
            raise ValueError(f"residual_positions {residual_positions!r} is not 'all' or 'masked'")
        known = residual_head.num_codes if residual_head is not None else None
        if known not in (None, transformer.num_codes):
            raise ValueError(
                f"the residual head is told {known} codes, the transformer has "
                f"{transformer.num_codes}"
            )
        self.transformer, self.residual_head = transformer, residual_head
        self.label_smoothing, self.unmasked_weight = label_smoothing, unmasked_weight
        self.caption_drop, self.residual_weight = caption_drop, residual_weight
        self.mask_schedule, self.residual_positions = mask_schedule, residual_positions
        self._counted: tuple[object, Tensor] = ((), torch.tensor(0.0))  # of `_mean_masked`'s step

    def losses(
        self,
        ids: Tensor,
        residual: Tensor,
        text: Tensor,
        text_mask: Tensor,
        draws: Draws,
        *,
        caption_drop: float | None = None,
        head_alone: bool = False,
        tokens_alone: bool = False,
    ) -> dict[str, Tensor]:
        """Scalars `loss`, `token`, `accuracy` and, with a residual head, `residual`.

        ids (B, H, W) int64; residual (B, C, H, W) = continuous - discrete latents; text (B, L, E);
        text_mask (B, L) bool, True = a real token. `caption_drop` None means the constructor's:
        pass 0 to evaluate. `accuracy` is over masked tokens.

        In training mode the means in `loss` are over the batches of all ranks and of all parts of
        the step, so that averaged gradients equal those of one process with the whole batch; the
        others are of this batch alone. In evaluation mode nothing waits for another rank, and
        `token` is the plain cross-entropy of the masked tokens: no label smoothing, no weight on
        the others.

        head_alone: `loss` and `residual` alone, the same one: of the residual head, over all
        positions of this batch, with no token masked, as a finished transformer shows a picture in
        sampling with `residual_condition="extra_forward"`. tokens_alone: without the residual's.
        """
        drop = self.caption_drop if caption_drop is None else caption_drop
        if head_alone:
            text = self._drop_captions(text, drop, draws)
            term = self._head_loss(residual, ids, self.transformer(ids, text, text_mask), draws)
            return {"loss": term, "residual": term}
        mask = self._draw_mask(ids, draws)  # (B, N)
        masked = self._mean_masked(ids, mask, draws)
        text = self._drop_captions(text, drop, draws)
        output = self.transformer(self._hide(ids, mask), text, text_mask)
        loss, terms = self._token_terms(output.logits, ids.flatten(1), mask, masked)
        if self.residual_head is None or tokens_alone:
            return {"loss": loss, **terms}
        term = self._residual_term(residual, ids, output, mask, masked, draws)
        own = term if self.residual_positions == "all" else term * masked / mask.sum()
        return {"loss": loss + self.residual_weight * term, **terms, "residual": own}

    def _draw_mask(self, ids: Tensor, draws: Draws) -> Tensor:
        batch, tokens = ids.flatten(1).shape
        ratio = mask_ratio(draws.rand(batch), self.mask_schedule)
        return training_mask(ratio, draws.rand(batch, tokens))  # (B, N)

    def _hide(self, ids: Tensor, mask: Tensor) -> Tensor:
        return ids.masked_fill(mask.view_as(ids), self.transformer.mask_id)

    def _drop_captions(self, text: Tensor, probability: float, draws: Draws) -> Tensor:
        """Null rows under the prompt's own mask, as sampling sees them (docs/method.md)."""
        is_dropped = draws.rand(len(text), 1, 1) < probability
        null = self.transformer.null_text[: text.shape[1]].to(text.dtype)  # (L, E)
        return torch.where(is_dropped, null, text)

    def _mean_masked(self, ids: Tensor, mask: Tensor, draws: Draws) -> Tensor:
        """How many tokens are masked, a scalar: here, or in training on average over the step.

        The other parts of the step are taken to have this part's shape.
        """
        if not self.training:
            return mask.sum().float()
        if draws.parts == 1:
            return mean_over_ranks(mask.sum().float())
        step = (draws.seed, draws.parts, ids.shape)
        if step != self._counted[0]:  # all parts of a step find the same
            masks = [self._draw_mask(ids, part) for part in draws.of_every_part()]
            self._counted = step, torch.stack([part.sum().float() for part in masks]).mean()
        return mean_over_ranks(self._counted[1].clone())

    def _token_terms(
        self, logits: Tensor, ids: Tensor, mask: Tensor, masked: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The term of the loss, over `masked` tokens, and what this batch's own tokens give."""
        unmasked_weight = self.unmasked_weight if self.training else 0.0
        total = masked_token_loss(
            logits,
            ids,
            mask,
            label_smoothing=self.label_smoothing if self.training else 0.0,
            unmasked_weight=unmasked_weight,
        )
        correct = ((logits.detach().max(2).indices == ids) & mask).sum()
        own = mask.sum()
        weight, own_weight = (
            number + unmasked_weight * (mask.numel() - number) for number in (masked, own)
        )
        return total / weight, {"token": total / own_weight, "accuracy": correct / own}

    def _residual_term(
        self,
        residual: Tensor,
        ids: Tensor,
        output: TransformerOutput,
        mask: Tensor,
        masked: Tensor,
        draws: Draws,
    ) -> Tensor:
        if self.residual_positions == "all":
            return self._head_loss(residual, ids, output, draws)
        return self._head_loss(residual, ids, output, draws, mask=mask, count=masked)

    def _head_loss(
        self,
        residual: Tensor,
        ids: Tensor,
        output: TransformerOutput,
        draws: Draws,
        **positions: Tensor,
    ) -> Tensor:
        assert self.residual_head is not None
        target = rearrange(residual, "b c h w -> b (h w) c")
        return self.residual_head.loss(
            target, output.hidden, draws, ids=ids.flatten(1), **positions
        )
