"""From a node of a configuration to the part it describes."""

from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import OmegaConf

from dcar.errors import CheckpointError, DataError
from experiments.config import ConfigError


def build(node: Any, **arguments: Any) -> Any:
    """Instantiate a config node; a wrong argument is a ConfigError that names node and class.

    What is wrong with weights or data stays the error that it is.
    """
    try:
        return instantiate(node, **arguments, _convert_="all")
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, CheckpointError | DataError | OSError):
            raise cause from error
        key = str(error).rsplit("full_key: ", 1)[-1].strip()
        reason = cause if cause is not None else str(error).splitlines()[0]
        target = OmegaConf.select(node, "_target_", default="?")
        raise ConfigError(f"{key or target}: {reason}") from error
