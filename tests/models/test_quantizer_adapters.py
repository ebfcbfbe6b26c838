"""SimVQ and FSQ behave as quantisers of ours."""

import sys
from collections.abc import Callable

import pytest
import torch

from dcar.models.quantizer_adapters import AdaptedQuantizer, fsq, simvq, unrounded_fsq

REASON = "needs the vector-quantize-pytorch package: pip install 'dcar-lightning[vq]'"
FACTORIES = [
    lambda: simvq(num_codes=32, dim=8),
    lambda: fsq(levels=[5, 4, 3], dim=8),
    lambda: fsq(levels=[5, 4, 3], dim=3),
]
each_quantizer = pytest.mark.parametrize("make", FACTORIES, ids=["simvq", "fsq", "fsq-bare"])


@pytest.fixture
def needs_package() -> None:
    pytest.importorskip("vector_quantize_pytorch", reason=REASON)


@each_quantizer
@pytest.mark.usefixtures("needs_package")
def test_discrete_is_exactly_the_lookup_of_ids(make: Callable[[], AdaptedQuantizer]) -> None:
    quantizer = make()
    quantized = quantizer(torch.randn(2, quantizer.dim, 4, 3))
    assert quantized.ids.shape == (2, 4, 3) and quantized.ids.dtype == torch.int64
    assert 0 <= quantized.ids.min() and quantized.ids.max() < quantizer.num_codes
    assert quantized.continuous.shape == quantized.discrete.shape == (2, quantizer.dim, 4, 3)
    assert torch.equal(quantized.discrete, quantizer.lookup(quantized.ids))


@each_quantizer
@pytest.mark.usefixtures("needs_package")
def test_autocast_changes_nothing(make: Callable[[], AdaptedQuantizer]) -> None:
    quantizer = make()
    latent = torch.randn(2, quantizer.dim, 4, 3)
    exact = quantizer(latent)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = quantizer(latent)
        assert torch.equal(quantizer.lookup(exact.ids), exact.discrete)
    assert torch.equal(rounded.ids, exact.ids)
    assert torch.equal(rounded.continuous, exact.continuous)


@each_quantizer
@pytest.mark.usefixtures("needs_package")
def test_discrete_and_loss_train_everything(make: Callable[[], AdaptedQuantizer]) -> None:
    quantizer = make()
    latent = torch.randn(2, quantizer.dim, 4, 3, requires_grad=True)
    quantized = quantizer(latent)
    (quantized.discrete.square().sum() + quantized.loss).backward()
    assert latent.grad is not None and latent.grad.abs().sum() > 0
    for name, parameter in quantizer.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@pytest.mark.usefixtures("needs_package")
def test_simvq_picks_the_nearest_code() -> None:
    quantizer = simvq(num_codes=32, dim=8)
    codes = quantizer.lookup(torch.arange(32).view(1, 1, 32))[0, :, 0].T
    latent = torch.randn(2, 8, 4, 3)
    distance = torch.cdist(latent.permute(0, 2, 3, 1).reshape(-1, 8), codes)
    assert torch.equal(quantizer(latent).ids.flatten(), distance.argmin(1))


@pytest.mark.usefixtures("needs_package")
def test_fsq_continuous_differs_from_discrete_by_rounding_alone() -> None:
    levels = torch.tensor([8, 5, 4])
    quantizer = fsq(levels=levels.tolist(), dim=3)
    latent = torch.randn(2, 3, 16, 16) * 2
    quantized = quantizer(latent)
    steps = (quantized.continuous - quantized.discrete) * (levels // 2).view(3, 1, 1)
    assert steps.abs().max() <= 0.5 + 1e-5
    assert steps.abs().max() > 0.4
    assert torch.equal(quantized.continuous, unrounded_fsq(quantizer.module, latent))


@pytest.mark.usefixtures("needs_package")
def test_too_few_levels_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 3 levels per dimension, got 2"):
        fsq(levels=[5, 2], dim=8)


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vector_quantize_pytorch", None)
    with pytest.raises(ImportError, match=r"dcar-lightning\[vq\]"):
        simvq(num_codes=8, dim=4)
