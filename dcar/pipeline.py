"""Prompt to picture: `DCARPipeline.from_pretrained("mini")("a red apple, flat style")`."""

import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from dcar.errors import NonFiniteError
from dcar.evaluation.pictures import to_pil
from dcar.models.checkpoints import Model, load_model, save_model
from dcar.models.sampler import SamplerSettings, Tokens, sample

AUTOCAST = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


def existing_device(name: str | torch.device) -> torch.device:
    """The device of that name. Raises ValueError for one that is not there."""
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # no such kind; torch built without it
        raise ValueError(f"device={name}: {str(error).splitlines()[0]}") from error


class DCARPipeline:
    """A tokenizer, a generator and a text encoder behind one call (docs/method.md section 9).

    precision: float32, bfloat16 or float16, of the autocast that everything but the quantizer, the
        text encoder and a residual head with `full_precision` runs in. A CPU without instructions
        for bfloat16 is many times slower in it.
    Raises ValueError for another precision, and for a device that is not there.
    """

    def __init__(
        self, model: Model, *, device: str | torch.device = "cpu", precision: str = "float32"
    ):
        if precision not in AUTOCAST:
            raise ValueError(f"precision={precision!r} must be one of {sorted(AUTOCAST)}")
        self.model, self.device, self.dtype = model, existing_device(device), AUTOCAST[precision]
        for module in (model.tokenizer, model.generator, model.text_encoder):
            module.to(self.device).eval()

    @classmethod
    def from_pretrained(cls, folder: str | Path, **options: Any) -> "DCARPipeline":
        """Load a model folder, or the shipped model "mini"; options as for the constructor.

        Raises CheckpointError.
        """
        return cls(load_model(folder), **options)

    def save_pretrained(self, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """Write config.json and one safetensors file a part; its weights in `dtype`, if given."""
        save_model(self.model, folder, dtype=dtype)

    @torch.no_grad()
    def __call__(
        self,
        prompts: str | Sequence[str],
        *,
        seeds: int | Sequence[int] = 0,
        steps: int | None = None,
        guidance: float | None = None,
        height: int | None = None,
        width: int | None = None,
        batch_size: int = 16,
        on_step: Callable[[int, Tensor, Tensor], None] | None = None,
    ) -> list[Image]:
        """One RGB picture a prompt.

        seeds: one an image, or the first of consecutive ones; an image depends on its own alone.
        steps, guidance: of the sampler, the model's own where None; guidance 0 is unguided.
        height, width: pixels, multiples of the tokenizer's downsampling; the training size if None.
        on_step: called with (step, ids, newly fixed) after each unmasking step of each batch.

        Raises ValueError naming the argument that cannot be used, NonFiniteError where a NaN
        went into a picture.
        """
        if not isinstance(prompts, Iterable):
            raise ValueError(f"prompts {prompts!r} is no text and no sequence of texts")
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not prompts:
            raise ValueError("prompts is empty")
        if not all(isinstance(prompt, str) for prompt in prompts):
            raise ValueError("prompts holds something other than text")
        seeds = seed_of_each(seeds, len(prompts))
        if len(seeds) != len(prompts):
            raise ValueError(f"seeds has {len(seeds)} entries for {len(prompts)} prompts")
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1")
        settings = self.settings(steps=steps, guidance=guidance)
        grid = self.tokens_along("height", height), self.tokens_along("width", width)
        options = {"grid": grid, "settings": settings, "on_step": on_step}
        images: list[Image] = []
        for part in chunks(len(prompts), batch_size):
            tokens = self.tokens(prompts[part], seeds=seeds[part], **options)
            pictures = self.decode(tokens)
            assert tokens.is_finite is not None
            if not bool(pictures.isfinite().all() & tokens.is_finite):  # waits for the device once
                raise NonFiniteError(f"pictures made of NaN: {self._advice()}")
            images += map(to_pil, pictures)
        return images

    def settings(self, **changes: Any) -> SamplerSettings:
        """The model's own sampler but for `changes`, of which None changes nothing."""
        given = {name: value for name, value in changes.items() if value is not None}
        return replace(self.model.sampler, **given)

    @torch.no_grad()
    def tokens(self, prompts: Sequence[str], *, seeds: Sequence[int], **options: Any) -> Tokens:
        """Ids (B, H, W) and residual (B, C, H, W); options as of `dcar.models.sampler.sample`."""
        text, text_mask = self.model.text_encoder(list(prompts))
        options = {"settings": self.model.sampler, **options}
        with self._autocast():
            return sample(self.model.generator, text, text_mask, seeds=list(seeds), **options)

    @torch.no_grad()
    def decode(self, tokens: Tokens) -> Tensor:
        """Images (B, 3, S, S) in [-1, 1]."""
        with self._autocast():
            image = self.model.tokenizer.decode_tokens(tokens.ids, tokens.residual)
        return image.float().clamp(-1, 1)

    def tokens_along(self, name: str, pixels: int | None) -> int:
        """How many tokens a `height` or `width` of so many pixels is, None of the training size.

        Raises ValueError naming the argument that cannot be used.
        """
        pixels = self.model.size if pixels is None else pixels
        factor = self.model.tokenizer.downsample
        if pixels <= 0 or pixels % factor:
            raise ValueError(f"{name}={pixels} must be a positive multiple of {factor}")
        return pixels // factor

    def _advice(self) -> str:
        if self.dtype == torch.float16:
            return "float16 holds no number above 65,504; take precision=bfloat16 or float32"
        return "look at the weights"

    @contextmanager
    def _autocast(self) -> Iterator[None]:
        """Each weight is narrowed once in here: autocast keeps that of weights that could learn."""
        if self.dtype is None:
            yield
            return
        parts = (self.model.generator, self.model.tokenizer)
        frozen = [p for part in parts for p in part.parameters() if not p.requires_grad]
        for parameter in frozen:
            parameter.requires_grad = True
        try:
            with torch.autocast(self.device.type, dtype=self.dtype):
                yield
        finally:
            for parameter in frozen:
                parameter.requires_grad = False


def seed_of_each(seeds: Any, count: int) -> list[int]:
    """Plain integers: those given, or as many as `count` from a single one; NumPy's will do."""
    is_one = getattr(seeds, "ndim", 1) == 0 or isinstance(seeds, int)
    try:
        if is_one:
            return list(range(operator.index(seeds), operator.index(seeds) + count))
        return [operator.index(seed) for seed in seeds]
    except TypeError as error:
        raise ValueError(f"seeds {seeds!r} is no integer and no sequence of them") from error


def chunks(total: int, size: int) -> Iterator[slice]:
    """Slices of at most `size` that cover range(total)."""
    return (slice(start, start + size) for start in range(0, total, size))
