"""DC-AR: masked autoregressive text-to-image generation over a deep compression tokenizer."""

import importlib
from typing import Any

_HOMES = {
    "DCARPipeline": "dcar.pipeline",
    "HybridTokenizer": "dcar.models.tokenizer",
    "Latents": "dcar.models.tokenizer",
    "Quantizer": "dcar.models.quantizer",
    "Quantized": "dcar.models.quantizer",
    "TokenizerCriterion": "dcar.models.losses",
    "HybridGenerator": "dcar.models.generator",
    "MaskedTransformer": "dcar.models.transformer",
    "Draws": "dcar.models.draws",
    "SamplerSettings": "dcar.models.sampler",
    "sample": "dcar.models.sampler",
    "load_model": "dcar.models.checkpoints",
    "save_model": "dcar.models.checkpoints",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    """Public names, imported when first used: `import dcar` alone costs nothing."""
    if name not in _HOMES:
        raise AttributeError(f"module 'dcar' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
