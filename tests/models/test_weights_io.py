"""Frozen networks: they compute, move, and are part of nothing that is saved or trained."""

import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from dcar.models.weights_io import as_constants, load_constants, save_tensors


def small() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1, bias=False))


def test_constants_compute_what_the_module_computed() -> None:
    module, image = small().eval(), torch.randn(2, 3, 8, 8)
    before = module(image)
    as_constants(module)
    assert torch.equal(module(image), before)


def test_whoever_holds_constants_trains_and_saves_nothing_of_them() -> None:
    owner = nn.ModuleDict({"frozen": as_constants(small()), "own": nn.Linear(2, 2)})
    assert sorted(owner.state_dict()) == ["own.bias", "own.weight"]
    assert len(list(owner.parameters())) == 2
    owner.load_state_dict(nn.ModuleDict({"own": nn.Linear(2, 2)}).state_dict())


def test_constants_follow_their_owner_to_another_device() -> None:
    owner = nn.ModuleList([as_constants(small())]).to("meta")
    assert {tensor.device.type for tensor in owner.buffers()} == {"meta"}


def test_loading_is_strict_and_widens_half_precision(tmp_path: Path) -> None:
    module, path = small(), tmp_path / "small.safetensors"
    save_file({name: tensor.half() for name, tensor in module.state_dict().items()}, path)
    loaded = small()
    load_constants(loaded, "small", path)
    weight = module.state_dict()["0.weight"]
    assert torch.equal(loaded.get_buffer("0.weight"), weight.half().float())
    save_file({"0.weight": weight}, path)
    with pytest.raises(RuntimeError, match="Missing key"):
        load_constants(small(), "small", path)


def test_a_missing_file_names_the_command_that_makes_it(tmp_path: Path) -> None:
    path = tmp_path / "mine.safetensors"
    with pytest.raises(FileNotFoundError, match=r"weights_build lpips_vgg --out .*mine"):
        load_constants(small(), "lpips_vgg", path)


@pytest.mark.parametrize(("umask", "rights"), [(0o022, 0o644), (0o007, 0o660)])
def test_a_file_has_the_rights_of_any_new_file(umask: int, rights: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        save_tensors({"a": torch.arange(3)}, tmp_path / "a.safetensors", {"b": "c"})
        assert os.umask(umask) == umask
    finally:
        os.umask(before)
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == rights
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        assert file.metadata() == {"b": "c"} and torch.equal(file.get_tensor("a"), torch.arange(3))
