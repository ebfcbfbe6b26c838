"""The shape of the repository: who imports whom, one test file per file, sizes, no local paths."""

import ast
import importlib
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import dcar

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*(ROOT / "dcar").rglob("*.py"), *(ROOT / "experiments").rglob("*.py")])
MODULES = [path for path in SOURCES if path.name != "__init__.py"]
TESTS = sorted((ROOT / "tests").rglob("*.py"))

# Folder -> (what of this project it may import, what it never imports). docs/architecture.md.
LIGHTNING, CONFIG = {"lightning", "pytorch_lightning"}, {"omegaconf", "hydra"}
TABLE: dict[str, tuple[tuple[str, ...], set[str]]] = {
    "dcar/errors.py": ((), LIGHTNING | CONFIG | {"torch"}),
    "dcar/models": (
        ("dcar.models", "dcar.errors"),
        LIGHTNING | CONFIG | {"webdataset", "torchmetrics"},
    ),
    "dcar/data": (("dcar.data", "dcar.errors"), LIGHTNING | CONFIG),
    "dcar/evaluation": (
        ("dcar.models", "dcar.data", "dcar.evaluation", "dcar.errors"),
        LIGHTNING | CONFIG,
    ),
    "dcar/lit": (
        ("dcar.models", "dcar.data", "dcar.evaluation", "dcar.lit", "dcar.errors"),
        CONFIG,
    ),
    "dcar/pipeline.py": (
        (
            "dcar.data",
            "dcar.errors",
            "dcar.evaluation.pictures",
            "dcar.evaluation.sheets",
            "dcar.models",
        ),
        LIGHTNING | CONFIG,
    ),
    "dcar/__init__.py": (("dcar",), LIGHTNING | CONFIG),
    "experiments": (("dcar", "experiments"), set()),
}
# Tests that mirror no single source file, and why.
NO_SOURCE = {
    "test_contributing.py": "runs the worked example of CONTRIBUTING.md",
    "test_data_docs.py": "follows docs/data.md",
    "test_environment.py": "holds the lists of packages equal",
    "test_evaluation_docs.py": "follows docs/evaluation.md",
    "test_finetuning_docs.py": "follows docs/finetuning.md",
    "test_imports.py": "this file",
    "test_readme.py": "runs README.md",
    "test_shipped_model.py": "the model in dcar/weights/mini",
    "test_training_docs.py": "follows docs/training.md",
    "data/test_loader_in_lightning.py": "the loader in a Trainer",
    "lit/test_last_checkpoint_outside.py": "full disks, SLURM, another rank",
    "experiments/test_nodes.py": "two nodes joined by a cable, one of them lost",
    "experiments/test_long_run.py": "a short run of benchmarks/long_run.py",
    "data/test_stream_kinds.py": "mixtures, buckets, captions and tokens",
    "data/test_stream_remote.py": "the stream over a faulty server",
    "experiments/test_configs.py": "every file under experiments/configs",
    "experiments/test_mini.py": "the recipe of the shipped model in a few steps",
    "experiments/test_full_size.py": "the paper's sizes take a step",
    "lit/test_ddp.py": "two processes against one, for every training module",
}
# Sources that need no test of their own name, and why.
NO_TEST = {
    "dcar/data/sources/source.py": "types alone; each source's test goes through them",
    "dcar/lit/health_rules.py": "tests/lit/test_health.py has a training that is ill for each",
}


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def dotted(path: Path) -> str:
    return relative(path).removesuffix(".py").removesuffix("/__init__").replace("/", ".")


@cache
def nodes(path: Path) -> list[ast.AST]:
    return list(ast.walk(ast.parse(path.read_text())))


def imports(path: Path) -> list[tuple[str, int]]:
    """(module, relative level) of every import statement, also those inside functions."""
    found = []
    for node in nodes(path):
        if isinstance(node, ast.Import):
            found += [(alias.name, 0) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append((node.module or "", node.level))
    return found


def mirror_of(source: Path) -> str:
    """dcar/a/b.py -> a/test_b.py; experiments/run.py -> experiments/test_run.py."""
    folder, _, name = relative(source).removeprefix("dcar/").rpartition("/")
    return f"{folder}/test_{name}".removeprefix("/")


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_a_file_imports_only_what_its_folder_may(path: Path) -> None:
    rows = [row for folder, row in TABLE.items() if f"{relative(path)}/".startswith(f"{folder}/")]
    assert len(rows) == 1, f"the import table has {len(rows)} rows for {relative(path)}"
    allowed, never = rows[0]
    for module, _ in imports(path):
        root = module.split(".")[0]
        assert root not in never, f"{relative(path)} imports {module}"
        if root in ("dcar", "experiments"):
            inside = any(f"{module}.".startswith(f"{name}.") for name in allowed)
            assert inside, f"{relative(path)} imports {module}; it may import {allowed}"


def test_imports_are_absolute() -> None:
    paths = SOURCES + TESTS
    assert [relative(path) for path in paths if any(level for _, level in imports(path))] == []


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_every_module_imports(path: Path) -> None:
    assert importlib.import_module(dotted(path)).__name__ == dotted(path)


def test_every_public_name_resolves() -> None:
    names = getattr(dcar, "__all__", [])
    assert names, "dcar/__init__.py names no public API"
    for name in names:
        assert getattr(dcar, name) is not None


def test_pure_functions_import_without_the_heavy_packages() -> None:
    code = "import sys, dcar.models.masking; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {"transformers", "lightning", "hydra"}.isdisjoint(done.stdout.split())


def test_a_picture_is_drawn_without_what_only_training_needs() -> None:
    """A third of the time that a picture took from its command."""
    code = "import sys, experiments.sample; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {"lightning", "torchmetrics", "webdataset"}.isdisjoint(done.stdout.split())


@pytest.mark.parametrize("task", ["run", "data_build", "data_inspect"])
def test_tools_for_data_start_without_torch(task: str) -> None:
    """Seconds of each start, and a few hundred MB of every process that builds shards."""
    code = f"import sys, experiments.{task}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {"torch", "lightning", "transformers"}.isdisjoint(done.stdout.split())


def test_every_source_file_has_a_test_file() -> None:
    missing = [
        relative(path) for path in MODULES if not (ROOT / "tests" / mirror_of(path)).exists()
    ]
    assert sorted(set(missing) - set(NO_TEST)) == []


def test_every_test_file_has_a_source_file() -> None:
    mirrored = {mirror_of(path) for path in MODULES}
    present = {p.relative_to(ROOT / "tests").as_posix() for p in TESTS if p.name[:5] == "test_"}
    assert sorted(present - mirrored - set(NO_SOURCE)) == []


def test_init_files_are_empty_but_the_package_s_own() -> None:
    filled = [relative(path) for path in SOURCES if path.name == "__init__.py" and path.read_text()]
    assert filled == ["dcar/__init__.py"]
    assert [relative(path) for path in TESTS if path.name == "__init__.py"] == []


def lengths(path: Path) -> list[tuple[str, int]]:
    """(name, lines) of every function."""
    functions = (n for n in nodes(path) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))
    return [(f.name, (f.end_lineno or f.lineno) - f.lineno + 1) for f in functions]


def test_files_and_functions_stay_short() -> None:
    long = []
    for path in SOURCES + TESTS:
        if (lines := len(path.read_text().splitlines())) > 400:
            long.append(f"{relative(path)} has {lines} lines")
        long += [f"{relative(path)}: {name} has {n} lines" for name, n in lengths(path) if n > 60]
    assert long == []


def committed_texts() -> list[Path]:
    suffixes = {".py", ".md", ".yaml", ".yml", ".toml", ".txt", ".cff", ".json", ".ini", ""}
    folders = ["dcar", "experiments", "tests", "docs", "benchmarks", "assets", ".ci"]
    inside = [path for folder in folders for path in (ROOT / folder).rglob("*")]
    kept = [path for path in [*ROOT.glob("*"), *inside] if path.suffix in suffixes]
    return sorted(path for path in kept if path.is_file() and "__pycache__" not in path.parts)


def test_no_text_names_a_path_of_one_machine() -> None:
    """Tests may speak of the temporary folder; nothing may speak of a checkout's own place."""
    checkout, temporary = (re.compile(rf"(?<![\w.-])/{name}/") for name in ("work", "tmp"))
    guilty = []
    for path in committed_texts():
        text = path.read_text(encoding="utf-8", errors="ignore")
        if checkout.search(text) or (path not in TESTS and temporary.search(text)):
            guilty.append(relative(path))
    assert guilty == []


def anchors(path: Path) -> set[str]:
    """What GitHub calls the headings of a Markdown file."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in headings}


def test_pointers_into_the_documents_lead_to_sections() -> None:
    """`docs/method.md section 3.2` and `docs/method.md sections 5 and 11` name headings there."""
    pointer = re.compile(r"docs/(\w+)\.md\)? sections? (\d+(?:\.\d+)?)(?: and (\d+(?:\.\d+)?))?")
    dead = []
    for path in committed_texts():
        for name, *numbers in pointer.findall(path.read_text(encoding="utf-8", errors="ignore")):
            headings = (ROOT / "docs" / f"{name}.md").read_text()
            for number in filter(None, numbers):
                if not re.search(rf"^#+ {re.escape(number)}\.? ", headings, re.MULTILINE):
                    dead.append(f"{relative(path)}: docs/{name}.md section {number}")
    assert dead == []


def test_links_between_the_documents_lead_somewhere() -> None:
    dead = []
    for path in committed_texts():
        if path.suffix != ".md":
            continue
        for target, anchor in re.findall(
            r"\]\((?!https?:)([^)#\s]*)#?([^)\s]*)\)", path.read_text()
        ):
            file = path.parent / target if target else path
            if not file.exists() or (anchor and anchor not in anchors(file)):
                dead.append(f"{relative(path)}: {target}#{anchor}")
    assert dead == []
