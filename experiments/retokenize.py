"""The task of `--exp=finetune/retokenize`: a model whose generator goes on with other tokens."""

from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from dcar.errors import CheckpointError, DataError
from dcar.lit.lineage import run_lineage, utc_now
from dcar.models.checkpoints import load_tokenizer, save_model
from dcar.models.code_matching import match_codes, match_generator
from dcar.models.tokenizer import HybridTokenizer
from experiments.components import build
from experiments.config import at_least, check_local
from experiments.fine_tune import find_base, tokenizer_checkpoint, tokenizer_config
from experiments.names import find
from experiments.run import RunOptions
from experiments.sample import chosen_device, find_model


def retokenize(config: DictConfig, options: RunOptions) -> None:
    """Write `out`: the base with the tokenizer of `tokenizer_from`, and its codes matched to it.

    Raises CheckpointError where that tokenizer makes other codes or channels than the base's.
    """
    at_least(config, 1, "images", "batch_size")
    check_local(config.out, is_folder=True)
    base_path = find(config.init_from, config.outputs, key="init_from")
    base = find_base(config.init_from, config.outputs)
    tokenizer, about, path = open_tokenizer(config)
    check_fit(tokenizer, base.tokenizer, config)
    config.size = config.size or base.size
    old, new, scale = both_tokens(base.tokenizer, tokenizer, config, options)
    matches = match_codes(old, new, num_codes=tokenizer.num_codes)
    match_generator(base.generator, matches)
    if base.generator.residual_head is not None:
        base.generator.residual_head.set_scale(scale)
    rank_zero_info(
        f"{len(old):,} pictures; of their positions {matches.agreement:.0%} have the old code that "
        f"the new one stands for most often; residuals' scale {scale:.4f}"
    )
    if options.dry_run:
        return
    plain: Any = OmegaConf.to_container(config, resolve=True)
    lineage = run_lineage(
        plain,
        init_from=base_path,
        inputs={"tokenizer_from": path},
        precision="32-true",
        world_size=1,
    )
    model = replace(base, tokenizer=tokenizer, config=base.config | {"tokenizer": about})
    save_model(model, config.out, lineage=lineage | {"saved": utc_now()})
    rank_zero_info(f"{config.out}: {config.init_from} for the tokens of {config.tokenizer_from}")


def open_tokenizer(config: DictConfig) -> tuple[HybridTokenizer, dict[str, Any], Path]:
    """Of a stage 2 or 3 checkpoint or a model: the tokenizer, its config, and where it lies."""
    path = tokenizer_checkpoint(config.tokenizer_from, config.outputs)
    if path is not None:
        return load_tokenizer(path)[0], tokenizer_config(path)["tokenizer"], path
    path = find(config.tokenizer_from, config.outputs, key="tokenizer_from")
    model = find_model(str(path), config.outputs)
    return model.tokenizer, model.config["tokenizer"], path


def check_fit(tokenizer: HybridTokenizer, old: HybridTokenizer, config: DictConfig) -> None:
    for name in ("num_codes", "latent_channels", "downsample"):
        if (have := getattr(tokenizer, name)) != (wanted := getattr(old, name)):
            raise CheckpointError(
                f"tokenizer_from={config.tokenizer_from} has {name} {have}, "
                f"the tokenizer of init_from={config.init_from} {wanted}"
            )


@torch.no_grad()
def both_tokens(
    old: HybridTokenizer, new: HybridTokenizer, config: DictConfig, options: RunOptions
) -> tuple[Tensor, Tensor, float]:
    """Ids (B, H, W) of `images` training pictures by both, and the size of new residuals (RMS)."""
    device = chosen_device(config.device)
    for tokenizer in (old, new):
        tokenizer.to(device).eval()
    batches = 1 if options.dry_run else -(-config.images // config.batch_size)
    ids: list[tuple[Tensor, Tensor]] = []
    squares = 0.0
    for batch in islice(build(config.data).preview_batches(), batches):
        if "image" not in batch:
            raise DataError("these shards hold tokens: codes are matched on pictures")
        image = batch["image"].to(device)
        before, after = old.encode(image), new.encode(image)
        ids.append((before.ids.cpu(), after.ids.cpu()))
        squares += float((after.continuous - after.discrete).square().mean()) * len(image)
    for tokenizer in (old, new):
        tokenizer.cpu()
    first, second = (torch.cat(parts) for parts in zip(*ids, strict=True))
    return first, second, (squares / len(first)) ** 0.5
