"""The task of `--exp=sample`: prompts to PNG files that carry their settings."""

import sys
import textwrap
from dataclasses import asdict, replace
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
)
from dcar.pipeline import DCARPipeline, existing_device
from experiments.components import build
from experiments.config import ConfigError, at_least, check_writable
from experiments.names import find
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


def find_model(reference: str, outputs: str, *, key: str = "ckpt") -> Model:
    """A model folder, a run's folder, a generator's checkpoint, or the name of a model.

    key: the setting that names it. Raises CheckpointError for what cannot be read or drawn from.
    """
    path = find(reference, outputs, key=key)
    return load_model(path) if path.is_dir() else model_of_checkpoint(path)


def open_model(config: DictConfig) -> Model:
    """The model that `ckpt` names, its sampler changed by what is given under `sampler`."""
    model = find_model(config.ckpt, config.outputs)
    return replace(model, sampler=replace(model.sampler, **build(config.sampler).keywords))


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
        return existing_device(name)
    except ValueError as error:
        raise ConfigError(str(error)) from error


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
    model = open_model(config)
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
