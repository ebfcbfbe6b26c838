"""LPIPS: a distance, the published one, differentiable, and part of no checkpoint."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torchmetrics
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import conv2d, max_pool2d, relu
from torchmetrics.functional.image.lpips import ScalingLayer, _normalize_tensor

from dcar.models.perceptual import BACKBONES, LPIPS, vgg_stages
from dcar.models.weights_io import SHIPPED


@pytest.fixture(scope="module")
def lpips() -> LPIPS:
    return LPIPS()


def smooth(batch: int, side: int = 64) -> Tensor:
    """Pictures with large shapes in [-1, 1]."""
    coarse = torch.rand(batch, 3, 5, 5) * 2 - 1
    return nn.functional.interpolate(coarse, (side, side), mode="bilinear")


def published_heads() -> list[Tensor]:
    """The linear heads that torchmetrics carries, as the LPIPS repository published them."""
    folder = Path(torchmetrics.__file__).parent / "functional" / "image" / "lpips_models"
    state = torch.load(folder / "alex.pth", map_location="cpu", weights_only=True)
    return [tensor.flatten() for tensor in state.values()]


def test_the_heads_are_the_published_ones(lpips: LPIPS) -> None:
    for ours, published in zip(lpips.heads, published_heads(), strict=True):
        assert torch.equal(ours, published)


def test_the_distance_is_that_of_torchmetrics_parts_on_alexnet(lpips: LPIPS) -> None:
    """AlexNet as torchvision defines it, written out; scaling and unit length by torchmetrics."""
    weights = {k: v.float() for k, v in load_file(SHIPPED / "lpips_alex.safetensors").items()}
    layers = [(0, 0, 4, 2), (1, 1, 1, 2), (2, 1, 1, 1), (3, 0, 1, 1), (4, 0, 1, 1)]

    def taps(image: Tensor) -> list[Tensor]:
        hidden, found = ScalingLayer()(image), []
        for stage, layer, stride, padding in layers:
            name = f"stages.{stage}.{layer}"
            if stage in (1, 2):
                hidden = max_pool2d(hidden, 3, 2)
            conv = conv2d(
                hidden, weights[f"{name}.weight"], weights[f"{name}.bias"], stride, padding
            )
            hidden = relu(conv)
            found.append(_normalize_tensor(hidden))
        return found

    a, b = smooth(3), smooth(3)
    expected = torch.zeros(3)
    for head, one, other in zip(published_heads(), taps(a), taps(b), strict=True):
        expected += (head.view(-1, 1, 1) * (one - other) ** 2).sum(1).mean((1, 2))
    assert torch.allclose(lpips(a, b), expected, atol=1e-6)
    assert expected.min() > 0.1


def test_the_distance_on_vgg_is_that_of_its_published_layers(tmp_path: Path) -> None:
    """VGG16 written out, with random weights: thirteen convolutions, read before each pooling."""
    widths, depths = (64, 128, 256, 512, 512), (2, 2, 3, 3, 3)
    state, channels = {}, 3
    for stage, (width, depth) in enumerate(zip(widths, depths, strict=True)):
        state[f"heads.{stage}"] = torch.rand(width)
        for layer in range(depth):
            name = f"stages.{stage}.{2 * layer + (stage > 0)}"
            state[f"{name}.weight"] = torch.randn(width, channels, 3, 3) / (3 * channels**0.5)
            state[f"{name}.bias"] = torch.randn(width) / 10
            channels = width
    save_file(state, tmp_path / "vgg.safetensors")

    def taps(image: Tensor) -> list[Tensor]:
        hidden, found = ScalingLayer()(image), []
        for stage, depth in enumerate(depths):
            hidden = max_pool2d(hidden, 2, 2) if stage else hidden
            for layer in range(depth):
                name = f"stages.{stage}.{2 * layer + (stage > 0)}"
                hidden = relu(conv2d(hidden, state[f"{name}.weight"], state[f"{name}.bias"], 1, 1))
            found.append(_normalize_tensor(hidden))
        return found

    a, b = smooth(2, 32), smooth(2, 32)
    expected = torch.zeros(2)
    for stage, (one, other) in enumerate(zip(taps(a), taps(b), strict=True)):
        head = state[f"heads.{stage}"].view(-1, 1, 1)
        expected += (head * (one - other) ** 2).sum(1).mean((1, 2))
    assert torch.allclose(LPIPS("vgg", tmp_path / "vgg.safetensors")(a, b), expected, rtol=1e-4)
    assert expected.min() > 0.1


@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_it_equals_torchmetrics_with_the_same_weights(net: str, tmp_path: Path) -> None:
    pytest.importorskip("torchvision", reason="torchvision (the eval extra) is not installed")
    from torchmetrics.functional.image.lpips import _LPIPS

    theirs: Any = _LPIPS(net=net, pnet_rand=True, pretrained=True).eval()  # type: ignore[arg-type]
    convs = [part for part in theirs.net.modules() if isinstance(part, nn.Conv2d)]
    heads = {f"heads.{i}": lin.model[-1].weight.flatten() for i, lin in enumerate(theirs.lins)}
    names = [
        f"stages.{stage}.{layer}"
        for stage, layers in enumerate(BACKBONES[net][0]())
        for layer, part in enumerate(layers)
        if isinstance(part, nn.Conv2d)
    ]
    pairs = list(zip(names, convs, strict=True))
    weights = {f"{name}.weight": conv.weight for name, conv in pairs}
    biases = {f"{name}.bias": conv.bias for name, conv in pairs}
    path = tmp_path / "same.safetensors"
    save_file({k: v.detach().clone() for k, v in (heads | weights | biases).items()}, path)
    a, b = smooth(3), smooth(3)
    assert torch.allclose(LPIPS(net, path)(a, b), theirs(a, b).flatten(), atol=1e-5)


def test_an_image_is_at_distance_zero_from_itself(lpips: LPIPS) -> None:
    image = smooth(2)
    assert lpips(image, image).tolist() == [0.0, 0.0]


def test_the_distance_is_symmetric_and_of_each_pair_alone(lpips: LPIPS) -> None:
    a, b = smooth(3), smooth(3)
    together = lpips(a, b)
    assert together.shape == (3,)
    assert torch.allclose(together, lpips(b, a))
    assert torch.allclose(together[1:2], lpips(a[1:2], b[1:2]), atol=1e-6)


def test_more_noise_is_farther_away(lpips: LPIPS) -> None:
    image = smooth(1).expand(5, -1, -1, -1)
    levels = torch.tensor([0.02, 0.05, 0.1, 0.2, 0.4]).view(5, 1, 1, 1)
    distances = lpips(image, (image + levels * torch.randn(1, 3, 64, 64)).clamp(-1, 1))
    assert (distances.diff() > 0).all()


def test_as_a_loss_it_moves_the_reconstruction_to_the_target(lpips: LPIPS) -> None:
    target, recon = smooth(1), smooth(1).requires_grad_()
    first = lpips(recon, target).sum()
    (gradient,) = torch.autograd.grad(first, recon)
    with torch.no_grad():
        step = recon - 0.05 * gradient / gradient.abs().max()
    assert lpips(step, target).sum() < first.detach()
    assert target.grad is None


def test_the_gradient_is_finite_where_the_images_are_flat_and_equal(lpips: LPIPS) -> None:
    recon = torch.zeros(1, 3, 64, 64, requires_grad=True)
    (gradient,) = torch.autograd.grad(lpips(recon, torch.zeros(1, 3, 64, 64)).sum(), recon)
    assert gradient.isfinite().all()


def test_features_that_are_all_zero_count_as_equal(tmp_path: Path) -> None:
    path = tmp_path / "dead.safetensors"
    dead = {k: -v.abs() for k, v in load_file(SHIPPED / "lpips_alex.safetensors").items()}
    save_file(dead, path)
    recon = torch.ones(1, 3, 64, 64, requires_grad=True)
    distance = LPIPS(weights=path)(recon, recon.detach())
    (gradient,) = torch.autograd.grad(distance.sum(), recon)
    assert distance.item() == 0
    assert gradient.isfinite().all()


def test_autocast_does_not_change_the_metric(lpips: LPIPS) -> None:
    a, b = smooth(2), smooth(2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = lpips(a, b)
    assert torch.equal(inside, lpips(a, b))


def test_bfloat16_convolutions_are_near(lpips: LPIPS) -> None:
    a, b = smooth(8), smooth(8)
    near = LPIPS(dtype=torch.bfloat16)(a, b)
    assert near.dtype == torch.float32
    assert not torch.equal(near, lpips(a, b))
    assert torch.allclose(near, lpips(a, b), rtol=0.03)


def test_it_stays_in_eval_and_out_of_checkpoints(lpips: LPIPS) -> None:
    owner = nn.ModuleList([lpips]).train()
    assert not lpips.training
    assert owner.state_dict() == {}
    assert list(owner.parameters()) == []


def test_the_smallest_image_leaves_the_deepest_features_one_position(lpips: LPIPS) -> None:
    *_, deepest = lpips.taps(torch.zeros(1, 3, 31, 31))
    assert deepest.shape == (1, 256, 1, 1)
    with pytest.raises(ValueError, match="31 pixels or more, not \\(30, 64\\)"):
        lpips(torch.zeros(1, 3, 30, 64), torch.zeros(1, 3, 30, 64))


def test_at_64_pixels_the_deepest_features_still_have_extent(lpips: LPIPS) -> None:
    sides = [tap.shape[-1] for tap in lpips.taps(torch.zeros(1, 3, 64, 64))]
    assert sides == [15, 7, 3, 3, 3]


def test_vgg_has_the_convolutions_of_vgg16(tmp_path: Path) -> None:
    stages = nn.ModuleList(vgg_stages())
    assert sum(tensor.numel() for tensor in stages.parameters()) == 14_714_688  # VGG16's features
    heads = {f"heads.{i}": torch.ones(width) for i, width in enumerate(BACKBONES["vgg"][1])}
    weights = {f"stages.{name}": tensor for name, tensor in stages.state_dict().items()}
    save_file(heads | weights, tmp_path / "vgg.safetensors")
    network = LPIPS("vgg", tmp_path / "vgg.safetensors")
    shapes = [tuple(tap.shape[1:]) for tap in network.taps(torch.zeros(1, 3, 32, 32))]
    assert shapes == [(64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4), (512, 2, 2)]


def test_another_network_is_refused() -> None:
    with pytest.raises(ValueError, match="'squeeze'"):
        LPIPS("squeeze")
