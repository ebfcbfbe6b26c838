"""Features for Frechet distances: MobileNetV2 as published, Inception by the extra."""

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import MobileNetV2Config, MobileNetV2Model

from dcar.models.features import (
    CPU_CHUNK,
    IMAGENET_MEAN,
    IMAGENET_STD,
    INCEPTION_FILE,
    InceptionFeatures,
    MobileNetV2Features,
    fid_features,
)


@pytest.fixture(scope="module")
def mobilenet() -> MobileNetV2Features:
    return MobileNetV2Features()


def pictures(batch: int, side: int = 64) -> Tensor:
    coarse = torch.rand(batch, 3, 7, 7)
    return nn.functional.interpolate(coarse, (side, side), mode="bilinear")


def reference(ours: MobileNetV2Features) -> nn.Module:
    """transformers' MobileNetV2 with our folded weights and batch norms that do nothing."""
    model = MobileNetV2Model(MobileNetV2Config(tf_padding=False)).eval()
    layers = [part for part in model.modules() if hasattr(part, "convolution")]
    convs = [part for part in ours.modules() if isinstance(part, nn.Conv2d)]
    for layer, conv in zip(layers, convs, strict=True):
        assert layer.convolution.weight.shape == conv.weight.shape
        layer.convolution.weight.data = conv.weight.clone()
        assert conv.bias is not None
        layer.normalization.bias.data = conv.bias.clone()
        layer.normalization.running_var.fill_(1 - layer.normalization.eps)
    return model


@torch.no_grad()
def test_the_network_is_the_mobilenet_v2_of_transformers(mobilenet: MobileNetV2Features) -> None:
    image = pictures(2, side=224)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    expected = reference(mobilenet)(pixel_values=(image - mean) / std).pooler_output
    assert torch.allclose(mobilenet(image), expected, atol=1e-4)
    assert expected.std(0).max() > 0.01


@torch.no_grad()
def test_bytes_and_floats_of_a_picture_have_the_same_features(
    mobilenet: MobileNetV2Features,
) -> None:
    levels = (pictures(2) * 255).to(torch.uint8)
    assert torch.allclose(mobilenet(levels), mobilenet(levels / 255), atol=1e-5)
    assert not torch.allclose(mobilenet(levels), mobilenet(levels.float()), atol=1e-2)


@torch.no_grad()
def test_features_do_not_depend_on_the_batch(mobilenet: MobileNetV2Features) -> None:
    image = pictures(CPU_CHUNK + 2, side=32)
    features = mobilenet(image)
    assert features.shape == (CPU_CHUNK + 2, mobilenet.num_features)
    assert torch.allclose(features[-1:], mobilenet(image[-1:]), atol=1e-4)


@torch.no_grad()
def test_autocast_does_not_change_the_features(mobilenet: MobileNetV2Features) -> None:
    image = pictures(1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = mobilenet(image)
    assert torch.equal(inside, mobilenet(image))


def test_it_stays_in_eval_and_out_of_checkpoints(mobilenet: MobileNetV2Features) -> None:
    owner = nn.ModuleList([mobilenet]).train()
    assert not mobilenet.training
    assert owner.state_dict() == {}
    assert list(owner.parameters()) == []


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match="'clip'"):
        fid_features("clip")


def test_auto_without_inception_s_file_is_mobilenet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    assert fid_features("auto").name == "mobilenetv2"


def test_inception_without_the_extra_names_it() -> None:
    if importlib.util.find_spec("torch_fidelity"):
        pytest.skip("torch-fidelity is installed; this is about a machine without it")
    with pytest.raises(ImportError, match=r"torch_fidelity.*dcar-lightning\[eval\]"):
        fid_features("inception")


def write_package(folder: Path, code: str) -> None:
    package = folder / "torch_fidelity"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "feature_extractor_inceptionv3.py").write_text(code)


@pytest.fixture
def no_fidelity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder first on the path, to put a torch_fidelity package in; an empty hub folder."""
    if importlib.util.find_spec("torch_fidelity"):
        pytest.skip("torch-fidelity is installed; this stands in for it")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("torch_fidelity")]:
        del sys.modules[name]


def test_a_torchvision_for_another_torch_is_named_with_the_pair(no_fidelity: Path) -> None:
    broken = "raise RuntimeError('operator torchvision::nms does not exist')"
    write_package(no_fidelity, broken)
    minor = int(torch.__version__.split(".")[1])
    with pytest.raises(ImportError, match=rf"torch {torch.__version__[:4]}.*0\.{minor + 15}\."):
        InceptionFeatures()


STAND_IN = """
import torch
class FeatureExtractorInceptionV3(torch.nn.Module):
    def __init__(self, name, features_list, feature_extractor_weights_path):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.load(feature_extractor_weights_path))
    def forward(self, image):
        assert image.dtype == torch.uint8
        return (image.float().mean((1, 2, 3))[:, None] * self.scale,)
"""


def test_inception_s_missing_file_is_named_and_auto_takes_it_when_there(no_fidelity: Path) -> None:
    write_package(no_fidelity, STAND_IN)
    with pytest.raises(FileNotFoundError, match=f"{INCEPTION_FILE}.*torch-fidelity"):
        fid_features("inception")
    assert fid_features("auto").name == "mobilenetv2"
    (no_fidelity / "checkpoints").mkdir()
    torch.save(torch.ones(2048), no_fidelity / "checkpoints" / INCEPTION_FILE)
    features = fid_features("auto")
    assert features.name == "inception"
    image = torch.full((2, 3, 8, 8), 7, dtype=torch.uint8)
    assert torch.equal(features(image), torch.full((2, 2048), 7.0))
    assert features.state_dict() == {}
