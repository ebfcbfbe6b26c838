"""Models on disk: checkpoints read safely, and model folders of config.json + safetensors.

A config that comes with weights is data from a stranger: it may name only the classes listed here,
and nothing is ever unpickled beyond tensors and plain containers.
"""

import hashlib
import importlib
import json
import os
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from dcar.errors import CheckpointError
from dcar.models.generator import HybridGenerator
from dcar.models.sampler import SamplerSettings
from dcar.models.tokenizer import HybridTokenizer
from dcar.models.weights_io import SHIPPED, save_tensors

COMPONENTS = (
    "dcar.models.autoencoder.Encoder",
    "dcar.models.autoencoder.Decoder",
    "dcar.models.quantizer.VectorQuantizer",
    "dcar.models.quantizer_adapters.simvq",
    "dcar.models.quantizer_adapters.fsq",
    "dcar.models.tokenizer.HybridTokenizer",
    "dcar.models.transformer.MaskedTransformer",
    "dcar.models.residual_head.ResidualHead",
    "dcar.models.residual_head.FlowResidualHead",
    "dcar.models.generator.HybridGenerator",
    "dcar.models.text_encoder.T5TextEncoder",
    "dcar.models.text_encoder.ByteT5TextEncoder",
    "dcar.models.sampler.SamplerSettings",
    "types.NoneType",  # a part that is left out
)
PARTS = ("tokenizer", "generator", "text_encoder")
TOKENIZER_MODULES = ("TokenizerStage2", "TokenizerStage3")  # whose tokenizers are of use to others
FINISHED = "a finished model"  # in place of a module's name, where a model folder was read


def build(config: Any) -> Any:
    """Build a component from plain data: `{"_target_": one of COMPONENTS, **arguments}`, nested.

    Raises CheckpointError for any other class.
    """
    if isinstance(config, Mapping):
        arguments = {key: build(value) for key, value in config.items() if key != "_target_"}
        return arguments if "_target_" not in config else _call(config["_target_"], arguments)
    if isinstance(config, list | tuple):
        return [build(value) for value in config]
    return config


def _call(target: str, arguments: dict[str, Any]) -> Any:
    if target not in COMPONENTS:
        raise CheckpointError(f"the config that comes with the weights names {target!r}: refused")
    module, name = target.rsplit(".", 1)
    return getattr(importlib.import_module(module), name)(**arguments)


def digest_path(path: Path) -> Path:
    """The file beside `path` with its sha256, as `sha256sum` writes it."""
    return path.with_name(f"{path.name}.sha256")


def known_digests(path: Path) -> list[str]:
    """The sha256 that `path` may have; two while it is being replaced, none where none is known."""
    try:
        lines = digest_path(path).read_text(errors="replace").splitlines()
    except FileNotFoundError:
        return []
    return [line[:64] for line in lines if re.match(r"[0-9a-f]{64}\b", line)]


def file_digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify_digest(path: Path) -> None:
    """Raises CheckpointError where a sha256 is known of `path` and is not what it holds.

    A running training may replace the file meanwhile: then the new one is looked at.
    """
    while True:
        before = os.stat(path).st_ino
        digest, known = file_digest(path), known_digests(path)
        if not known or digest in known:
            return
        if os.stat(path).st_ino == before:
            raise CheckpointError(
                f"{path} is damaged: its sha256 is not the one in {digest_path(path).name}"
            )


def read_checkpoint(path: str | Path, *, mapped: bool = False) -> dict[str, Any]:
    """A Lightning checkpoint of this project: plain containers and tensors, on the CPU.

    mapped: tensors are read when they are looked at, so that a glance at the rest is quick. Raises
    CheckpointError where the file is missing, damaged (its sha256 is compared where one lies beside
    it), not ours or holds a pickled object.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint at {path}")
    try:
        verify_digest(path)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds objects other than tensors and plain containers, which could run code "
            "when opened: refused. Convert it to safetensors where you trust it."
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if not isinstance(checkpoint, dict) or "dcar" not in checkpoint:
        raise CheckpointError(f"{path} was not written by a training run of this project")
    return checkpoint


def load_strictly(module: nn.Module, state: Mapping[str, Tensor], *, source: str | Path) -> None:
    """`load_state_dict` whose error lists the keys and shapes that differ (the first few)."""
    own = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    given = {name: tuple(tensor.shape) for name, tensor in state.items()}
    differing = sorted(k for k in own.keys() | given.keys() if own.get(k) != given.get(k))
    if differing:
        shown = [f"{k}: {own.get(k)} here, {given.get(k)} there" for k in differing[:8]]
        raise CheckpointError(
            f"{source} holds another architecture; {len(differing)} entries differ: "
            + "; ".join(shown)
        )
    module.load_state_dict(dict(state))


def load_tokenizer(
    path: str | Path, into: HybridTokenizer | None = None
) -> tuple[HybridTokenizer, str]:
    """The tokenizer of a checkpoint or model folder, and the name of the module that trained it.

    into: takes the weights; None builds a tokenizer as the checkpoint's own config says. Raises
    CheckpointError where neither stage 2 nor stage 3 wrote the checkpoint.
    """
    if Path(path).is_dir():
        tokenizer = into
        if tokenizer is None:
            tokenizer = _built(_read_config(Path(path)), "tokenizer").eval().requires_grad_(False)
        _load_part(tokenizer, Path(path), "tokenizer")
        return tokenizer, FINISHED
    checkpoint = read_checkpoint(path)
    module = checkpoint["dcar"]["module"]
    if module not in TOKENIZER_MODULES:
        raise CheckpointError(
            f"tokenizer_from={path} was written by {module}; tokens are those of "
            f"{' or '.join(TOKENIZER_MODULES)}"
        )
    tokenizer = build(checkpoint["dcar"]["config"]["tokenizer"]) if into is None else into
    load_strictly(tokenizer, checkpoint["network"], source=path)
    return tokenizer, module


@dataclass
class Model:
    """All that turns prompts into pictures. config: plain data, one entry a part and `size`."""

    tokenizer: HybridTokenizer
    generator: HybridGenerator
    text_encoder: nn.Module
    sampler: SamplerSettings
    config: dict[str, Any]

    @property
    def size(self) -> int:
        """Side of the square images it was trained on, in pixels."""
        return int(self.config["size"])


def build_model(config: Mapping[str, Any]) -> Model:
    """Parts from plain data with keys tokenizer, generator, text_encoder, sampler, size.

    Raises CheckpointError naming the key that is missing or that nothing can be built from.
    """
    missing = sorted({*PARTS, "sampler", "size"} - set(config))
    if missing:
        raise CheckpointError(f"the model's config lacks {missing}")
    if not isinstance(config["size"], int):
        raise CheckpointError(f"the model's config: size {config['size']!r} is no integer")
    parts = {part: _built(config, part) for part in (*PARTS, "sampler")}
    return Model(**parts, config=dict(config))


def _built(config: Mapping[str, Any], part: str) -> Any:
    try:
        found = build(config[part])
    except (TypeError, ValueError, KeyError) as error:
        raise CheckpointError(f"the model's config: {part}: {error}") from error
    if not isinstance(found, SamplerSettings if part == "sampler" else nn.Module):
        raise CheckpointError(f"the model's config: {part} is {found!r}")
    return found


def is_saved(text_encoder: nn.Module) -> bool:
    """A pre-trained text encoder is named, not copied, by what it is used in."""
    return bool(text_encoder.trainable)


def narrowed(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A floating-point tensor in `dtype`, others and single values, such as scales, as they are.

    Raises ValueError on overflow.
    """
    if dtype is None or tensor.ndim == 0 or not tensor.is_floating_point():
        return tensor.contiguous()
    narrow = tensor.to(dtype).contiguous()
    if not bool(narrow.isfinite().all()) and bool(tensor.isfinite().all()):
        raise ValueError(f"{name} has values beyond {dtype}: {tensor.abs().max():.3g}")
    return narrow


def save_model(
    model: Model,
    folder: str | Path,
    *,
    lineage: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write config.json and one safetensors file a part; the pre-trained text encoder by name.

    lineage: where the weights come from, kept in config.json; loading leaves it there.
    dtype: of the weights in the files, which loading widens again; None keeps each as it is.
    Raises ValueError naming a weight that `dtype` cannot hold.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for part in PARTS:
        module = getattr(model, part)
        if part != "text_encoder" or is_saved(module):
            weights = module.state_dict().items()
            state = {name: narrowed(f"{part}.{name}", value, dtype) for name, value in weights}
            save_tensors(state, folder / f"{part}.safetensors")
    config = model.config | ({"lineage": dict(lineage)} if lineage else {})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def shipped_models() -> list[str]:
    """Names of the models that come with the package."""
    return sorted(path.parent.name for path in SHIPPED.glob("*/config.json"))


def model_folder(reference: str | Path) -> Path:
    """The folder of that path, or of a shipped model's name where there is no such path."""
    folder = Path(reference)
    return SHIPPED / folder if not folder.exists() and str(folder) in shipped_models() else folder


def load_model(folder: str | Path) -> Model:
    """Read what `save_model` wrote, in eval mode; or a shipped model, by its name.

    Raises CheckpointError saying what is wrong.
    """
    folder = model_folder(folder)
    model = build_model(_read_config(folder))
    for part in PARTS:
        module = getattr(model, part)
        if part != "text_encoder" or is_saved(module):
            _load_part(module, folder, part)
        module.eval().requires_grad_(False)
    return model


def _read_config(folder: Path) -> Any:
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        names = ", ".join(shipped_models())
        raise CheckpointError(
            f"{folder} is no model folder, and no model that comes with the package ({names}): "
            f"{error}"
        ) from error
    if isinstance(config, dict):
        config.pop("lineage", None)  # of these weights, not of what is made of them
    return config


def _load_part(module: nn.Module, folder: Path, part: str) -> None:
    path = folder / f"{part}.safetensors"
    try:
        load_strictly(module, load_file(path), source=path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
