"""Low-rank adapters (LoRA) on a transformer's linear layers, by peft, and adapter folders on disk.

A folder is in peft's own format; the metadata of its weights say which base they belong to.
"""

import hashlib
import json
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from dcar.errors import CheckpointError, import_extra
from dcar.models.checkpoints import Model, is_saved, load_strictly
from dcar.models.fingerprint import fingerprint, tokenizer_fingerprint
from dcar.models.weights_io import save_tensors

TARGETS = (
    "attention.qkv",
    "attention.output",
    "cross_attention.query",
    "cross_attention.key_value",
    "cross_attention.output",
    "mlp.inner",
    "mlp.output",
)
NAME = "default"  # what peft calls the only adapter
PREFIX = "base_model.model."  # of every name in peft's files
DIGITS = 12  # of a fingerprint, in messages


def import_peft() -> Any:
    """Raises MissingExtraError that names the extra."""
    return import_extra("peft", extra="lora", needs="LoRA needs peft")


@dataclass(frozen=True)
class LoraSettings:
    """rank of the updates, which count alpha / rank times; dropout of what they read.

    targets: ends of the names of the linear layers that get one. Raises ValueError for impossible
    values.
    """

    rank: int = 16
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] = TARGETS

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", tuple(self.targets))
        if self.rank < 1:
            raise ValueError(f"rank={self.rank} must be at least 1")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} is not in [0, 1)")


@dataclass(frozen=True)
class Base:
    """The model that adapters belong to: where it was found, and its fingerprint."""

    name: str
    fingerprint: str

    def check(self, other: "Base", *, source: str | Path) -> None:
        """Raises CheckpointError where the adapters in `source` belong to `other`, not to this."""
        if self.fingerprint != other.fingerprint:
            raise CheckpointError(
                f"{source} belongs to the base {other.name} ({other.fingerprint[:DIGITS]}), "
                f"not to {self.name} ({self.fingerprint[:DIGITS]})"
            )


def describe_base(model: Model, name: str) -> Base:
    """Fingerprint over generator, trained text encoder and what decides the tokens.

    The tokenizer's decoder may be another one: fine-tuning it leaves the tokens as they are.
    """
    parts: dict[str, nn.Module] = {"generator": model.generator}
    if is_saved(model.text_encoder):
        parts["text_encoder"] = model.text_encoder
    both = fingerprint(nn.ModuleDict(parts)) + tokenizer_fingerprint(model.tokenizer)
    return Base(name, hashlib.sha256(both.encode()).hexdigest())


def check_targets(transformer: nn.Module, targets: tuple[str, ...]) -> None:
    """Raises ValueError for a target that is the end of no linear layer's name."""
    linear = [name for name, part in transformer.named_modules() if isinstance(part, nn.Linear)]
    unknown = [t for t in targets if not any(f".{name}".endswith(f".{t}") for name in linear)]
    if unknown:
        # the same in each block, so without the blocks' numbers
        known = sorted({n.split(".", 2)[2] if n.startswith("blocks.") else n for n in linear})
        raise ValueError(f"targets {unknown} name no linear layer; there are {known}")


def adapted_layers(module: nn.Module) -> dict[str, Any]:
    """peft's layers below `module` by name."""
    layer_class = import_peft().tuners.lora.LoraLayer
    return {name: part for name, part in module.named_modules() if isinstance(part, layer_class)}


def add_adapters(transformer: nn.Module, settings: LoraSettings) -> nn.Module:
    """Put adapters into `transformer`, in place, and freeze all else of it.

    Returns a module of the adapters alone: their names and the very parameters that `transformer`
    computes with. So an optimizer, a checkpoint or an averaged copy of it has none of the base.
    At first they change nothing. Raises ValueError for unknown targets, ImportError without peft.
    """
    peft = import_peft()
    check_targets(transformer, settings.targets)
    peft.inject_adapter_in_model(peft_config(settings), transformer, adapter_name=NAME)
    adapters = nn.Module()
    for name, layer in adapted_layers(transformer).items():
        place = adapters
        for part in name.split("."):
            if part not in place._modules:
                place.add_module(part, nn.Module())
            place = place.get_submodule(part)
        place.lora_A, place.lora_B = layer.lora_A[NAME], layer.lora_B[NAME]
    return adapters


def peft_config(settings: LoraSettings) -> Any:
    return import_peft().LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=list(settings.targets),
    )


def merge_adapters(module: nn.Module) -> nn.Module:
    """A copy of `module` on the CPU whose weights are base + adapters, in plain linear layers.

    At the end of a training Lightning has moved the adapters there, and left the frozen base.
    """
    module = deepcopy(module).cpu().requires_grad_(False)
    for name, layer in adapted_layers(module).items():
        layer.merge()
        parent, _, child = name.rpartition(".")
        setattr(module.get_submodule(parent), child, layer.get_base_layer())
    return module


@dataclass(frozen=True)
class Adapter:
    """What an adapter folder holds; weights by the names of `add_adapters`' module."""

    settings: LoraSettings
    base: Base
    weights: dict[str, Tensor]

    def save(self, folder: str | Path) -> None:
        """Write adapter_config.json and adapter_model.safetensors, which peft reads too."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = peft_config(self.settings)
        config.base_model_name_or_path, config.inference_mode = self.base.name, True
        config.target_modules = list(self.settings.targets)  # a set would be written in any order
        config.save_pretrained(folder)
        weights = {PREFIX + name: tensor.contiguous() for name, tensor in self.weights.items()}
        # one entry, because several would be written in any order
        about = json.dumps({"base": asdict(self.base), "settings": asdict(self.settings)})
        save_tensors(weights, folder / "adapter_model.safetensors", metadata={"dcar": about})

    @classmethod
    def load(cls, folder: str | Path) -> "Adapter":
        """Read what `save` wrote. Raises CheckpointError saying what is wrong."""
        path = Path(folder) / "adapter_model.safetensors"
        try:
            with safe_open(path, framework="pt") as file:
                about = file.metadata() or {}
                weights = {name: file.get_tensor(name) for name in file.keys()}
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error
        if "dcar" not in about:
            raise CheckpointError(f"{path} does not say which base it belongs to: not ours")
        facts = json.loads(about["dcar"])
        weights = {name.removeprefix(PREFIX): tensor for name, tensor in weights.items()}
        return cls(LoraSettings(**facts["settings"]), Base(**facts["base"]), weights)

    def merge_into(self, model: Model, *, name: str, source: str | Path) -> Model:
        """A model of base + adapters; `model`, found at `name`, takes the adapters itself.

        Raises CheckpointError where the adapters, from `source`, belong to another base.
        """
        describe_base(model, name).check(self.base, source=source)
        adapters = add_adapters(model.generator.transformer, self.settings)
        load_strictly(adapters, self.weights, source=source)
        generator: Any = merge_adapters(model.generator)
        return Model(model.tokenizer, generator, model.text_encoder, model.sampler, model.config)
