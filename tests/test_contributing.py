"""The worked example of CONTRIBUTING.md, run as it is written."""

import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hydra.utils import instantiate

import dcar.models
from experiments.config import load_config

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
# First line of a block ("# path/of/the/file.py") -> the block.
BLOCKS = {
    block.splitlines()[0].removeprefix("# "): block
    for block in re.findall(r"^```(?:python|yaml)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
}
SOURCE = "dcar/models/binary_quantizer.py"
TEST = "tests/models/test_binary_quantizer.py"
CHOICE = "experiments/configs/tokenizer/quantizer/binary.yaml"
LOOK = "a look at it, in any Python shell"


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The example's module, importable under the name it would have in the package."""
    path = tmp_path / Path(SOURCE).name
    path.write_text(BLOCKS[SOURCE])
    name = SOURCE.removesuffix(".py").replace("/", ".")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(dcar.models, path.stem, module, raising=False)
    spec.loader.exec_module(module)
    yield module


def run(name: str) -> dict[str, Any]:
    namespace: dict[str, Any] = {}
    exec(compile(BLOCKS[name], f"CONTRIBUTING.md ({name})", "exec"), namespace)
    return namespace


def test_the_blocks_are_the_files_of_the_example() -> None:
    assert {SOURCE, TEST, LOOK, CHOICE} <= set(BLOCKS)


def test_the_tests_of_the_example_pass(example: ModuleType) -> None:
    tests = [test for name, test in run(TEST).items() if name.startswith("test_")]
    assert len(tests) == 5
    for test in tests:
        test()


def test_a_tokenizer_with_the_example_encodes_and_trains_a_batch(example: ModuleType) -> None:
    looked = run(LOOK)
    assert looked["recon"].shape == looked["image"].shape
    assert looked["latents"].ids.max() < looked["tokenizer"].num_codes
    for name, parameter in looked["tokenizer"].named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    measured = looked["tokenizer"].eval().encode(looked["image"])
    assert torch.equal(looked["tokenizer"].lookup(measured.ids), measured.discrete)


def test_the_command_of_the_example_selects_it(example: ModuleType, tmp_path: Path) -> None:
    choice = tmp_path / Path(CHOICE).relative_to("experiments/configs")
    choice.parent.mkdir(parents=True)
    choice.write_text(BLOCKS[CHOICE])
    command = re.findall(r"^python -m experiments\.run --exp=(\S+) (.*)$", TEXT, re.MULTILINE)
    (name, overrides), *_ = command
    config = load_config(name, [*overrides.split(), f"hydra.searchpath=[file://{tmp_path}]"])
    tokenizer = instantiate(config.tokenizer, _convert_="all")
    assert isinstance(tokenizer.quantizer, example.BinaryQuantizer)
    assert tokenizer.num_codes == config.num_codes
    latents = tokenizer.encode(torch.zeros(1, 3, config.size, config.size))
    assert torch.equal(tokenizer.lookup(latents.ids), latents.discrete)


def test_the_example_keeps_the_house_rules(example: ModuleType) -> None:
    lines = BLOCKS[SOURCE].splitlines()
    assert max(map(len, lines)) <= 100
    assert lines[1].startswith('"""')
