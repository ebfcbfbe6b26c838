"""Steps without values cost what real ones do, and real ones what torch's counter says."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dcar.evaluation.cost_meter import BACKWARD, Meter
from dcar.evaluation.cost_steps import (
    BytePass,
    GeneratorStep,
    Step,
    T5Pass,
    TokenizerStep,
    UnloadedLPIPS,
    meter_step,
    without_values,
)
from dcar.models.diffusion import noise_schedule
from dcar.models.discriminator import PatchDiscriminator
from dcar.models.generator import HybridGenerator
from dcar.models.losses import LOGITS_AT_ONCE, TokenizerCriterion, masked_token_loss
from dcar.models.perceptual import LPIPS
from dcar.models.transformer import MaskedTransformer
from tests.toys import CODES, SIZE, toy_generator, toy_text_encoder, toy_tokenizer

BATCH = 3
ON_CPU = LOGITS_AT_ONCE["cpu"]


def tokenizer_step(**options: Any) -> TokenizerStep:
    criterion = TokenizerCriterion(
        pixel="l1",
        pixel_weight=1.0,
        perceptual=UnloadedLPIPS("alex"),
        perceptual_weight=1.0,
        codebook_weight=1.0,
        adversarial_weight=0.5,
    )
    discriminator = PatchDiscriminator(width=16, layers=1, norm="group")
    return TokenizerStep(
        SIZE, toy_tokenizer(), criterion, discriminator, discrete_prob=1.0, **options
    )


def generator_step(**options: Any) -> GeneratorStep:
    tokenizer = toy_tokenizer().eval().requires_grad_(False)
    text = BytePass(toy_text_encoder())
    return GeneratorStep(SIZE, toy_generator(), tokenizer, text, **options)


def deep_transformer() -> MaskedTransformer:
    """Its gradients are more than all activations of one image."""
    sizes = {"dim": 256, "depth": 2, "heads": 2, "text_dim": 8, "text_tokens": 16}
    return MaskedTransformer(num_codes=CODES, **sizes)


def grouped_convolution_backward(
    grad_shape: list[int],
    input_shape: list[int],
    weight_shape: list[int],
    *rest: Any,
    out_shape: Any = None,
    **_: Any,
) -> int:
    """torch's own formula takes the channels of all groups together for the weight's gradient."""
    output_mask = rest[7]
    pixels = grad_shape[0] * grad_shape[2] * grad_shape[3]
    return sum(output_mask[:2]) * 2 * pixels * torch.Size(weight_shape).numel()


def counted_by_torch(step: Step, batch: int) -> int:
    mapping = {torch.ops.aten.convolution_backward: grouped_convolution_backward}
    counter = FlopCounterMode(display=False, custom_mapping=mapping)
    with sdpa_kernel(SDPBackend.MATH), counter:
        step.run(batch, lambda loss: loss.backward())
    return counter.get_total_flops()


def total(meter: Meter) -> int:
    return sum(flops.total for flops in meter.flops.values())


@pytest.mark.parametrize("make", [tokenizer_step, generator_step])
def test_flops_of_a_step_are_those_of_torch_s_counter(make) -> None:
    step = make()
    theirs, ours = counted_by_torch(step, BATCH), total(meter_step(step, BATCH, half=None))
    assert ours == pytest.approx(theirs, rel=0.03)  # attention's scores, einsum in LPIPS


@pytest.mark.parametrize(
    ("make", "half"),
    [
        (tokenizer_step, torch.float16),
        (generator_step, None),
        pytest.param(tokenizer_step, None, marks=pytest.mark.slow),
        pytest.param(generator_step, torch.float16, marks=pytest.mark.slow),
    ],
)
def test_a_step_without_values_costs_what_a_real_one_does(make, half) -> None:
    real = meter_step(make(), 8 * BATCH, half=half)
    with torch.device("meta"):
        step = make()
    with without_values(step):
        fake = meter_step(step, 8 * BATCH, half=half)
    assert fake.flops == real.flops
    assert fake.peak_bytes == pytest.approx(real.peak_bytes, rel=0.03)
    assert set(fake.peak) == set(real.peak)


class LossStep(GeneratorStep):
    """The loss of tokens alone, whose logits take most of the memory."""

    def run(self, batch: int, backward: Callable[[Tensor], None]) -> None:
        logits = torch.zeros(batch, 1, ON_CPU, dtype=torch.float16, requires_grad=True)
        mask = torch.ones(batch, 1, dtype=torch.bool)
        backward(masked_token_loss(logits, mask.long(), mask))


def test_a_gpu_widens_more_logits_at_once() -> None:
    step = LossStep(**vars(generator_step()))
    on_gpu, on_cpu = (meter_step(step, 4, half=None, as_cuda=gpu) for gpu in (True, False))
    assert on_gpu.peak_bytes > 1.5 * on_cpu.peak_bytes
    assert meter_step(step, 4, half=None, as_cuda=False).peak_bytes == on_cpu.peak_bytes


@pytest.mark.slow
def test_work_and_memory_grow_with_the_batch() -> None:
    with torch.device("meta"):
        step = generator_step()
    with without_values(step):
        meters = {batch: meter_step(step, batch, half=None) for batch in (64, 128, 256)}
    assert total(meters[128]) == 2 * total(meters[64])
    first, second = (meters[2 * b].peak_bytes - meters[b].peak_bytes for b in (64, 128))
    assert second == pytest.approx(2 * first, rel=0.01)


def test_real_steps_are_possible_after_those_without_values() -> None:
    with torch.device("meta"):
        step = generator_step(encodes=False, reads=False)
    with without_values(step):
        meter_step(step, BATCH, half=None)
    head = toy_generator().residual_head
    assert head is not None
    assert torch.isfinite(noise_schedule(1000, 1000, torch.device("cpu")).signal).all()


def test_every_part_of_a_tokenizer_s_step_works() -> None:
    flops = meter_step(tokenizer_step(), BATCH, half=None).flops
    names = {name for name, _ in flops}
    assert names >= {"encoder", "quantizer", "decoder", "discriminator", "perceptual"}


def test_frozen_parts_cost_no_backward_work() -> None:
    step = tokenizer_step()
    step.tokenizer.encoder.requires_grad_(False)
    meter = meter_step(step, BATCH, half=None)
    parts = {name: flops for (name, _), flops in meter.flops.items() if name == "encoder"}
    assert all(flops.forward and not flops.backward for flops in parts.values()) and parts


def test_a_discriminator_is_passed_through_once_and_trained_on_twice_the_images() -> None:
    forward = {}
    for step in (with_gan := tokenizer_step(), without := tokenizer_step()):
        step.discriminator = step.discriminator if step is with_gan else None
        flops = meter_step(step, BATCH, half=None).flops
        forward[step is with_gan] = sum(f.forward for (n, _), f in flops.items() if n[:4] == "disc")
    assert without.networks() == [without.tokenizer] and forward[False] == 0
    meter = Meter()
    with meter.watch({"discriminator": [with_gan.discriminator]}), meter.running():
        with_gan.discriminator(with_gan.images(BATCH))
    once = sum(flops.forward for flops in meter.flops.values())
    assert forward[True] == 3 * once


@pytest.mark.parametrize(
    ("options", "missing"),
    [({"encodes": False}, {"tokenizer"}), ({"reads": False}, {"text encoder"}), ({}, set())],
)
def test_what_is_precomputed_does_not_run(options, missing) -> None:
    names = {name for name, _ in meter_step(generator_step(**options), BATCH, half=None).flops}
    assert {"tokenizer", "text encoder"} - names == missing


def test_gradients_that_are_held_before_are_not_the_step_s_own() -> None:
    peaks = {}
    for holds in (False, True):
        step = generator_step(holds_gradients=holds)
        step.generator = HybridGenerator(transformer=deep_transformer())
        peaks[holds] = meter_step(step, 1, half=None).peak[BACKWARD]
    gradients = 4 * sum(p.numel() for p in step.generator.parameters())
    assert peaks[True] < 0.5 * gradients and gradients <= peaks[False]


def test_lpips_without_weights_has_the_shapes_of_the_one_with() -> None:
    ours, theirs = UnloadedLPIPS("alex"), LPIPS("alex")
    shapes = [{n: b.shape for n, b in network.named_buffers()} for network in (ours, theirs)]
    assert shapes[0] == shapes[1] and len(shapes[0]) > 10


def test_t5_base_has_its_published_size() -> None:
    with torch.device("meta"):
        encoder = T5Pass("google-t5/t5-base", length=300, dtype=torch.bfloat16)
    assert sum(p.numel() for p in encoder.parameters()) == 109_628_544
    assert {p.dtype for p in encoder.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in encoder.parameters())


def test_a_local_text_encoder_is_read_from_its_config(tmp_path: Path) -> None:
    sizes = {"d_model": 16, "d_ff": 32, "num_layers": 1, "num_heads": 2, "d_kv": 8}
    config = {"model_type": "t5", "vocab_size": 50} | sizes
    (tmp_path / "config.json").write_text(json.dumps(config))
    text, mask = T5Pass(str(tmp_path), length=5, dtype=torch.float32)(2)
    assert text.shape == (2, 5, 16) and mask.shape == (2, 5)


def test_a_text_encoder_that_is_not_known_is_named() -> None:
    with pytest.raises(ValueError, match="'some/encoder'.*t5-base"):
        T5Pass("some/encoder", length=5, dtype=torch.float32)


def test_recomputed_activations_are_fewer() -> None:
    step = generator_step()
    assert step.checkpointing() == [step.generator.transformer]
    assert tokenizer_step().checkpointing()
    kept, peaks = step.generator.transformer, []
    for kept.checkpoint_activations in (False, True):
        peaks.append(meter_step(step, 64, half=None).peak["transformer"])
    assert peaks[1] < peaks[0]


def test_parts_hold_everything_that_is_trained() -> None:
    for step in (tokenizer_step(), generator_step()):
        parts = {p for part in step.parts().values() for p in part.parameters()}
        trained = {p for network in step.networks() for p in network.parameters()}
        assert trained <= parts and isinstance(step.averaged()[0], nn.Module)
