"""DC-AE: published sizes, shapes, attention identities and parity with diffusers' AutoencoderDC."""

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dcar.models.autoencoder import (
    HEAD_DIM,
    NORMS,
    Decoder,
    Encoder,
    LiteMLA,
    average_channels,
    linear_attention,
    pixel_shuffle,
    pixel_unshuffle,
    quadratic_attention,
    repeat_channels,
    shortcut_down,
    shortcut_up,
)


def make_encoder(**changes: Any) -> Encoder:
    settings: dict[str, Any] = {
        "latent_channels": 8,
        "widths": [16, 32, 64],
        "depths": [0, 1, 1],
        "blocks": ["res", "res", "evit"],
    }
    return Encoder(**settings | changes)


def make_decoder(**changes: Any) -> Decoder:
    settings: dict[str, Any] = {
        "latent_channels": 8,
        "widths": [16, 32, 64],
        "depths": [0, 1, 1],
        "blocks": ["res", "res", "evit"],
        "norms": ["bn2d", "bn2d", "ln2d"],
        "activations": ["relu", "relu", "silu"],
        "out_norm": "ln2d",
    }
    return Decoder(**settings | changes)


def published(
    *, latent_channels: int, widths: list[int], encoder_depths: list[int], decoder_depths: list[int]
) -> tuple[Encoder, Decoder]:
    """The public family: three stages of ResBlocks, the rest attention (arXiv 2410.10733)."""
    attention = len(widths) - 3
    shared: dict[str, Any] = {
        "latent_channels": latent_channels,
        "widths": widths,
        "blocks": ["res"] * 3 + ["evit"] * attention,
    }
    with torch.device("meta"):
        encoder = Encoder(**shared, depths=encoder_depths)
        decoder = Decoder(
            **shared,
            depths=decoder_depths,
            norms=["bn2d"] * 3 + ["ln2d"] * attention,
            activations=["relu"] * 3 + ["silu"] * attention,
            out_norm="ln2d",
        )
    return encoder, decoder


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_f32c32_has_the_published_number_of_parameters() -> None:
    encoder, decoder = published(
        latent_channels=32,
        widths=[128, 256, 512, 512, 1024, 1024],
        encoder_depths=[0, 4, 8, 2, 2, 2],
        decoder_depths=[0, 5, 10, 2, 2, 2],
    )
    assert count(encoder) == 123_172_384
    assert count(decoder) == 200_184_076
    assert count(encoder) + count(decoder) == 323_356_460


@pytest.mark.parametrize(
    ("latent_channels", "widths", "factor"),
    [
        (16, [128, 256, 512, 512, 1024], 16),
        (32, [128, 256, 512, 512, 1024, 1024], 32),
        (128, [128, 256, 512, 512, 1024, 1024, 2048], 64),
    ],
)
def test_published_sizes_have_their_factor_and_channels(
    latent_channels: int, widths: list[int], factor: int
) -> None:
    stages = len(widths)
    encoder, decoder = published(
        latent_channels=latent_channels,
        widths=widths,
        encoder_depths=[0, 4, 8, 2, 2, 2, 2][:stages],
        decoder_depths=[0, 5, 10, 2, 2, 2, 2][:stages],
    )
    latent = encoder(torch.empty(1, 3, 256, 256, device="meta"))
    assert encoder.downsample == decoder.downsample == factor
    assert latent.shape == (1, latent_channels, 256 // factor, 256 // factor)
    assert decoder(latent).shape == (1, 3, 256, 256)


@pytest.mark.parametrize("first_depth", [0, 1])
@pytest.mark.parametrize("size", [(16, 16), (32, 32), (24, 16)])
def test_images_become_latents_and_images_again(size: tuple[int, int], first_depth: int) -> None:
    depths = [first_depth, 1, 1]
    encoder, decoder = make_encoder(depths=depths), make_decoder(depths=depths)
    latent = encoder(torch.randn(2, 3, *size))
    assert latent.shape == (2, 8, size[0] // 4, size[1] // 4)
    assert decoder(latent).shape == (2, 3, *size)


def test_an_empty_middle_stage_still_changes_the_size() -> None:
    encoder, decoder = make_encoder(depths=[1, 0, 1]), make_decoder(depths=[1, 0, 1])
    latent = encoder(torch.randn(1, 3, 16, 16))
    assert latent.shape == (1, 8, 4, 4)
    assert decoder(latent).shape == (1, 3, 16, 16)


def test_every_parameter_gets_a_gradient() -> None:
    encoder, decoder = make_encoder(), make_decoder()
    decoder(encoder(torch.randn(2, 3, 32, 32))).square().sum().backward()
    for module in (encoder, decoder):
        for name, parameter in module.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_feature_maps_stay_channels_last_and_bf16_under_autocast() -> None:
    found: dict[str, tuple[bool, torch.dtype]] = {}

    def note(name: str, features: Tensor) -> None:
        is_last = features.is_contiguous(memory_format=torch.channels_last)
        found[name] = is_last, features.dtype

    encoder, decoder = make_encoder(), make_decoder()
    for name, module in [*encoder.named_modules(), *decoder.named_modules()]:
        module.register_forward_hook(lambda _m, _i, output, name=name: note(name, output))
    with torch.autocast("cpu", torch.bfloat16):
        decoder(encoder(torch.randn(2, 3, 32, 32)).float())
    assert len(found) > 20
    assert set(found.values()) == {(True, torch.bfloat16)}, found


def test_bf16_autocast_stays_close_to_fp32() -> None:
    encoder, decoder = make_encoder().eval(), make_decoder().eval()
    image = torch.randn(2, 3, 32, 32)
    exact = decoder(encoder(image))
    with torch.autocast("cpu", torch.bfloat16):
        rounded = decoder(encoder(image))
    assert (rounded - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize(("width_in", "width_out"), [(4, 16), (8, 16), (8, 8), (16, 8), (12, 16)])
def test_channel_shortcuts_equal_their_definition(width_in: int, width_out: int) -> None:
    features = torch.randn(2, width_in, 4, 6)
    averaged = F.pixel_unshuffle(features, 2).unflatten(1, (width_out, -1)).mean(2)
    torch.testing.assert_close(shortcut_down(features, width_out), averaged)
    coarse = torch.randn(2, width_out, 4, 6)
    repeated = coarse.repeat_interleave(4 * width_in // width_out, dim=1)
    torch.testing.assert_close(shortcut_up(coarse, width_in), F.pixel_shuffle(repeated, 2))


def test_averaging_undoes_repeating_and_unshuffling_undoes_shuffling() -> None:
    features = torch.randn(2, 8, 4, 6)
    torch.testing.assert_close(average_channels(repeat_channels(features, 3), 8), features)
    torch.testing.assert_close(pixel_unshuffle(pixel_shuffle(features)), features)


@pytest.mark.parametrize(("norm", "centred"), [("ln2d", True), ("rms2d", False)])
def test_channel_norms_equal_their_definition(norm: str, centred: bool) -> None:
    module = NORMS[norm](8)
    weight, bias = module.get_parameter("weight"), module.get_parameter("bias")
    nn.init.normal_(weight)
    nn.init.normal_(bias)
    features = torch.randn(2, 8, 3, 5) * 4 + 1
    mean = features.mean(1, keepdim=True) if centred else 0.0
    power = (features - mean).square().mean(1, keepdim=True)
    expected = (features - mean) / (power + 1e-5).sqrt()
    expected = expected * weight[:, None, None] + bias[:, None, None]
    torch.testing.assert_close(module(features), expected, atol=1e-5, rtol=1e-5)


def attention_inputs(positions: int) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = torch.randn(3, 4, HEAD_DIM, positions)
    return query.relu(), key.relu(), value


@pytest.mark.parametrize("attention", [linear_attention, quadratic_attention])
@pytest.mark.parametrize("positions", [16, 64])
def test_attention_equals_weighted_means_in_float64(attention: Any, positions: int) -> None:
    query, key, value = attention_inputs(positions)
    weights = torch.einsum("bdi,bdj->bij", query.double(), key.double())  # query i, key j
    weights = weights / weights.sum(-1, keepdim=True)
    expected = torch.einsum("bij,bdj->bdi", weights, value.double())
    torch.testing.assert_close(attention(query, key, value).double(), expected, atol=1e-5, rtol=0)


def test_a_position_nothing_attends_to_gives_zero_and_finite_gradients() -> None:
    query, key, value = attention_inputs(40)
    query[..., 0] = 0
    inputs = [tensor.requires_grad_() for tensor in (query, key, value)]
    attended = linear_attention(*inputs)
    assert attended[..., 0].abs().max() == 0
    gradients = torch.autograd.grad(attended.sum(), inputs)
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize(
    ("size", "used", "other"),
    [
        ((4, 8), quadratic_attention, linear_attention),  # 32 positions
        ((3, 11), linear_attention, quadratic_attention),  # 33
    ],
)
def test_attention_is_linear_only_beyond_one_head_of_positions(
    size: tuple[int, int], used: Any, other: Any
) -> None:
    qkv = torch.randn(1, 3 * HEAD_DIM, *size)
    query, key, value = qkv.flatten(2).split(HEAD_DIM, dim=1)
    attended = LiteMLA(HEAD_DIM, norm="ln2d").attend(qkv, size[1]).flatten(2)
    # Both forms agree but for rounding, so bits tell which one ran.
    assert torch.equal(attended, used(query.relu(), key.relu(), value))
    assert not torch.equal(attended, other(query.relu(), key.relu(), value))


def test_attention_is_computed_in_fp32_under_autocast() -> None:
    attention = LiteMLA(32, norm="ln2d")
    qkv = torch.randn(2, 96, 8, 8).bfloat16()
    expected = attention.attend(qkv.float(), 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(attention.attend(qkv, 8), expected.bfloat16())


def test_lists_of_different_length_are_refused() -> None:
    with pytest.raises(ValueError, match="depths has 2 stages but widths has 3"):
        make_encoder(depths=[1, 1])
    with pytest.raises(ValueError, match="norms has 1 stages but widths has 3"):
        make_decoder(norms=["ln2d"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"widths": [16, 32, 72]}, "from 32 to 72"),
        ({"widths": [16, 16, 48], "blocks": ["res"] * 3, "latent_channels": 10}, "48.*10"),
        ({"widths": [16, 32, 48], "blocks": ["res", "evit", "res"]}, "from 32 to 48"),
        ({"widths": [16, 16, 16]}, "16 channels needs a multiple of 32"),
        ({"blocks": ["res", "res", "conv"]}, "'conv' in blocks"),
        ({"norm": "batch"}, "'batch' in norms"),
        ({"depths": [0], "widths": [16], "blocks": ["res"]}, "empty first stage"),
    ],
)
def test_impossible_encoders_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_encoder(**changes)


def test_widths_that_cannot_be_upsampled_are_refused() -> None:
    with pytest.raises(ValueError, match="from 160 to 32"):
        make_decoder(widths=[16, 32, 160])


RENAMES = [
    (r"^encoder\.conv_in\.", "encoder.project_in."),
    (r"^encoder\.conv_out\.", "encoder.project_out."),
    (r"^decoder\.conv_in\.", "decoder.project_in."),
    (r"^decoder\.norm_out\.", "decoder.out_norm."),
    (r"^decoder\.conv_out\.", "decoder.project_out."),
    (r"\.(down|up)_blocks\.", ".stages."),
    (r"\.attn\.to_out\.", ".attention.project."),
    (r"\.attn\.norm_out\.", ".attention.norm."),
    (r"\.conv_out\.conv_inverted\.", ".local.expand."),
    (r"\.conv_out\.conv_depth\.", ".local.depthwise."),
    (r"\.conv_out\.conv_point\.", ".local.project."),
    (r"\.conv_out\.norm\.", ".local.norm."),
]


def from_diffusers(state: dict[str, Tensor], ours: nn.Module) -> dict[str, Tensor]:
    """Rename keys, stack query, key and value, make linear layers 1 x 1 kernels."""
    converted: dict[str, Tensor] = {}
    for key, tensor in state.items():
        for pattern, replacement in RENAMES:
            key = re.sub(pattern, replacement, key)
        if match := re.match(r"(.*)\.attn\.to_([qkv])\.weight", key):
            key, part = f"{match[1]}.attention.qkv.weight", match[2]
            tensor = torch.cat([converted[key], tensor]) if part != "q" else tensor
        converted[key] = tensor
    shapes = {key: tensor.shape for key, tensor in ours.state_dict().items()}
    return {key: tensor.reshape(shapes[key]) for key, tensor in converted.items()}


@pytest.mark.parametrize("first_depth", [0, 1])
@pytest.mark.parametrize("size", [(32, 32), (64, 48)])  # quadratic and linear attention
def test_outputs_equal_those_of_diffusers(first_depth: int, size: tuple[int, int]) -> None:
    diffusers = pytest.importorskip("diffusers", reason="parity needs diffusers' AutoencoderDC")
    widths, depths = [16, 32, 32, 64], [first_depth, 1, 2, 2]
    blocks = ["res", "res", "evit", "evit"]
    theirs = diffusers.AutoencoderDC(
        latent_channels=8,
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        encoder_layers_per_block=depths,
        decoder_layers_per_block=depths,
        encoder_block_types=["ResBlock"] * 2 + ["EfficientViTBlock"] * 2,
        decoder_block_types=["ResBlock"] * 2 + ["EfficientViTBlock"] * 2,
        encoder_qkv_multiscales=((), (), (), ()),
        decoder_qkv_multiscales=((), (), (), ()),
        decoder_norm_types=["batch_norm"] * 2 + ["rms_norm"] * 2,
        decoder_act_fns=["relu"] * 2 + ["silu"] * 2,
        upsample_block_type="pixel_shuffle",
        downsample_block_type="pixel_unshuffle",
    ).eval()
    for name, tensor in theirs.named_parameters():
        if "norm" in name:  # fresh scales of one and shifts of zero would hide a swap
            nn.init.normal_(tensor, 0.5, 0.5)
    for name, tensor in theirs.named_buffers():
        if "running" in name:
            nn.init.uniform_(tensor, 0.5, 1.5)
    shared: dict[str, Any] = {"widths": widths, "depths": depths, "blocks": blocks}
    ours = nn.ModuleDict(
        {
            "encoder": make_encoder(**shared, norm="rms2d"),
            "decoder": make_decoder(
                **shared,
                norms=["bn2d"] * 2 + ["rms2d"] * 2,
                activations=["relu"] * 2 + ["silu"] * 2,
                out_norm="rms2d",
            ),
        }
    ).eval()
    ours.load_state_dict(from_diffusers(theirs.state_dict(), ours), strict=True)
    image = torch.randn(2, 3, *size)
    latent = theirs.encode(image).latent
    torch.testing.assert_close(ours["encoder"](image), latent, atol=1e-4, rtol=1e-4)
    recon = theirs.decode(latent).sample
    torch.testing.assert_close(ours["decoder"](latent), recon, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("training", [True, False])
def test_recomputed_activations_change_neither_gradients_nor_running_statistics(
    training: bool,
) -> None:
    results = []
    for recompute in (False, True):
        torch.manual_seed(0)
        encoder = make_encoder(checkpoint_activations=recompute)
        decoder = make_decoder(norms=["bn2d", "bn2d", "ln2d"], checkpoint_activations=recompute)
        both = nn.ModuleList([encoder, decoder]).train(training)
        for number in (1, 2):  # statistics of the second batch stand on those of the first
            image = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(number))
            recon = decoder(encoder(image))
            (recon - image).square().mean().backward()
        gradients = {name: p.grad for name, p in both.named_parameters()}
        results.append(gradients | dict(both.named_buffers()) | {"recon": recon.detach()})
    assert any(name.endswith("num_batches_tracked") for name in results[0])
    for name, tensor in results[0].items():
        assert tensor is not None and torch.equal(tensor, results[1][name]), name


def test_recomputing_keeps_the_inputs_of_layers_alone() -> None:
    saved = {}
    for recompute in (False, True):
        decoder = make_decoder(checkpoint_activations=recompute)
        sizes: list[int] = []

        def keep(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        latent = torch.randn(2, 8, 4, 4)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            decoder(latent)
        saved[recompute] = sum(sizes)
    assert saved[True] < saved[False] / 2
