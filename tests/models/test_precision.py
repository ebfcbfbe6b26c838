"""What stays fp32 under autocast: the parts whose numbers leave fp16's range or need its digits."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

from dcar.models.autoencoder import LiteMLA, RMSNorm2d
from dcar.models.draws import Draws
from dcar.models.losses import TokenizerCriterion, hinge_discriminator_loss, masked_token_loss
from dcar.models.perceptual import LPIPS
from dcar.models.precision import without_autocast, without_half
from dcar.models.quantizer import VectorQuantizer
from dcar.models.residual_head import FlowResidualHead, ResidualHead
from dcar.models.text_encoder import T5TextEncoder
from dcar.models.tokenizer import Latents
from tests.toys import toy_generator, toy_text_encoder, toy_tokenizer

HALVES = [torch.float16, torch.bfloat16]
BEYOND_HALF = 300.0  # its square is more than fp16 can hold


@contextmanager
def output_dtypes(root: nn.Module) -> Iterator[set[torch.dtype]]:
    """Of every floating-point tensor that a module below `root` gives."""
    seen: set[torch.dtype] = set()

    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.is_floating_point():
            seen.add(output.dtype)

    handles = [module.register_forward_hook(note) for module in root.modules()]
    yield seen
    for handle in handles:
        handle.remove()


def test_matrix_products_stay_fp32_inside() -> None:
    matrix = torch.randn(4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert (matrix @ matrix).dtype == torch.bfloat16
        with without_autocast(matrix):
            assert (matrix @ matrix).dtype == torch.float32
        assert (matrix @ matrix).dtype == torch.bfloat16


def test_fp16_alone_can_be_kept_out() -> None:
    matrix = torch.randn(4, 4)
    for dtype, inside in ((torch.float16, torch.float32), (torch.bfloat16, torch.bfloat16)):
        with torch.autocast("cpu", dtype):
            with without_half(matrix):
                assert (matrix @ matrix).dtype == inside
            assert (matrix @ matrix).dtype == dtype
    with without_half(matrix):
        assert (matrix @ matrix).dtype == torch.float32


def test_meta_tensors_need_no_autocast() -> None:
    for switch in (without_autocast, without_half):
        with switch(torch.empty(2, device="meta")) as context:
            assert context is None


@pytest.mark.parametrize("dtype", HALVES)
def test_the_quantizer_gives_the_ids_and_codes_of_fp32(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    quantizer = VectorQuantizer(num_codes=4096, dim=8)
    latent = torch.randn(2, 8, 16, 16)
    plain = quantizer(latent)
    with torch.autocast("cpu", dtype):
        mixed = quantizer(latent)
        assert quantizer.lookup(plain.ids).dtype == torch.float32
    assert torch.equal(plain.ids, mixed.ids)
    for name in ("continuous", "discrete", "loss"):
        ours, theirs = getattr(plain, name), getattr(mixed, name)
        assert theirs.dtype == torch.float32 and torch.equal(ours, theirs), name


@pytest.mark.parametrize("dtype", HALVES)
def test_the_codebook_learns_in_fp32_inside_a_tokenizer(dtype: torch.dtype) -> None:
    tokenizer = toy_tokenizer()
    with torch.autocast("cpu", dtype), output_dtypes(tokenizer.encoder) as seen:
        latents = tokenizer.encode(torch.rand(2, 3, 16, 16))
        decoded = tokenizer.decode(latents.discrete)
    assert dtype in seen and decoded.dtype == dtype
    for tensor in (latents.continuous, latents.discrete, latents.residual, latents.codebook_loss):
        assert tensor.dtype == torch.float32
    latents.codebook_loss.backward()
    assert tokenizer.quantizer.codebook.grad.dtype == torch.float32


@pytest.mark.parametrize("side", [4, 8])
def test_linear_attention_holds_sums_that_fp16_cannot(side: int) -> None:
    """side 4 takes the quadratic form, 8 the linear one."""
    attention = LiteMLA(32, norm="rms2d")
    qkv = torch.full((1, 96, side, side), BEYOND_HALF, dtype=torch.float16)
    with torch.autocast("cpu", torch.float16):
        attended = attention.attend(qkv, side)
    assert attended.dtype == torch.float16
    torch.testing.assert_close(attended.float(), torch.full_like(attended.float(), BEYOND_HALF))


def test_the_root_mean_square_norm_squares_in_fp32() -> None:
    features = torch.full((1, 8, 2, 2), BEYOND_HALF, dtype=torch.float16)
    with torch.autocast("cpu", torch.float16):
        normed = RMSNorm2d(8)(features)
    torch.testing.assert_close(normed.float(), torch.ones(1, 8, 2, 2))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("kind", [ResidualHead, FlowResidualHead])
def test_the_residual_head_and_its_loss_are_fp32(kind: Any, dtype: torch.dtype) -> None:
    head = kind(channels=4, dim=8, width=16, depth=1, scale=0.1)
    residual = torch.randn(2, 6, 4)
    hidden = torch.randn(2, 6, 8, requires_grad=True)
    plain = head.loss(residual, hidden, Draws(0))
    with torch.autocast("cpu", dtype), output_dtypes(head) as seen:
        mixed = head.loss(residual, hidden, Draws(0))
    assert seen == {torch.float32} and mixed.dtype == torch.float32
    assert torch.equal(plain, mixed)


@pytest.mark.parametrize("dtype", HALVES)
def test_the_generator_s_losses_are_fp32_around_a_half_transformer(dtype: torch.dtype) -> None:
    generator = toy_generator()
    ids, residual = torch.zeros(2, 4, 4, dtype=torch.int64), torch.randn(2, 4, 4, 4)
    text, text_mask = torch.randn(2, 16, 8), torch.ones(2, 16, dtype=torch.bool)
    with torch.autocast("cpu", dtype):
        with output_dtypes(generator.transformer) as transformer:
            terms = generator.losses(ids, residual, text, text_mask, Draws(0))
    assert dtype in transformer
    assert {term.dtype for term in terms.values()} == {torch.float32}


def test_a_sum_of_token_losses_may_be_larger_than_fp16_holds() -> None:
    logits = torch.zeros(1, 40_000, 16, dtype=torch.float16)
    ids, mask = torch.zeros(1, 40_000, dtype=torch.int64), torch.ones(1, 40_000, dtype=torch.bool)
    with torch.autocast("cpu", torch.float16):
        total = masked_token_loss(logits, ids, mask)
    assert total.dtype == torch.float32 and 110_000 < float(total) < 111_000


@pytest.mark.parametrize("dtype", HALVES)
def test_the_tokenizer_s_criterion_and_lpips_are_fp32(dtype: torch.dtype) -> None:
    criterion = TokenizerCriterion(
        pixel="l1",
        pixel_weight=1.0,
        perceptual=LPIPS(),
        perceptual_weight=1.0,
        codebook_weight=1.0,
        adversarial_weight=0.5,
    )
    image, latent = torch.rand(2, 3, 32, 32), torch.rand(2, 4, 4, 4)
    latents = Latents(latent, latent, torch.zeros(2, 4, 4, dtype=torch.int64), torch.tensor(1.0))
    recon, logits = torch.rand(2, 3, 32, 32).to(dtype), torch.rand(2, 1, 4, 4).to(dtype)
    with torch.autocast("cpu", dtype), output_dtypes(criterion) as seen:
        terms = criterion(recon, image, latents, logits)
        judged = hinge_discriminator_loss(logits, logits)
        perceptual = criterion.perceptual(recon, image)
    assert seen == {torch.float32} and judged.dtype == perceptual.dtype == torch.float32
    assert {term.dtype for term in terms.values()} == {torch.float32}


@pytest.mark.parametrize(
    ("dtype", "inside"), [(torch.float16, torch.float32), (torch.bfloat16, torch.bfloat16)]
)
def test_the_trained_text_encoder_stays_out_of_fp16(
    dtype: torch.dtype, inside: torch.dtype
) -> None:
    encoder = toy_text_encoder()
    plain, _ = encoder(["a red apple"])
    with torch.autocast("cpu", dtype), output_dtypes(encoder) as seen:
        mixed, _ = encoder(["a red apple"])
    assert (inside in seen) and (torch.float16 not in seen)
    assert torch.equal(plain, mixed) == (inside == torch.float32)


def test_a_pretrained_t5_stays_out_of_fp16(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = T5Config(vocab_size=384, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    T5EncoderModel(config).save_pretrained(tmp_path)
    ByT5Tokenizer().save_pretrained(tmp_path)
    encoder = T5TextEncoder(str(tmp_path), max_tokens=12, local_files_only=True)
    plain, _ = encoder(["a red apple"])
    with torch.autocast("cpu", torch.float16), output_dtypes(encoder) as seen:
        mixed, _ = encoder(["a red apple"])
    assert seen == {torch.float32} and torch.equal(plain, mixed)
