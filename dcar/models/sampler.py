"""Text to tokens: iterative unmasking, then residual sampling (DC-AR section 3.2, docs/method.md).

B images, H W token grid, N = H*W, T steps, K codebook size, C latent channels, L text length.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from dcar.models.generator import HybridGenerator
from dcar.models.noise import ImageNoise
from dcar.models.transformer import MaskedTransformer, TransformerOutput
from dcar.models.unmasking import SamplerSettings, make_plan, unmask_step

# (step, ids (B, H, W), tokens fixed by this step (B, H, W) bool)
OnStep = Callable[[int, Tensor, Tensor], None]


@dataclass(frozen=True)
class Tokens:
    """What the tokenizer decodes: ids (B, H, W) int64 and residual (B, C, H, W) fp32 or None.

    is_finite: where they were drawn, a bool on the device: whether the logits held no NaN.
    """

    ids: Tensor
    residual: Tensor | None
    is_finite: Tensor | None = None


class _Captioned:
    """The transformer with its captions: B conditional rows, then B unconditional ones."""

    def __init__(
        self,
        transformer: MaskedTransformer,
        text: Tensor,
        text_mask: Tensor,
        *,
        null_mask: str,
        is_guided: bool,
    ):
        self.transformer, self.batch = transformer, len(text)
        text, text_mask = _trimmed(text, text_mask)
        if is_guided:
            text, text_mask = _with_null(transformer, text, text_mask, null_mask)
        self.context = transformer.encode_text(text, text_mask)
        self.conditional = self.context.first(self.batch)

    def __call__(self, ids: Tensor, *, is_guided: bool) -> TransformerOutput:
        if not is_guided:
            return self.transformer.forward_context(ids, self.conditional)
        return self.transformer.forward_context(ids.repeat(2, 1, 1), self.context)


def _trimmed(text: Tensor, text_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Without the padding that no caption of the batch needs: masked rows have no influence.

    To a multiple of 8 rows, as the encoders give them, which attention's kernels want.
    """
    columns = text_mask.any(0).nonzero()
    length = int(columns.max()) + 1 if len(columns) else 1
    length += -length % 8
    return text[:, :length], text_mask[:, :length]


def _with_null(
    transformer: MaskedTransformer, text: Tensor, text_mask: Tensor, null_mask: str
) -> tuple[Tensor, Tensor]:
    null = transformer.null_text.to(text)
    if null_mask == "prompt":
        null = null[: text.shape[1]]
        return torch.cat([text, null.expand_as(text)]), text_mask.repeat(2, 1)
    padding = len(null) - text.shape[1]
    text = F.pad(text, (0, 0, 0, padding))
    text_mask = F.pad(text_mask, (0, padding))
    text = torch.cat([text, null.expand_as(text)])  # (2B, text_tokens, E)
    return text, torch.cat([text_mask, torch.ones_like(text_mask)])


def _check_text(transformer: MaskedTransformer, text: Tensor, text_mask: Tensor) -> None:
    if text.ndim != 3 or text.shape[2] != transformer.text_dim:
        raise ValueError(f"text {tuple(text.shape)} is not (B, L, {transformer.text_dim})")
    if not 1 <= text.shape[1] <= transformer.text_tokens:
        raise ValueError(
            f"text has {text.shape[1]} rows per caption, not 1 to {transformer.text_tokens}"
        )
    if text_mask.shape != text.shape[:2] or text_mask.dtype != torch.bool:
        given = f"{text_mask.dtype} {tuple(text_mask.shape)}"
        raise ValueError(f"text_mask {given} is not bool {tuple(text.shape[:2])}")


def _check_request(batch: int, grid: tuple[int, int], seeds: Sequence[int]) -> None:
    if len(grid) != 2 or any(not isinstance(side, int) or side < 1 for side in grid):
        raise ValueError(f"grid {grid} is not two positive integers (height, width) in tokens")
    if len(seeds) != batch:
        raise ValueError(f"seeds has {len(seeds)} entries for {batch} captions")
    for seed in seeds:
        if not isinstance(seed, int) or not 0 <= seed < 2**63:
            raise ValueError(f"seeds has {seed!r}, which is not an integer in [0, 2**63)")


def _check_ids(ids: Tensor, shape: tuple[int, int, int], mask_id: int) -> None:
    if ids.shape != shape or ids.is_floating_point() or ids.dtype == torch.bool:
        raise ValueError(f"initial_ids {tuple(ids.shape)} {ids.dtype} is not integer {shape}")
    if bool(((ids < 0) | (ids > mask_id)).any()):
        raise ValueError(f"initial_ids are not all in [0, {mask_id}], the last the mask id")


def _check_editing(
    generator: HybridGenerator,
    shape: tuple[int, int, int],
    settings: SamplerSettings,
    ids: Tensor | None,
    residual: Tensor | None,
    keep: Tensor | None,
) -> None:
    head = generator.residual_head
    if ids is not None:
        _check_ids(ids, shape, generator.transformer.mask_id)
    if residual is None:
        if keep is not None:
            raise ValueError("keep_residual is given without initial_residual")
        return
    if head is None or not settings.residual_refinement:
        raise ValueError("initial_residual needs a residual head and residual_refinement")
    wanted = (shape[0], head.channels, *shape[1:])
    if residual.shape != wanted:
        raise ValueError(f"initial_residual {tuple(residual.shape)} is not {wanted}")
    if keep is None and ids is None:
        raise ValueError("initial_residual needs keep_residual or initial_ids")
    if keep is not None and (keep.shape != shape or keep.dtype != torch.bool):
        raise ValueError(f"keep_residual {tuple(keep.shape)} {keep.dtype} is not bool {shape}")


@torch.no_grad()
def sample(
    generator: HybridGenerator,
    text: Tensor,
    text_mask: Tensor,
    *,
    grid: tuple[int, int],
    seeds: Sequence[int],
    settings: SamplerSettings,
    initial_ids: Tensor | None = None,
    initial_residual: Tensor | None = None,
    keep_residual: Tensor | None = None,
    on_step: OnStep | None = None,
) -> Tokens:
    """Draw the tokens of B images for captions text (B, L, E), text_mask (B, L) bool.

    grid is (H, W) in tokens. seeds has one integer per image; an image depends on its seed, its
    caption and the settings alone, up to rounding. The residual is None without a residual head or
    without residual_refinement. Runs on the device of `text`; precision is the caller's autocast.

    Editing: initial_ids (B, H, W) hold the mask id (K) where to generate, the others stay.
    initial_residual (B, C, H, W) stays where keep_residual (B, H, W) bool is True; by default where
    initial_ids are given. An image with fewer masked tokens than steps takes one step per token.

    on_step(step, ids, newly_fixed) is called after each step; ids still masked are K.
    Raises ValueError, naming the argument, for shapes, types or values that do not fit.
    """
    transformer, shape = generator.transformer, (len(text), *grid)
    _check_text(transformer, text, text_mask)
    _check_request(len(text), grid, seeds)
    _check_editing(generator, shape, settings, initial_ids, initial_residual, keep_residual)
    head = generator.residual_head if settings.residual_refinement else None
    if head is not None:
        head.check_sampling(steps=settings.residual_steps, clip=settings.residual_clip)
    noise = ImageNoise(seeds, text.device)
    start = torch.full(shape, transformer.mask_id, device=text.device)
    if initial_ids is not None:
        start = initial_ids.to(text.device, torch.long)
    ids, hidden, hidden_uncond, is_finite = _unmask(
        generator, text, text_mask, start, noise, settings, on_step
    )
    if head is None:
        return Tokens(ids, None, is_finite)
    residual = head.sample(
        hidden,
        noise=noise,
        ids=ids.flatten(1),
        guidance=settings.guidance_of_residual,
        hidden_uncond=hidden_uncond,
        temperature=settings.residual_temperature,
        clip=settings.residual_clip,
        steps=settings.residual_steps,
        full_precision=settings.residual_full_precision,
    )  # (B, N, C)
    residual = rearrange(residual, "b (h w) c -> b c h w", h=grid[0])
    if initial_residual is not None:
        keep = start != transformer.mask_id if keep_residual is None else keep_residual
        residual = torch.where(
            keep.to(residual.device)[:, None], initial_residual.to(residual), residual
        )
    return Tokens(ids, residual, is_finite)


def draw_residual(
    generator: HybridGenerator,
    text: Tensor,
    text_mask: Tensor,
    *,
    ids: Tensor,
    seeds: Sequence[int],
    settings: SamplerSettings,
) -> Tensor:
    """The residual (B, C, H, W) that the head draws for finished ids (B, H, W).

    From the hidden states of one forward pass in which no token is masked; `settings` beyond those
    of the residual play no part. Raises ValueError as `sample` does.
    """
    settings = replace(
        settings,
        steps=1,  # with all ids given that is the forward pass, and draws none of them
        guidance=0.0,
        residual_guidance=settings.guidance_of_residual,
        residual_condition="last_step",
    )
    grid = (ids.shape[1], ids.shape[2])
    tokens = sample(
        generator, text, text_mask, grid=grid, seeds=seeds, settings=settings, initial_ids=ids
    )
    if tokens.residual is None:
        raise ValueError("draw_residual needs a residual head and residual_refinement")
    return tokens.residual


def _unmask(
    generator: HybridGenerator,
    text: Tensor,
    text_mask: Tensor,
    start: Tensor,
    noise: ImageNoise,
    settings: SamplerSettings,
    on_step: OnStep | None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Ids (B, H, W), the hidden states (B, N, D) that the residual head reads, c and u, and whether
    all logits were finite: of NaN ids are made as of any other numbers."""
    batch, height, width = start.shape
    mask_id = generator.transformer.mask_id
    ids = start.flatten(1)  # (B, N)
    masked = ids == mask_id
    plan = make_plan(masked, settings)
    is_guided = any(plan.is_guided) or settings.guides_residual
    model = _Captioned(
        generator.transformer, text, text_mask, null_mask=settings.null_mask, is_guided=is_guided
    )
    uniform = noise.rand(settings.steps, 2, height * width)  # (B, T, 2, N)
    rows = 2 if settings.guides_residual else 1  # that the residual head reads of an image
    hidden: list[Tensor] = [ids] * batch
    is_finite = torch.ones((), dtype=torch.bool, device=ids.device)
    for step in range(len(plan)):
        visible = ids.masked_fill(masked, mask_id).view_as(start)
        output = model(visible, is_guided=plan.is_guided[step])
        is_finite &= output.logits.amax(2).isfinite().all()  # the largest is NaN where any is
        was_masked = masked
        ids, masked = unmask_step(
            output, ids, masked, plan, step, uniform[:, step], (height, width), settings
        )
        for image in (row for row in range(batch) if plan.is_last[step][row]):
            hidden[image] = output.hidden[image::batch][:rows]  # (1 or 2, N, D)
        if on_step is not None:
            shown = ids.masked_fill(masked, mask_id)
            on_step(step, shown.view_as(start), (was_masked & ~masked).view_as(start))
    ids = ids.view_as(start)
    if settings.residual_refinement and settings.residual_condition == "extra_forward":
        output = model(ids, is_guided=settings.guides_residual)
        hidden = [output.hidden[image::batch] for image in range(batch)]
    stacked = torch.stack(hidden, dim=1)  # (1 or 2, B, N, D)
    return ids, stacked[0], stacked[1] if len(stacked) == 2 else None, is_finite
