"""Toy models and data that tests share: real classes at the smallest sizes, no files."""

from collections.abc import Iterator
from copy import deepcopy
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from lightning import LightningDataModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from dcar.evaluation.metrics import GenerationMetrics, ReconstructionMetrics
from dcar.lit.base import BaseModule
from dcar.lit.generator import MaskedARGenerator
from dcar.lit.tokenizer import TokenizerModule, TokenizerStage1, TokenizerStage2, TokenizerStage3
from dcar.models.autoencoder import Decoder, Encoder
from dcar.models.checkpoints import Model, build_model
from dcar.models.discriminator import PatchDiscriminator
from dcar.models.generator import HybridGenerator
from dcar.models.losses import TokenizerCriterion
from dcar.models.masking import masked_after, next_masked
from dcar.models.quantizer import VectorQuantizer
from dcar.models.residual_head import ResidualHead
from dcar.models.sampler import SamplerSettings
from dcar.models.text_encoder import ByteT5TextEncoder
from dcar.models.tokenizer import HybridTokenizer
from dcar.models.transformer import MaskedTransformer

ROOT = Path(__file__).parents[1]
STAGES = {1: TokenizerStage1, 2: TokenizerStage2, 3: TokenizerStage3}
SIZE, CODES, CHANNELS = 32, 16, 4
# Of other ranks: forking is quick, but autograd refuses it once it has threads for a GPU
START = "spawn" if torch.cuda.is_available() else "fork"


def autoencoder_config() -> dict[str, Any]:
    return {
        "latent_channels": CHANNELS,
        "widths": [8, 8, 32],
        "depths": [0, 1, 1],
        "blocks": ["res", "res", "evit"],
    }


def tokenizer_config(norm: str = "bn2d") -> dict[str, Any]:
    """Plain data, as it is saved beside weights."""
    common = autoencoder_config()
    path = "dcar.models"
    decoder = {"norms": [norm, norm, "ln2d"], "activations": ["relu", "relu", "silu"]}
    return {
        "_target_": f"{path}.tokenizer.HybridTokenizer",
        "encoder": {"_target_": f"{path}.autoencoder.Encoder", **common},
        "quantizer": {
            "_target_": f"{path}.quantizer.VectorQuantizer",
            "num_codes": CODES,
            "dim": CHANNELS,
        },
        "decoder": {
            "_target_": f"{path}.autoencoder.Decoder",
            **common,
            **decoder,
            "out_norm": "ln2d",
        },
    }


def toy_tokenizer(norm: str = "bn2d", **quantizer: Any) -> HybridTokenizer:
    common = autoencoder_config()
    return HybridTokenizer(
        encoder=Encoder(**common),
        quantizer=VectorQuantizer(num_codes=CODES, dim=CHANNELS, **quantizer),
        decoder=Decoder(
            **common,
            norms=[norm, norm, "ln2d"],
            activations=["relu", "relu", "silu"],
            out_norm="ln2d",
        ),
    )


def toy_generator(
    scale: float | None = 0.1, caption_drop: float = 0.1, depth: int = 2, width: int = 16
) -> HybridGenerator:
    return HybridGenerator(
        transformer=MaskedTransformer(
            num_codes=CODES, dim=16, depth=depth, heads=2, text_dim=8, text_tokens=16, base_grid=4
        ),
        residual_head=ResidualHead(
            channels=CHANNELS, dim=16, width=width, depth=1, scale=scale, sample_steps=4
        ),
        caption_drop=caption_drop,
    )


def fixed_per_step(tokens: int, steps: int, schedule: str = "arccos") -> list[int]:
    """How many tokens each step of sampling fixes; with fewer tokens than steps, one per token."""
    steps = min(steps, tokens)
    masked, fixed = torch.tensor(tokens), []
    for step in range(steps):
        progress = torch.tensor((step + 1) / steps, dtype=torch.float64)
        left = next_masked(masked_after(progress, tokens, schedule), masked)
        left = torch.zeros_like(left) if step == steps - 1 else left
        fixed.append(int(masked - left))
        masked = left
    return fixed


def toy_text_encoder() -> ByteT5TextEncoder:
    return ByteT5TextEncoder(dim=8, layers=1, heads=2, max_tokens=16)


def toy_criterion(stage: int, *, adversarial: float = 0.0) -> TokenizerCriterion:
    return TokenizerCriterion(
        pixel="l1",
        pixel_weight=1.0,
        perceptual=None,
        perceptual_weight=0.0,
        codebook_weight=1.0 if stage == 2 else 0.0,
        adversarial_weight=adversarial,
    )


@cache
def _metrics() -> ReconstructionMetrics:
    return ReconstructionMetrics(features=None)


def toy_metrics() -> ReconstructionMetrics:
    """Without FID; the networks are read from their files once, and copied."""
    return deepcopy(_metrics())


def toy_stage(
    stage: int,
    *,
    adversarial: bool = False,
    norm: str = "bn2d",
    revival_decay: float | None = None,
    **options: Any,
) -> TokenizerModule:
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "tokenizer": toy_tokenizer(norm, revival_decay=revival_decay),
        "criterion": toy_criterion(stage, adversarial=0.5 if adversarial else 0.0),
        "discriminator": PatchDiscriminator(width=16, layers=1, norm="group")
        if adversarial
        else None,
        "optimizer": partial(torch.optim.AdamW, lr=1e-2),
        "metrics": toy_metrics,
    }
    return STAGES[stage](**settings | options)


def toy_masked_generator(**options: Any) -> MaskedARGenerator:
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "generator": toy_generator(),
        "text_encoder": toy_text_encoder(),
        "tokenizer": toy_tokenizer(),
        "tokenizer_from": None,
        "sampler": SamplerSettings(steps=3, guidance=1.0),
        "size": SIZE,
        "optimizer": partial(torch.optim.AdamW, lr=1e-2),
        "metrics": GenerationMetrics,
    }
    return MaskedARGenerator(**settings | options)


class ToyImages(Dataset):
    """Smooth random pictures with captions, a function of their index alone."""

    def __init__(self, count: int, *, offset: int = 0, size: int = SIZE):
        self.count, self.offset, self.size = count, offset, size

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(index + self.offset)
        coarse = torch.rand(1, 3, 4, 4, generator=generator) * 2 - 1
        image = torch.nn.functional.interpolate(coarse, self.size, mode="bilinear")[0]
        return {"key": f"toy/{index}", "image": image, "caption": f"toy {index}"}


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    batch: dict[str, Any] = {name: [sample[name] for sample in samples] for name in samples[0]}
    return batch | {"image": torch.stack(batch["image"])}


class ToyLoader(DataLoader):
    """A loader whose position is saved, as the shard loader's is."""

    def __init__(self, dataset: Dataset, batch_size: int, sampler: Any = None):
        super().__init__(dataset, batch_size, sampler=sampler, collate_fn=collate)
        self.position = self.skip = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        skip, self.skip = self.skip, 0
        self.position = 0
        for batch in super().__iter__():
            self.position += 1
            if self.position > skip:
                yield batch
        self.position = 0

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position % len(self)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.skip = state["position"]


class ToyData(LightningDataModule):
    """The global batch is the same images in the same order, whatever the number of ranks."""

    def __init__(self, batch_size: int = 4, *, count: int = 16, world: int = 1):
        super().__init__()
        self.batch_size, self.count, self.world = batch_size, count, world

    def train_dataloader(self) -> ToyLoader:
        data = ToyImages(self.count)
        sampler = None
        if self.world > 1:
            sampler = DistributedSampler(data, self.world, self.trainer.global_rank, shuffle=False)
        return ToyLoader(data, self.batch_size // self.world, sampler)

    def val_dataloader(self) -> list[ToyLoader]:
        return [ToyLoader(ToyImages(8, offset=100), 4)]

    def preview_batches(self) -> Iterator[dict[str, Any]]:
        return iter(self.train_dataloader())


def toy_trainer(max_steps: int, **settings: Any) -> Trainer:
    defaults: dict[str, Any] = {
        "max_steps": max_steps,
        "max_epochs": -1,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": any(
            isinstance(callback, Checkpoint) for callback in settings.get("callbacks", [])
        ),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        "num_sanity_val_steps": 0,
        "limit_val_batches": 0,
    }
    return Trainer(**defaults | settings)


def weights(module: BaseModule) -> dict[str, Tensor]:
    """Copies of everything the module saves."""
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def model_config() -> dict[str, Any]:
    """The plain data of a whole toy model, as config.json holds it."""
    path = "dcar.models"
    return {
        "size": SIZE,
        "tokenizer": tokenizer_config(),
        "generator": {
            "_target_": f"{path}.generator.HybridGenerator",
            "transformer": {
                "_target_": f"{path}.transformer.MaskedTransformer",
                "num_codes": CODES,
                "dim": 16,
                "depth": 2,
                "heads": 2,
                "text_dim": 8,
                "text_tokens": 16,
                "base_grid": 4,
            },
            "residual_head": {
                "_target_": f"{path}.residual_head.ResidualHead",
                "channels": CHANNELS,
                "dim": 16,
                "width": 16,
                "depth": 1,
                "scale": 0.1,
                "sample_steps": 4,
            },
        },
        "text_encoder": {
            "_target_": f"{path}.text_encoder.ByteT5TextEncoder",
            "dim": 8,
            "layers": 1,
            "heads": 2,
            "max_tokens": 16,
        },
        "sampler": {"_target_": f"{path}.sampler.SamplerSettings", "steps": 3, "guidance": 1.0},
    }


def toy_model() -> Model:
    """A model whose logits depend on text and position (a fresh output layer is zero)."""
    torch.manual_seed(0)
    model = build_model(model_config())
    for parameter in model.generator.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def stage_checkpoint(stage: int, path: Path) -> Path:
    """Of a tokenizer that one step of a stage has trained, with what exports need."""
    module = toy_stage(stage)
    module.plain_config = {"tokenizer": tokenizer_config(), "size": SIZE}
    trainer = toy_trainer(1)
    trainer.fit(module, datamodule=ToyData())
    trainer.save_checkpoint(path)
    return path
