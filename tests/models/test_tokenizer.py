"""The hybrid tokenizer: both paths, their identities, and parts that do not fit."""

from typing import Any

import pytest
import torch

from dcar.models.autoencoder import Decoder, Encoder
from dcar.models.quantizer import VectorQuantizer
from dcar.models.quantizer_adapters import fsq
from dcar.models.tokenizer import HybridTokenizer

WIDTHS = [16, 32, 64]


def make_encoder(**changes: Any) -> Encoder:
    settings: dict[str, Any] = {"latent_channels": 8, "widths": WIDTHS, "depths": [0, 1, 1]}
    settings |= {"blocks": ["res", "res", "evit"]} | changes
    return Encoder(**settings)


def make_decoder(**changes: Any) -> Decoder:
    settings: dict[str, Any] = {"latent_channels": 8, "widths": WIDTHS, "depths": [0, 1, 1]}
    settings |= {"blocks": ["res", "res", "evit"], "norms": ["bn2d", "bn2d", "ln2d"]}
    settings |= {"activations": ["relu", "relu", "silu"], "out_norm": "ln2d"} | changes
    return Decoder(**settings)


def make_tokenizer() -> HybridTokenizer:
    return HybridTokenizer(
        encoder=make_encoder(),
        quantizer=VectorQuantizer(num_codes=32, dim=8),
        decoder=make_decoder(),
    )


def test_the_published_tokenizer_has_its_number_of_parameters() -> None:
    widths = [128, 256, 512, 512, 1024, 1024]
    blocks = ["res"] * 3 + ["evit"] * 3
    with torch.device("meta"):
        tokenizer = HybridTokenizer(
            encoder=Encoder(
                latent_channels=32, widths=widths, depths=[0, 4, 8, 2, 2, 2], blocks=blocks
            ),
            quantizer=VectorQuantizer(num_codes=16384, dim=32),
            decoder=Decoder(
                latent_channels=32,
                widths=widths,
                depths=[0, 5, 10, 2, 2, 2],
                blocks=blocks,
                norms=["bn2d"] * 3 + ["ln2d"] * 3,
                activations=["relu"] * 3 + ["silu"] * 3,
                out_norm="ln2d",
            ),
        )
    assert sum(parameter.numel() for parameter in tokenizer.parameters()) == 323_880_748
    assert (tokenizer.downsample, tokenizer.num_codes, tokenizer.latent_channels) == (32, 16384, 32)


@pytest.mark.parametrize("size", [(16, 16), (32, 32), (16, 24)])
def test_images_become_tokens_and_images_again(size: tuple[int, int]) -> None:
    tokenizer = make_tokenizer()
    latents = tokenizer.encode(torch.randn(2, 3, *size))
    grid = (size[0] // 4, size[1] // 4)
    assert latents.ids.shape == (2, *grid)
    for latent in (latents.continuous, latents.discrete, latents.residual):
        assert latent.shape == (2, 8, *grid)
        assert tokenizer.decode(latent).shape == (2, 3, *size)


def test_continuous_is_discrete_plus_residual() -> None:
    latents = make_tokenizer().encode(torch.randn(2, 3, 32, 32))
    assert latents.residual.abs().max() > 0.1
    total = latents.discrete + latents.residual
    torch.testing.assert_close(total, latents.continuous, atol=1e-6, rtol=0)


def test_tokens_decode_as_the_latents_they_came_from() -> None:
    tokenizer = make_tokenizer().eval()
    latents = tokenizer.encode(torch.randn(2, 3, 32, 32))
    discrete, hybrid = tokenizer.decode(latents.discrete), tokenizer.decode(latents.continuous)
    assert torch.equal(tokenizer.lookup(latents.ids), latents.discrete)
    torch.testing.assert_close(tokenizer.decode_tokens(latents.ids), discrete)
    refined = tokenizer.decode_tokens(latents.ids, latents.residual)
    torch.testing.assert_close(refined, hybrid, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(discrete, hybrid, atol=1e-2)


def test_both_paths_train_encoder_and_decoder_and_the_loss_trains_the_codebook() -> None:
    for path in ("continuous", "discrete"):
        tokenizer = make_tokenizer()
        latents = tokenizer.encode(torch.randn(2, 3, 32, 32))
        (tokenizer.decode(getattr(latents, path)).square().sum() + latents.codebook_loss).backward()
        for name, parameter in tokenizer.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, (path, name)


def test_latents_are_fp32_under_autocast() -> None:
    tokenizer = make_tokenizer()
    with torch.autocast("cpu", torch.bfloat16):
        latents = tokenizer.encode(torch.randn(2, 3, 32, 32))
        assert torch.equal(tokenizer.lookup(latents.ids), latents.discrete)
        assert tokenizer.decode(latents.discrete).isfinite().all()
    assert latents.continuous.dtype == latents.residual.dtype == torch.float32


def test_another_quantizer_is_one_argument() -> None:
    pytest.importorskip("vector_quantize_pytorch", reason="FSQ needs vector-quantize-pytorch")
    quantizer = fsq(levels=[5, 5, 4], dim=8)
    tokenizer = HybridTokenizer(encoder=make_encoder(), quantizer=quantizer, decoder=make_decoder())
    latents = tokenizer.encode(torch.randn(1, 3, 16, 16))
    assert tokenizer.num_codes == 100
    assert tokenizer.decode_tokens(latents.ids, latents.residual).shape == (1, 3, 16, 16)


@pytest.mark.parametrize("size", [(30, 32), (32, 30)])
def test_sides_that_are_no_multiple_are_refused(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="30 is not a multiple of the downsampling 4"):
        make_tokenizer().encode(torch.randn(1, 3, *size))


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"quantizer": VectorQuantizer(num_codes=4, dim=16)}, "makes 8 .* quantizer expects 16"),
        ({"decoder": make_decoder(latent_channels=16)}, "makes 8 .* decoder expects 16"),
        (
            {
                "decoder": make_decoder(
                    widths=[32, 64],
                    depths=[1, 1],
                    blocks=["res"] * 2,
                    norms=["ln2d"] * 2,
                    activations=["silu"] * 2,
                )
            },
            "downsamples by 4 but the decoder upsamples by 2",
        ),
    ],
)
def test_parts_that_do_not_fit_are_refused(parts: dict[str, Any], message: str) -> None:
    fitting = {
        "encoder": make_encoder(),
        "quantizer": VectorQuantizer(num_codes=4, dim=8),
        "decoder": make_decoder(),
    }
    with pytest.raises(ValueError, match=message):
        HybridTokenizer(**fitting | parts)
