"""LoRA fine-tuning of a finished generator: adapters train, everything else stays as it is."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from dcar.errors import CheckpointError
from dcar.lit.frozen import Frozen
from dcar.lit.generator import MaskedARGenerator
from dcar.models.checkpoints import FINISHED, Model
from dcar.models.generator import HybridGenerator
from dcar.models.lora import (
    Adapter,
    Base,
    LoraSettings,
    add_adapters,
    describe_base,
    merge_adapters,
)


class LoraGenerator(MaskedARGenerator):
    """Trains adapters in the transformer of `base` on images (B, 3, S, S) with captions.

    Only the adapters are the network: the optimizer, the average and the checkpoints hold nothing
    of the base, whose generator, text encoder and tokenizer are frozen. A checkpoint says which
    base it belongs to; going on with another one raises CheckpointError.

    base, base_name: the model to start from and what to call it. size: S in pixels, None for the
    base's own. Other arguments are those of `MaskedARGenerator`.
    """

    def __init__(
        self,
        *,
        base: Model,
        base_name: str,
        lora: LoraSettings,
        size: int | None = None,
        **options: Any,
    ):
        super().__init__(
            generator=base.generator,
            text_encoder=base.text_encoder,
            tokenizer=base.tokenizer,
            tokenizer_from=None,
            sampler=base.sampler,
            size=size or base.size,
            **options,
        )
        self.tokenizer_from, self.tokenizer_module = base_name, FINISHED
        self.base_config, self.lora = base.config | {"size": self.size}, lora
        self.base = describe_base(base, base_name)
        self.frozen_text = Frozen(base.text_encoder)
        self.frozen_generator = Frozen(base.generator)
        self.network = add_adapters(base.generator.transformer, lora)  # type: ignore[assignment]

    @property
    def generator(self) -> HybridGenerator:
        return self.frozen_generator.module

    def frozen(self) -> list[Any]:
        return [*super().frozen(), self.frozen_generator]

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self.generator.train()

    def on_validation_start(self) -> None:
        super().on_validation_start()
        self.generator.eval()  # not a registered module, so Lightning does not

    def on_validation_end(self) -> None:
        super().on_validation_end()
        self.generator.train()

    def model(self) -> Model:
        """The whole model with base + adapters in plain weights; it needs no peft."""
        merged: Any = merge_adapters(self.generator)
        encoder = self.text_encoder.module
        return Model(self.tokenizer.module, merged, encoder, self.sampler, self.base_config)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["dcar"] |= {
            "config": self.base_config,
            "base": asdict(self.base),
            "lora": asdict(self.lora),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.base.check(Base(**checkpoint["dcar"]["base"]), source="the checkpoint")


def adapter_of(checkpoint: dict[str, Any], *, source: str | Path) -> Adapter:
    """The (averaged) adapters of a checkpoint that `LoraGenerator` wrote."""
    facts = checkpoint["dcar"]
    if facts["module"] != "LoraGenerator":
        raise CheckpointError(
            f"{source} was written by {facts['module']}; adapters are LoraGenerator's"
        )
    settings = LoraSettings(**facts["lora"])
    return Adapter(settings, Base(**facts["base"]), checkpoint["network"])
