"""The three stages of tokenizer training over one body (docs/method.md section 5).

B batch, S image side, C latent channels, H W latent grid, K codebook size.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from einops import rearrange
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from dcar.errors import DataError, NonFiniteError
from dcar.evaluation.metrics import ReconstructionMetrics
from dcar.lit.base import BaseModule, train_only
from dcar.lit.frozen import Frozen
from dcar.lit.stepping import Losses
from dcar.models.checkpoints import Model, load_strictly
from dcar.models.distributed import first_rank_value
from dcar.models.draws import Draws
from dcar.models.kmeans import kmeans
from dcar.models.losses import TokenizerCriterion, hinge_discriminator_loss
from dcar.models.quantizer import (
    VectorQuantizer,
    codebook_perplexity,
    codebook_usage,
    count_codes,
)
from dcar.models.sampler import draw_residual
from dcar.models.tokenizer import HybridTokenizer, Latents


@contextmanager
def fixed(module: nn.Module) -> Iterator[None]:
    """Gradients pass through `module` but its parameters collect none."""
    module.requires_grad_(False)
    try:
        yield
    finally:
        module.requires_grad_(True)


class TokenizerModule(BaseModule):
    """Trains `tokenizer` on images (B, 3, S, S) in [-1, 1]; a stage is the values that it fixes.

    criterion: pixel, perceptual, codebook and adversarial terms.
    discriminator: None for a stage without one; it joins at step `discriminator_start`.
    discrete_prob: chance that an image is decoded from its codes rather than continuous latents.
    per_image: draw the path for each image (the paper) or once for the batch (released code).
    trainable: parts of the tokenizer that move.
    init_from: checkpoint of the stage before.
    kmeans_vectors: codebook from k-means on so many latents before the first step, 0 for none.
    metrics, val_names: what makes the figures of a validation set; names of these sets, in order.
    """

    network: HybridTokenizer
    discrete_prob: float
    trainable: tuple[str, ...]
    starts_from: tuple[str, ...]
    starts_anew: tuple[str, ...] = ()  # parts that the stage before has not trained

    def __init__(
        self,
        *,
        tokenizer: HybridTokenizer,
        criterion: TokenizerCriterion,
        discriminator: nn.Module | None = None,
        discriminator_start: int = 0,
        per_image: bool = True,
        init_from: str | Path | None = None,
        kmeans_vectors: int = 0,
        metrics: Callable[[], ReconstructionMetrics] = ReconstructionMetrics,
        val_names: Sequence[str] = ("val",),
        **training: Any,
    ):
        super().__init__(**training)
        self.network = tokenizer
        self.discriminator = discriminator
        self.discriminator_start = discriminator_start
        self.per_image, self.kmeans_vectors = per_image, kmeans_vectors
        for name, parameter in criterion.named_parameters():
            if parameter.requires_grad and not name.startswith("perceptual."):  # a whole network
                raise ValueError(f"the criterion would learn {name}, but nothing in it is trained")
        self.criterion = Frozen(criterion)
        self.val_names = tuple(val_names)
        self.metrics = {name: Frozen(metrics()) for name in val_names}
        self.val_counts: dict[str, Tensor] = {}
        self.last_counts: dict[str, Tensor] = {}  # of the last whole validation, all ranks
        train_only(tokenizer, self.trainable)
        if init_from is not None:
            self._start_from(init_from)

    def _start_from(self, path: str | Path) -> None:
        state = self.load_network(path, expected=self.starts_from, without=self.starts_anew)
        prefix = "discriminator."
        weights = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        if self.discriminator is not None and weights:
            load_strictly(self.discriminator, weights, source=path)

    def optimized(self) -> list[list[nn.Module]]:
        return [[m] for m in (self.network, self.discriminator) if m is not None]

    def frozen(self) -> list[Any]:
        return [self.criterion, *self.metrics.values()]

    def on_train_start(self) -> None:
        stream = getattr(self.trainer.train_dataloader, "stream", None)
        if "quantizer" in self.trainable and stream is not None and stream.buckets:
            raise ValueError(
                "codes are learned from pictures of one shape: no data.train.buckets here"
            )
        quantizer = self.network.quantizer
        if self.kmeans_vectors and self.global_step == 0 and not self.is_dry_run:
            if isinstance(quantizer, VectorQuantizer):
                self._initialize_codebook(quantizer)
            else:
                rank_zero_info(f"{type(quantizer).__name__} sets its own codes: no k-means")

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        if "image" not in batch:
            raise DataError("these shards hold tokens: a tokenizer trains on pictures")
        return super().on_after_batch_transfer(batch, dataloader_idx)

    def losses(self, batch: dict[str, Any], batch_idx: int) -> Iterator[Losses]:
        image = batch["image"]
        latents = self.network.encode(image)
        recon = self.network.decode(self.decoded(latents, batch, batch_idx))  # (B, 3, S, S)
        if self.is_read():
            counts = count_codes(latents.ids, self.network.num_codes)
            self.log_terms("codebook", {"batch_usage": codebook_usage(counts)}, over_ranks=False)
        has_gan = self.discriminator is not None and self.global_step >= self.discriminator_start
        fake_logits = self._judge(recon) if has_gan else None
        terms = self.criterion.module(recon, image, latents, fake_logits)
        yield Losses(0, terms["loss"], terms)
        if has_gan:
            yield self._discriminator_losses(recon.detach(), image)

    def decoded(self, latents: Latents, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """What a training step decodes, (B, C, H, W)."""
        return self._mix(latents, self.draws(batch_idx))

    def _mix(self, latents: Latents, draws: Draws) -> Tensor:
        """Each image's discrete or continuous latents, by a coin of `discrete_prob`."""
        coin = draws.rand(len(latents.ids)) if self.per_image else draws.rand_of_step()  # (B,) (1,)
        is_discrete = (coin < self.discrete_prob)[:, None, None, None]
        return torch.where(is_discrete, latents.discrete, latents.continuous)

    def _judge(self, recon: Tensor) -> Tensor:
        assert self.discriminator is not None
        with fixed(self.discriminator):
            return self.discriminator(recon)

    def _discriminator_losses(self, recon: Tensor, image: Tensor) -> Losses:
        assert self.discriminator is not None
        # one after the other: batch norm would even out in one batch what tells them apart
        real, fake = self.discriminator(image), self.discriminator(recon)
        loss = hinge_discriminator_loss(real, fake)
        terms = {"discriminator": loss, "real_logits": real.mean(), "fake_logits": fake.mean()}
        return Losses(1, loss, terms)

    def after_step(self) -> None:
        self.network.quantizer.after_step()

    def forget_batches(self) -> None:
        self.network.quantizer.forget_batches()

    def validation_step(
        self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Both paths, always: the training coin has no part in it."""
        image, name = batch["image"], self.val_names[dataloader_idx]
        latents = self.network.encode(image)
        discrete = self.network.decode(latents.discrete).float()
        hybrid = self.network.decode(latents.continuous).float()
        self.metrics[name].module.update(image, discrete, hybrid)
        counts = count_codes(latents.ids, self.network.num_codes)  # (K,)
        self.val_counts[name] = self.val_counts.get(name, torch.zeros_like(counts)) + counts

    def on_validation_epoch_end(self) -> None:
        for name, metrics in self.metrics.items():
            if name not in self.val_counts or self.is_dry_run:  # one batch may be too few for FID
                continue
            self.log_terms(name, metrics.module.compute(), show=("psnr_hybrid", "psnr_discrete"))
            metrics.module.reset()
            counts = self.trainer.strategy.reduce(self.val_counts.pop(name), reduce_op="sum")
            self.last_counts[name] = counts
            usage, perplexity = codebook_usage(counts), codebook_perplexity(counts)
            self.log_terms("codebook", {f"{name}_usage": usage, f"{name}_perplexity": perplexity})

    @torch.no_grad()
    def _initialize_codebook(self, quantizer: VectorQuantizer) -> None:
        """K-means on latents of all ranks; every rank computes the same codebook."""
        latents: list[Tensor] = []
        wanted = self.kmeans_vectors // self.trainer.world_size
        for batch in self.preview_batches():
            with self.trainer.precision_plugin.forward_context():
                latent = self.network.encode(batch["image"].to(self.device)).continuous
            latents.append(latent.float())
            if sum(latent[:, 0].numel() for latent in latents) >= wanted:
                break
        gathered = cast(Tensor, self.all_gather(torch.cat(latents)))
        ranks = self.trainer.world_size
        gathered = gathered.view(ranks, -1, *gathered.shape[-3:])  # (ranks, B, C, H, W)
        vectors = rearrange(gathered, "rank b c h w -> (b rank h w) c")  # as one process sees them
        rank_zero_info(f"codebook: k-means of {len(vectors)} latents to {quantizer.num_codes}")
        if not vectors.isfinite().all():  # outside any step, so nothing else would notice
            raise NonFiniteError(
                "the latents for k-means are not finite: look at the first batches and init_from"
            )
        codes = kmeans(
            vectors,
            quantizer.num_codes,
            iterations=20,
            seed=self.seed,
            spherical=quantizer.normalize,
        )
        quantizer.initialize(first_rank_value(codes))  # a GPU's sums have no fixed order


class TokenizerStage1(TokenizerModule):
    """Continuous warm-up: encoder and decoder learn; the quantizer is bypassed."""

    discrete_prob = 0.0
    trainable = ("encoder", "decoder")
    starts_from = ("TokenizerStage1",)


class TokenizerStage2(TokenizerModule):
    """Discrete learning: everything trains through the codes.

    One stage 1 serves any quantizer and size of codebook: it has trained none.
    """

    discrete_prob = 1.0
    trainable = ("encoder", "quantizer", "decoder")
    starts_from = ("TokenizerStage1",)
    starts_anew = ("quantizer",)


class TokenizerStage3(TokenizerModule):
    """Alternate fine-tuning: only the decoder trains, on either path with equal chance.

    drawn_by: a finished model with this tokenizer's tokens. Of each batch, the share `drawn_share`
    is decoded from its codes and the residual that the model draws for them by its own sampler
    settings, so that the decoder learns what it gets when pictures are made of words. Batches hold
    `caption` then. Not in the paper: docs/method.md section 5. Raises ValueError for a share
    outside [0, 1], and without a model, or with one that draws no residuals, for one above 0.
    """

    discrete_prob = 0.5
    trainable = ("decoder",)
    starts_from = ("TokenizerStage2",)

    def __init__(self, *, drawn_by: Model | None = None, drawn_share: float = 0.0, **stage: Any):
        super().__init__(**stage)
        if not 0 <= drawn_share <= 1:
            raise ValueError(f"drawn_share {drawn_share} is not in [0, 1]")
        self.drawn_share = drawn_share
        self.drawer: ResidualDrawer | None = None
        if drawn_share:
            if drawn_by is None:
                raise ValueError(f"drawn_share {drawn_share} needs a model: give drawn_by")
            self.drawer = ResidualDrawer(drawn_by)

    def frozen(self) -> list[Any]:
        return [*super().frozen(), *(self.drawer.parts if self.drawer else [])]

    def decoded(self, latents: Latents, batch: dict[str, Any], batch_idx: int) -> Tensor:
        draws = self.draws(batch_idx)
        mixed = self._mix(latents, draws)
        if self.drawer is None:
            return mixed
        if "caption" not in batch:
            raise DataError("residuals are drawn by captions: give data.train.captioned=true")
        # at least one, and as many in every batch: one shape to compile
        rows = max(1, round(self.drawn_share * len(mixed)))
        ids, captions = latents.ids[:rows], batch["caption"][:rows]
        drawn = latents.discrete[:rows] + self.drawer(ids, captions, draws)
        return torch.cat([drawn, mixed[rows:]])


class ResidualDrawer:
    """The residual that a finished model draws for given codes, by its own sampler settings.

    Raises ValueError for a model without a residual head, or that samples without it.
    """

    def __init__(self, model: Model):
        if model.generator.residual_head is None or not model.sampler.residual_refinement:
            raise ValueError("the model of drawn_by draws no residuals")
        self.generator, self.text_encoder = Frozen(model.generator), Frozen(model.text_encoder)
        self.parts = [self.generator, self.text_encoder]
        self.settings = model.sampler

    def __call__(self, ids: Tensor, captions: Sequence[str], draws: Draws) -> Tensor:
        """(B, C, H, W) for ids (B, H, W) and B captions."""
        text, mask = self.text_encoder(captions)
        return draw_residual(
            self.generator.module,
            text,
            mask,
            ids=ids,
            seeds=draws.randint(2**31, len(ids)).tolist(),
            settings=self.settings,
        )
