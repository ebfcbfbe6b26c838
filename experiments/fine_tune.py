"""The tasks of `--exp=finetune/*`: a finished model on one's own pictures, and what comes out."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from omegaconf import DictConfig, OmegaConf
from torch import nn

from dcar.errors import CheckpointError
from dcar.lit.fine_tuning import adapter_of
from dcar.lit.lineage import model_lineage
from dcar.models.checkpoints import (
    TOKENIZER_MODULES,
    Model,
    load_tokenizer,
    read_checkpoint,
    save_model,
)
from dcar.models.fingerprint import tokenizer_fingerprint
from dcar.models.lora import Adapter, import_peft
from dcar.models.tokenizer import HybridTokenizer
from experiments.config import ConfigError
from experiments.names import find, find_checkpoint
from experiments.run import RunOptions
from experiments.sample import find_model
from experiments.train import train

BASE_PARTS = ("tokenizer", "generator", "text_encoder", "sampler")


def find_base(reference: str, outputs: str, checkpoint_activations: bool = False) -> Model:
    """What `find_model` takes; its weights are trained, so memory is saved as the run asks."""
    model = find_model(reference, outputs, key="init_from")
    switch_checkpointing(model.generator, checkpoint_activations)
    return model


def switch_checkpointing(network: nn.Module, checkpoint_activations: bool) -> None:
    """Of the run, not of the base: it saves memory where the fine-tuning takes place."""
    for module in network.modules():
        if hasattr(module, "checkpoint_activations"):
            setattr(module, "checkpoint_activations", checkpoint_activations)  # noqa: B010 (mypy)


def tokenizer_checkpoint(reference: str, outputs: str) -> Path | None:
    """The checkpoint of stage 2 or 3 that is meant, None where it is something else."""
    path = Path(str(find_checkpoint(reference, outputs)))
    is_tokenizer = (
        path.is_file() and read_checkpoint(path, mapped=True)["dcar"]["module"] in TOKENIZER_MODULES
    )
    return path if is_tokenizer else None


def find_tokenizer(
    reference: str, outputs: str, checkpoint_activations: bool = False
) -> HybridTokenizer:
    """Of a stage 2 or 3 checkpoint, or of anything that `find_base` takes."""
    path = tokenizer_checkpoint(reference, outputs)
    tokenizer = load_tokenizer(path)[0] if path else find_base(reference, outputs).tokenizer
    switch_checkpointing(tokenizer, checkpoint_activations)
    return tokenizer


def find_drawer(reference: str | None, outputs: str, drawn_share: float) -> Model | None:
    """The model that draws residuals for `finetune/decoder`, None where none are to be drawn."""
    return find_base(reference, outputs) if reference and drawn_share else None


def tokenizer_config(path: Path) -> dict[str, Any]:
    """Architecture and resolution of a tokenizer's checkpoint."""
    config = read_checkpoint(path, mapped=True)["dcar"]["config"]
    return {key: config[key] for key in ("tokenizer", "size")}


def take_from(config: DictConfig, source: dict[str, Any], keys: tuple[str, ...]) -> None:
    """Architecture and, unless the user gave another one, resolution of what is fine-tuned.

    Raises ConfigError where the user gave another architecture.
    """
    for key in keys:
        if config.get(key) is not None:
            raise ConfigError(f"{key} is that of what is fine-tuned and cannot be given")
        config[key] = source[key]
    config.size = config.size or source["size"]


def last_checkpoint(config: DictConfig) -> Path:
    return Path(config.output_dir) / "checkpoints" / "last.ckpt"


def start_from_base(config: DictConfig) -> Model:
    """The base; the configuration is completed by it, `init_from` becomes where it lies."""
    if config.tokenizer_from is not None:
        raise ConfigError(
            f"tokenizer_from={config.tokenizer_from}: the base's own is used; "
            "--exp=finetune/retokenize gives it another one"
        )
    base = find_base(config.init_from, config.outputs)
    take_from(config, base.config, BASE_PARTS)
    key = "generator.transformer.checkpoint_activations"  # of the run; the base may lack it
    OmegaConf.update(config, key, config.checkpoint_activations, force_add=True)
    path = find(config.init_from, config.outputs, key="init_from")
    saved = read_checkpoint(path, mapped=True)["dcar"] if path.is_file() else None
    config.tokenizer_from = saved["tokenizer_from"] if saved else str(path)
    config.init_from = str(path)
    return base


def train_and_tell(config: DictConfig, options: RunOptions, result: str) -> dict[str, float]:
    """Train, then say what the model folder holds. Returns the last logged metrics by name."""
    metrics = train(config, options)
    if not options.dry_run:
        rank_zero_info(f"{Path(config.output_dir) / 'model'}: {result}")
    return metrics


def generator(config: DictConfig, options: RunOptions) -> dict[str, float]:
    """Train all weights of a finished generator further, then write `model`.

    Returns the last logged metrics by name. Raises CheckpointError for a base that cannot be used.
    """
    start_from_base(config)
    return train_and_tell(config, options, f"all weights of {config.init_from}, fine-tuned")


def start_with_new_head(config: DictConfig) -> None:
    """Complete the configuration by the base, whose residual head a new one takes the place of.

    Raises ConfigError where more of the generator is given than its residual head.
    """
    head, given = config.generator.residual_head, config.sampler
    if config.generator.transformer != {"dim": None}:
        raise ConfigError(
            "generator is that of what is fine-tuned and cannot be given, but for "
            "generator/residual_head and what is under generator.residual_head"
        )
    config.generator = config.sampler = None
    base = start_from_base(config)
    sizes = {name: getattr(base.tokenizer, name) for name in ("latent_channels", "num_codes")}
    take_from(config, sizes | {"size": base.size}, tuple(sizes))
    OmegaConf.update(config, "generator.residual_head", head, merge=False, force_add=True)
    config.sampler = base.config["sampler"] | dict(given)


def residual_head(config: DictConfig, options: RunOptions) -> dict[str, float]:
    """Train a new residual head for a finished generator, then write `model`, the base with it.

    Returns the last logged metrics by name. Raises CheckpointError for a base that cannot be used.
    """
    start_with_new_head(config)
    return train_and_tell(config, options, f"{config.init_from} with a new residual head")


def lora(config: DictConfig, options: RunOptions) -> dict[str, float]:
    """Train adapters, then write `model` (base + adapters) and `adapter` (they alone).

    Returns the last logged metrics by name. Raises MissingExtraError without peft, CheckpointError
    for a base that cannot be used.
    """
    import_peft()
    base = find_base(config.init_from, config.outputs)
    take_from(config, base.config, BASE_PARTS)
    del base
    metrics = train(config, options)
    if not options.dry_run:
        export_adapter(config)
    return metrics


@rank_zero_only
def export_adapter(config: DictConfig) -> None:
    path, folder = last_checkpoint(config), Path(config.output_dir)
    adapter_of(read_checkpoint(path), source=path).save(folder / "adapter")
    rank_zero_info(f"{folder / 'model'}: base + adapters; {folder / 'adapter'}: the adapters alone")


def merge(config: DictConfig, options: RunOptions) -> None:
    """Write the model folder `out`: the base with the adapters of a folder in its weights.

    Raises CheckpointError where the adapters belong to another base.
    """
    adapter = Adapter.load(config.adapter)
    base = find_base(config.init_from, config.outputs)
    merged = adapter.merge_into(base, name=config.init_from, source=config.adapter)
    if not options.dry_run:
        save_model(merged, config.out)
        rank_zero_info(f"{config.out}: {config.init_from} with {config.adapter}")


def check_same_tokens(config: DictConfig, base: Model) -> None:
    tokenizer = find_tokenizer(config.init_from, config.outputs)
    if tokenizer_fingerprint(base.tokenizer) != tokenizer_fingerprint(tokenizer):
        raise CheckpointError(
            f"model={config.model} was trained on tokens of another tokenizer than "
            f"init_from={config.init_from}"
        )


def decoder(config: DictConfig, options: RunOptions) -> dict[str, float]:
    """Train the tokenizer's decoder, then write `model`: the base model with the new decoder.

    Without a base model (`init_from` is a tokenizer's checkpoint and `model` is not given) the
    checkpoint is all that is written. Returns the last logged metrics by name. Raises
    CheckpointError where the base's tokens are not those of the tokenizer.
    """
    path = tokenizer_checkpoint(config.init_from, config.outputs)
    reference = config.model or (None if path else config.init_from)
    base = find_base(reference, config.outputs) if reference else None
    about: dict[str, Any] = {}
    if base is not None:
        check_same_tokens(config, base)
        about = base.config
    if path is not None:
        own = tokenizer_config(path)
        about = own | about | {"tokenizer": own["tokenizer"]}
    take_from(config, about, ("tokenizer",))
    if config.drawn_share:
        if base is None:
            raise ConfigError(f"drawn_share={config.drawn_share} needs the model: add model=FOLDER")
        config.model, config.data.train.captioned = reference, True
    metrics = train(config, options)
    if base is not None and not options.dry_run:
        export_decoder(config, base)
    return metrics


def tokenizer(config: DictConfig, options: RunOptions) -> dict[str, float]:
    """Train encoder, codebook and decoder of a finished tokenizer further; pictures get new tokens.

    The checkpoint is what comes out: no generator knows these tokens yet. Returns the last logged
    metrics by name.
    """
    path = tokenizer_checkpoint(config.init_from, config.outputs)
    about = tokenizer_config(path) if path else find_base(config.init_from, config.outputs).config
    take_from(config, about, ("tokenizer",))
    return train(config, options)


@rank_zero_only
def export_decoder(config: DictConfig, base: Model) -> None:
    folder = Path(config.output_dir) / "model"
    about = base.config | {"tokenizer": OmegaConf.to_container(config.tokenizer, resolve=True)}
    last = last_checkpoint(config)
    tokenizer, _ = load_tokenizer(last)
    model = replace(base, tokenizer=tokenizer, config=about)
    save_model(model, folder, lineage=model_lineage(last))
    rank_zero_info(f"{folder}: the model with the new decoder")
