"""LPIPS, the learned perceptual distance (arXiv 1801.03924), in plain torch. B images of side S.

Weights: dcar/weights/README.md says where they come from and how half precision was checked.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from dcar.models.weights_io import load_constants

# Mean and deviation of ImageNet's pixels, for images in [-1, 1].
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)
EPSILON = 1e-8  # under the root: features that are all zero stay zero
MIN_SIDE = {"alex": 31, "vgg": 16}  # the deepest tap keeps one position


def alex_stages() -> list[nn.Sequential]:
    """AlexNet's five convolutions; each stage ends at the rectifier that the distance reads."""
    return [
        nn.Sequential(nn.Conv2d(3, 64, 11, stride=4, padding=2), nn.ReLU()),
        nn.Sequential(nn.MaxPool2d(3, stride=2), nn.Conv2d(64, 192, 5, padding=2), nn.ReLU()),
        nn.Sequential(nn.MaxPool2d(3, stride=2), nn.Conv2d(192, 384, 3, padding=1), nn.ReLU()),
        nn.Sequential(nn.Conv2d(384, 256, 3, padding=1), nn.ReLU()),
        nn.Sequential(nn.Conv2d(256, 256, 3, padding=1), nn.ReLU()),
    ]


def vgg_stages() -> list[nn.Sequential]:
    """VGG16's five blocks; each stage ends at the last rectifier before the next pooling."""
    widths, depths = (3, 64, 128, 256, 512, 512), (2, 2, 3, 3, 3)
    stages = []
    for index, depth in enumerate(depths):
        layers: list[nn.Module] = [nn.MaxPool2d(2)] if index else []
        for layer in range(depth):
            wide = widths[index + (layer > 0)]
            layers += [nn.Conv2d(wide, widths[index + 1], 3, padding=1), nn.ReLU()]
        stages.append(nn.Sequential(*layers))
    return stages


BACKBONES = {
    "alex": (alex_stages, (64, 192, 384, 256, 256)),
    "vgg": (vgg_stages, (64, 128, 256, 512, 512)),
}


def unit(features: Tensor) -> Tensor:
    """Each position's channel vector at length one."""
    return features * torch.rsqrt(features.square().sum(1, keepdim=True) + EPSILON)


class LPIPS(nn.Module):
    """Perceptual distance of image pairs: `LPIPS()(a, b) -> (B,)`, zero for equal images.

    a, b: (B, 3, S, S) float in [-1, 1]; values outside are not clamped. Gradients flow to whichever
    of the two asks for them, so as a training loss put the reconstruction first and leave the
    target without. The network itself is constant: always eval, no parameters, nothing in a
    state_dict, its own dtype whatever autocast says.

    net: "alex" (shipped; the one that published LPIPS figures use) or "vgg" (59 MB, not shipped).
    weights: a .safetensors file of `python -m dcar.models.weights_build`; None is the shipped one.
    dtype: of the convolutions. float32 is the metric. bfloat16 is for training: on a CPU with AMX
    2.8 times faster (B 32, S 64); the mean over a set moves by under 1%, the gradient keeps a
    cosine of 0.996.
    Raises ValueError for another `net` or for an image smaller than the network's MIN_SIDE, and
    FileNotFoundError, with the command that makes the file, where the weights are not there.
    """

    shift: Tensor
    scale: Tensor

    def __init__(
        self,
        net: str = "alex",
        weights: str | Path | None = None,
        *,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        if net not in BACKBONES:
            raise ValueError(f"LPIPS has the networks {list(BACKBONES)}, not {net!r}")
        stages, widths = BACKBONES[net]
        self.net, self.dtype = net, dtype
        self.stages = nn.ModuleList(stages())
        self.heads = nn.ParameterList(torch.zeros(width) for width in widths)
        load_constants(self, f"lpips_{net}", weights)
        # Half the bytes and the layout that half-precision convolutions are written for.
        if dtype != torch.float32:
            self.stages.to(dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.register_buffer("shift", torch.tensor(SHIFT).view(3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(SCALE).view(3, 1, 1), persistent=False)

    def taps(self, image: Tensor) -> Iterator[Tensor]:
        """Unit features of the five stages, (B, width, h, w) each."""
        features = ((image - self.shift) / self.scale).to(self.dtype)
        for stage in self.stages:
            features = stage(features)  # (B, width, h, w)
            yield unit(features.float())

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        self._check_size(a)
        with torch.autocast(a.device.type, enabled=False):
            pairs = zip(self.heads, self.taps(a.float()), self.taps(b.float()), strict=True)
            distances = [
                torch.einsum("bchw,c->bhw", (one - other).square(), head).mean((1, 2))  # (B,)
                for head, one, other in pairs
            ]
        return torch.stack(distances).sum(0)

    def train(self, mode: bool = True) -> "LPIPS":
        return super().train(False)

    def _check_size(self, image: Tensor) -> None:
        if min(image.shape[-2:]) < MIN_SIDE[self.net]:
            raise ValueError(
                f"LPIPS {self.net} needs images of {MIN_SIDE[self.net]} pixels or more, "
                f"not {tuple(image.shape[-2:])}"
            )
