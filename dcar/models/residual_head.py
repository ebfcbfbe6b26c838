"""Residual tokens from hidden states: a small MLP denoiser under two training objectives.

B batch, N tokens, C latent channels, D width of the transformer, W width of the head, M rows.
Source: DC-AR section 3.2.
"""

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from dcar.models.denoiser import Denoiser
from dcar.models.diffusion import add_noise, ancestral_step, diffusion_loss, noise_schedule
from dcar.models.draws import Draws, RowDraws
from dcar.models.noise import ImageNoise
from dcar.models.precision import without_autocast

# (noisy rows (M, C), step as the network is told it (1,)) -> network output (M, outputs)
Denoise = Callable[[Tensor, Tensor], Tensor]
_TIME_UNITS = 1000.0  # the time embedding's range: flow times are in [0, 1]


class BaseResidualHead(nn.Module, ABC):
    """What both objectives share: the scale, the rows, guidance, precision.

    Residuals are divided by `scale` before and multiplied by it after the denoiser, nowhere else.
    `scale` is a buffer, saved with the weights; it is NaN until the constructor, `set_scale`
    or a checkpoint gives it, and loss and sample then raise ValueError. Measure it as the standard
    deviation of the residuals over the training images.

    The condition is a position's hidden state alone, as in DC-AR. With `num_codes`, the size of the
    codebook, it is the normalised hidden state and an embedding of the position's own code, as in
    HART (arXiv 2410.10812): the residual depends on which code it is left by. `loss` and `sample`
    then need `ids`.

    The arithmetic around the denoiser is always fp32. `full_precision` (default) also keeps the
    denoiser itself out of a surrounding autocast; without it the matrix products follow autocast,
    which is several times faster on a GPU.
    """

    scale: Tensor

    def __init__(
        self,
        *,
        channels: int,
        outputs: int,
        dim: int,
        width: int,
        depth: int,
        scale: float | None,
        batch_mul: int,
        full_precision: bool,
        num_codes: int | None,
    ):
        super().__init__()
        if batch_mul < 1:
            raise ValueError(f"batch_mul {batch_mul} is below 1")
        self.channels, self.batch_mul, self.full_precision = channels, batch_mul, full_precision
        self.num_codes = num_codes
        self.denoiser = Denoiser(
            channels=channels, outputs=outputs, dim=dim, width=width, depth=depth
        )
        self.code_embedding: nn.Embedding | None = None
        if num_codes is not None:
            self.code_embedding = nn.Embedding(num_codes, width)
            nn.init.zeros_(self.code_embedding.weight)
        self.register_buffer("scale", torch.tensor(math.nan))
        self._is_scale_known = False
        if scale is not None:
            self.set_scale(scale)

    @abstractmethod
    def _row_losses(self, start: Tensor, denoise: Denoise, draws: RowDraws) -> Tensor:
        """Loss of each row (M,) for scaled residuals (M, C)."""

    @abstractmethod
    def _sample_rows(
        self,
        denoise: Denoise,
        noise: Callable[[int], Tensor],
        *,
        temperature: float,
        clip: float | None,
        steps: int | None,
    ) -> Tensor:
        """Scaled residuals (M, C); noise(k) gives k draws, (k, M, C)."""

    @abstractmethod
    def _guide(self, conditional: Tensor, unconditional: Tensor, guidance: float) -> Tensor:
        """The network's output under guidance, (M, outputs)."""

    def check_sampling(self, *, steps: int | None, clip: float | None) -> None:
        """Raises ValueError, naming the sampler's setting, for what this head cannot do."""

    def set_scale(self, scale: float) -> None:
        """Fix the unit of the residuals. Raises ValueError unless scale is finite and positive."""
        if not (math.isfinite(scale) and scale > 0):
            raise ValueError(f"scale {scale} is not a positive number")
        self.scale.fill_(scale)

    def loss(
        self,
        residual: Tensor,
        hidden: Tensor,
        draws: Draws,
        *,
        ids: Tensor | None = None,
        mask: Tensor | None = None,
        count: Tensor | None = None,
    ) -> Tensor:
        """Mean loss over all positions, or over those of `mask` (B, N): a scalar in fp32.

        residual (B, N, C) unscaled; hidden (B, N, D), gradients flow into it; ids (B, N) int64, the
        codes that the residuals go with, read by a head with `num_codes` alone. Every position is
        used `batch_mul` times with different noise. With a mask the sum over its positions is
        divided by `count`, a scalar: by the number of its positions where that is None.
        """
        self._require_scale()
        batch, tokens, _ = residual.shape
        with self._precision(hidden):
            start = repeat(residual.float() / self.scale, "b n c -> (b k n) c", k=self.batch_mul)
            condition = self._condition(hidden, ids)  # (B, N, W)
            condition = repeat(condition, "b n w -> (b k n) w", k=self.batch_mul)

            def denoise(noisy: Tensor, time: Tensor) -> Tensor:
                return self.denoiser(noisy, time, condition).float()

            losses = self._row_losses(
                start, denoise, RowDraws(draws, batch, tokens, self.batch_mul)
            )
        losses = rearrange(losses, "(b k n) -> b k n", b=batch, n=tokens).mean(1)  # (B, N)
        if mask is None:
            return losses.mean()
        count = mask.sum().float() if count is None else count
        return (losses * mask).sum() / count.clamp(min=1)

    @torch.no_grad()
    def sample(
        self,
        hidden: Tensor,
        *,
        noise: ImageNoise,
        ids: Tensor | None = None,
        guidance: float = 0.0,
        hidden_uncond: Tensor | None = None,
        temperature: float = 1.0,
        clip: float | None = None,
        steps: int | None = None,
        full_precision: bool | None = None,
    ) -> Tensor:
        """Residuals (B, N, C), unscaled, fp32, for hidden states (B, N, D) and ids (B, N).

        guidance s uses (1 + s) * conditional - s * unconditional and needs `hidden_uncond`; 0 skips
        the unconditional half. `clip`, `steps`, `full_precision`: None means the head's own. Raises
        ValueError when the scale was never set, or hidden_uncond or ids are missing.
        """
        self._require_scale()
        self.check_sampling(steps=steps, clip=clip)
        batch, tokens, _ = hidden.shape
        with self._precision(hidden, full_precision):
            denoise = self._guided_denoiser(hidden, hidden_uncond, ids, guidance)

            def rows(count: int) -> Tensor:
                drawn = noise.randn(count, tokens, self.channels).to(hidden.device)
                return rearrange(drawn, "b k n c -> k (b n) c")

            sampled = self._sample_rows(
                denoise, rows, temperature=temperature, clip=clip, steps=steps
            )
            sampled = sampled * self.scale
        return rearrange(sampled, "(b n) c -> b n c", b=batch)

    def _guided_denoiser(
        self,
        hidden: Tensor,
        hidden_uncond: Tensor | None,
        ids: Tensor | None,
        guidance: float,
    ) -> Denoise:
        if guidance and hidden_uncond is None:
            raise ValueError(f"guidance {guidance} needs hidden_uncond")
        both = [hidden] if hidden_uncond is None or not guidance else [hidden, hidden_uncond]
        # the condition does not change from step to step, nor does the time from row to row
        codes = None if ids is None else ids.repeat(len(both), 1)
        condition = self._condition(torch.cat(both), codes).flatten(0, 1)

        def denoise(noisy: Tensor, time: Tensor) -> Tensor:
            output = self.denoiser(noisy.repeat(len(both), 1), time, condition).float()
            if len(both) == 1:
                return output
            conditional, unconditional = output.chunk(2)
            return self._guide(conditional, unconditional, guidance)

        return denoise

    def _condition(self, hidden: Tensor, ids: Tensor | None) -> Tensor:
        hidden = hidden.to(self.denoiser.input.weight.dtype)
        if self.code_embedding is None:
            return self.denoiser.condition_embedding(hidden)  # (B, N, W)
        if ids is None:
            raise ValueError("a residual head with num_codes needs ids")
        normed = F.layer_norm(hidden, hidden.shape[-1:], eps=1e-6)
        return self.denoiser.condition_embedding(normed) + self.code_embedding(ids)

    def _precision(
        self, hidden: Tensor, full: bool | None = None
    ) -> contextlib.AbstractContextManager[object]:
        full = self.full_precision if full is None else full
        return without_autocast(hidden) if full else contextlib.nullcontext()

    def _require_scale(self) -> None:
        if self._is_scale_known:  # looked at once only: reading a value back stalls the GPU
            return
        if bool(self.scale.isnan()):
            raise ValueError(
                "scale of the residual head is not set: give it to the constructor, call set_scale"
                " with the standard deviation of the residuals, or load trained weights"
            )
        self._is_scale_known = True

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._is_scale_known = False

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "BaseResidualHead":
        exact = self.scale
        super()._apply(fn, recurse)
        if self.scale.dtype != torch.float32 and not exact.is_meta:
            self.scale = exact.to(self.scale.device)  # weights may go to half precision, not this
        return self


class ResidualHead(BaseResidualHead):
    """The denoiser as an iDDPM: cosine schedule, learned-range variance.

    prediction: "noise" (the authors') or "start", x_0 itself: the same diffusion, but only the
    second says what to expect where all is noise, as at the first step of sampling. With one step
    the mean of the residual is drawn (docs/method.md section 7.1).

    `clip_denoised` limits the predicted x_0 at every sampling step, in units of scale: 1 is the
    authors' limit, and cuts a third of the values where scale is a standard deviation; 0 is none
    (MAR), with which predicted noise throws the first step far off. Raises ValueError for a
    negative one, for another prediction, and unless 1 <= sample_steps <= train_steps.
    """

    def __init__(
        self,
        *,
        channels: int,
        dim: int,
        width: int = 1024,
        depth: int = 6,
        scale: float | None = None,
        train_steps: int = 1000,
        sample_steps: int = 32,
        clip_denoised: float = 1.0,
        batch_mul: int = 4,
        full_precision: bool = True,
        num_codes: int | None = None,
        prediction: str = "noise",
    ):
        super().__init__(
            channels=channels,
            outputs=2 * channels,
            dim=dim,
            width=width,
            depth=depth,
            scale=scale,
            batch_mul=batch_mul,
            full_precision=full_precision,
            num_codes=num_codes,
        )
        self.train_steps, self.sample_steps = train_steps, sample_steps
        if prediction not in ("noise", "start"):
            raise ValueError(f"prediction {prediction!r} is neither 'noise' nor 'start'")
        self.prediction = prediction
        if not clip_denoised >= 0:
            raise ValueError(f"clip_denoised {clip_denoised} is below 0")
        self.clip_denoised = float(clip_denoised)  # True of older configs is 1, False none
        noise_schedule(train_steps, sample_steps)  # rejects impossible step counts

    def check_sampling(self, *, steps: int | None, clip: float | None) -> None:
        if steps is not None and steps > self.train_steps:
            raise ValueError(f"residual_steps {steps} is above the head's {self.train_steps}")

    def _row_losses(self, start: Tensor, denoise: Denoise, draws: RowDraws) -> Tensor:
        schedule = noise_schedule(self.train_steps, self.train_steps, start.device)
        step, noise = draws.randint(self.train_steps), draws.randn(self.channels)
        output = denoise(add_noise(schedule, start, noise, step), step)  # (M, 2C)
        return diffusion_loss(schedule, start, noise, step, output, prediction=self.prediction)

    def _sample_rows(
        self,
        denoise: Denoise,
        noise: Callable[[int], Tensor],
        *,
        temperature: float,
        clip: float | None,
        steps: int | None,
    ) -> Tensor:
        steps = self.sample_steps if steps is None else steps
        clip = self.clip_denoised if clip is None else clip
        drawn = noise(steps)  # (steps, M, C), the first for the start
        schedule = noise_schedule(self.train_steps, steps, drawn.device)
        step_back = partial(ancestral_step, clip=clip, temperature=temperature)
        indices = torch.arange(steps, device=drawn.device)
        noisy = drawn[0]
        for index in reversed(range(steps)):
            step = indices[index : index + 1]
            output = denoise(noisy, schedule.timesteps[index : index + 1])
            fresh = drawn[steps - index] if index else None
            noisy = step_back(schedule, noisy, output, step, fresh, prediction=self.prediction)
        return noisy

    def _guide(self, conditional: Tensor, unconditional: Tensor, guidance: float) -> Tensor:
        predicted, raw_variance = conditional.chunk(2, dim=1)
        guided = predicted + guidance * (predicted - unconditional[:, : self.channels])
        return torch.cat([guided, raw_variance], dim=1)  # the variance stays unguided


class FlowResidualHead(BaseResidualHead):
    """The same denoiser trained by flow matching: it predicts the velocity data - noise.

    Straight paths from noise at time 0 to data at time 1 (arXiv 2210.02747, 2209.03003), integrated
    by `sample_steps` steps of `solver` "euler" or "heun" (two evaluations per step). Nothing is
    clipped: sample with a `clip` raises ValueError. An alternative to the paper's diffusion.
    """

    def __init__(
        self,
        *,
        channels: int,
        dim: int,
        width: int = 1024,
        depth: int = 6,
        scale: float | None = None,
        sample_steps: int = 16,
        solver: str = "heun",
        batch_mul: int = 4,
        full_precision: bool = True,
        num_codes: int | None = None,
    ):
        super().__init__(
            channels=channels,
            outputs=channels,
            dim=dim,
            width=width,
            depth=depth,
            scale=scale,
            batch_mul=batch_mul,
            full_precision=full_precision,
            num_codes=num_codes,
        )
        if solver not in ("euler", "heun"):
            raise ValueError(f"solver {solver!r} is neither 'euler' nor 'heun'")
        if sample_steps < 1:
            raise ValueError(f"sample_steps {sample_steps} is below 1")
        self.sample_steps, self.solver = sample_steps, solver

    def check_sampling(self, *, steps: int | None, clip: float | None) -> None:
        if clip:
            raise ValueError("residual_clip must be null or 0: flow matching does not clip")

    def _row_losses(self, start: Tensor, denoise: Denoise, draws: RowDraws) -> Tensor:
        time, noise = draws.rand(), draws.randn(self.channels)
        noisy = torch.lerp(noise, start, time[:, None])
        velocity = denoise(noisy, time * _TIME_UNITS)  # (M, C)
        return (velocity - (start - noise)).square().mean(1)

    def _sample_rows(
        self,
        denoise: Denoise,
        noise: Callable[[int], Tensor],
        *,
        temperature: float,
        clip: float | None,
        steps: int | None,
    ) -> Tensor:
        steps = self.sample_steps if steps is None else steps
        noisy = noise(1)[0] * temperature
        times = torch.linspace(0, 1, steps + 1, device=noisy.device)
        for step in range(steps):
            velocity = denoise(noisy, times[step : step + 1] * _TIME_UNITS)
            if self.solver == "heun":
                guess = noisy + velocity / steps
                velocity_there = denoise(guess, times[step + 1 : step + 2] * _TIME_UNITS)
                velocity = (velocity + velocity_there) / 2
            noisy = noisy + velocity / steps
        return noisy

    def _guide(self, conditional: Tensor, unconditional: Tensor, guidance: float) -> Tensor:
        return conditional + guidance * (conditional - unconditional)
