"""Trains the toy generator with FSDP2 on two ranks and alone, in the variants of `main`.

python tests/lit/sharding_run.py FOLDER  writes a folder of checkpoints each and facts_RANKS.json
"""

import json
import os
import sys
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch.callbacks import Callback

sys.path.insert(0, str(Path(__file__).parents[2]))

from dcar.lit import optimizers
from dcar.lit.averaging import AverageWeights
from dcar.lit.checkpoint_io import DurableCheckpointIO
from dcar.lit.generator import MaskedARGenerator
from dcar.lit.last_checkpoint import LastCheckpoint
from dcar.lit.optimizers import MuonAdamW
from dcar.lit.sharding import ShardedStrategy, own_piece
from tests.lit.ddp_run import run_forked
from tests.toys import (
    ToyData,
    ToyImages,
    ToyLoader,
    toy_generator,
    toy_masked_generator,
    toy_trainer,
)

STEPS, BATCH, IMAGES = 5, 8, 32


class UnevenData(ToyData):
    """The second rank has one batch of validation, every other rank two."""

    def val_dataloader(self) -> list[ToyLoader]:
        return [ToyLoader(ToyImages(4 if self.trainer.global_rank == 1 else 8, offset=100), 4)]


class Watch(Callback):
    """What can only be seen while training; draws a picture on the first rank alone."""

    def __init__(self) -> None:
        self.facts: dict[str, Any] = {"norms": {}, "pieces": [], "pictures": 0}

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        if "opt/gradient_norm" in trainer.logged_metrics:
            self.facts["norms"][trainer.global_step] = float(
                trainer.logged_metrics["opt/gradient_norm"]
            )
        sizes = [own_piece(p).numel() for p in pl_module.network.parameters()]
        self.facts["pieces"].append(sum(sizes))

    @torch.no_grad()
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.is_global_zero:
            text, text_mask = pl_module.text_encoder(["a prompt"])
            pl_module.decode(pl_module.sample(text, text_mask, seeds=[0]))
            self.facts["pictures"] += 1


ADAMW = partial(torch.optim.AdamW, lr=1e-2, eps=1e-2, fused=True)  # see ddp_run.py
MUON = partial(MuonAdamW, lr=1e-2, aside=["token_embedding", "transformer.output"])


def toy_module(
    *,
    accumulate: int = 1,
    checkpoint_activations: bool = False,
    optimizer: Any = ADAMW,
    head_alone: bool = False,
) -> MaskedARGenerator:
    torch.manual_seed(0)
    generator = toy_generator(scale=None, caption_drop=0.3)
    generator.transformer.checkpoint_activations = checkpoint_activations
    return toy_masked_generator(
        generator=generator, optimizer=optimizer, accumulate=accumulate, head_alone=head_alone
    )


def fit(
    folder: Path,
    *,
    ranks: int,
    resume: Path | None = None,
    **options: Any,
) -> dict[str, Any]:
    module, watch = toy_module(**options), Watch()
    sharded = ShardedStrategy(ranks=ranks, timeout=timedelta(minutes=1))
    trainer = toy_trainer(
        STEPS,
        devices=ranks,
        strategy=sharded if ranks > 1 else "auto",
        callbacks=[
            AverageWeights(decay=0.9),
            watch,
            LastCheckpoint(folder=folder, every_steps=3),
        ],
        plugins=[DurableCheckpointIO()],
        limit_val_batches=1.0,
        val_check_interval=2 * module.accumulate,
    )
    data = UnevenData(BATCH // module.accumulate, count=IMAGES, world=ranks)
    trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
    name = "residual" if module.head_alone else "token"
    watch.facts[f"val_{name}"] = float(trainer.callback_metrics[f"val/{name}"])
    return watch.facts


def main(folder: Path, ranks: int) -> None:
    optimizers.quick_dtype = lambda device: torch.float32  # Muon, too, is compared in fp32
    if ranks == 1:
        facts = {
            "one": fit(folder / "one", ranks=1),
            "muon_one": fit(folder / "muon_one", ranks=1, optimizer=MUON),
            "head_one": fit(folder / "head_one", ranks=1, head_alone=True),
        }
    else:
        facts = {
            "two": fit(folder / "two", ranks=2),
            "muon_two": fit(folder / "muon_two", ranks=2, optimizer=MUON),
            "head_two": fit(folder / "head_two", ranks=2, head_alone=True),
            "parts": fit(folder / "parts", ranks=2, accumulate=2, checkpoint_activations=True),
            "resumed": fit(
                folder / "resumed", ranks=2, resume=folder / "two" / "step_00000003.ckpt"
            ),
        }
    if os.environ["LOCAL_RANK"] == "0":
        (folder / f"facts_{ranks}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    run_forked(partial(main, Path(sys.argv[1])))
