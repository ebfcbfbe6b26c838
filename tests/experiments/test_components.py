"""Nodes of a configuration become parts, or an error that names them."""

import pytest
from omegaconf import OmegaConf

from dcar.errors import CheckpointError, DataError
from experiments.components import build
from experiments.config import ConfigError


def test_a_node_becomes_its_part_and_takes_further_arguments() -> None:
    node = OmegaConf.create({"_target_": "fractions.Fraction", "numerator": 1})
    assert build(node, denominator=2) == 0.5


def test_lists_and_mappings_arrive_as_plain_ones() -> None:
    node = OmegaConf.create({"_target_": "builtins.dict", "widths": [1, 2]})
    assert type(build(node)["widths"]) is list


def test_an_argument_the_class_does_not_have_names_node_and_reason() -> None:
    config = OmegaConf.create({"part": {"_target_": "fractions.Fraction", "colour": 1}})
    with pytest.raises(ConfigError, match="part: .*colour"):
        build(config.part)


@pytest.mark.parametrize("kind", [CheckpointError, DataError, PermissionError])
def test_what_is_wrong_with_weights_or_data_stays_that(kind: type[Exception], monkeypatch) -> None:
    def refuse() -> None:
        raise kind("of another kind")

    monkeypatch.setitem(globals(), "refuse", refuse)
    raised = {"_target_": "tests.experiments.test_components.refuse"}
    with pytest.raises(kind, match="of another kind"):
        build(OmegaConf.create(raised))


def refuse() -> None:
    """Stands for a class that reads files when it is built."""
