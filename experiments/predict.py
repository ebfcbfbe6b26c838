"""What data/precompute and data/caption share: shards in, shards out, on any number of devices."""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any, cast

from lightning import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, Strategy
from omegaconf import DictConfig, OmegaConf

from dcar.data.loader import told_plainly
from dcar.data.storage import is_remote, join, local_path, parent
from dcar.data.wording import amount
from dcar.lit.shard_reader import Decode, ShardReading, Source, find_sources
from dcar.lit.shard_writer import Progress, ShardPredictionWriter
from experiments.components import build
from experiments.config import ConfigError, check_local
from experiments.run import RunOptions
from experiments.strategy import device_count, make_trainer, resolve_accelerator
from experiments.train import resolve_precision

PATIENCE = timedelta(days=30)  # of a rank that is done while another works on its last shards


def resolve_strategy(settings: dict[str, Any]) -> str | Strategy:
    """`auto` with several processes is one copy of the model on each."""
    if settings["strategy"] != "auto" or device_count(settings) == 1:
        return str(settings["strategy"])
    return DDPStrategy(timeout=PATIENCE)


def build_trainer(config: DictConfig, **options: Any) -> Trainer:
    settings = cast(dict[str, Any], OmegaConf.to_container(config.trainer, resolve=True))
    settings["devices"] = settings["devices"] or "auto"
    settings["accelerator"] = resolve_accelerator(settings["accelerator"])
    settings["precision"] = resolve_precision(str(settings["precision"]), settings["accelerator"])
    settings["strategy"] = resolve_strategy(settings)
    return make_trainer(settings, **options)


def check_out(out: str, sources: Sequence[Source]) -> None:
    """Raises ValueError where `out` is a folder of the input: its shards would be replaced."""
    for folder in {parent(source.url) for source in sources}:
        same = parent(join(out, "x")) == folder
        if not (is_remote(out) or is_remote(folder)):
            same = local_path(out).resolve() == local_path(folder).resolve()
        if same:
            raise ValueError(f"out={out} holds the input, whose shards would be replaced")


def check_precision(config: DictConfig, key: str) -> None:
    """Raises ConfigError for a precision of the trainer: that of the work is `key`."""
    if config.trainer.precision != "32-true":
        given = config.trainer.precision
        raise ConfigError(f"trainer.precision={given}: here {key} says it ({key}={config[key]})")


def open_sources(config: DictConfig) -> list[Source]:
    """The shards of `in`, before anything large is loaded.

    Raises FileNotFoundError where there are none, ValueError where `out` is their own folder.
    """
    sources = find_sources(cast(dict[str, Any], OmegaConf.to_container(config))["in"])
    check_out(config.out, sources)
    check_local(config.out, is_folder=True)
    return sources


def predict_shards(
    config: DictConfig,
    options: RunOptions,
    *,
    sources: Sequence[Source],
    module: LightningModule,
    decode: Decode,
    settings: dict[str, Any],
    nothing_made: str = "nothing made",
) -> None:
    """One output shard in `out` for each of `sources`; what is finished is not made again.

    settings: what the predictions depend on; shards in `out` of other settings, or of another input
    than the shard of their name, are refused. Raises ValueError, FileNotFoundError and DataError as
    the reader and writer do, RuntimeError for what passes for bad input but comes amid the work.
    """
    progress = Progress(config.out, settings, sources=sources)
    progress.check_folder()
    data = ShardReading(
        sources,
        decode=decode,
        finished=progress.finished,
        batch_size=config.batch_size,
        num_workers=config.num_workers,
        cache=build(config.shard_cache),
    )
    writer = ShardPredictionWriter(progress, max_bad=config.max_bad, nothing_made=nothing_made)
    if options.dry_run:
        trainer = build_trainer(config, fast_dev_run=1)
    else:
        trainer = build_trainer(config, callbacks=[writer], logger=False)
    try:
        with told_plainly():
            trainer.predict(module, datamodule=data, return_predictions=False)
    except (ValueError, TypeError) as error:
        if not writer.tried:
            raise
        raise RuntimeError(f"after {amount(writer.tried, 'sample')}: {error}") from error
