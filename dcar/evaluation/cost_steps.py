"""One training step of the tokenizer and of the generator, as `dcar.lit` takes it, to be metered.

B batch, S image side, L text length, E text width. Inputs are zeros; fake tensors have no values.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import T5Config, T5EncoderModel

from dcar.evaluation.cost_meter import Meter
from dcar.models.diffusion import noise_schedule
from dcar.models.discriminator import PatchDiscriminator
from dcar.models.draws import Draws
from dcar.models.generator import HybridGenerator
from dcar.models.losses import (
    TokenizerCriterion,
    as_many_logits_as_on_a_gpu,
    hinge_discriminator_loss,
)
from dcar.models.perceptual import BACKBONES, LPIPS, SCALE, SHIFT
from dcar.models.precision import without_autocast
from dcar.models.residual_head import BaseResidualHead
from dcar.models.text_encoder import ByteT5TextEncoder
from dcar.models.tokenizer import HybridTokenizer
from dcar.models.weights_io import as_constants

# Encoders of T5 by the last part of their hub name: width, feed-forward width, layers, heads.
T5_SIZES = {
    "t5-small": (512, 2048, 6, 8),
    "t5-base": (768, 3072, 12, 12),
    "t5-large": (1024, 4096, 24, 16),
}
T5_HEAD_WIDTH = 64


class UnloadedLPIPS(LPIPS):
    """LPIPS without its weights, which are no part of what it costs and may not be at hand."""

    def __init__(self, net: str, dtype: torch.dtype = torch.float32):
        nn.Module.__init__(self)
        stages, widths = BACKBONES[net]
        self.net, self.dtype = net, dtype
        self.stages = nn.ModuleList(stages()).to(dtype)
        self.heads = nn.ParameterList(torch.zeros(width) for width in widths)
        as_constants(self)
        self.register_buffer("shift", torch.tensor(SHIFT).view(3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(SCALE).view(3, 1, 1), persistent=False)


class T5Pass(nn.Module):
    """A frozen T5 encoder of a published size over L = `length` tokens, all attended to.

    name: a hub name such as google-t5/t5-base, or a local folder. Raises ValueError for neither.
    """

    def __init__(self, name: str, *, length: int, dtype: torch.dtype):
        super().__init__()
        self.length = length
        # the stack alone: its parent holds the embedding under two names
        stack: nn.Module = T5EncoderModel(t5_config(name)).encoder
        self.model = stack.to(dtype).eval().requires_grad_(False)

    def forward(self, batch: int) -> tuple[Tensor, Tensor]:
        ids, mask = text_inputs(batch, self.length)
        with without_autocast(ids), torch.no_grad():
            return self.model(input_ids=ids).last_hidden_state, mask  # (B, L, E)


class BytePass(nn.Module):
    """A byte encoder that trains with the generator, over its longest captions."""

    def __init__(self, encoder: ByteT5TextEncoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, batch: int) -> tuple[Tensor, Tensor]:
        ids, mask = text_inputs(batch, self.encoder.max_tokens)
        embedded = self.encoder.model.embed_tokens(ids)
        if self.encoder.words is not None:
            embedded = embedded + self.encoder.words(ids)
        if self.encoder.pool_words:
            most = self.encoder.most_tokens
            mask = mask[:, :1].expand(batch, most)
            embedded = torch.zeros(batch, most, ids.shape[1]).to(embedded) @ embedded
        hidden = self.encoder.model(inputs_embeds=embedded, attention_mask=mask)
        return hidden.last_hidden_state, mask  # (B, L, E)


def t5_config(name: str) -> T5Config:
    known = name.rstrip("/").rsplit("/", 1)[-1]
    if known not in T5_SIZES:
        try:
            return T5Config.from_pretrained(name, local_files_only=True)
        except OSError as error:
            raise ValueError(
                f"text encoder {name!r}: neither a folder with a config.json nor one of "
                f"{sorted(T5_SIZES)}"
            ) from error
    width, feed_forward, layers, heads = T5_SIZES[known]
    return T5Config(
        vocab_size=32128,
        d_model=width,
        d_kv=T5_HEAD_WIDTH,
        d_ff=feed_forward,
        num_layers=layers,
        num_heads=heads,
    )


def text_inputs(batch: int, length: int) -> tuple[Tensor, Tensor]:
    """Ids and mask, (B, L) each, of captions that fill the length."""
    shape = (batch, length)
    return torch.zeros(shape, dtype=torch.int64), torch.ones(shape, dtype=torch.bool)


def drop_gradients(modules: list[nn.Module]) -> None:
    for module in modules:
        for parameter in module.parameters():
            parameter.grad = None


@dataclass
class Step(ABC):
    """What a training step holds and runs, part by part.

    size: side of the images. holds_gradients: room for them is there before the step, from the
    micro-batch before or as DDP's buckets.
    """

    size: int
    holds_gradients: bool = field(default=False, kw_only=True)

    @abstractmethod
    def parts(self) -> dict[str, nn.Module]:
        """Everything on the device, by the name it is reported under."""

    @abstractmethod
    def networks(self) -> list[nn.Module]:
        """What the optimizers train."""

    @abstractmethod
    def averaged(self) -> list[nn.Module]:
        """What is averaged over steps, where anything is."""

    @abstractmethod
    def run(self, batch: int, backward: Callable[[Tensor], None]) -> None:
        """Forward and backward of one micro-batch on the CPU, whose tensors may be fake."""

    def checkpointing(self) -> list[Any]:
        """Modules with a switch to recompute their activations."""
        modules = [m for network in self.networks() for m in network.modules()]
        return [module for module in modules if hasattr(module, "checkpoint_activations")]

    def images(self, batch: int) -> Tensor:
        return torch.zeros(batch, 3, self.size, self.size)


@dataclass
class TokenizerStep(Step):
    """discrete_prob: see `dcar.lit.tokenizer`; discriminator None: a step before it joins."""

    tokenizer: HybridTokenizer
    criterion: TokenizerCriterion
    discriminator: PatchDiscriminator | None
    discrete_prob: float

    def parts(self) -> dict[str, nn.Module]:
        parts: dict[str, nn.Module | None] = {
            "encoder": self.tokenizer.encoder,
            "quantizer": self.tokenizer.quantizer,
            "decoder": self.tokenizer.decoder,
            "discriminator": self.discriminator,
            "perceptual": self.criterion.perceptual,
        }
        return {name: module for name, module in parts.items() if module is not None}

    def networks(self) -> list[nn.Module]:
        return [module for module in (self.tokenizer, self.discriminator) if module is not None]

    def averaged(self) -> list[nn.Module]:
        return [self.tokenizer]

    def run(self, batch: int, backward: Callable[[Tensor], None]) -> None:
        image = self.images(batch)
        latents = self.tokenizer.encode(image)
        chosen = torch.rand(batch, 1, 1, 1) < self.discrete_prob
        mixed = torch.where(chosen, latents.discrete, latents.continuous)
        recon = self.tokenizer.decode(mixed)
        logits = None
        if self.discriminator is not None:
            self.discriminator.requires_grad_(False)
            logits = self.discriminator(recon)
            self.discriminator.requires_grad_(True)
        terms = self.criterion(recon, image, latents, logits)
        backward(terms["loss"])
        if self.discriminator is not None:
            real, fake = self.discriminator(image), self.discriminator(recon.detach())
            backward(hinge_discriminator_loss(real, fake))


@dataclass
class GeneratorStep(Step):
    """encodes, reads: the tokenizer and text encoder run; else their results come with the data."""

    generator: HybridGenerator
    tokenizer: HybridTokenizer
    text_encoder: T5Pass | BytePass
    encodes: bool = True
    reads: bool = True

    def parts(self) -> dict[str, nn.Module]:
        parts: dict[str, nn.Module | None] = {
            "transformer": self.generator.transformer,
            "residual head": self.generator.residual_head,
            "text encoder": self.text_encoder,
            "tokenizer": self.tokenizer,
        }
        return {name: module for name, module in parts.items() if module is not None}

    def networks(self) -> list[nn.Module]:
        trains_text = isinstance(self.text_encoder, BytePass)
        return [self.generator, *([self.text_encoder] if trains_text else [])]

    def averaged(self) -> list[nn.Module]:
        return self.networks()

    def run(self, batch: int, backward: Callable[[Tensor], None]) -> None:
        ids, residual = self._tokens(batch)
        text, mask = self._text(batch)
        terms = self.generator.losses(ids, residual, text, mask, Draws(0))
        backward(terms["loss"])

    def _tokens(self, batch: int) -> tuple[Tensor, Tensor]:
        side, channels = self.size // self.tokenizer.downsample, self.tokenizer.latent_channels
        if not self.encodes:
            ids = torch.zeros(batch, side, side, dtype=torch.int64)
            return ids, torch.zeros(batch, channels, side, side)
        with torch.no_grad():
            latents = self.tokenizer.encode(self.images(batch))
        return latents.ids, latents.residual.float()

    def _text(self, batch: int) -> tuple[Tensor, Tensor]:
        if self.reads:
            return self.text_encoder(batch)
        transformer = self.generator.transformer
        _, mask = text_inputs(batch, transformer.text_tokens)
        return torch.zeros(batch, transformer.text_tokens, transformer.text_dim), mask


@contextmanager
def without_values(step: Step) -> Iterator[None]:
    """Modules built on the meta device run on fake CPU tensors: they have shapes, but no values."""
    noise_schedule.cache_clear()  # its tables are real outside and fake inside
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in {id(part): part for part in step.parts().values()}.values():
            module.to_empty(device="cpu")
            for inner in module.modules():
                if isinstance(inner, BaseResidualHead):
                    inner._is_scale_known = True  # it would look at a value
        yield
    noise_schedule.cache_clear()


def meter_step(step: Step, batch: int, *, half: torch.dtype | None, as_cuda: bool = True) -> Meter:
    """FLOPs and bytes of one micro-batch. half: the dtype of autocast, None for fp32.

    Gradients that the step holds before are not counted.
    """
    meter = Meter(as_cuda=as_cuda)
    trained = [p for module in step.networks() for p in module.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter) if step.holds_gradients else None
    autocast = nullcontext() if half is None else torch.autocast("cpu", dtype=half)
    watched = {name: [module] for name, module in step.parts().items()}
    logits = as_many_logits_as_on_a_gpu() if as_cuda else nullcontext()
    with meter.watch(watched), meter.running(), autocast, logits:
        step.run(batch, meter.backward)
    drop_gradients(step.networks())
    return meter
