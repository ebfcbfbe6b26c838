"""The task of `--exp=export`: a model folder in the precision that it is given away in."""

from pathlib import Path

import torch
from lightning.pytorch.utilities import rank_zero_info
from omegaconf import DictConfig

from dcar.lit.lineage import model_lineage
from dcar.models.checkpoints import save_model
from experiments.config import ConfigError
from experiments.names import find
from experiments.run import RunOptions
from experiments.sample import find_model

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def export(config: DictConfig, options: RunOptions) -> None:
    """Read a model and write it to `out`, with the record of where it comes from.

    Raises ConfigError for a precision that there is not, or that cannot hold the weights, and
    CheckpointError for a model that cannot be read.
    """
    if config.precision not in PRECISIONS:
        given = f"precision={config.precision}"
        raise ConfigError(f"{given} must be one of {', '.join(PRECISIONS)}")
    model = find_model(config.ckpt, config.outputs)
    source = find(config.ckpt, config.outputs, key="ckpt")
    if options.dry_run:
        return
    try:
        save_model(
            model,
            config.out,
            lineage=model_lineage(source),
            dtype=PRECISIONS[config.precision],
        )
    except ValueError as error:
        raise ConfigError(f"precision={config.precision}: {error}") from error
    size = sum(file.stat().st_size for file in Path(config.out).iterdir())
    rank_zero_info(f"{config.out}: {source}, {size / 1e6:.1f} MB")
