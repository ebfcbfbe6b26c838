"""The task of `--exp=eval/geneval`: pictures of GenEval's prompts, laid out as its scorer reads."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_info
from omegaconf import DictConfig

from dcar.data.storage import write_atomically
from dcar.errors import DataError
from dcar.evaluation.sheets import save_png
from dcar.lit.shard_writer import differing
from dcar.pipeline import DCARPipeline, chunks
from experiments.config import ConfigError, at_least, check_writable
from experiments.generate import describe_model
from experiments.run import RunOptions
from experiments.sample import chosen_device, open_model

SETTINGS = "settings.json"


@dataclass(frozen=True)
class Wanted:
    """One picture that is not there yet: of prompt `number`, the `image`-th."""

    number: int
    image: int
    prompt: str

    def path(self, out: Path) -> Path:
        return out / f"{self.number:05d}" / "samples" / f"{self.image:04d}.png"


def read_metadata(path: Path) -> list[tuple[str, str]]:
    """(line, prompt) of each line of GenEval's evaluation_metadata.jsonl.

    Raises DataError naming the line that is no object with a text `prompt`.
    """
    if not path.is_file():
        raise FileNotFoundError(f"in={path}: there is no such file")
    found = []
    for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            prompt = json.loads(line)["prompt"]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}:{number} is no object with a prompt ({error!r})") from error
        if not isinstance(prompt, str) or not prompt.strip():
            raise DataError(f"{path}:{number}: its prompt is no text")
        found.append((line, prompt))
    if not found:
        raise DataError(f"{path} holds no prompt")
    return found


def write_text(path: Path, text: str) -> None:
    with write_atomically(path) as file:
        file.write(text.encode())


def check_settings(out: Path, settings: dict[str, Any]) -> None:
    """Raises ConfigError where the pictures in `out` were drawn with other settings."""
    plain, path = json.loads(json.dumps(settings)), out / SETTINGS
    if path.is_file():
        if lines := differing(plain, json.loads(path.read_text())):
            raise ConfigError(
                f"out={out} holds pictures of other settings: give another folder "
                f"({'; '.join(lines)})"
            )
    elif any(out.glob("[0-9]*/samples/*.png")):
        raise ConfigError(f"out={out} holds pictures, and no {SETTINGS} that says of what")


def wanted(prompts: list[tuple[str, str]], out: Path, images: int) -> Iterator[Wanted]:
    """Pictures that are not there, the prompts in order."""
    for number, (_, prompt) in enumerate(prompts):
        for image in range(images):
            one = Wanted(number, image, prompt)
            if not one.path(out).is_file():
                yield one


def geneval(config: DictConfig, options: RunOptions) -> None:
    """Draw `images_per_prompt` of each prompt; those that are there already are kept."""
    at_least(config, 1, "images_per_prompt", "batch_size")
    at_least(config, 0, "seed")
    check_writable(config.out, is_folder=True)
    prompts, out = read_metadata(Path(config["in"])), Path(config.out)
    model = open_model(config)
    pipeline = DCARPipeline(model, device=chosen_device(config.device), precision=config.precision)
    sampler = pipeline.settings(steps=config.steps, guidance=config.guidance)
    settings = {
        "model": describe_model(model, config.ckpt),
        "sampler": asdict(sampler),
        "seed": config.seed,
        "precision": config.precision,
        "prompts": [prompt for _, prompt in prompts],
    }
    check_settings(out, settings)
    missing = list(wanted(prompts, out, config.images_per_prompt))
    if options.dry_run:
        missing = missing[:1]
    else:
        write_text(out / SETTINGS, json.dumps(settings, indent=1) + "\n")
        for number, (line, _) in enumerate(prompts):
            write_text(out / f"{number:05d}" / "metadata.jsonl", line + "\n")
    for part in chunks(len(missing), config.batch_size):
        batch = missing[part]
        pictures = pipeline(
            [one.prompt for one in batch],
            seeds=[config.seed + one.image for one in batch],  # the same for every prompt
            steps=config.steps,
            guidance=config.guidance,
            batch_size=len(batch),
        )
        if options.dry_run:
            return
        for one, picture in zip(batch, pictures, strict=True):
            facts = {"prompt": one.prompt, "seed": config.seed + one.image}
            save_png(picture, one.path(out), facts)
        rank_zero_info(f"{min(part.stop, len(missing))} of {len(missing)} pictures")
    rank_zero_info(
        f"{out}: {config.images_per_prompt} pictures of each of {len(prompts)} prompts; "
        "GenEval's evaluation/evaluate_images.py scores them"
    )
