"""The task of `--exp=judge`: train the judge, then write its weights file with its figures."""

import json
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_info
from omegaconf import DictConfig

from dcar.lit.judge import JudgeTraining
from dcar.models.judge import save_judge
from experiments.components import build
from experiments.config import ConfigError, check_writable
from experiments.run import RunOptions
from experiments.strategy import device_count
from experiments.train import train

NOT_FIGURES = ("train/", "opt/", "perf/", "data/")


def judge(config: DictConfig, options: RunOptions) -> None:
    """Fit, or go on fitting; the averaged weights go to `config.weights`.

    Where all steps are done already only the file is written, again. Raises ConfigError for more
    than one process, which would see the same views.
    """
    if device_count(config.trainer) != 1:
        raise ConfigError(
            f"trainer.devices={config.trainer.devices}: a judge trains in one process"
        )
    check_writable(config.weights, "weights")
    train(config, options)
    folder = Path(config.output_dir)
    facts_file, last = folder / "metrics.json", folder / "checkpoints" / "last.ckpt"
    if options.dry_run:
        return
    facts = json.loads(facts_file.read_text())
    module: JudgeTraining = build(config.module)
    module.load_network(last, expected=(JudgeTraining.__name__,))
    figures = {
        "images": facts["steps"] * config.batch_size * config.accumulate,
        "steps": facts["steps"],
        **{
            name: round(value, 4)
            for name, value in sorted(facts["metrics"].items())
            if not name.startswith(NOT_FIGURES)
        },
    }
    save_judge(module.network, config.weights, figures=figures)
    rank_zero_info(f"{config.weights}: {json.dumps(figures)}")
