"""The task of every training experiment: build data, module and trainer from config, and fit."""

import json
from pathlib import Path
from typing import Any, cast

import torch
from lightning import LightningDataModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Callback, Checkpoint, Timer
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities import rank_zero_info
from omegaconf import DictConfig, OmegaConf

from dcar.data.storage import write_atomically
from dcar.errors import CheckpointError
from dcar.lit.base import BaseModule
from dcar.lit.board import TensorBoardLogger
from dcar.lit.callbacks import ConfigText
from dcar.lit.checkpoint_io import DurableCheckpointIO
from dcar.lit.generator import MaskedARGenerator
from dcar.lit.last_checkpoint import LastCheckpoint
from dcar.lit.lineage import model_lineage
from dcar.lit.precision import is_on_cpu
from dcar.lit.sharding import is_sharded
from dcar.models.checkpoints import PARTS, load_strictly, read_checkpoint, save_model
from experiments.components import build
from experiments.config import ConfigError, at_least, check_writable, quick_dtype
from experiments.lineage import lineage_of
from experiments.resume import find_resume, finished
from experiments.run import RunOptions
from experiments.strategy import (
    make_trainer,
    resolve_accelerator,
    resolve_strategy,
    syncs_batchnorm,
)


def resolve_precision(precision: str, accelerator: str) -> str:
    """`auto`: fp16 on a GPU, bf16 on a CPU that has instructions for it, else fp32."""
    if precision != "auto":
        return precision
    if torch.cuda.is_available() and not is_on_cpu(accelerator):
        return "16-mixed"
    return "bf16-mixed" if quick_dtype() == "bfloat16" else "32-true"


def build_logger(node: DictConfig, resume: Path | None) -> Any:
    """TensorBoard forgets what was logged after the checkpoint, which is logged again."""
    if resume is None or not node._target_.endswith("TensorBoardLogger"):
        return build(node)
    taken = int(read_checkpoint(resume, mapped=True)["global_step"])
    return build(node, purge_step=taken + 1)


def build_trainer(
    config: DictConfig, module: BaseModule, options: RunOptions, *, resume: Path | None = None
) -> Trainer:
    settings = cast(dict[str, Any], OmegaConf.to_container(config.trainer, resolve=True))
    settings["accelerator"] = resolve_accelerator(settings["accelerator"])
    settings["precision"] = resolve_precision(str(settings["precision"]), settings["accelerator"])
    settings["strategy"] = resolve_strategy(settings, alternates=len(module.optimized()) > 1)
    settings["sync_batchnorm"] = syncs_batchnorm(settings)
    plugins: list[Any] = [DurableCheckpointIO()]
    if SLURMEnvironment.detect():  # a job is queued again by LastCheckpoint
        plugins.append(SLURMEnvironment(auto_requeue=False))
    callbacks: list[Callback] = [build(node) for node in config.callbacks.values()]
    callbacks.sort(key=lambda one: isinstance(one, LastCheckpoint))  # it may end the run: last
    for callback in callbacks:
        if isinstance(callback, ConfigText):
            callback.text = OmegaConf.to_yaml(config, resolve=True)
    if options.dry_run:
        callbacks = [callback for callback in callbacks if not isinstance(callback, Checkpoint)]
        return make_trainer(settings | {"fast_dev_run": 1}, callbacks=callbacks, plugins=plugins)
    loggers = [build_logger(node, resume) for node in config.loggers.values()]
    trainer = make_trainer(settings, callbacks=callbacks, logger=loggers, plugins=plugins)
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.trainer = trainer
    return trainer


def model_config(config: DictConfig) -> dict[str, Any]:
    """What a checkpoint or model folder says of itself: plain data, parts by class name."""
    plain = OmegaConf.to_container(config, resolve=True)
    assert isinstance(plain, dict)
    return {key: plain[key] for key in (*PARTS, "sampler", "size") if key in plain}


def find_start(config: DictConfig, options: RunOptions) -> Path | None:
    """The checkpoint to go on from. Raises ConfigError where the run could not be written."""
    if options.dry_run:
        return find_resume(config, options.ckpt or "new")
    check_writable(config.output_dir, "outputs", is_folder=True)
    return find_resume(config, options.ckpt)


def train(config: DictConfig, options: RunOptions) -> dict[str, float]:
    """Fit, or go on fitting, one module. Returns the last logged metrics by name."""
    at_least(config, 0, "seed", "learning_rate")
    resume = find_start(config, options)
    if finished(resume, config):
        rank_zero_info(f"{config.exp}: all {config.max_steps} steps are done ({resume})")
        return {}
    if config.module.get("deepen") and config.init_from is None:
        raise ConfigError("module.deepen=true needs init_from, the weights of fewer blocks")
    seed_everything(config.seed, workers=True, verbose=False)
    config = with_weights(config, options)
    datamodule: LightningDataModule = build(config.data)
    module: BaseModule = build(config.module)
    module.plain_config = model_config(config)
    module.run_config = cast(dict[str, Any], OmegaConf.to_container(config, resolve=True))
    first = load_weights(module, resume)
    trainer = build_trainer(config, module, options, resume=resume)
    if not options.dry_run:
        module.lineage = lineage_of(
            config,
            resumed=resume,
            datamodule=datamodule,
            precision=str(trainer.precision),
            world_size=trainer.world_size,
        )
        folder = Path(config.output_dir)
        rank_zero_info(f"{config.exp}: {from_where(resume, first)}; what it leaves is in {folder}")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(OmegaConf.to_yaml(config, resolve=True))
        (folder / "metrics.json").unlink(missing_ok=True)  # it says that all is done
    fit(trainer, module, datamodule, resume, first=first)
    logged = dict(trainer.callback_metrics)  # a validation of its own would forget those of steps
    if module.validated_step != trainer.global_step and not options.dry_run:
        trainer.validate(module, datamodule=datamodule, verbose=False)
    logged |= trainer.callback_metrics
    metrics = {name: float(value) for name, value in logged.items()}
    if options.dry_run:
        rank_zero_info(f"dry run: one step of {config.exp} was taken, nothing was written")
    elif trainer.is_global_zero:
        if isinstance(module, MaskedARGenerator):
            export(module, config)
        write_facts(trainer, module, metrics, config)
    return metrics


def from_where(resume: Path | None, first: int) -> str:
    return "starts afresh" if resume is None else f"goes on from {resume}, step {first}"


def load_weights(module: BaseModule, resume: Path | None) -> int:
    """The step of the checkpoint, if any. Lightning loads it too; its own error lists no shapes."""
    if resume is None:
        return 0
    checkpoint = read_checkpoint(resume, mapped=True)
    load_strictly(module, checkpoint["state_dict"], source=resume)
    return int(checkpoint["global_step"])


def fit(
    trainer: Trainer,
    module: BaseModule,
    datamodule: LightningDataModule,
    resume: Path | None,
    *,
    first: int,
) -> None:
    """Raises RuntimeError for what would pass for bad input, but comes when steps were taken."""
    try:
        trainer.fit(module, datamodule=datamodule, ckpt_path=resume, weights_only=True)
    except (ValueError, TypeError) as error:
        if trainer.global_step <= first:
            raise
        raise RuntimeError(f"after step {trainer.global_step}: {error}") from error


def write_facts(
    trainer: Trainer, module: BaseModule, metrics: dict[str, float], config: DictConfig
) -> None:
    """metrics.json: the last value of everything logged, with what it took to get there."""
    timer = next((c for c in trainer.callbacks if isinstance(c, Timer)), None)  # type: ignore[attr-defined]
    facts = {
        "experiment": config.exp,
        "steps": trainer.global_step,
        "seconds": timer.time_elapsed("train") if timer else None,
        "parameters": sum(p.numel() for p in module.network.parameters()),
        "trained_parameters": sum(
            p.numel() for p in module.network.parameters() if p.requires_grad
        ),
        "precision": str(trainer.precision),
        "device": str(module.device),
        "metrics": metrics,
    }
    with write_atomically(Path(config.output_dir) / "metrics.json") as file:
        file.write(json.dumps(facts, indent=2).encode() + b"\n")


def export(module: MaskedARGenerator, config: DictConfig) -> None:
    """The averaged generator with its tokenizer as a model folder, ready for `--exp=sample`."""
    folder = Path(config.output_dir)
    last = folder / "checkpoints" / "last.ckpt"
    if is_sharded(module.network):  # this process has a piece of it, and the others are done
        plain_config, module = module.plain_config, build(config.module)
        module.plain_config = plain_config
    module.load_network(last, expected=(type(module).__name__,))
    save_model(module.model(), folder / "model", lineage=model_lineage(last))


def with_weights(config: DictConfig, options: RunOptions) -> DictConfig:
    """What the training starts from is there; a dry run starts from random weights where it is not.

    Raises CheckpointError naming the key whose checkpoint has not been made yet.
    """
    config = config.copy()
    for key in ("init_from", "tokenizer_from"):
        path = OmegaConf.select(config, f"module.{key}")
        if path is None or Path(path).exists():
            continue
        if not options.dry_run:
            raise CheckpointError(
                f"{key}={config[key]}: there is no checkpoint at {path}: make it first, or name "
                "another"
            )
        rank_zero_info(f"dry run: {path} is not there; {key} is left out")
        config.module[key] = None
    return config
