"""The task of `--exp=data/precompute`: shards of pictures to shards of tokens."""

from pathlib import Path

from omegaconf import DictConfig

from dcar.data.transforms import ImageTransform
from dcar.lit.generator import TOKENIZER_MODULES
from dcar.lit.precompute import ImageDecoder, TokenPredictor, describe_tokens
from dcar.models.checkpoints import (
    CheckpointError,
    load_strictly,
    read_checkpoint,
)
from dcar.models.checkpoints import build as build_component
from dcar.models.tokenizer import HybridTokenizer
from experiments.predict import predict_shards
from experiments.run import RunOptions
from experiments.train import build, resolve_precision


def load_tokenizer(path: str | Path) -> tuple[HybridTokenizer, str]:
    """The tokenizer of a checkpoint, built as its own config says, and the module that trained it.

    Raises CheckpointError where neither stage 2 nor stage 3 wrote the checkpoint.
    """
    checkpoint = read_checkpoint(path)
    module, config = checkpoint["dcar"]["module"], checkpoint["dcar"]["config"]
    if module not in TOKENIZER_MODULES:
        raise CheckpointError(
            f"tokenizer_from={path} was written by {module}; tokens are those of "
            f"{' or '.join(TOKENIZER_MODULES)}"
        )
    tokenizer: HybridTokenizer = build_component(config["tokenizer"])
    load_strictly(tokenizer, checkpoint["network"], source=path)
    return tokenizer, module


def precompute(config: DictConfig, options: RunOptions) -> None:
    """Tokenise every sample of `in` once. Raises ValueError for a crop drawn at random."""
    transform = ImageTransform(config.size, crop=config.crop)
    tokenizer, module = load_tokenizer(config.checkpoint)
    text_encoder = build(config.text_encoder) if config.text else None
    predictor = TokenPredictor(tokenizer=tokenizer, text_encoder=text_encoder)
    facts = describe_tokens(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        size=config.size,
        checkpoint=config.tokenizer_from,
        module=module,
    )
    predict_shards(
        config,
        options,
        module=predictor,
        decode=ImageDecoder(transform, captioned=config.captioned),
        settings={
            **facts,
            "crop": config.crop,
            "precision": resolve_precision(config.trainer.precision),
        },
    )
