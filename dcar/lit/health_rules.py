"""The illnesses of a training that can be seen in what it logs, each a rule with its words."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

WELL = ""
RECENT = 5  # looks that a value of single batches is averaged over
LAST_PART = 0.99  # of the steps; in the rest a schedule may well have come to zero

REVIVAL = "Set revival_decay=0.99, which moves idle codes onto latents, or lower learning_rate"
SLOWER = "Lower learning_rate, and start again from a checkpoint with all codes in use"
LARGE_GRADIENTS = "Set trainer.precision=bf16-mixed, or lower learning_rate"


@dataclass(frozen=True)
class Look:
    """What rules see at one step. metrics: the last logged values; vectors: latents of a batch."""

    step: int
    max_steps: int  # -1 without an end
    metrics: Mapping[str, float]
    module: Any
    vectors: int | None = None


class Rule(ABC):
    """One illness. patience: looks in a row that must say so, and that must deny it afterwards."""

    name: str
    patience = 3
    memory: tuple[str, ...] = ()  # attributes of plain data that outlast a resumption

    @abstractmethod
    def check(self, look: Look) -> str | None:
        """Words where it is ill, WELL where it is not, None where nothing can be said."""


def remedy_for_codes(module: Any) -> str:
    """What to set for more codes in use."""
    revives = getattr(module.network.quantizer, "revival_decay", 0.0) is not None
    return SLOWER if revives else REVIVAL


def trains_codes(module: Any) -> bool:
    """Whether the codebook is learned: else its usage says nothing of this training."""
    return "quantizer" in getattr(module, "trainable", ())


class CodebookUsage(Rule):
    """Codes that a batch uses, as a share of those that it could use if all were alike.

    fall: ill below this part of the best mean over recent looks. floor: ill below this share.
    after: steps that are not judged, as a new codebook finds its place.
    """

    name = "codebook_usage"
    memory = ("recent", "best")

    def __init__(self, *, fall: float, floor: float, after: int):
        self.fall, self.floor, self.after = fall, floor, after
        self.recent: list[float] = []
        self.best = 0.0

    def check(self, look: Look) -> str | None:
        usage = look.metrics.get("codebook/batch_usage")
        if usage is None or not look.vectors or not trains_codes(look.module):
            return None
        codes = look.module.network.num_codes
        possible = 1 - (1 - 1 / codes) ** look.vectors
        self.recent = [*self.recent, usage / possible][-RECENT:]
        mean = sum(self.recent) / len(self.recent)
        if look.step < self.after or len(self.recent) < RECENT:
            return WELL
        self.best = max(self.best, mean)
        limit = max(self.fall * self.best, self.floor)
        if mean >= limit:
            return WELL
        return (
            f"codebook usage is falling: a batch uses {mean:.1%} of the codes that it could "
            f"(alarm below {limit:.1%}; the best was {self.best:.1%}). "
            + remedy_for_codes(look.module)
        )


class ValidationUsage(Rule):
    """Codes used over whole validation sets; ill below `fall` of the best since step `after`."""

    name = "codebook_validation_usage"
    patience = 1
    memory = ("best",)

    def __init__(self, *, fall: float, after: int):
        self.fall, self.after = fall, after
        self.best: dict[str, float] = {}

    def check(self, look: Look) -> str | None:
        if not trains_codes(look.module) or look.step < self.after:
            return None
        usages = {
            name: value
            for name, value in look.metrics.items()
            if name.startswith("codebook/") and name.endswith("_usage") and "batch" not in name
        }
        for name, usage in usages.items():
            self.best[name] = max(usage, self.best.get(name, 0.0))
            if usage < self.fall * self.best[name]:
                return (
                    f"{name} has fallen to {usage:.1%} of the codes (alarm below "
                    f"{self.fall * self.best[name]:.1%}; the best was {self.best[name]:.1%}). "
                    + remedy_for_codes(look.module)
                )
        return WELL if usages else None


class DiscriminatorWins(Rule):
    """A discriminator that tells every image apart; ill below `floor` of its hinge loss."""

    name = "discriminator"
    memory = ("recent",)

    def __init__(self, *, floor: float):
        self.floor = floor
        self.recent: list[float] = []

    def check(self, look: Look) -> str | None:
        loss = look.metrics.get("train/discriminator")
        if loss is None:
            return None
        self.recent = [*self.recent, loss][-RECENT:]
        mean = sum(self.recent) / len(self.recent)
        if mean >= self.floor or len(self.recent) < RECENT:
            return WELL
        real, fake = (look.metrics[f"train/{side}_logits"] for side in ("real", "fake"))
        return (
            f"the discriminator is winning: its loss is {mean:.3f} (alarm below {self.floor:g}; 1 "
            f"is a draw), its logits are {real:.2f} for real and {fake:.2f} for made images. Raise "
            "module.discriminator_start, or lower criterion.adversarial_weight or "
            "discriminator.width"
        )


class LossScale(Rule):
    """fp16 gradients that overflow at ever smaller loss scales; ill below `floor`."""

    name = "loss_scale"
    patience = 1

    def __init__(self, *, floor: float):
        self.floor = floor

    def check(self, look: Look) -> str | None:
        scale = look.metrics.get("opt/loss_scale")
        if scale is None or scale >= self.floor:
            return None if scale is None else WELL
        return (
            f"the loss scale of fp16 is collapsing: {scale:g} (alarm below {self.floor:g}), as "
            f"gradients overflow again and again. {LARGE_GRADIENTS}"
        )


class SkippedSteps(Rule):
    """Steps that were not taken, for a loss or gradient that was not finite.

    share: the largest healthy part of the steps between two looks.
    """

    name = "skipped_steps"
    memory = ("before",)

    def __init__(self, *, share: float):
        self.share = share
        self.before: tuple[int, float] | None = None

    def check(self, look: Look) -> str | None:
        count = look.metrics.get("opt/skipped_steps")
        if count is None:
            return None
        before, self.before = self.before, (look.step, count)
        if before is None or look.step <= before[0]:
            return None
        share = (count - before[1]) / (look.step - before[0])
        if share <= self.share:
            return WELL
        return (
            f"{share:.0%} of the last {look.step - before[0]} steps were not taken, as a loss or "
            f"gradient was not finite (alarm above {self.share:.0%}). {LARGE_GRADIENTS}"
        )


class ConditionDropout(Rule):
    """Guidance needs a model that has been trained without captions as well."""

    name = "condition_dropout"
    patience = 1

    def check(self, look: Look) -> str | None:
        sampler = getattr(look.module, "sampler", None)
        if sampler is None:
            return None
        guidance = max(sampler.guidance, sampler.guidance_of_residual)
        if look.module.generator.caption_drop > 0 or guidance == 0:
            return WELL
        return (
            "condition dropout is off: generator.caption_drop is 0, so the guidance of "
            f"{guidance:g} that samples are drawn with compares with a caption never trained. "
            "Set generator.caption_drop=0.1, or sampler.guidance=0"
        )


class CaptionsWithoutEffect(Rule):
    """Validation losses that are the same with the captions of other images.

    gap: smallest healthy difference, as a part of the loss. after: steps before which captions need
    have no effect yet.
    """

    name = "captions"
    patience = 1

    def __init__(self, *, gap: float, after: int):
        self.gap, self.after = gap, after

    def check(self, look: Look) -> str | None:
        names = getattr(look.module, "val_names", ())
        known = [name for name in names if f"{name}/token_shuffled" in look.metrics]
        if not known or look.step < self.after:
            return None
        right = look.metrics[f"{known[0]}/token"]
        wrong = look.metrics[f"{known[0]}/token_shuffled"]
        if wrong - right >= self.gap * right:
            return WELL
        return (
            f"captions have no effect: {known[0]}/token is {right:.4f} and with the captions of "
            f"other images {wrong:.4f} (alarm below a difference of {self.gap:.1%}). Look whether "
            "captions fit their images (--exp=data/peek), whether generator.caption_drop "
            f"({look.module.generator.caption_drop:g}) is too high, or take another text_encoder"
        )


class LearningRateZero(Rule):
    """A learning rate of zero before the last steps."""

    name = "learning_rate"
    patience = 1
    least = 1e-12  # too little to move a weight in fp32

    def check(self, look: Look) -> str | None:
        names = ("opt/learning_rate", "opt/discriminator_learning_rate")
        rates = {name: look.metrics[name] for name in names if name in look.metrics}
        if not rates or 0 <= LAST_PART * look.max_steps <= look.step:
            return None
        zero = [name for name, rate in rates.items() if rate < self.least]
        if not zero:
            return WELL
        return (
            f"nothing is learnt: {zero[0]} is {rates[zero[0]]:g} before the last steps (alarm "
            f"below {self.least:g}). Set learning_rate, or max_steps where module.schedule ends "
            "too early"
        )


class DataWaits(Rule):
    """Steps that wait for data longer than they compute; ill above `share` of the time."""

    name = "data"

    def __init__(self, *, share: float):
        self.share = share

    def check(self, look: Look) -> str | None:
        waited = look.metrics.get("data/wait_share")
        if waited is None:
            return None
        if waited <= self.share:
            return WELL
        return (
            f"steps wait for data {waited:.0%} of the time (alarm above {self.share:.0%}). Raise "
            "data.num_workers, keep shard_cache.folder on a fast local disk, or for the generator "
            "make tokens first (--exp=data/precompute)"
        )
