"""The task of `--exp=data/caption`: shards of pictures to shards of captions."""

from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

from dcar.lit.captioning import NO_CAPTION, CaptionPredictor, PictureDecoder
from dcar.models.captioner import Captioner, Prompt
from experiments.config import ConfigError
from experiments.predict import check_precision, open_sources, predict_shards
from experiments.run import RunOptions


def read_prompts(prompts: dict[str, Any]) -> dict[str, Prompt]:
    """Prompts by name from the config; a wrong one is a ConfigError that names it."""
    found = {}
    for name, fields in prompts.items():
        try:
            found[name] = Prompt(**fields)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"prompts.{name}: {error}") from error
    return found


def caption(config: DictConfig, options: RunOptions) -> None:
    """Caption every picture of `in` once for each prompt."""
    plain = cast(dict[str, Any], OmegaConf.to_container(config, resolve=True))
    check_precision(config, "dtype")
    sources, prompts = open_sources(config), read_prompts(plain["prompts"])
    decode = PictureDecoder(max_side=config.max_side)
    captioner = Captioner(config.model, dtype=config.dtype, generation=plain["generation"])
    predictor = CaptionPredictor(captioner=captioner, prompts=prompts)
    settings = {
        "kind": "captions",
        **{key: plain[key] for key in ("model", "dtype", "prompts", "generation", "max_side")},
    }
    predict_shards(
        config,
        options,
        sources=sources,
        module=predictor,
        decode=decode,
        settings=settings,
        nothing_made=NO_CAPTION,
    )
