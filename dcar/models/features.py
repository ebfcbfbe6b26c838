"""Image features for a Frechet distance: MobileNetV2 (shipped), Inception. B images of side S."""

import importlib.util
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from dcar.errors import MissingExtraError
from dcar.models.weights_io import as_constants, load_constants

# (expansion, width, blocks, stride of the first): arXiv 1801.04381, table 2.
MOBILENET_STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
CPU_CHUNK = 8  # images at once on a CPU: their activations stay in its cache, 1.4 times faster


def conv(width: int, out: int, kernel: int, *, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """A convolution with its batch norm folded in, hence the bias."""
    return nn.Conv2d(width, out, kernel, stride=stride, padding=kernel // 2, groups=groups)


class InvertedResidual(nn.Module):
    """Expand, filter each channel, project; added to the input where the shape allows."""

    def __init__(self, width: int, out: int, *, expansion: int, stride: int):
        super().__init__()
        hidden = width * expansion
        expand = [conv(width, hidden, 1), nn.ReLU6(inplace=True)] if expansion > 1 else []
        depthwise = conv(hidden, hidden, 3, stride=stride, groups=hidden)
        self.layers = nn.Sequential(
            *expand, depthwise, nn.ReLU6(inplace=True), conv(hidden, out, 1)
        )
        self.is_residual = stride == 1 and width == out

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.layers(hidden) if self.is_residual else self.layers(hidden)


def mobilenet_layers() -> nn.Sequential:
    layers: list[nn.Module] = [conv(3, 32, 3, stride=2), nn.ReLU6(inplace=True)]
    width = 32
    for expansion, out, blocks, stride in MOBILENET_STAGES:
        for index in range(blocks):
            first = stride if index == 0 else 1
            layers.append(InvertedResidual(width, out, expansion=expansion, stride=first))
            width = out
    return nn.Sequential(*layers, conv(width, 1280, 1), nn.ReLU6(inplace=True))


class MobileNetV2Features(nn.Module):
    """Pooled ImageNet features of MobileNetV2 at width 1.0: (B, 3, S, S) -> (B, 1280) fp32.

    Input is uint8 in [0, 255] or float in [0, 1], any size: it is resized to 224 x 224 (bilinear
    with antialias, no crop) and normalised with ImageNet's mean and deviation in here. The network
    is constant: always eval, no parameters, nothing in a state_dict, fp32 whatever autocast says.
    A distance on these features carries their name and is not comparable to Inception's.
    Source: arXiv 1801.04381; weights: dcar/weights/README.md.
    """

    name = "mobilenetv2"
    num_features = 1280  # torchmetrics reads it
    side = 224
    mean: Tensor
    std: Tensor

    def __init__(self, weights: str | Path | None = None):
        super().__init__()
        self.layers = mobilenet_layers()
        load_constants(self, "mobilenet_v2", weights)
        self.layers.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1), persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        chunk = CPU_CHUNK if image.device.type == "cpu" else len(image)
        with torch.autocast(image.device.type, enabled=False):
            return torch.cat([self._pooled(part) for part in image.split(max(chunk, 1))])

    def _pooled(self, image: Tensor) -> Tensor:
        pixels = image / 255 if image.dtype == torch.uint8 else image.float()
        size = (self.side, self.side)
        pixels = interpolate(pixels, size, mode="bilinear", antialias=True)  # (B, 3, 224, 224)
        pixels = ((pixels - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        return self.layers(pixels).mean((2, 3))  # (B, 1280)

    def train(self, mode: bool = True) -> "MobileNetV2Features":
        return super().train(False)


INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"


def inception_path() -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE


class InceptionFeatures(nn.Module):
    """The FID Inception (2015-12-05) of torch-fidelity: (B, 3, S, S) uint8 -> (B, 2048).

    Resizes to 299 with TensorFlow 1's bilinear rule, as published FIDs do. Needs the `eval` extra
    and the weights file at `inception_path()` (a pickle: take it from its publisher only), and
    downloads nothing.
    Raises ImportError (what to install) or FileNotFoundError (the file, where it is published).
    """

    name = "inception"
    num_features = 2048

    def __init__(self) -> None:
        super().__init__()
        extractor = _inception_class()
        path = inception_path()
        if not path.is_file():
            raise FileNotFoundError(
                f"no {path}: put {INCEPTION_FILE} there; the project toshas/torch-fidelity on "
                "GitHub publishes it under release v0.2.0"
            )
        network = extractor("inception-v3-compat", ["2048"], feature_extractor_weights_path=path)
        self.network = as_constants(network)

    def forward(self, image: Tensor) -> Tensor:
        with torch.autocast(image.device.type, enabled=False):
            return self.network(image)[0]  # (B, 2048)

    def train(self, mode: bool = True) -> "InceptionFeatures":
        return super().train(False)


def _inception_class() -> type[nn.Module]:
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f'Inception features need {error.name}: pip install "dcar-lightning[eval]"'
        ) from error
    except RuntimeError as error:  # torchvision's compiled part was built for another torch
        version = torch.__version__
        minor = int(version.split(".")[1])
        raise MissingExtraError(
            f"torchvision does not fit torch {version}; install the pair torch {version} and "
            f"torchvision 0.{minor + 15}.* from one index (both CPU builds, or both CUDA builds)"
        ) from error
    return FeatureExtractorInceptionV3


def fid_features(name: str = "auto") -> MobileNetV2Features | InceptionFeatures:
    """The feature extractor of a Frechet distance; its `name` belongs in the metric's key.

    name: "inception", "mobilenetv2", or "auto": Inception where torch-fidelity is installed and the
    weights file is in place, else MobileNetV2. Errors: `InceptionFeatures`; ValueError for others.
    """
    if name not in ("auto", "inception", "mobilenetv2"):
        raise ValueError(f"FID features are 'auto', 'inception' or 'mobilenetv2', not {name!r}")
    is_installed = importlib.util.find_spec("torch_fidelity") is not None
    if name == "inception" or (name == "auto" and is_installed and inception_path().is_file()):
        return InceptionFeatures()
    return MobileNetV2Features()
