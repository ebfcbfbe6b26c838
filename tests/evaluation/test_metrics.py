"""Metrics of pictures: known values, and the same numbers on one rank and on two."""

import math
import socket
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, multiprocessing, nn

from dcar.data.transforms import to_unit_range
from dcar.evaluation.metrics import (
    GenerationMetrics,
    LPIPSMetric,
    ReconstructionMetrics,
    lpips_metric,
)
from dcar.models.perceptual import LPIPS
from tests.toys import START


class ChannelMeans(nn.Module):
    """Three features, so that the Frechet distance costs nothing here."""

    name, num_features = "means", 3

    def forward(self, picture: Tensor) -> Tensor:
        assert picture.dtype == torch.uint8
        return picture.double().mean((2, 3))


def images(batch: int, side: int = 32) -> Tensor:
    """Smooth pictures whose values are levels of uint8."""
    generator = torch.Generator().manual_seed(batch)
    coarse = torch.rand(batch, 3, 6, 6, generator=generator)
    return to_unit_range((nn.functional.interpolate(coarse, side, mode="bilinear") * 200).byte())


def reconstruction(**settings: Any) -> ReconstructionMetrics:
    return ReconstructionMetrics(features=ChannelMeans(), **settings)


def test_psnr_is_of_each_image_then_the_mean() -> None:
    metrics, image = reconstruction(paths=["hybrid"]), images(2)
    levels = torch.tensor([2.0, 20.0]).view(2, 1, 1, 1)
    metrics.update(image, image + levels / 127.5)
    expected = sum(20 * math.log10(255 / level) for level in (2, 20)) / 2
    assert metrics.compute()["psnr_hybrid"].item() == pytest.approx(expected, rel=1e-5)


def test_reconstructions_are_rounded_before_every_metric() -> None:
    metrics, image = reconstruction(paths=["hybrid"]), images(4)
    metrics.update(image, image + 0.003)  # under half a level
    found = metrics.compute()
    assert found["psnr_hybrid"] == torch.inf
    assert found["ssim_hybrid"].item() == pytest.approx(1, abs=1e-6)
    assert found["lpips_hybrid"] == 0
    assert found["rfid_means_hybrid"].item() == pytest.approx(0, abs=1e-6)


def test_each_path_has_its_own_numbers_in_the_order_of_the_arguments() -> None:
    metrics, image = reconstruction(), images(4)
    metrics.update(image, (image + 0.3).clamp(-1, 1), image + 0.02)
    found = metrics.compute()
    names = ("psnr", "ssim", "lpips", "rfid_means")
    assert sorted(found) == sorted(f"{n}_{path}" for n in names for path in ("discrete", "hybrid"))
    assert found["psnr_discrete"] < found["psnr_hybrid"]
    assert found["ssim_discrete"] < found["ssim_hybrid"]
    assert found["lpips_discrete"] > found["lpips_hybrid"]
    assert found["rfid_means_discrete"] > found["rfid_means_hybrid"]


def test_without_features_there_is_no_fid() -> None:
    metrics, image = ReconstructionMetrics(paths=["hybrid"], features=None), images(1)
    metrics.update(image, image)
    assert sorted(metrics.compute()) == ["lpips_hybrid", "psnr_hybrid", "ssim_hybrid"]


def test_a_wrong_number_of_reconstructions_is_refused() -> None:
    with pytest.raises(ValueError, match="1 reconstructions for the paths"):
        reconstruction().update(images(2), images(2))


def test_lpips_is_the_mean_over_pairs_not_over_batches() -> None:
    metric, a = LPIPSMetric(), images(4)
    b = (a + torch.linspace(0, 1, 4).view(4, 1, 1, 1)).clamp(-1, 1)
    for part in (slice(0, 1), slice(1, 4)):
        metric.update(a[part], b[part])
    assert metric.compute().item() == pytest.approx(LPIPS()(a, b).mean().item(), rel=1e-5)


def test_without_torchvision_s_alexnet_lpips_is_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    assert isinstance(lpips_metric(), LPIPSMetric)


def test_a_reset_starts_anew() -> None:
    metrics, image = reconstruction(paths=["hybrid"]), images(3)
    found = []
    for first in (0.4, None):
        if first is not None:
            metrics.update(image, image * first)
            metrics.reset()
        metrics.update(image, image * 0.9)
        found.append(metrics.compute())
        metrics.reset()
    assert found[0] == found[1]


def test_generation_compares_generated_with_real_pictures() -> None:
    metrics, image = GenerationMetrics(features=ChannelMeans()), images(8)
    found = []
    for fake in (image.flip(0), image * 0.5):
        metrics.update_real(image)
        metrics.update_fake(fake)
        found.append(metrics.compute()["gfid_means"].item())
        metrics.reset()
    assert found[0] == pytest.approx(0, abs=1e-6)
    assert found[1] > 1


def test_their_networks_are_in_no_checkpoint_and_no_optimizer() -> None:
    owner = nn.ModuleList([ReconstructionMetrics(), GenerationMetrics()])
    assert owner.state_dict() == {}
    assert list(owner.parameters()) == []
    owner.load_state_dict({})


def decoded(image: Tensor) -> tuple[Tensor, Tensor]:
    return image * 0.8, image * 0.95


def on_one_of_two_ranks(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
    address, limit = f"tcp://127.0.0.1:{port}", timedelta(seconds=60)
    distributed.init_process_group(
        "gloo", init_method=address, rank=rank, world_size=2, timeout=limit
    )
    try:
        metrics, mine = reconstruction(), images(10)[[slice(0, 3), slice(3, 10)][rank]]
        for part in mine.split(2):
            metrics.update(part, *decoded(part))
        torch.save(metrics.compute(), Path(folder) / f"{rank}.pt")
    finally:
        distributed.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_find_what_one_finds(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    metrics, image = reconstruction(), images(10)
    metrics.update(image, *decoded(image))
    alone = metrics.compute()
    process = multiprocessing.get_context(START).Process
    other = process(target=on_one_of_two_ranks, args=(1, port, str(tmp_path)))
    other.start()
    on_one_of_two_ranks(0, port, str(tmp_path))
    other.join()
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for name, value in alone.items():
            assert found[name].item() == pytest.approx(value.item(), rel=1e-4), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_metrics_are_the_same_inside_autocast(dtype: torch.dtype) -> None:
    """Of whose half precisions SSIM's sums of squares leave the range, or the digits."""
    image = images(2)
    noisy = (
        image + 0.1 * torch.randn(image.shape, generator=torch.Generator().manual_seed(0))
    ).clamp(-1, 1)
    alone, inside = reconstruction(paths=["hybrid"]), reconstruction(paths=["hybrid"])
    alone.update(image, noisy)
    with torch.autocast("cpu", dtype):
        inside.update(image, noisy)
    for name, value in alone.compute().items():
        assert inside.compute()[name] == value, name
