"""Metrics of reconstruction and generation, reduced over ranks. B images of side S.

The protocol is docs/method.md section 13: every picture is rounded to uint8 before any metric.
"""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure

from dcar.data.transforms import to_unit_range
from dcar.evaluation.fid import FrechetDistances
from dcar.evaluation.pictures import to_uint8
from dcar.models.features import fid_features
from dcar.models.perceptual import LPIPS
from dcar.models.precision import without_autocast
from dcar.models.weights_io import as_constants

ALEXNET_FILE = "alexnet-owt-7be5be79.pth"  # torchvision's name; torchmetrics' LPIPS reads it


class LPIPSMetric(Metric):
    """Mean LPIPS over the image pairs, (B, 3, S, S) in [-1, 1], that `update` was given."""

    is_differentiable = True
    higher_is_better = False
    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, network: nn.Module | None = None):
        super().__init__()
        self.network = network or LPIPS()
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, image: Tensor, reconstruction: Tensor) -> None:
        self.total += self.network(image, reconstruction).double().sum()
        self.count += len(image)

    def compute(self) -> Tensor:
        return (self.total / self.count).float()


def lpips_metric() -> Metric:
    """LPIPS with AlexNet: torchmetrics' where it can run without a download, else `LPIPSMetric`.

    It can where torchvision is installed and its ALEXNET_FILE lies in torch's hub folder. The two
    agree to 1e-5 with the same weights, to 1e-4 with the shipped ones (partly half precision).
    """
    file = Path(torch.hub.get_dir()) / "checkpoints" / ALEXNET_FILE
    if importlib.util.find_spec("torchvision") is None or not file.is_file():
        return LPIPSMetric()
    from torchmetrics.image import LearnedPerceptualImagePatchSimilarity

    metric = LearnedPerceptualImagePatchSimilarity(net_type="alex")
    as_constants(metric.net)
    return metric


def pairwise_metrics() -> nn.ModuleDict:
    """Of pictures with values in 0..255. PSNR is per image, then the mean, as in docs/method.md."""
    psnr = PeakSignalNoiseRatio(data_range=255.0, dim=(1, 2, 3))
    ssim = StructuralSimilarityIndexMeasure(data_range=(0.0, 255.0))
    return nn.ModuleDict({"psnr": psnr, "ssim": ssim, "lpips": lpips_metric()})


def distances(features: str | nn.Module, names: Sequence[str]) -> FrechetDistances:
    extractor = fid_features(features) if isinstance(features, str) else features
    return FrechetDistances(extractor, names)


class ReconstructionMetrics(nn.Module):
    """PSNR, SSIM, LPIPS and FID of decoded pictures against the images, for each decoding path.

    `update(image, *reconstructions)`: (B, 3, S, S) in [-1, 1], one reconstruction per path in the
    order of `paths`. `compute()`, over all ranks: {"psnr_PATH" (dB), "ssim_PATH", "lpips_PATH",
    "rfid_FEATURES_PATH"}; PSNR is infinite where one reconstruction is perfect. `reset()` forgets
    all but the features of the real pictures.

    features: a name that `fid_features` knows, an extractor with `name` and `num_features`, or None
    for no FID. No tensor in here is ever part of a state_dict. Raises ValueError for a wrong number
    of reconstructions, RuntimeError in `compute` for fewer than two images, and what `fid_features`
    raises.
    """

    def __init__(
        self,
        *,
        paths: Sequence[str] = ("discrete", "hybrid"),
        features: str | nn.Module | None = "auto",
    ):
        super().__init__()
        self.paths = tuple(paths)
        self.pairwise: Any = nn.ModuleDict({path: pairwise_metrics() for path in self.paths})
        self.distances = None if features is None else distances(features, self.paths)

    @torch.no_grad()
    def update(self, image: Tensor, *reconstructions: Tensor) -> None:
        if len(reconstructions) != len(self.paths):
            raise ValueError(f"{len(reconstructions)} reconstructions for the paths {self.paths}")
        real = to_uint8(image)
        with without_autocast(real):  # SSIM's sums of squares leave the range of fp16
            if self.distances is not None:
                self.distances.update_real(real)
            for path, reconstruction in zip(self.paths, reconstructions, strict=True):
                self._update_path(path, real, to_uint8(reconstruction))

    def _update_path(self, path: str, real: Tensor, decoded: Tensor) -> None:
        for name, metric in self.pairwise[path].items():
            ours = to_unit_range if name == "lpips" else Tensor.float
            metric.update(ours(decoded), ours(real))
        if self.distances is not None:
            self.distances.update_fake(path, decoded)

    def compute(self) -> dict[str, Tensor]:
        terms = {
            f"{name}_{path}": metric.compute()
            for path, metrics in self.pairwise.items()
            for name, metric in metrics.items()
        }
        if self.distances is None:
            return terms
        key = f"rfid_{self.distances.features.name}"
        return terms | {f"{key}_{path}": value for path, value in self.distances.compute().items()}

    def reset(self) -> None:
        for module in self.modules():
            if isinstance(module, Metric):
                module.reset()


class GenerationMetrics(nn.Module):
    """FID of generated pictures: `update_real(image)`, `update_fake(image)`, in [-1, 1].

    `compute()` over all ranks: {"gfid_FEATURES"}. `features` and errors: `ReconstructionMetrics`.
    """

    def __init__(self, *, features: str | nn.Module = "auto"):
        super().__init__()
        self.distances = distances(features, ["generated"])

    @torch.no_grad()
    def update_real(self, image: Tensor) -> None:
        self.distances.update_real(to_uint8(image))

    @torch.no_grad()
    def update_fake(self, image: Tensor) -> None:
        self.distances.update_fake("generated", to_uint8(image))

    def compute(self) -> dict[str, Tensor]:
        value = self.distances.compute()["generated"]
        return {f"gfid_{self.distances.features.name}": value}

    def reset(self) -> None:
        self.distances.reset()
