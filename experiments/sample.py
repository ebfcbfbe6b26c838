"""The task of `--exp=sample`: prompts to PNG files that carry their settings."""

import sys
import textwrap
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, ListConfig
from PIL.Image import Image

from dcar.errors import CheckpointError
from dcar.evaluation.sheets import captioned_grid, save_png
from dcar.models.checkpoints import (
    Model,
    build_model,
    load_model,
    load_strictly,
    load_tokenizer,
    read_checkpoint,
    shipped_models,
)
from dcar.pipeline import DCARPipeline
from experiments.config import ConfigError, at_least, check_writable, nearest, places
from experiments.run import RunOptions


def read_prompts(prompt: Any) -> list[str]:
    """One prompt, a list of them, or the lines of a text file."""
    if prompt is None:
        raise ConfigError("prompt=null: give a text, a list of texts or a .txt file")
    several = isinstance(prompt, list | ListConfig)
    prompts = [str(line) for line in prompt] if several else [str(prompt)]
    if not all(line.strip() for line in prompts):
        raise ConfigError("prompt is empty: give a text, a list of texts or a .txt file")
    if several:
        return prompts
    (prompt,) = prompts
    path = Path(prompt)
    if path.suffix == ".txt":
        if not path.is_file():
            raise ConfigError(f"prompt={prompt}: there is no such file")
        try:
            lines = path.read_text("utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise ConfigError(f"prompt={prompt} is no UTF-8 text: {error}") from error
        return [line.strip() for line in lines if line.strip()]
    return [prompt]


def find_folder(reference: str, outputs: str, *, key: str = "ckpt") -> Path:
    """A model folder, a run's folder, the name of a shipped model, or an experiment's name."""
    configs = [p for p in places(reference, outputs) if p.name == "config.json"]
    for config in configs:
        if config.is_file():
            return config.parent
    if within := models_within(Path(reference)):
        raise CheckpointError(
            f"{key}={reference} is no model itself; there are {', '.join(map(str, within))} in it"
        )
    raise CheckpointError(
        f"{key}={reference} is no checkpoint, no model that comes with the package "
        f"({', '.join(shipped_models())}){nearest(reference, shipped_models())}, and no "
        f"config.json lies in {' or '.join(str(config.parent) for config in configs)}"
    )


def models_within(folder: Path) -> list[Path]:
    """What can be drawn from in the folders of a recipe: models, and generators being trained."""
    models = [config.parent for config in folder.glob("*/model/config.json")]
    unfinished = [
        path
        for path in folder.glob("*/checkpoints/last.ckpt")
        if path.parents[1] / "model" not in models
        and read_checkpoint(path, mapped=True)["dcar"]["module"] == "MaskedARGenerator"
    ]
    return sorted(models + unfinished)


def find_model(reference: str, outputs: str, *, key: str = "ckpt") -> Model:
    """What `find_folder` takes, or a Lightning checkpoint. key: the setting, for its errors."""
    path = Path(reference)
    if path.is_file():
        return model_of_checkpoint(path)
    return load_model(find_folder(reference, outputs, key=key))


def model_of_checkpoint(path: Path) -> Model:
    """Generator and text encoder from the checkpoint, the tokenizer from where it came from."""
    checkpoint = read_checkpoint(path)
    config, writer = checkpoint["dcar"]["config"], checkpoint["dcar"]["module"]
    if writer != "MaskedARGenerator":
        raise CheckpointError(f"{path} was written by {writer}; sampling needs a generator's")
    tokenizer_from = checkpoint["dcar"]["tokenizer_from"]
    if tokenizer_from in (None, "None"):  # as older checkpoints have it
        raise CheckpointError(f"{path} was trained on the tokens of a tokenizer of random weights")
    model = build_model(config)
    network = torch.nn.ModuleDict({"generator": model.generator})
    if model.text_encoder.trainable:
        network["text_encoder"] = model.text_encoder
    load_strictly(network, checkpoint["network"], source=path)
    load_tokenizer(tokenizer_from, into=model.tokenizer)
    return model


def chosen_device(name: str | None) -> torch.device:
    """A GPU where there is one and none is named. Raises ConfigError for one that is not there."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # no such kind; torch built without it
        raise ConfigError(f"device={name}: {str(error).splitlines()[0]}") from error
    return device


def output_paths(out: str, count: int) -> list[Path]:
    """`out` itself for one image, numbered beside it for several."""
    path = Path(out)
    if path.suffix.lower() != ".png":
        raise ConfigError(f"out={out} must end in .png")
    if count == 1:
        return [path]
    return [path.with_name(f"{path.stem}-{index:03d}.png") for index in range(count)]


def sample(config: DictConfig, options: RunOptions) -> list[Image]:
    """Draw every prompt, write a PNG each, and a captioned grid where there are several."""
    prompts = read_prompts(config.prompt)
    if not prompts:
        raise ConfigError(f"prompt={config.prompt}: no prompt in it")
    at_least(config, 1, "images_per_prompt")
    at_least(config, 0, "seed")
    prompts = [prompt for prompt in prompts for _ in range(config.images_per_prompt)]
    paths = output_paths(config.out, len(prompts))
    check_writable(config.out)
    device = chosen_device(config.device)
    model = find_model(config.ckpt, config.outputs)
    encoder: Any = model.text_encoder
    for prompt in dict.fromkeys(prompts):
        if encoder.cuts(prompt):
            start = textwrap.shorten(prompt, 80, placeholder=" ...")
            print(
                f"only the first {encoder.max_tokens} tokens are read of: {start}", file=sys.stderr
            )
    pipeline = DCARPipeline(model, device=device, precision=config.precision)
    pictures = pipeline(
        prompts,
        seeds=config.seed,
        steps=config.steps,
        guidance=config.guidance,
        height=config.height,
        width=config.width,
        batch_size=1 if options.dry_run else config.batch_size,
    )
    if options.dry_run:
        width, height = pictures[0].size
        print(f"dry run: {len(pictures)} drawn, {width} x {height} px; nothing is written")
    else:
        facts = {"ckpt": config.ckpt, "precision": config.precision}
        facts |= asdict(pipeline.settings(steps=config.steps, guidance=config.guidance))
        write(pictures, prompts, paths, config, facts)
    return pictures


def write(
    pictures: list[Image],
    prompts: list[str],
    paths: list[Path],
    config: DictConfig,
    settings: dict[str, Any],
) -> None:
    for index, (picture, prompt, path) in enumerate(zip(pictures, prompts, paths, strict=True)):
        save_png(picture, path, {"prompt": prompt, "seed": config.seed + index, **settings})
        print(f"{path}: {prompt}")
    if len(pictures) > 1:
        grid_path = Path(config.out)
        columns = min(8, len(pictures))
        grid = captioned_grid(pictures, prompts, columns=columns)
        facts = {"prompts": "\n".join(prompts), "first seed": config.seed}
        save_png(grid, grid_path, facts | settings)
        print(f"{grid_path}: all {len(pictures)} with their prompts")
