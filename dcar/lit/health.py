"""Says in words when a training is ill: what is wrong, the number, and the setting to change."""

import logging
from collections import Counter
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from dcar.lit.callbacks import writer
from dcar.lit.health_rules import (
    CaptionsWithoutEffect,
    CodebookUsage,
    ConditionDropout,
    DataWaits,
    DiscriminatorWins,
    LearningRateZero,
    Look,
    LossScale,
    Rule,
    SkippedSteps,
    ValidationUsage,
)

log = logging.getLogger(__name__)


def vectors_of(batch: Any, module: Any) -> int | None:
    """How many latents a tokenizer makes of a batch, None where there are none to tell."""
    image, downsample = batch.get("image"), getattr(module.network, "downsample", None)
    if not isinstance(image, Tensor) or downsample is None:
        return None
    return len(image) * (image.shape[-2] // downsample) * (image.shape[-1] // downsample)


class HealthWatch(Callback):
    """Looks at the logged metrics every `every_steps` steps and speaks when something turns ill.

    Each illness is told once, in the log and as TensorBoard text `health/<rule>`, and once more
    when it is over. `Throughput`, before this one, measures what is said of data. The thresholds
    are explained at the rules; those in `*_after` count steps, as short trainings show little.
    Raises ValueError where `every_steps` is below 1.
    """

    def __init__(
        self,
        *,
        every_steps: int = 50,
        codebook_fall: float = 0.5,
        codebook_floor: float = 0.05,
        codebook_after: int = 500,
        discriminator_floor: float = 0.1,
        loss_scale_floor: float = 16.0,
        skipped_share: float = 0.1,
        captions_gap: float = 0.001,
        captions_after: int = 5000,
        wait_share: float = 0.5,
    ):
        if every_steps < 1:
            raise ValueError(f"every_steps={every_steps} must be at least 1")
        self.every_steps = every_steps
        self.rules: list[Rule] = [
            CodebookUsage(fall=codebook_fall, floor=codebook_floor, after=codebook_after),
            ValidationUsage(fall=codebook_fall, after=codebook_after),
            DiscriminatorWins(floor=discriminator_floor),
            LossScale(floor=loss_scale_floor),
            SkippedSteps(share=skipped_share),
            ConditionDropout(),
            CaptionsWithoutEffect(gap=captions_gap, after=captions_after),
            LearningRateZero(),
            DataWaits(share=wait_share),
        ]
        self.ill: set[str] = set()  # rules whose illness has been told and is not over
        self.turns: Counter[str] = Counter()  # looks in a row that say otherwise
        self.looked_at = -1

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What the settings alone tell is told before the first step."""
        look = Look(trainer.global_step, trainer.max_steps, {}, pl_module)
        self._look(trainer, look)
        self.looked_at = trainer.global_step

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        step = trainer.global_step
        if step % self.every_steps or step == self.looked_at:
            return
        self.looked_at = step
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        vectors = vectors_of(batch, pl_module)
        self._look(trainer, Look(step, trainer.max_steps, metrics, pl_module, vectors))

    def _look(self, trainer: Trainer, look: Look) -> None:
        for rule in self.rules:
            words = rule.check(look)
            if words is not None and self._is_news(rule, bool(words)):
                self._tell(trainer, rule.name, words, look.step)

    def _is_news(self, rule: Rule, is_ill: bool) -> bool:
        """Whether `patience` looks in a row, this one included, say otherwise than was told."""
        turns = self.turns[rule.name] + 1 if is_ill != (rule.name in self.ill) else 0
        self.turns[rule.name] = turns % rule.patience
        if turns == rule.patience:
            self.ill ^= {rule.name}
        return turns == rule.patience

    def _tell(self, trainer: Trainer, name: str, words: str, step: int) -> None:
        """A log record, not a Python warning: no filter turns it into the end of a training."""
        if words and trainer.is_global_zero:
            log.warning("health, step %d: %s", step, words)
        elif not words:
            rank_zero_info(f"health, step {step}: {name} is well again")
        if (board := writer(trainer)) is not None:
            board.add_text(f"health/{name}", words or "well again", step)

    def state_dict(self) -> dict[str, Any]:
        memories = {
            rule.name: {name: getattr(rule, name) for name in rule.memory} for rule in self.rules
        }
        turns = {name: count for name, count in self.turns.items() if count}
        return {"ill": sorted(self.ill), "turns": turns, "memories": memories}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.ill = set(state_dict["ill"])
        self.turns = Counter(state_dict.get("turns", {}))  # older checkpoints have none
        for rule in self.rules:
            for name, value in state_dict["memories"].get(rule.name, {}).items():
                setattr(rule, name, value)
