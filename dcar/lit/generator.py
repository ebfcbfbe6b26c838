"""Training of the hybrid masked autoregressive generator, at any resolution.

B batch, S image side, C latent channels, H W latent grid, L text length, E text width.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, cast

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from dcar.errors import CheckpointError
from dcar.evaluation.metrics import GenerationMetrics
from dcar.lit.base import BaseModule, train_only
from dcar.lit.frozen import Frozen
from dcar.lit.precompute import check_tokens, describe_tokens
from dcar.lit.stepping import Losses
from dcar.lit.token_cache import TokenCache
from dcar.models.checkpoints import Model, load_model, load_tokenizer
from dcar.models.deepening import deepen as deepen_blocks
from dcar.models.draws import Draws
from dcar.models.generator import HybridGenerator
from dcar.models.residual_head import BaseResidualHead
from dcar.models.sampler import SamplerSettings, Tokens, draw_residual, sample
from dcar.models.tokenizer import HybridTokenizer


def _check_text_encoder(encoder: Any, generator: HybridGenerator) -> None:
    """Raises ValueError for captions wider or longer than the transformer takes."""
    transformer, name = generator.transformer, type(encoder).__name__
    if encoder.dim != transformer.text_dim:
        raise ValueError(
            f"{name} gives captions {encoder.dim} wide, the transformer has "
            f"text_dim={transformer.text_dim}"
        )
    if (most := getattr(encoder, "most_tokens", encoder.max_tokens)) > transformer.text_tokens:
        raise ValueError(
            f"{name} gives up to {most} tokens a caption, the transformer has "
            f"text_tokens={transformer.text_tokens}"
        )


class MaskedARGenerator(BaseModule):
    """Trains `generator` on tokens of images (B, 3, S, S) in [-1, 1] with captions.

    Batches hold `image`, or the tokens made of it (and perhaps text embeddings) by
    `--exp=data/precompute`. A datamodule with token shards has a method `token_facts` that returns
    their manifests' facts with `folder` and `split`, "train" or one of `val_names`; fitting raises
    CheckpointError where another tokenizer, resolution or text encoder made them, and for tokens of
    a split without facts; ValueError where what they hold does not go with a trained text encoder
    or with `fid_images`.

    tokenizer, tokenizer_from: architecture of a frozen tokenizer, and its weights: a checkpoint of
        stage 2 or 3, or a model folder.
    text_encoder: trained along where its `trainable` says so, else frozen.
    init_from: a checkpoint of this module, at any resolution (positions are computed), or a model
        folder.
    deepen: `init_from` may have fewer blocks: copies that add nothing yet make up for the others.
    head_alone: a new residual head learns from the finished generator of `init_from`, all of whose
        own weights stay: from hidden states of whole pictures, no token of them masked. Validation
        logs `explained`, the share of the residual's energy that is drawn by `sampler`. Raises
        ValueError without a residual head.
    scale_batches: batches that measure the residual's standard deviation before the first step,
        at this resolution, unless the head was built with a scale.
    cache_tokens: tokenise each image of a set once; needs a transform without randomness. Batches
        without a `place` are taken by their keys, which must then differ within the set.
    val_names: of the validation sets in order; cross-entropy with right and shuffled captions is
        logged for each (not with `head_alone`), gFID for the first, from `fid_images` samples (0
        for none).
    """

    network: nn.ModuleDict

    def __init__(
        self,
        *,
        generator: HybridGenerator,
        text_encoder: nn.Module,
        tokenizer: HybridTokenizer,
        tokenizer_from: str | Path | None,
        sampler: SamplerSettings,
        size: int,
        init_from: str | Path | None = None,
        deepen: bool = False,
        head_alone: bool = False,
        scale_batches: int = 32,
        cache_tokens: bool = False,
        fid_images: int = 0,
        metrics: Callable[[], GenerationMetrics] = GenerationMetrics,
        val_names: Sequence[str] = ("val",),
        **training: Any,
    ):
        super().__init__(**training)
        if generator.transformer.num_codes != tokenizer.num_codes:
            raise ValueError(
                f"the transformer predicts {generator.transformer.num_codes} codes, "
                f"the tokenizer has {tokenizer.num_codes}"
            )
        _check_text_encoder(text_encoder, generator)
        parts: dict[str, nn.Module] = {"generator": generator}
        if text_encoder.trainable:
            parts["text_encoder"] = text_encoder
        self.network = nn.ModuleDict(parts)
        self.frozen_text = None if text_encoder.trainable else Frozen(text_encoder)
        self.tokenizer = Frozen(tokenizer)
        self.sampler, self.size = sampler, size
        self.scale_batches, self.fid_images = scale_batches, fid_images
        self.cache = TokenCache() if cache_tokens else None
        self.val_names = tuple(val_names)
        self._split = "train"  # the set of the batch at hand
        self._neighbour: tuple[Tensor, Tensor] | None = None  # text and mask of the last caption
        self._drawn = 0  # images for FID, here and in this validation
        self.metrics = Frozen(metrics()) if fid_images else None
        head = generator.residual_head
        self.token_splits: set[str] = set()  # those whose tokens have facts
        if head is not None and sampler.residual_refinement:  # not as late as in a validation
            head.check_sampling(steps=sampler.residual_steps, clip=sampler.residual_clip)
        self.measures_scale = head is not None and not bool(torch.isfinite(head.scale))
        self.tokenizer_from, self.tokenizer_module = tokenizer_from, "random weights"
        if tokenizer_from is not None:
            _, self.tokenizer_module = load_tokenizer(tokenizer_from, into=tokenizer)
        self.head_alone = head_alone
        if init_from is not None:
            self._start_from(init_from, self._deepened if deepen else dict)
        if head_alone:
            if head is None:
                raise ValueError(
                    "head_alone=True: generator/residual_head=none is no head to train"
                )
            train_only(self.network, ())
            head.requires_grad_(True).train()

    def _deepened(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        try:
            return deepen_blocks(state, len(self.generator.transformer.blocks))
        except ValueError as error:
            raise CheckpointError(f"init_from cannot be deepened: {error}") from error

    def _start_from(self, path: str | Path, adapt: Callable[..., dict[str, Tensor]]) -> None:
        new = ("generator.residual_head",) if self.head_alone else ()
        if not Path(path).is_dir():
            self.load_network(path, expected=("MaskedARGenerator",), adapt=adapt, without=new)
            return
        model = load_model(path)
        parts = {name: getattr(model, name).state_dict() for name in self.network}
        state = {f"{name}.{key}": value for name in parts for key, value in parts[name].items()}
        self.take_weights(adapt(state), source=path, without=new)

    @property
    def generator(self) -> HybridGenerator:
        return cast(HybridGenerator, self.network["generator"])

    @property
    def text_encoder(self) -> Any:
        """Captions to text (B, L, E) and mask (B, L): part of the network, or frozen."""
        return self.network["text_encoder"] if self.frozen_text is None else self.frozen_text

    def frozen(self) -> list[Any]:
        frozen = [self.tokenizer, self.frozen_text, self.metrics]
        return [module for module in frozen if module is not None]

    def model(self) -> Model:
        """The whole model, to sample from or to save as a model folder."""
        frozen = self.frozen_text
        encoder = self.network["text_encoder"] if frozen is None else frozen.module
        return Model(
            self.tokenizer.module, self.generator, encoder, self.sampler, self.plain_config
        )

    def on_fit_start(self) -> None:
        """Refuse token shards that this tokenizer, resolution or text encoder did not make."""
        datamodule: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        facts: list[dict[str, Any]] = getattr(datamodule, "token_facts", list)()
        self.token_splits = {theirs["split"] for theirs in facts}
        if not facts or (self.is_dry_run and self.tokenizer_from is None):
            return
        ours = describe_tokens(
            tokenizer=self.tokenizer.module,
            text_encoder=self._encoder_of_embeddings(facts),
            size=self.size,
            checkpoint=str(self.tokenizer_from),
            module=self.tokenizer_module,
        )
        for theirs in facts:
            check_tokens(theirs, ours)
            if self.fid_images and theirs["split"] == self.val_names[0]:
                raise ValueError(
                    f"gFID compares with images, but {theirs['folder']} holds tokens: give the set "
                    f"{self.val_names[0]!r} shards of images, or set module.fid_images=0"
                )

    def _encoder_of_embeddings(self, facts: Sequence[dict[str, Any]]) -> nn.Module | None:
        """The encoder that text embeddings among the token shards must be of, None without any."""
        folders = [theirs["folder"] for theirs in facts if theirs["text"]]
        if folders and self.frozen_text is None:
            raise ValueError(
                f"{folders[0]} holds text embeddings, but {type(self.text_encoder).__name__} is "
                "trained with the generator and would not be used: make tokens with text=false"
            )
        return self.frozen_text.module if folders and self.frozen_text else None

    def on_train_start(self) -> None:
        stream = getattr(self.trainer.train_dataloader, "stream", None)
        if self.cache is not None and stream is not None and stream.transform.is_random:
            raise ValueError(
                "cache_tokens keeps each picture's tokens, but these are cut or mirrored at random "
                "(data.train.transform): take crop 'center' or 'adm' without flip, or no cache"
            )
        if self.measures_scale and self.global_step == 0:
            self._measure_residual_scale(
                1 if self.is_dry_run else self.scale_batches * self.accumulate
            )

    def on_train_batch_start(self, batch: dict[str, Any], batch_idx: int) -> None:
        self._refuse_unknown_tokens(batch, "train")

    def on_validation_batch_start(
        self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._refuse_unknown_tokens(batch, self.val_names[dataloader_idx])

    def _refuse_unknown_tokens(self, batch: dict[str, Any], split: str) -> None:
        """By now every batch has ids; those made here come with the pictures they are of."""
        if "image" not in batch and split not in self.token_splits:
            raise CheckpointError(
                f"the set {split!r} is of token shards without a manifest: "
                "finish --exp=data/precompute first"
            )

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """Ids (B, H, W) int64 and residual (B, C, H, W) float32: the shards' own, or made here."""
        batch = super().on_after_batch_transfer(batch, dataloader_idx)
        if self.cache is not None:
            self._split = "train" if self.trainer.training else self.val_names[dataloader_idx]
        batch["ids"], batch["residual"] = self._tokens(batch)
        return batch

    def _tokens(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        if "ids" not in batch:
            return self._tokenize(batch)
        return batch["ids"].long(), batch["residual"].float()

    def _text(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Text (B, L, E) and mask (B, L): the shards' own, or of the captions."""
        if "text" in batch:
            return batch["text"].float(), batch["text_mask"]
        return self.text_encoder(batch["caption"])

    def _tokenize(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        image = batch["image"]
        if self.cache is None:
            return self._encode(image)
        keys = [f"{self._split}/{place}" for place in batch.get("place", batch["key"])]
        if rows := self.cache.missing(keys):
            self.cache.put([keys[row] for row in rows], *self._encode(image[rows]))
        return self.cache.get(keys, image.device)

    @torch.no_grad()
    def _encode(self, image: Tensor) -> tuple[Tensor, Tensor]:
        with self._autocast():
            latents = self.tokenizer.encode(image)
        return latents.ids, latents.residual.float()

    def _autocast(self) -> AbstractContextManager[None]:
        return self.trainer.precision_plugin.forward_context()

    def losses(self, batch: dict[str, Any], batch_idx: int) -> Iterator[Losses]:
        text, text_mask = self._text(batch)  # (B, L, E), (B, L)
        terms = self._terms(batch, text, text_mask, self.draws(batch_idx))
        yield Losses(0, terms["loss"], terms)

    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        self._neighbour, self._drawn = None, 0

    def validation_step(
        self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Losses with every caption kept: right ones, then each image with its neighbour's.

        With `head_alone` those of the head, and the mean over batches of what it explains.

        The neighbour of an image alone in its batch is the last one of the batch before.
        """
        text, text_mask = self._text(batch)
        name, weight = self.val_names[dataloader_idx], len(batch["caption"])
        terms = self._validation_losses(batch, text, text_mask, batch_idx)
        if self.head_alone:
            terms["explained"] = self._explained(batch, text, text_mask)
        else:
            others = self._others(text, text_mask)
            wrong = self._validation_losses(batch, *others, batch_idx, tokens_alone=True)
            terms["token_shuffled"] = wrong["token"]
        for key, value in terms.items():
            self.log(
                f"{name}/{key}",
                value,
                batch_size=weight,
                sync_dist=True,
                add_dataloader_idx=False,
                prog_bar=key == "token",
            )
        if dataloader_idx == 0:
            self._update_fid(batch, text, text_mask)

    def _others(self, text: Tensor, text_mask: Tensor) -> tuple[Tensor, Tensor]:
        """For each image the caption before."""
        others = text.roll(1, 0), text_mask.roll(1, 0)
        if len(text) == 1 and self._neighbour is not None:
            others = self._neighbour
        self._neighbour = text[-1:].clone(), text_mask[-1:].clone()
        return others

    def _validation_losses(
        self, batch: dict[str, Any], text: Tensor, text_mask: Tensor, batch_idx: int, **how: Any
    ) -> dict[str, Tensor]:
        draws = Draws(batch_idx, self.device, rank=self.global_rank, world=self.trainer.world_size)
        return self._terms(batch, text, text_mask, draws, caption_drop=0.0, **how)

    def _terms(self, batch: dict[str, Any], *given: Any, **how: Any) -> dict[str, Tensor]:
        """The generator's losses; given: text, its mask, and the draws. how: further keywords."""
        return self.generator.losses(
            batch["ids"], batch["residual"], *given, head_alone=self.head_alone, **how
        )

    def _explained(self, batch: dict[str, Any], text: Tensor, text_mask: Tensor) -> Tensor:
        """The share of the residual's energy that the head draws, a scalar, 1 at best."""
        drawn = draw_residual(
            self.generator,
            text,
            text_mask,
            ids=batch["ids"],
            seeds=list(range(len(text))),
            settings=self.sampler,
        )
        error = (batch["residual"] - drawn).square().sum()
        return 1 - error / batch["residual"].square().sum()

    def _update_fid(self, batch: dict[str, Any], text: Tensor, text_mask: Tensor) -> None:
        """Draw so many of the batch that all ranks come to at least `fid_images`, a seed each."""
        world = self.trainer.world_size
        count = min(len(text), -(-self.fid_images // world) - self._drawn)
        if self.metrics is None or count <= 0 or self.trainer.sanity_checking:
            return
        seeds = [self.global_rank + world * (self._drawn + row) for row in range(count)]
        self._drawn += count
        tokens = self.sample(text[:count], text_mask[:count], seeds=seeds)
        self.metrics.module.update_real(batch["image"][:count])
        self.metrics.module.update_fake(self.decode(tokens))

    def on_validation_epoch_end(self) -> None:
        if self.metrics is not None and not (self.trainer.sanity_checking or self.is_dry_run):
            self.log_terms(self.val_names[0], self.metrics.module.compute())
            self.metrics.module.reset()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        path = self.tokenizer_from
        checkpoint["dcar"]["tokenizer_from"] = None if path is None else str(path)

    @torch.no_grad()
    def sample(self, text: Tensor, text_mask: Tensor, *, seeds: Sequence[int]) -> Tokens:
        """Tokens of one square image a seed, at this module's resolution."""
        side = self.size // self.tokenizer.downsample
        return sample(
            self.generator,
            text,
            text_mask,
            grid=(side, side),
            seeds=list(seeds),
            settings=self.sampler,
        )

    @torch.no_grad()
    def decode(self, tokens: Tokens) -> Tensor:
        """Images (B, 3, S, S) in [-1, 1] of sampled tokens."""
        return self.tokenizer.decode_tokens(tokens.ids, tokens.residual).float().clamp(-1, 1)

    @torch.no_grad()
    def _measure_residual_scale(self, batches: int) -> None:
        """Root mean square of the residual over some training batches of every rank."""
        total = torch.zeros(2, device=self.device, dtype=torch.float64)
        for index, batch in enumerate(self.preview_batches()):
            if index == batches:
                break
            residual = self._tokens(move_data_to_device(batch, self.device))[1].double()
            total += torch.stack([residual.square().sum(), residual.new_tensor(residual.numel())])
        total = self.trainer.strategy.reduce(total, reduce_op="sum")
        scale = float((total[0] / total[1]).sqrt())
        cast(BaseResidualHead, self.generator.residual_head).set_scale(scale)
        rank_zero_info(f"residual head: scale {scale:.4f} from {int(total[1])} values")
