"""Weights of the frozen networks: files shipped in dcar/weights, and modules that only compute."""

import os
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

SHIPPED = Path(__file__).parents[1] / "weights"


def as_constants(module: nn.Module) -> nn.Module:
    """Turn every parameter and buffer of a module, in place, into a buffer that is never saved.

    It computes as before and `.to(device)` moves it, but no optimizer, checkpoint, averaged copy or
    gradient bucket of whatever holds it sees a tensor.
    """
    for part in module.eval().modules():
        tensors = [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]
        for name, tensor in tensors:
            delattr(part, name)
            part.register_buffer(name, tensor.detach(), persistent=False)
        if isinstance(part, nn.modules.batchnorm._NormBase):
            # Else it adds its counter to any state_dict that its owner loads, as an unexpected key.
            part.track_running_stats = False
    return module


def load_constants(module: nn.Module, name: str, path: str | Path | None = None) -> None:
    """Fill a module from a .safetensors file (strict; half precision is widened), then freeze it.

    path: None is the file `name` of dcar/weights. Raises FileNotFoundError, with the command that
    makes the file, where there is none.
    """
    path = Path(path or SHIPPED / f"{name}.safetensors")
    if not path.is_file():
        raise FileNotFoundError(
            f"no weights at {path}; `python -m dcar.models.weights_build {name} --out {path}` "
            "makes them"
        )
    module.load_state_dict(load_file(path))
    as_constants(module)


def save_tensors(
    tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """One .safetensors file with the rights of any new file; the library's is its owner's alone."""
    save_file(dict(tensors), path, metadata=dict(metadata) if metadata else None)
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)
