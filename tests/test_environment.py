"""The lists of packages agree: pyproject.toml, environment.yml, constraints.txt, the imports."""

import ast
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from omegaconf import OmegaConf

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
ENVIRONMENT_TEXT = (ROOT / "environment.yml").read_text()
ENVIRONMENT = OmegaConf.create(ENVIRONMENT_TEXT).dependencies
PIP_SECTION = list(ENVIRONMENT[-1].pip)
COMMENTED = re.findall(r"^ +# - (\S+)$", ENVIRONMENT_TEXT, flags=re.MULTILINE)
PINS = dict(
    line.lower().split("==")
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if line and not line.startswith("#")
)
EVERY_REQUIREMENT = sorted({*PROJECT["dependencies"], *sum(EXTRAS.values(), [])})
# Distributions of modules that an optional extra brings, for machines that lack the extra.
OPTIONAL = {
    "imagehash": ["imagehash"],
    "pyarrow": ["pyarrow"],
    "ray": ["ray"],
    "peft": ["peft"],
    "s3fs": ["s3fs"],
    "gcsfs": ["gcsfs"],
    "resvg_py": ["resvg-py"],
    "torch_fidelity": ["torch-fidelity"],
    "torchvision": ["torchvision"],
    "vector_quantize_pytorch": ["vector-quantize-pytorch"],
}


def distribution(requirement: str) -> str:
    """The normalised name: "hydra_core>=1.3" -> "hydra-core"."""
    return re.split(r"[<>=!~;\[ ]", requirement)[0].lower().replace("_", "-")


def version(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", text))


def bounds(requirement: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The (lowest, first one too high) of "name>=low,<high"; a range without a top is open."""
    low = re.search(r">=([\d.]+)", requirement)
    high = re.search(r"<([\d.]+)", requirement)
    assert low, f"{requirement!r} has no lower bound"
    return version(low[1]), version(high[1]) if high else (sys.maxsize,)


def third_party_imports() -> set[str]:
    sources = [path for folder in ("dcar", "experiments", "tests") for path in files(folder)]
    roots = {root for path in sources for root in imported_roots(path)}
    return roots - sys.stdlib_module_names - {"benchmarks", "dcar", "experiments", "tests"}


def files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def imported_roots(path: Path) -> set[str]:
    roots = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            roots |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            roots.add(node.module.split(".")[0])
    return roots


def test_environment_and_pyproject_list_the_same_ranges() -> None:
    assert sorted(PIP_SECTION) == sorted(PROJECT["dependencies"] + EXTRAS["dev"])


def test_the_optional_groups_of_the_environment_are_the_extras() -> None:
    listed = {text for extra in EXTRAS.values() for text in extra}
    assert sorted(COMMENTED) == sorted(listed - set(PIP_SECTION))


def test_the_environment_has_a_python_that_the_project_accepts() -> None:
    python = next(entry for entry in ENVIRONMENT if str(entry).startswith("python"))
    assert version(python) >= version(PROJECT["requires-python"])


@pytest.mark.parametrize("requirement", EVERY_REQUIREMENT)
def test_constraints_pin_each_direct_dependency_inside_its_range(requirement: str) -> None:
    pins = {distribution(name): pin for name, pin in PINS.items()}
    assert distribution(requirement) in pins, f"constraints.txt does not pin {requirement}"
    low, high = bounds(requirement)
    assert low <= version(pins[distribution(requirement)]) < high


def test_each_third_party_import_is_a_named_dependency() -> None:
    installed, unnamed = packages_distributions(), []
    required = {distribution(text) for text in EVERY_REQUIREMENT}
    listed = {distribution(text) for text in [*PIP_SECTION, *COMMENTED]}
    for module in sorted(third_party_imports()):
        names = {distribution(name) for name in installed.get(module, [])}
        names |= set(OPTIONAL.get(module, []))
        if not (names & required and names & listed):
            unnamed.append(module)
    assert unnamed == []


def test_the_lightning_range_leaves_out_the_malicious_releases() -> None:
    ranges = [text for text in EVERY_REQUIREMENT if distribution(text) == "lightning"]
    assert ranges
    for low, _ in map(bounds, ranges):
        assert low > (2, 6, 3)  # 2.6.2 and 2.6.3 were uploaded by an attacker
        assert low >= (2, 6, 6)  # the oldest release that the tests have run on


def test_the_makefile_has_the_targets_that_it_and_the_documents_name() -> None:
    makefile = (ROOT / "Makefile").read_text()
    rules = set(re.findall(r"^([a-z-]+):", makefile, flags=re.MULTILINE))
    promised = set(re.findall(r"^\.PHONY: (.*)$", makefile, flags=re.MULTILINE)[0].split())
    for document in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        promised |= set(re.findall(r"(?:`|^)make ([a-z-]+)", document.read_text(), re.MULTILINE))
    assert {"install", "quickstart", "test", "test-fast", "lint"} <= rules
    assert promised <= rules


@pytest.mark.skipif(not (ROOT / ".venv/.installed").exists(), reason="not installed by make")
def test_the_package_is_found_beside_a_folder_of_its_name(tmp_path: Path) -> None:
    """As the clone itself is for a script that lies next to it."""
    (tmp_path / "dcar").mkdir()
    command = [ROOT / ".venv/bin/python", "-c", "from dcar import DCARPipeline"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
