"""The task of `--exp=eval/generate`: a picture of every caption in shards, as shards again."""

import hashlib
import io
import json
from dataclasses import asdict
from typing import Any

from lightning import LightningModule
from omegaconf import DictConfig
from torch import nn

from dcar.data.members import Raw
from dcar.data.samples import read_caption
from dcar.models.checkpoints import Model
from dcar.models.fingerprint import fingerprint
from dcar.pipeline import DCARPipeline
from experiments.config import at_least
from experiments.predict import check_precision, open_sources, predict_shards
from experiments.run import RunOptions
from experiments.sample import open_model


def seed_of(key: str, seed: int) -> int:
    """A picture's own seed, whatever is drawn beside it: 32 bits of a hash of both."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{key}".encode()).digest()[:4], "big")


def read_prompt(raw: Raw) -> dict[str, Any]:
    """Raises BadSample for a sample without words; pictures are not looked at."""
    return {"key": str(raw["__key__"]), "caption": read_caption(raw, required=True)}


def describe_model(model: Model, reference: str) -> dict[str, Any]:
    """What pictures depend on of a model, as plain data, and where it was found."""
    parts = {name: getattr(model, name) for name in ("tokenizer", "generator", "text_encoder")}
    return {"ckpt": reference, "fingerprint": fingerprint(nn.ModuleDict(parts))}


class PicturePredictor(LightningModule):
    """Batches of captions to raw samples: `png`, `txt` the caption, `json` the picture's seed.

    seed: of the whole set. precision: `DCARPipeline`'s. options: of its call.
    """

    pipeline: DCARPipeline

    def __init__(self, model: Model, *, seed: int, precision: str, options: dict[str, Any]):
        super().__init__()
        self.model, self.seed, self.precision, self.options = model, seed, precision, options

    def on_predict_start(self) -> None:
        self.pipeline = DCARPipeline(self.model, device=self.device, precision=self.precision)

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[Raw]:
        keys = batch["key"]
        if not keys:
            return []
        seeds = [seed_of(key, self.seed) for key in keys]
        pictures = self.pipeline(
            batch["caption"], seeds=seeds, batch_size=len(keys), **self.options
        )
        samples: list[Raw] = []
        for key, caption, seed, picture in zip(
            keys, batch["caption"], seeds, pictures, strict=True
        ):
            png = io.BytesIO()
            picture.save(png, "PNG")
            facts = json.dumps({"seed": seed}).encode()
            samples.append(
                {"__key__": key, "png": png.getvalue(), "txt": caption.encode(), "json": facts}
            )
        return samples


def generate(config: DictConfig, options: RunOptions) -> None:
    """Draw every caption of `in` once. Raises ValueError naming a setting that cannot be used."""
    at_least(config, 0, "seed")
    check_precision(config, "precision")
    sources = open_sources(config)
    model = open_model(config)
    names = ("steps", "guidance", "height", "width")
    asked = {name: config[name] for name in names if config[name] is not None}
    pipeline = DCARPipeline(model, precision=config.precision)
    sampler = pipeline.settings(steps=config.steps, guidance=config.guidance)
    sides = {name: config[name] or model.size for name in ("height", "width")}
    for name, side in sides.items():
        pipeline.tokens_along(name, side)
    predict_shards(
        config,
        options,
        sources=sources,
        module=PicturePredictor(model, seed=config.seed, precision=config.precision, options=asked),
        decode=read_prompt,
        settings={
            "kind": "pictures",
            "model": describe_model(model, config.ckpt),
            "sampler": asdict(sampler),
            "shape": [*sides.values()],
            "seed": config.seed,
            "precision": config.precision,
        },
    )
