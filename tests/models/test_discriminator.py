"""The patch discriminator: shapes, size, locality, norms."""

import pytest
import torch
from torch import nn

from dcar.models.discriminator import PatchDiscriminator


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("size", [(64, 64), (32, 48)])
def test_one_logit_per_patch(norm: str, size: tuple[int, int]) -> None:
    logits = PatchDiscriminator(width=16, norm=norm)(torch.randn(2, 3, *size))
    assert logits.shape == (2, 1, size[0] // 8 - 2, size[1] // 8 - 2)


def test_the_default_is_the_published_70_pixel_network() -> None:
    discriminator = PatchDiscriminator()
    assert sum(parameter.numel() for parameter in discriminator.parameters()) == 2_765_633
    convolutions = [m for m in discriminator.modules() if isinstance(m, nn.Conv2d)]
    view = 1
    for convolution in reversed(convolutions):
        view = (view - 1) * convolution.stride[0] + convolution.kernel_size[0]
    assert view == 70


def test_a_logit_sees_its_patch_only() -> None:
    discriminator = PatchDiscriminator(width=16).eval()
    image = torch.randn(1, 3, 128, 128, requires_grad=True)
    discriminator(image)[0, 0, 0, 0].backward()
    assert image.grad is not None
    assert image.grad[..., :30, :30].abs().sum() > 0
    assert image.grad[..., 70:, :].abs().sum() == image.grad[..., 70:].abs().sum() == 0


def test_group_norm_does_not_mix_images() -> None:
    image = torch.randn(3, 3, 32, 32)
    for norm, alone_is_same in [("group", True), ("batch", False)]:
        discriminator = PatchDiscriminator(width=16, norm=norm)
        together, alone = discriminator(image)[:1], discriminator(image[:1])
        assert torch.allclose(together, alone, atol=1e-5) == alone_is_same


def test_deeper_networks_stop_widening_at_eight_times() -> None:
    discriminator = PatchDiscriminator(width=4, layers=5)
    assert max(m.out_channels for m in discriminator.modules() if isinstance(m, nn.Conv2d)) == 32


def test_impossible_norms_are_refused() -> None:
    with pytest.raises(ValueError, match="'layer'"):
        PatchDiscriminator(norm="layer")
    with pytest.raises(ValueError, match="width 24 .* 32 groups"):
        PatchDiscriminator(width=24, norm="group")
