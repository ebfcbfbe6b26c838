"""DC-AE encoder and decoder (arXiv 2410.10733, used by DC-AR, arXiv 2507.04947, section 3).

B batch, S image side, f downsample, C latent channels, H W any feature map, D its width, N = H*W.
Every feature map is kept channels-last in memory, so norms over channels need no copy.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from dcar.models.precision import without_autocast

HEAD_DIM = 32  # channels per attention head in every DC-AE


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of (B, D, H, W); keeps the input's dtype under autocast."""

    def forward(self, features: Tensor) -> Tensor:
        with without_autocast(features):
            weight, bias = self.weight.to(features.dtype), self.bias.to(features.dtype)
            last = rearrange(features, "b d h w -> b h w d")
            normed = F.layer_norm(last, self.normalized_shape, weight, bias, self.eps)
        return rearrange(normed, "b h w d -> b d h w")


class RMSNorm2d(nn.LayerNorm):
    """Root-mean-square norm over channels with weight and bias, as in the public DC-AE weights."""

    def forward(self, features: Tensor) -> Tensor:
        with without_autocast(features):
            weight, bias = self.weight.to(features.dtype), self.bias.to(features.dtype)
            last = rearrange(features, "b d h w -> b h w d")
            normed = F.rms_norm(last, self.normalized_shape, weight, self.eps) + bias
        return rearrange(normed, "b h w d -> b d h w")


NORMS: dict[str, type[nn.Module]] = {
    "ln2d": LayerNorm2d,
    "rms2d": RMSNorm2d,
    "bn2d": nn.BatchNorm2d,
}
ACTIVATIONS: dict[str, type[nn.Module]] = {"silu": nn.SiLU, "relu": nn.ReLU}


def conv(width_in: int, width_out: int, kernel: int, *, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(width_in, width_out, kernel, padding=kernel // 2, bias=bias)


def pixel_shuffle(features: Tensor) -> Tensor:
    """(B, 4D, H, W) to (B, D, 2H, 2W), staying channels-last where the CUDA kernel would not."""
    return F.pixel_shuffle(features, 2).contiguous(memory_format=torch.channels_last)


def pixel_unshuffle(features: Tensor) -> Tensor:
    """(B, D, H, W) to (B, 4D, H/2, W/2), staying channels-last."""
    return F.pixel_unshuffle(features, 2).contiguous(memory_format=torch.channels_last)


def average_channels(features: Tensor, width: int) -> Tensor:
    """Mean over neighbouring channels until `width` are left."""
    last = rearrange(features, "b (d group) h w -> b h w d group", d=width)
    return rearrange(last.mean(-1), "b h w d -> b d h w")


def repeat_channels(features: Tensor, times: int) -> Tensor:
    """Each channel `times` times in a row."""
    last = rearrange(features, "b d h w -> b h w d")
    return rearrange(torch.stack([last] * times, dim=-1), "b h w d times -> b (d times) h w")


def shortcut_down(features: Tensor, width: int) -> Tensor:
    """pixel_unshuffle, then average_channels to `width`.

    The usual ratios are computed without the unshuffle, which would dominate small models on CPU.
    """
    group = 4 * features.shape[1] // width
    if group % 4 == 0:  # whole 2 x 2 patches are averaged
        return average_channels(F.avg_pool2d(features, 2), width)
    if group == 2:  # pairs in a row are averaged, the two rows become two channels
        last = rearrange(features, "b d h w -> b h w d")
        pairs = (last[:, :, 0::2] + last[:, :, 1::2]) / 2
        rows = torch.stack([pairs[:, 0::2], pairs[:, 1::2]], dim=-1)
        return rearrange(rows, "b h w d i -> b (d i) h w")
    return average_channels(pixel_unshuffle(features), width)


def shortcut_up(features: Tensor, width: int) -> Tensor:
    """repeat_channels to 4 x `width`, then pixel_shuffle."""
    times = 4 * width // features.shape[1]
    if times % 4 == 0:  # all four pixels of a 2 x 2 patch repeat one channel
        return F.interpolate(repeat_channels(features, times // 4), scale_factor=2.0)
    return pixel_shuffle(repeat_channels(features, times))


class Downsample(nn.Module):
    """Half the sides: convolution and space-to-channel, plus the channel-averaging shortcut."""

    def __init__(self, width_in: int, width_out: int, *, shortcut: bool = True):
        super().__init__()
        if width_out % 4 or (shortcut and 4 * width_in % width_out):
            raise ValueError(
                f"downsampling from {width_in} to {width_out} channels: the second must be a "
                f"multiple of 4 and divide {4 * width_in} = 4 x {width_in}"
            )
        self.width_out, self.shortcut = width_out, shortcut
        self.conv = conv(width_in, width_out // 4, 3)

    def forward(self, features: Tensor) -> Tensor:
        halved = pixel_unshuffle(self.conv(features))  # (B, D_out, H/2, W/2)
        if not self.shortcut:
            return halved
        return halved + shortcut_down(features, self.width_out)


class Upsample(nn.Module):
    """Double the sides: convolution and channel-to-space, plus the channel-repeating shortcut."""

    def __init__(self, width_in: int, width_out: int, *, shortcut: bool = True):
        super().__init__()
        if shortcut and 4 * width_out % width_in:
            raise ValueError(
                f"upsampling from {width_in} to {width_out} channels: {width_in} must divide "
                f"{4 * width_out} = 4 x {width_out}"
            )
        self.width_out, self.shortcut = width_out, shortcut
        self.conv = conv(width_in, 4 * width_out, 3)

    def forward(self, features: Tensor) -> Tensor:
        doubled = pixel_shuffle(self.conv(features))  # (B, D_out, 2H, 2W)
        return doubled + shortcut_up(features, self.width_out) if self.shortcut else doubled


class ResBlock(nn.Module):
    def __init__(self, width: int, *, norm: str, activation: str):
        super().__init__()
        self.conv1 = conv(width, width, 3)
        self.activation = ACTIVATIONS[activation]()
        self.conv2 = conv(width, width, 3, bias=False)
        self.norm = NORMS[norm](width)

    def forward(self, features: Tensor) -> Tensor:
        return features + self.norm(self.conv2(self.activation(self.conv1(features))))


def linear_attention(query: Tensor, key: Tensor, value: Tensor, *, eps: float = 1e-15) -> Tensor:
    """Attention with weights `query . key` in O(N); all are (heads, HEAD_DIM, N), the two >= 0."""
    context = value @ key.mT  # (heads, HEAD_DIM, HEAD_DIM)
    weight_sum = key.sum(-1, keepdim=True).mT @ query  # (heads, 1, N)
    return (context @ query) / (weight_sum + eps)


def quadratic_attention(query: Tensor, key: Tensor, value: Tensor, *, eps: float = 1e-15) -> Tensor:
    """The same function in O(N^2), cheaper and with fewer roundings while N <= HEAD_DIM."""
    weights = key.mT @ query  # (heads, N keys, N queries)
    return value @ (weights / (weights.sum(-2, keepdim=True) + eps))


class LiteMLA(nn.Module):
    """Linear attention with a ReLU kernel, in fp32 (DC-AE: single scale, arXiv 2205.14756)."""

    def __init__(self, width: int, *, norm: str):
        super().__init__()
        if width % HEAD_DIM:
            raise ValueError(f"attention over {width} channels needs a multiple of {HEAD_DIM}")
        self.qkv = conv(width, 3 * width, 1, bias=False)
        self.project = conv(width, width, 1, bias=False)
        self.norm = NORMS[norm](width)

    def forward(self, features: Tensor) -> Tensor:
        return self.norm(self.project(self.attend(self.qkv(features), features.shape[-1])))

    def attend(self, qkv: Tensor, columns: int) -> Tensor:
        batch, dtype = len(qkv), qkv.dtype
        with without_autocast(qkv):
            qkv = qkv.to(torch.float32, memory_format=torch.contiguous_format)
            qkv = rearrange(qkv, "b (heads d) h w -> (b heads) d (h w)", d=3 * HEAD_DIM)
            query, key = F.relu(qkv[:, : 2 * HEAD_DIM]).chunk(2, dim=1)  # (heads, HEAD_DIM, N)
            is_linear = qkv.shape[-1] > HEAD_DIM
            attention = linear_attention if is_linear else quadratic_attention
            attended = attention(query, key, qkv[:, 2 * HEAD_DIM :])
        attended = rearrange(attended, "(b heads) d (h w) -> b (heads d) h w", b=batch, w=columns)
        return attended.to(dtype, memory_format=torch.channels_last)  # (B, D, H, W)


class GLUMBConv(nn.Module):
    """Inverted bottleneck with a depthwise convolution and a gate (SANA, arXiv 2410.10629)."""

    def __init__(self, width: int, *, norm: str, activation: str, expand: int = 4):
        super().__init__()
        hidden = 2 * expand * width
        self.expand = conv(width, hidden, 1)
        self.depthwise = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.activation = ACTIVATIONS[activation]()
        self.project = conv(hidden // 2, width, 1, bias=False)
        self.norm = NORMS[norm](width)

    def forward(self, features: Tensor) -> Tensor:
        hidden = self.depthwise(self.activation(self.expand(features)))  # (B, 8D, H, W)
        values, gate = hidden.chunk(2, dim=1)
        return self.norm(self.project(values * self.activation(gate)))  # (B, D, H, W)


class EViTBlock(nn.Module):
    def __init__(self, width: int, *, norm: str, activation: str):
        super().__init__()
        self.attention = LiteMLA(width, norm=norm)
        self.local = GLUMBConv(width, norm=norm, activation=activation)

    def forward(self, features: Tensor) -> Tensor:
        features = features + self.attention(features)
        return features + self.local(features)


BLOCKS: dict[str, type[nn.Module]] = {"res": ResBlock, "evit": EViTBlock}


@contextmanager
def statistics_kept(module: nn.Module) -> Iterator[None]:
    """What batch norms in `module` learn of a batch in here goes to copies and is forgotten."""
    norms = [part for part in module.modules() if isinstance(part, _BatchNorm)]
    own = [dict(norm._buffers) for norm in norms]
    for norm, buffers in zip(norms, own, strict=True):
        norm._buffers.update({name: b if b is None else b.clone() for name, b in buffers.items()})
    try:
        yield
    finally:
        for norm, buffers in zip(norms, own, strict=True):
            norm._buffers.update(buffers)


@torch.compiler.disable(recursive=False)  # layers are then compiled each by itself
def run_recomputing(stage: nn.Module, features: Tensor) -> Tensor:
    """Run the layers of a stage, which in the backward pass compute again what they did not keep.

    The second time running statistics stay as they are.
    """
    for layer in stage.children():

        def contexts(layer: nn.Module = layer) -> tuple[AbstractContextManager[None], Any]:
            return nullcontext(), statistics_kept(layer)

        features = checkpoint(layer, features, use_reentrant=False, context_fn=contexts)
    return features


def run_stage(stage: nn.Module, features: Tensor, *, recompute: bool) -> Tensor:
    if recompute and torch.is_grad_enabled():
        return run_recomputing(stage, features)
    return stage(features)


def check_stages(
    *, widths: Sequence[int], depths: Sequence[int], **per_stage: Sequence[str]
) -> None:
    known = {"blocks": BLOCKS, "norms": NORMS, "activations": ACTIVATIONS}
    for name, values in {"depths": depths, **per_stage}.items():
        if len(values) != len(widths):
            raise ValueError(f"{name} has {len(values)} stages but widths has {len(widths)}")
    for name, values in per_stage.items():
        for value in values:
            if value not in known[name]:
                raise ValueError(f"unknown {value!r} in {name}: choose from {sorted(known[name])}")
    if depths[0] == 0 and len(widths) < 2:
        raise ValueError(f"an empty first stage needs a second one, got {len(widths)} stage")


def check_latent(latent_channels: int, width: int) -> None:
    if width % latent_channels:
        raise ValueError(
            f"the innermost width {width} must be a multiple of latent_channels {latent_channels}"
        )


class Encoder(nn.Module):
    """Image (B, 3, S, S) in [-1, 1] to latent (B, C, S/f, S/f), f = 2 ** (stages - 1).

    `widths`, `depths` and `blocks` ("res" or "evit") have one entry per stage, finest first. With
    `depths[0] == 0` the first stage vanishes: pixels are taken straight to half the side and to
    `widths[1]` channels (arXiv 2410.10733). `checkpoint_activations` keeps the input of each layer
    alone for the backward pass: less memory, a third more time. Raises ValueError where widths
    cannot be connected.
    """

    def __init__(
        self,
        *,
        latent_channels: int,
        widths: Sequence[int],
        depths: Sequence[int],
        blocks: Sequence[str],
        norm: str = "ln2d",
        activation: str = "silu",
        in_channels: int = 3,
        checkpoint_activations: bool = False,
    ):
        super().__init__()
        check_stages(
            widths=widths,
            depths=depths,
            blocks=blocks,
            norms=[norm] * len(widths),
            activations=[activation] * len(widths),
        )
        check_latent(latent_channels, widths[-1])
        self.latent_channels, self.downsample = latent_channels, 2 ** (len(widths) - 1)
        self.checkpoint_activations = checkpoint_activations
        self.project_in: nn.Module
        if depths[0] > 0:
            self.project_in = conv(in_channels, widths[0], 3)
        else:
            self.project_in = Downsample(in_channels, widths[1], shortcut=False)
        self.stages = nn.ModuleList()
        for index, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            block = BLOCKS[blocks[index]]
            layers = [block(width, norm=norm, activation=activation) for _ in range(depth)]
            if index < len(widths) - 1 and (index > 0 or depth > 0):
                layers.append(Downsample(width, widths[index + 1]))
            self.stages.append(nn.Sequential(*layers))
        self.project_out = conv(widths[-1], latent_channels, 3)

    def forward(self, image: Tensor) -> Tensor:
        features = self.project_in(image.contiguous(memory_format=torch.channels_last))
        for stage in self.stages:
            features = run_stage(stage, features, recompute=self.checkpoint_activations)
        averaged = average_channels(features, self.latent_channels)
        return self.project_out(features) + averaged  # (B, C, S/f, S/f)


class Decoder(nn.Module):
    """Latent (B, C, S/f, S/f) to image (B, 3, S, S), not clamped; mirrors `Encoder`.

    All lists have one entry per stage, finest first, and run backwards. `norms` takes "ln2d",
    "rms2d" or "bn2d"; `out_norm` is the one before the last convolution. `checkpoint_activations`
    is that of `Encoder`.
    """

    def __init__(
        self,
        *,
        latent_channels: int,
        widths: Sequence[int],
        depths: Sequence[int],
        blocks: Sequence[str],
        norms: Sequence[str],
        activations: Sequence[str],
        out_norm: str,
        out_channels: int = 3,
        checkpoint_activations: bool = False,
    ):
        super().__init__()
        check_stages(
            widths=widths, depths=depths, blocks=blocks, norms=norms, activations=activations
        )
        check_latent(latent_channels, widths[-1])
        self.latent_channels, self.downsample = latent_channels, 2 ** (len(widths) - 1)
        self.checkpoint_activations = checkpoint_activations
        self.project_in = conv(latent_channels, widths[-1], 3)
        self.stages = nn.ModuleList()
        for index, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            layers: list[nn.Module] = []
            if index < len(widths) - 1 and (index > 0 or depth > 0):
                layers.append(Upsample(widths[index + 1], width))
            block, norm, activation = BLOCKS[blocks[index]], norms[index], activations[index]
            layers += [block(width, norm=norm, activation=activation) for _ in range(depth)]
            self.stages.append(nn.Sequential(*layers))
        width = widths[0] if depths[0] > 0 else widths[1]
        self.out_norm = NORMS[out_norm](width)
        self.project_out: nn.Module
        if depths[0] > 0:
            self.project_out = conv(width, out_channels, 3)
        else:
            self.project_out = Upsample(width, out_channels, shortcut=False)

    def forward(self, latent: Tensor) -> Tensor:
        latent = latent.contiguous(memory_format=torch.channels_last)
        features = self.project_in(latent)  # (B, widths[-1], H, W)
        repeats = features.shape[1] // self.latent_channels
        # Under autocast the latent is fp32: cast, or every feature map would become fp32.
        features = features + repeat_channels(latent.to(features.dtype), repeats)
        for stage in reversed(self.stages):
            features = run_stage(stage, features, recompute=self.checkpoint_activations)
        return self.project_out(F.relu(self.out_norm(features)))  # (B, 3, S, S)
