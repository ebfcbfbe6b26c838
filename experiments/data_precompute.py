"""The task of `--exp=data/precompute`: shards of pictures to shards of tokens."""

from omegaconf import DictConfig

from dcar.data.transforms import ImageTransform
from dcar.lit.precompute import ImageDecoder, TokenPredictor, describe_tokens
from dcar.models.checkpoints import load_tokenizer
from experiments.components import build
from experiments.predict import open_sources, predict_shards
from experiments.run import RunOptions
from experiments.train import resolve_precision


def precompute(config: DictConfig, options: RunOptions) -> None:
    """Tokenise every sample of `in` once. Raises ValueError for a crop drawn at random."""
    sources, transform = open_sources(config), ImageTransform(config.size, crop=config.crop)
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
        sources=sources,
        module=predictor,
        decode=ImageDecoder(transform, captioned=config.captioned),
        settings={
            **facts,
            "crop": config.crop,
            "precision": resolve_precision(config.trainer.precision, config.trainer.accelerator),
        },
    )
