"""Composes an experiment's configuration with Hydra, and says in one line what is wrong with it."""

import inspect
import os
import re
from collections.abc import Iterator, Sequence
from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dcar.data.storage import is_remote
from experiments.names import find_checkpoint, nearest

CONFIGS = Path(__file__).parent / "configs"
EXPERIMENTS = CONFIGS / "experiment"
REPOSITORY = Path(__file__).parents[1]


# Keys that a choice of `data` may or may not read.
OF_DATA = (
    "train_urls",
    "val_urls",
    "data_root",
    "captions",
    "val_captions",
    "caption_weights",
    "cut_captions",
)
# Keys that only some choices of other parts read.
OF_PARTS = (
    "lpips_vgg",
    "revival_decay",
    "residual_width",
    "residual_depth",
    "residual_repeats",
    "residual_full_precision",
)
OPTIONS = ("exp", "ckpt")  # of the command line, with dashes
OF_SEVERAL_KINDS = ("compile", "trainer.devices")  # whose users check them
# What keys take that are null by default.
WHEN_GIVEN = {
    **dict.fromkeys(("processes", "samples", "batch_size", "accumulate", "size"), "integer"),
    **dict.fromkeys(("max_steps", "steps", "height", "width", "near_duplicates"), "integer"),
    **dict.fromkeys(("guidance", "max_aspect", "memory_gib", "peak_tflops"), "number"),
    **dict.fromkeys(("tf32_tflops", "fp32_tflops"), "number"),
}


class ConfigError(ValueError):
    """The experiment, a key or a value is wrong: one line that names it and what is near."""


def quick_dtype() -> str:
    """bfloat16 on a GPU and on a CPU that have instructions for it, else float32."""
    import torch  # only where it is asked for: `--list` and the tools for data start without

    from dcar.models import precision

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return str(precision.quick_dtype(device)).removeprefix("torch.")


def given(value: Any, key: str) -> Any:
    """The value of a key that only some choices of a group need."""
    if value is None:
        raise ConfigError(f"{key} must be given: add {key}=VALUE")
    return value


def check_writable(path: str, key: str = "out", *, is_folder: bool = False) -> None:
    """Raises ConfigError, before any work is done, where nothing could be written at `path`."""
    if is_remote(path):
        raise ConfigError(f"{key}={path}: give a folder or file of this machine")
    place = os.path.abspath(path)
    if not is_folder:
        if os.path.isdir(place):
            raise ConfigError(f"{key}={path} is a folder")
        place = os.path.dirname(place)
    while not os.path.lexists(place):
        place = os.path.dirname(place)
    if not os.path.isdir(place):
        raise ConfigError(f"{key}={path}: {place} is no folder")
    if not os.access(place, os.W_OK | os.X_OK):
        raise ConfigError(f"{key}={path}: {place} cannot be written to")


def check_local(out: str | None, *, is_folder: bool = False) -> None:
    """`check_writable` for a task that writes to stores too, which are only known when it does."""
    if out and not is_remote(out):
        check_writable(out, is_folder=is_folder)


def at_least(config: DictConfig, least: int, *keys: str) -> None:
    """Raises ConfigError for the first of these keys whose number is below `least`."""
    for key in keys:
        if config[key] is None or config[key] < least:
            raise ConfigError(f"{key}={config[key]} must be at least {least}")


OmegaConf.register_new_resolver("given", given, replace=True)
OmegaConf.register_new_resolver("times", lambda one, other: one * other, replace=True)
OmegaConf.register_new_resolver("quick_dtype", lambda: f"torch.{quick_dtype()}", replace=True)
OmegaConf.register_new_resolver("repository", lambda: str(REPOSITORY), replace=True)
OmegaConf.register_new_resolver("find_checkpoint", find_checkpoint, replace=True)


def experiment_names() -> list[str]:
    """Every experiment that has a task of its own (files with a leading underscore are parts)."""
    paths = sorted(EXPERIMENTS.rglob("*.yaml"))
    return [str(p.relative_to(EXPERIMENTS).with_suffix("")) for p in paths if p.name[0] != "_"]


def first_comment(name: str) -> str:
    """The first comment line of an experiment's file that is not Hydra's package header."""
    lines = (EXPERIMENTS / f"{name}.yaml").read_text().splitlines()
    comments = [line[1:].strip() for line in lines if line.startswith("#")]
    return next(comment for comment in comments if not comment.startswith("@package"))


def load_config(name: str, overrides: Sequence[str] = ()) -> DictConfig:
    """The experiment's configuration, complete: no missing values, no broken interpolation.

    Raises ConfigError.
    """
    if name not in experiment_names():
        known = experiment_names()
        raise ConfigError(f"no experiment {name!r}{nearest(name, known)} (--list shows them)")
    base = _compose(name, [])
    overrides = [as_text(override) for override in overrides]
    swapped = _with_components(name, overrides) or base
    overrides = [_added(override, swapped) for override in overrides]
    try:
        config = _compose(name, overrides)
    except ConfigError as error:
        raise ConfigError(_explain(str(error), swapped, overrides)) from error
    _check_types(base, config, overrides)
    _check_use(name, config, overrides)
    try:
        OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ConfigError(_explain_missing(error)) from error
    for key in _required(name):
        if config[key] is None:
            raise ConfigError(f"{key} must be given: add {key}=VALUE")
    return config


def _required(name: str) -> list[str]:
    """Keys that the experiment's own file leaves open: OmegaConf keeps an inherited null there."""
    own = OmegaConf.load(EXPERIMENTS / f"{name}.yaml")
    return [str(key) for key in own if OmegaConf.is_missing(own, key)]


def _with_components(name: str, overrides: Sequence[str]) -> DictConfig | None:
    """The configuration with its components swapped, before their own settings change."""
    chosen = [one for one in overrides if (CONFIGS / one.partition("=")[0]).is_dir()]
    try:
        return _compose(name, chosen) if chosen else None
    except ConfigError:  # told when all is composed
        return None


def _added(override: str, base: DictConfig) -> str:
    """With Hydra's `++` where no file has the key, but the class that is built takes it."""
    key = override.partition("=")[0]
    parent, _, leaf = key.rpartition(".")
    return f"++{override}" if leaf in _arguments(base, parent) else override


def _arguments(base: DictConfig, parent: str) -> list[str]:
    """What the class of a node takes that the node does not give."""
    try:
        node = OmegaConf.select(base, parent) if parent else None
    except (OmegaConfBaseException, HydraException):
        return []
    if not isinstance(node, DictConfig):
        return []
    target = "lightning.Trainer" if parent == "trainer" else node.get("_target_")
    try:
        taken = inspect.signature(get_object(target)).parameters if target else ()
    except ValueError:  # a class written in C, as that of None is
        return []
    return [name for name in taken if name not in node]


def as_text(override: str) -> str:
    """An override as the shell gave it: free text, such as a prompt with commas, is quoted.

    Hydra would take `a, b` for a sweep over two values, which no experiment has, and `${x}` for
    another key's value, which no prompt means.
    """
    key, equals, value = override.partition("=")
    if key == "prompt" and "${" in value and value[0] not in "['\"":
        return _quoted(key, value.replace("${", "\\${"))
    try:
        if not OverridesParser.create().parse_override(override).is_sweep_override():
            return override
    except HydraException:
        if not equals:
            return override
        if value[:1] in ("[", "{"):
            escaped = value.replace("\\", "\\\\").replace('"', '\\"')
            raise ConfigError(
                f"{override}: no list or mapping; text that begins with {value[0]!r} is "
                f"given in quotes of its own: '{key}=\"{escaped}\"'"
            ) from None
    return _quoted(key, value)


def _quoted(key: str, value: str) -> str:
    escaped = value.replace("'", "\\'")
    return f"{key}='{escaped}'"


def _compose(name: str, overrides: Sequence[str]) -> DictConfig:
    return deepcopy(_composed(CONFIGS, name, tuple(overrides)))


@lru_cache(maxsize=256)  # each takes a third of a second, and a process asks for some again
def _composed(folder: Path, name: str, overrides: tuple[str, ...]) -> DictConfig:
    try:
        with initialize_config_dir(str(folder), version_base="1.3"):
            return compose(f"experiment/{name}", [f"+exp={name}", *overrides])
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError) as error:
        raise ConfigError(" ".join(str(error).split())) from error


def _explain(message: str, base: DictConfig, overrides: Sequence[str]) -> str:
    """Name the key of a failed override and the nearest that exists."""
    if found := re.search(r"Could not override '([^']+)'", message):
        parent = found[1].rpartition(".")[0]
        known = [*flat_keys(base), *(f"{parent}.{name}" for name in _arguments(base, parent))]
        if found[1] in [*known, *_groups()]:
            return f"this experiment has no choice of {found[1]}"
        if "/" in found[1]:
            return f"no group {found[1]!r}{nearest(found[1], _groups())}"
        if found[1] in OPTIONS:
            return f"unknown key {found[1]!r}; did you mean --{found[1]}?"
        parts = [name for name in known if found[1] in _arguments(base, name)]
        deeper = [name for name in known if name.rpartition(".")[2] == found[1]]
        deeper += [f"{name}.{found[1]}" for name in parts]
        hint = f"; did you mean {deeper[0]!r}?" if deeper else nearest(found[1], known)
        return f"unknown key {found[1]!r}{hint}"
    if found := re.search(r"Could not find '([^']+)/([^/']+)'", message):
        options = sorted(p.stem for p in (CONFIGS / found[1]).glob("*.yaml"))
        return f"{found[1]} has no choice {found[2]!r}{nearest(found[2], options)} (has {options})"
    return f"{message[:200]} (overrides: {' '.join(overrides)})"


def _groups() -> list[str]:
    """Kinds of components, as on the command line."""
    return sorted({path.parent.as_posix() for path in _choices()})


def _choices() -> list[Path]:
    """Files of components, relative to the folder of all configurations."""
    files = sorted(path.relative_to(CONFIGS) for path in CONFIGS.rglob("*.yaml"))
    return [path for path in files if path.parts[0] != EXPERIMENTS.name]


def _explain_missing(error: OmegaConfBaseException) -> str:
    key = error.full_key or "?"
    first_line = str(error).splitlines()[0]
    if found := re.search(r"ConfigError raised while resolving interpolation: (.*)", first_line):
        return found[1]
    if "Missing mandatory value" in first_line:
        return f"{key} must be given: add {key}=VALUE"
    return f"{key}: {first_line}"


def flat_keys(node: Any, prefix: str = "") -> Iterator[str]:
    """Dotted names of every key below `node`, groups included."""
    if isinstance(node, DictConfig):
        for key in node:
            name = f"{prefix}{key!s}"
            yield name
            yield from flat_keys(node._get_node(key), f"{name}.")


def _check_types(base: DictConfig, config: DictConfig, overrides: Sequence[str]) -> None:
    """A number stays a number, a switch a switch, a mapping a mapping."""
    for override in overrides:
        key = override.split("=")[0].lstrip("+~")
        try:
            old = OmegaConf.select(base, key)
            new = OmegaConf.select(config, key)
        except OmegaConfBaseException:
            continue
        if old == "auto" or new is None or "/" in key or key in OF_SEVERAL_KINDS:
            continue
        expected = WHEN_GIVEN.get(key, _kind(new)) if old is None else _kind(old)
        example = "" if old is None else f", as in {key}={old}"
        if expected != _kind(new) and not (expected == "number" and _kind(new) == "integer"):
            raise ConfigError(f"{key}={new}: expected {expected}{example}")


def _check_use(name: str, config: DictConfig, overrides: Sequence[str]) -> None:
    """Nothing is given that the experiment would ignore: data it does not read, parts of a base."""
    for override in overrides:
        key, _, value = override.lstrip("+").partition("=")
        if key in (*OF_DATA, *OF_PARTS) and value != "null" and not _is_read(config, key):
            what = "the data" if key in OF_DATA else "any part"
            hint = " or ".join(_readers(key))
            raise ConfigError(f"{key} is not read by {what} of {name}; {hint} reads it")
        part = key.partition("/")[0]
        if (CONFIGS / key).is_dir() and value != "null" and config.get(part, "") is None:
            raise ConfigError(f"{key}={value}: {name} takes its {key} from what it starts from")


def _is_read(config: DictConfig, key: str) -> bool:
    text = _text_of_data(config) if key in OF_DATA else OmegaConf.to_yaml(config)
    return _reads(text, key)


def _text_of_data(config: DictConfig) -> str:
    """What the data are made from, with the keys that these read."""
    text = OmegaConf.to_yaml(config.get("data") or config)
    for key in OF_DATA:
        if key in config and _reads(text, key):
            text += OmegaConf.to_yaml(OmegaConf.masked_copy(config, [key]))
    return text


def _readers(key: str) -> list[str]:
    """Choices of components that read a key, as on the command line."""
    return [
        f"{path.parent.as_posix()}={path.stem}"
        for path in _choices()
        if _reads((CONFIGS / path).read_text(), key)
    ]


def _reads(text: str, key: str) -> bool:
    return re.search(rf"\$\{{[^}}]*\b{key}\b", text) is not None


def _kind(value: Any) -> str:
    kinds: list[tuple[type | tuple[type, ...], str]] = [
        (bool, "true or false"),
        (int, "integer"),
        (float, "number"),
        (str, "text"),
        (DictConfig, "a mapping"),
    ]
    return next((name for kind, name in kinds if isinstance(value, kind)), "a list")
