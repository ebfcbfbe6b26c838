"""DC-HT, the hybrid tokenizer: image <-> continuous and discrete latents (DC-AR section 3.1).

B batch, S image side, f downsample, C latent channels, H W = S/f latent grid, K codebook size.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from dcar.models.autoencoder import Decoder, Encoder
from dcar.models.quantizer import Quantizer


@dataclass(frozen=True)
class Latents:
    """Both paths of one batch of images."""

    continuous: Tensor  # (B, C, H, W) fp32
    discrete: Tensor  # (B, C, H, W) fp32, equals lookup(ids)
    ids: Tensor  # (B, H, W) int64 in [0, K)
    codebook_loss: Tensor  # scalar

    @property
    def residual(self) -> Tensor:
        """What the codes leave out, (B, C, H, W): continuous = discrete + residual."""
        return self.continuous - self.discrete


class HybridTokenizer(nn.Module):
    """Encoder, quantiser and one decoder for both paths (DC-AR section 3.1, arXiv 2507.04947).

    `encode` takes images (B, 3, H*f, W*f) in [-1, 1], square or not; `decode` takes either of
    `latents.continuous` and `latents.discrete`, or `discrete + residual` when generating.
    Raises ValueError if the parts disagree on channels or downsampling.
    """

    def __init__(self, *, encoder: Encoder, quantizer: Quantizer, decoder: Decoder):
        super().__init__()
        channels = {"quantizer": quantizer.dim, "decoder": decoder.latent_channels}
        for name, found in channels.items():
            if found != encoder.latent_channels:
                raise ValueError(
                    f"the encoder makes {encoder.latent_channels} latent channels "
                    f"but the {name} expects {found}"
                )
        if encoder.downsample != decoder.downsample:
            raise ValueError(
                f"the encoder downsamples by {encoder.downsample} "
                f"but the decoder upsamples by {decoder.downsample}"
            )
        self.encoder, self.quantizer, self.decoder = encoder, quantizer, decoder

    @property
    def downsample(self) -> int:
        return self.encoder.downsample

    @property
    def latent_channels(self) -> int:
        return self.encoder.latent_channels

    @property
    def num_codes(self) -> int:
        return self.quantizer.num_codes

    def encode(self, image: Tensor) -> Latents:
        """Both latents of images (B, 3, S, S) in [-1, 1]; ValueError where f does not divide S."""
        for side in image.shape[-2:]:
            if side % self.downsample:
                raise ValueError(
                    f"image side {side} is not a multiple of the downsampling {self.downsample}"
                )
        quantized = self.quantizer(self.encoder(image))
        return Latents(
            continuous=quantized.continuous,
            discrete=quantized.discrete,
            ids=quantized.ids,
            codebook_loss=quantized.loss,
        )

    def decode(self, latent: Tensor) -> Tensor:
        """Latents (B, C, H, W) to images (B, 3, H*f, W*f) in about [-1, 1], not clamped."""
        return self.decoder(latent)

    def lookup(self, ids: Tensor) -> Tensor:
        """Codes (B, C, H, W) of ids (B, H, W)."""
        return self.quantizer.lookup(ids)

    def decode_tokens(self, ids: Tensor, residual: Tensor | None = None) -> Tensor:
        """Images of ids (B, H, W), refined by residual (B, C, H, W); the sum is not normalised."""
        latent = self.lookup(ids)
        return self.decode(latent if residual is None else latent + residual)
