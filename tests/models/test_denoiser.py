import torch

from dcar.models.denoiser import Denoiser


def denoiser() -> Denoiser:
    return Denoiser(channels=3, outputs=6, dim=5, width=8, depth=2)


def trained() -> Denoiser:
    model = denoiser()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.5)
    return model


def test_a_new_denoiser_is_the_zero_function() -> None:
    output = denoiser()(torch.randn(7, 3), torch.arange(7), torch.randn(7, 8))
    assert output.shape == (7, 6)
    assert not output.any()


def test_one_time_for_all_rows_equals_the_same_time_in_each() -> None:
    model, noisy, condition = trained(), torch.randn(7, 3), torch.randn(7, 8)
    once = model(noisy, torch.tensor([40]), condition)
    each = model(noisy, torch.full((7,), 40), condition)
    assert torch.allclose(once, each, atol=1e-5)


def test_rows_do_not_mix_and_every_input_matters() -> None:
    model, time = trained(), torch.arange(7)
    noisy, condition = torch.randn(7, 3), torch.randn(7, 8)
    before = model(noisy, time, condition)
    changes = [
        (noisy.index_add(0, torch.tensor([2]), torch.ones(1, 3)), time, condition),
        (noisy, time.index_fill(0, torch.tensor([2]), 900), condition),
        (noisy, time, condition.index_add(0, torch.tensor([2]), torch.ones(1, 8))),
    ]
    for changed in changes:
        differs = (model(*changed) - before).abs().amax(1) > 1e-4
        assert differs.tolist() == [row == 2 for row in range(7)]


def test_every_weight_gets_a_gradient_once_the_output_is_not_zero() -> None:
    model = trained()
    condition = model.condition_embedding(torch.randn(7, 5))
    model(torch.randn(7, 3), torch.arange(7), condition).square().sum().backward()
    assert all(bool(weight.grad.any()) for weight in model.parameters())
