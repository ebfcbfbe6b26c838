"""The rules of iterative unmasking, one function each, and the settings that choose among them.

B images, N tokens, T steps, K codebook size. Source: DC-AR section 3.2, MaskGIT (arXiv 2202.04200).
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from dcar.models.masking import SCHEDULES, halton_rank, masked_after, next_masked
from dcar.models.transformer import TransformerOutput

MAX_STEPS = 4096
_NOTHING = -1
CHOICES = {
    "schedule": tuple(SCHEDULES),
    "guidance_decay": ("constant", "linear", "power-cosine"),
    "confidence": ("raw_logit", "log_prob"),
    "selection": ("confidence", "halton", "random"),
    "count_from": ("first_row", "per_row"),
    "residual_condition": ("last_step", "extra_forward"),
    "null_mask": ("prompt", "full"),
}


@dataclass(frozen=True)
class SamplerSettings:
    """Every choice of the sampler. The defaults are those of the authors' sampler.

    Raises ValueError, naming the field, for a value out of range.
    """

    steps: int = 12  # in [1, 4096]; with fewer tokens than steps, one step per token
    schedule: str = "arccos"  # fraction still masked after each step
    guidance: float = 4.5  # s in c + s * (c - u): 4.5 here is 5.5 in the u + s * (c - u) convention
    # linear: s * step / steps, so the first step is unguided; power-cosine: rises from no guidance
    # to s in the u + s * (c - u) convention, with guidance_power
    guidance_decay: str = "constant"
    guidance_power: float = 2.5
    randomize_temperature: float = 1.5  # of the Gumbel noise, times the fraction of steps left
    softmax_annealing: bool = True  # divide logits by 0.5 + 0.8 * (fraction of steps left)
    confidence: str = "raw_logit"  # or log_prob (MaskGIT)
    selection: str = "confidence"  # or a fixed halton order, or random: which tokens a step fixes
    # how many to re-mask: first_row counts once per batch and re-masks ties at the cut-off; per_row
    # counts for each image and breaks ties: take it to edit images differently in one batch
    count_from: str = "first_row"
    null_mask: str = "prompt"  # rows of the null caption seen without text: the prompt's, or all
    residual_refinement: bool = True  # False: discrete tokens alone
    residual_condition: str = "last_step"  # or extra_forward, with every token known
    residual_guidance: float | None = None  # None: the same as guidance
    residual_temperature: float = 1.0
    residual_clip: float | None = None  # in units of the head's scale, 0 for none; None: its own
    residual_steps: int | None = None  # None: the head's own
    residual_full_precision: bool | None = None  # the head in fp32 within autocast; None: its own

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} {getattr(self, name)!r} is not one of {choices}")
        self._check_steps("steps", self.steps)
        if self.residual_steps is not None:
            self._check_steps("residual_steps", self.residual_steps)
        for name in (
            "guidance",
            "guidance_power",
            "randomize_temperature",
            "residual_guidance",
            "residual_temperature",
            "residual_clip",
        ):
            self._check_weight(name, getattr(self, name))
        if self.guidance_decay == "power-cosine" and 0 < self.guidance < 1:
            raise ValueError(f"guidance {self.guidance} is below 1, the least of power-cosine")

    @staticmethod
    def _check_steps(name: str, value: object) -> None:
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MAX_STEPS:
            raise ValueError(f"{name} {value!r} is not an integer in [1, {MAX_STEPS}]")

    @staticmethod
    def _check_weight(name: str, value: float | None) -> None:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is not None and not (is_number and math.isfinite(value) and value >= 0):
            raise ValueError(f"{name} {value!r} is not a finite number of at least 0")

    @property
    def guidance_of_residual(self) -> float:
        return self.guidance if self.residual_guidance is None else self.residual_guidance

    @property
    def guides_residual(self) -> bool:
        """Whether the residual head reads hidden states without the caption, too."""
        return self.residual_refinement and self.guidance_of_residual > 0


def guidance_at(progress: Tensor, settings: SamplerSettings) -> Tensor:
    """Weight s of c + s * (c - u) at each `progress` = step / steps in [0, 1)."""
    if settings.guidance_decay == "constant" or settings.guidance == 0:
        return torch.full_like(progress, settings.guidance)
    if settings.guidance_decay == "linear":
        return settings.guidance * progress
    rise = (1 - torch.cos(math.pi * progress**settings.guidance_power)) / 2
    return (settings.guidance - 1) * rise


def sample_ids(logits: Tensor, temperature: Tensor, uniform: Tensor) -> Tensor:
    """Ids (B, N) with the law of argmax(logits + temperature * Gumbel noise); 0 is greedy.

    That law is softmax(logits / temperature), so one uniform draw (B, N) per token inverts it in
    place of K Gumbel draws. temperature (B, 1). Probabilities are added up as whole numbers of
    2**-30: CUDA adds floats in no fixed order, and refuses to where `trainer.deterministic=true`.
    """
    greedy = logits.argmax(2)
    scaled = logits / temperature.clamp(min=1e-6)[..., None]
    parts = scaled.softmax(2).mul_(2**30).int()
    cumulative = parts.cumsum(2, dtype=torch.int32)  # (B, N, K)
    target = (uniform[..., None] * 2**24).long() * cumulative[..., -1:] >> 24
    drawn = torch.searchsorted(cumulative, target.int(), right=True).squeeze(2)
    drawn = drawn.clamp(max=logits.shape[2] - 1)
    return torch.where(temperature > 0, drawn, greedy)


def gumbel(uniform: Tensor) -> Tensor:
    tiny = torch.finfo(uniform.dtype).tiny
    return -(-uniform.clamp(min=tiny).log()).clamp(min=tiny).log()


def select_masked(confidence: Tensor, masked: Tensor, count: Tensor, *, ties: bool) -> Tensor:
    """The `count` (B,) least confident of the masked tokens stay masked: (B, N) bool.

    `ties` also keeps every token masked that equals the most confident of them.
    """
    confidence = confidence.masked_fill(~masked, math.inf)
    order = confidence.sort(dim=1)
    if ties:
        cut_off = order.values.gather(1, (count - 1).clamp(min=0)[:, None])
        return masked & (confidence <= cut_off) & (count > 0)[:, None]
    rank = torch.empty_like(order.indices).scatter_(
        1, order.indices, torch.arange(masked.shape[1], device=masked.device).expand_as(masked)
    )
    return masked & (rank < count[:, None])


@dataclass(frozen=True)
class Plan:
    """What every step needs to know of every image, as tables (T, B) made before the first step."""

    steps: list[int]  # of each image: settings.steps, or its number of masked tokens if fewer
    guidance: Tensor
    temperature: Tensor  # of the Gumbel noise
    softness: Tensor  # logits are divided by it
    is_random: list[bool]  # per step: is any temperature above 0
    masked: Tensor  # int64, how many stay masked before the clamps; _NOTHING from the last step on
    is_guided: list[bool]  # per step: does any image need the unconditional half
    is_last: list[list[bool]]  # per step and image

    def __len__(self) -> int:
        return max(self.steps)


def make_plan(masked: Tensor, settings: SamplerSettings) -> Plan:
    """masked (B, N) bool. Made on the CPU: the loop then never waits for the device."""
    tokens = masked.shape[1]
    steps = masked.sum(1).cpu().clamp(min=1, max=settings.steps)  # (B,)
    index = torch.arange(int(steps.max()), dtype=torch.float64)[:, None]
    done = ((index + 1) / steps).clamp(max=1)  # (T, B)
    is_last = (index + 1 == steps).tolist()
    guidance = guidance_at((index / steps).clamp(max=1), settings)
    needs_last = settings.guides_residual and settings.residual_condition == "last_step"
    softness = 0.5 + 0.8 * (1 - done) if settings.softmax_annealing else torch.ones_like(done)
    temperature = settings.randomize_temperature * (1 - done)
    left = masked_after(done, tokens, settings.schedule).masked_fill(done >= 1, _NOTHING)
    return Plan(
        steps=steps.tolist(),
        guidance=guidance.float().to(masked.device),
        temperature=temperature.float().to(masked.device),
        softness=softness.float().to(masked.device),
        is_random=(temperature > 0).any(1).tolist(),
        masked=left.to(masked.device),
        is_guided=[
            bool((row > 0).any()) or (needs_last and any(last))
            for row, last in zip(guidance, is_last, strict=True)
        ],
        is_last=is_last,
    )


def _guided_logits(output: TransformerOutput, guidance: Tensor, batch: int) -> Tensor:
    """c + s * (c - u) in fp32: (B, N, K). guidance (B,)."""
    conditional = output.logits[:batch].float()
    if len(output.logits) == batch:
        return conditional
    unconditional = output.logits[batch:].float()
    return conditional + guidance[:, None, None] * (conditional - unconditional)


@lru_cache(maxsize=32)
def _halton_rank_on(device: torch.device, height: int, width: int) -> Tensor:
    """Copied to a GPU once, and not in every step."""
    return halton_rank(height, width).to(device, torch.float32)


def _confidence(
    logits: Tensor, ids: Tensor, grid: tuple[int, int], noise: Tensor, settings: SamplerSettings
) -> Tensor:
    """How early each token is fixed, (B, N); noise (B, N) as gumbel(uniform) * temperature."""
    if settings.selection == "halton":
        return -_halton_rank_on(logits.device, *grid).expand_as(noise)
    if settings.selection == "random":
        return noise
    if settings.confidence == "log_prob":
        logits = logits.log_softmax(2)
    return logits.gather(2, ids[..., None]).squeeze(2) + noise


def unmask_step(
    output: TransformerOutput,
    ids: Tensor,
    masked: Tensor,
    plan: Plan,
    step: int,
    uniform: Tensor,
    grid: tuple[int, int],
    settings: SamplerSettings,
) -> tuple[Tensor, Tensor]:
    """One step of unmasking: new ids (B, N), and which of them are to be masked again (B, N).

    uniform (B, 2, N): one draw for the id and an independent one for the confidence.
    """
    logits = _guided_logits(output, plan.guidance[step], len(ids))
    logits = logits / plan.softness[step][:, None, None]
    temperature = plan.temperature[step][:, None]  # (B, 1)
    if plan.is_random[step]:
        sampled = sample_ids(logits, temperature, uniform[:, 0])
    else:
        sampled = logits.argmax(2)
    ids = torch.where(masked, sampled, ids)
    noise = gumbel(uniform[:, 1])
    noise = noise if settings.selection == "random" else temperature * noise
    confidence = _confidence(logits, sampled, grid, noise, settings)
    count = _masked_next(plan.masked[step], masked.sum(1), settings.count_from)
    ties = settings.count_from == "first_row"
    return ids, select_masked(confidence, masked, count, ties=ties)


def _masked_next(planned: Tensor, masked: Tensor, count_from: str) -> Tensor:
    """How many tokens of each image stay masked, (B,)."""
    count = next_masked(planned, masked)
    if count_from == "first_row":
        count = torch.minimum(count, next_masked(planned, masked[:1]))
    return torch.where(planned == _NOTHING, 0, count)
