"""Compiled networks: the same parameters under the same names, and the same training."""

import shutil
from functools import partial

import pytest
import torch
from torch import nn

from dcar.lit.averaging import AverageWeights
from dcar.lit.base import BaseModule
from dcar.lit.compilation import VARIANTS, compile_backend, compile_parts
from dcar.models.autoencoder import Encoder
from tests.toys import (
    ToyData,
    toy_generator,
    toy_masked_generator,
    toy_stage,
    toy_trainer,
)

SGD = partial(torch.optim.SGD, lr=0.1)


def compiled(module: nn.Module) -> list[str]:
    parts = module.named_modules()
    return [name for name, part in parts if part._compiled_call_impl is not None]


def test_true_is_inductor_and_false_is_nothing() -> None:
    assert compile_backend(True) == "inductor" and compile_backend(False) is None
    assert compile_backend("aot_eager") == "aot_eager"


def test_an_unknown_backend_is_refused_with_those_there_are() -> None:
    with pytest.raises(ValueError, match="compile='fast' is not true, false or one of .*inductor"):
        compile_backend("fast")


def test_names_of_weights_stay() -> None:
    plain, other = toy_stage(2, adversarial=True), toy_stage(2, adversarial=True)
    compile_parts(other, backend="eager")
    assert compiled(other) == ["network.encoder", "network.decoder", "discriminator"]
    assert other.state_dict().keys() == plain.state_dict().keys()
    assert torch._dynamo.config.recompile_limit >= VARIANTS


def test_the_generator_is_compiled_by_the_block_and_its_frozen_tokenizer_too() -> None:
    module = toy_masked_generator(compile="eager")
    module.configure_model()
    module.configure_model()  # Lightning asks once for each of fit and validate
    blocks = [f"network.generator.transformer.blocks.{index}" for index in (0, 1)]
    assert compiled(module) == [*blocks, "network.generator.residual_head.denoiser"]
    assert compiled(module.tokenizer.module) == ["encoder", "decoder"]


def test_nothing_is_compiled_unless_it_is_asked_for() -> None:
    module = toy_masked_generator()
    module.configure_model()
    assert compiled(module) == [] and compiled(module.tokenizer.module) == []


def trained(module: BaseModule) -> dict[str, torch.Tensor]:
    average = AverageWeights(decay=0.9)
    settings = {"limit_val_batches": 1, "val_check_interval": 2}
    toy_trainer(2, callbacks=[average], **settings).fit(module, datamodule=ToyData())
    torch._dynamo.reset()
    assert average.average is not None and compiled(average.average) == []
    return module.state_dict()


@pytest.mark.slow
def test_a_compiled_tokenizer_that_recomputes_trains_as_a_plain_one() -> None:
    plain, other = (
        toy_stage(3, optimizer=SGD, compile=backend) for backend in (False, "aot_eager")
    )
    other.network.encoder.checkpoint_activations = True
    other.network.decoder.checkpoint_activations = True
    expected = trained(plain)
    for name, tensor in trained(other).items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-6, msg=name)


@pytest.mark.slow
def test_a_compiled_generator_trains_as_a_plain_one() -> None:
    plain, other = (
        toy_masked_generator(generator=toy_generator(), optimizer=SGD, compile=backend)
        for backend in (False, "aot_eager")
    )
    other.load_state_dict(plain.state_dict())
    expected = trained(plain)
    for name, tensor in trained(other).items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-6, msg=name)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler: no g++")
def test_inductor_compiles_the_islands_of_fp32_under_autocast() -> None:
    encoder = Encoder(latent_channels=4, widths=[32, 32], depths=[0, 1], blocks=["res", "evit"])
    image = torch.randn(2, 3, 16, 16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = encoder(image)
        compile_parts(encoder, backend="inductor")
        latent = encoder(image)
    torch._dynamo.reset()
    assert latent.dtype == expected.dtype
    assert (latent - expected).norm() < 0.05 * expected.norm()
