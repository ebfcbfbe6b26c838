"""PatchGAN discriminator (arXiv 1611.07004). B batch, S image side."""

from torch import Tensor, nn

GROUPS = 32  # channels of a GroupNorm are split into this many groups
MAX_FACTOR = 8  # widest layer, in multiples of the first


def make_norm(norm: str, channels: int) -> nn.Module:
    return nn.BatchNorm2d(channels) if norm == "batch" else nn.GroupNorm(GROUPS, channels)


class PatchDiscriminator(nn.Module):
    """Images (B, 3, S, S) in [-1, 1] to one logit per overlapping patch, (B, 1, S', S').

    S' is about S / 2 ** layers. Three layers see patches of 70 pixels. `norm` is "batch", as in the
    paper and in most tokenizers, or "group", which is the same alone as in a batch and on any
    number of ranks: better for small batches. Raises ValueError for settings that cannot be built.
    """

    def __init__(
        self, *, in_channels: int = 3, width: int = 64, layers: int = 3, norm: str = "batch"
    ):
        super().__init__()
        if norm not in ("batch", "group"):
            raise ValueError(f"norm {norm!r} is neither 'batch' nor 'group'")
        if norm == "group" and 2 * width % GROUPS:
            raise ValueError(f"twice the width {width} must be a multiple of the {GROUPS} groups")
        widths = [width * min(2**layer, MAX_FACTOR) for layer in range(layers + 1)]
        body: list[nn.Module] = [nn.Conv2d(in_channels, width, 4, stride=2, padding=1)]
        for layer in range(layers):
            # The last layer keeps the size: it only widens the view.
            stride = 2 if layer < layers - 1 else 1
            body += [
                nn.LeakyReLU(0.2),
                nn.Conv2d(widths[layer], widths[layer + 1], 4, stride, padding=1, bias=False),
                make_norm(norm, widths[layer + 1]),
            ]
        body += [nn.LeakyReLU(0.2), nn.Conv2d(widths[-1], 1, 4, padding=1)]
        self.body = nn.Sequential(*body)
        self.body.apply(initialize)

    def forward(self, image: Tensor) -> Tensor:
        return self.body(image)  # (B, 1, S', S')


def initialize(module: nn.Module) -> None:
    """N(0, 0.02) for convolutions and N(1, 0.02) for norm scales, as in the paper."""
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d | nn.GroupNorm):
        nn.init.normal_(module.weight, 1.0, 0.02)
