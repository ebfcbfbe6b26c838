"""The task of `--exp=eval/fid`: the Frechet distance between two sets of pictures in shards."""

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torch.utils.data import DataLoader
from torchmetrics.image.fid import FrechetInceptionDistance

from dcar.data.images import read_image
from dcar.data.loader import told_plainly
from dcar.data.members import BadSample, Raw
from dcar.data.samples import image_bytes, read_pixels
from dcar.data.shards import read_facts
from dcar.data.storage import parent, write_atomically
from dcar.data.transforms import ImageTransform
from dcar.errors import DataError
from dcar.evaluation.fid import fid_metric
from dcar.lit.shard_reader import Decode, ShardReader, Source, find_sources
from dcar.lit.shard_writer import judge
from dcar.models.features import fid_features
from experiments.components import build
from experiments.config import ConfigError, at_least, check_writable
from experiments.run import RunOptions
from experiments.sample import chosen_device

Shape = tuple[int, int]  # height, width
CROPS = ("adm", "center")


def read_as_is(raw: Raw) -> dict[str, Any]:
    """The picture as it was drawn: `pixels` uint8 (height, width, 3)."""
    data = image_bytes(raw)
    try:
        pixels = np.asarray(read_image(data))
    except Exception as error:  # a hostile file may raise anything inside a decoder
        raise BadSample("broken image") from error
    return {"key": str(raw["__key__"]), "pixels": pixels}


class Cropped:
    """The picture cut to a shape in the way of evaluations: `pixels` uint8 (height, width, 3)."""

    def __init__(self, shape: Shape, *, crop: str):
        self.transform, self.shape = ImageTransform(max(shape), crop=crop), shape

    def __call__(self, raw: Raw) -> dict[str, Any]:
        pixels = read_pixels(raw, self.transform, self.shape)
        return {"key": str(raw["__key__"]), "pixels": pixels}


class PictureSet:
    """Pictures of shards in batches (B, 3, H, W) of uint8, which must all be of one shape.

    Raises DataError for a picture of another shape than the first, and where more than `max_bad`
    of the samples could not be used.
    """

    def __init__(self, config: DictConfig, name: str):
        self.name, self.config = name, config
        self.urls = cast(dict[str, Any], OmegaConf.to_container(config))[name]
        try:
            self.sources: list[Source] = find_sources(self.urls)
        except DataError as error:
            raise DataError(f"{name}: {error}") from error
        self.images, self.shape = 0, (0, 0)

    def batches(self, decode: Decode) -> Iterator[Tensor]:
        reader = ShardReader(
            self.sources,
            decode=decode,
            batch_size=self.config.batch_size,
            cache=build(self.config.shard_cache),
        )
        bad: Counter[str] = Counter()
        tried = 0
        loader = DataLoader(reader, batch_size=None, num_workers=self.config.num_workers)
        with told_plainly():
            for batch in loader:
                bad, tried = bad + Counter(batch["bad"]), tried + batch["tried"]
                if batch["key"]:
                    yield self._stacked(batch)
        judge(bad, tried, self.config.max_bad)

    def _stacked(self, batch: dict[str, Any]) -> Tensor:
        if not self.images:
            self.shape = batch["pixels"][0].shape[:2]
        for key, pixels in zip(batch["key"], batch["pixels"], strict=True):
            if pixels.shape[:2] != self.shape:
                raise DataError(
                    f"{self.name}: {key} in {batch['shard']} is of {_sides(pixels.shape)}, those "
                    f"before it of {_sides(self.shape)}: the distance is between pictures of one "
                    "size"
                )
        self.images += len(batch["key"])
        return torch.from_numpy(np.stack(batch["pixels"])).permute(0, 3, 1, 2)  # (B, 3, H, W)

    def facts(self) -> dict[str, Any]:
        """How many there are, and what their manifests say of how they were made."""
        folders = sorted({parent(source.url) for source in self.sources})
        made = {folder: facts for folder in folders if (facts := read_facts(folder))}
        return {"in": self.urls, "images": self.images, "made": made}


def _sides(shape: Any) -> str:
    return f"{shape[1]} x {shape[0]}"


def measure(
    metric: FrechetInceptionDistance,
    pictures: PictureSet,
    decode: Decode,
    *,
    real: bool,
    only_first: bool,
) -> None:
    """Feed a set to the metric, saying now and then how far it is."""
    told = 0
    for picture in pictures.batches(decode):
        metric.update(picture.to(metric.device), real=real)
        if pictures.images - told >= 1000:
            told = pictures.images
            rank_zero_info(f"{pictures.name}: {told} pictures")
        if only_first:
            return
    if pictures.images < 2:
        raise ConfigError(
            f"{pictures.name}={pictures.urls} has {pictures.images} pictures: the distance needs "
            "two at least"
        )


def fid(config: DictConfig, options: RunOptions) -> float | None:
    """The distance, printed and written to `out` with what it was measured on."""
    at_least(config, 1, "batch_size")
    at_least(config, 0, "num_workers")
    if config.crop not in CROPS:
        raise ConfigError(f"crop={config.crop} is none of {', '.join(CROPS)}")
    check_writable(config.out)
    device = chosen_device(config.device)
    generated, real = PictureSet(config, "generated"), PictureSet(config, "real")
    features = fid_features(config.fid_features)
    metric = fid_metric(features).to(device)
    measure(metric, generated, read_as_is, real=False, only_first=options.dry_run)
    crop = Cropped(generated.shape, crop=config.crop)
    measure(metric, real, crop, real=True, only_first=options.dry_run)
    if options.dry_run:
        return None
    distance = float(metric.compute())
    results = {
        "fid": distance,
        "features": features.name,
        "shape": list(generated.shape),
        "crop": config.crop,
        "generated": generated.facts(),
        "real": real.facts(),
    }
    with write_atomically(config.out) as file:
        file.write(json.dumps(results, indent=1).encode() + b"\n")
    rank_zero_info(
        f"FID {distance:.2f} on {features.name} features: {generated.images} pictures of "
        f"{_sides(generated.shape)} against {real.images} real ones ({config.out})"
    )
    if min(generated.images, real.images) < features.num_features:
        rank_zero_info(
            f"fewer pictures than the {features.num_features} features: biased upwards, compare "
            "only at equal numbers"
        )
    return distance
