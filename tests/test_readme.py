"""Every command of README.md, run as it stands there (with other folders for its output)."""

import fcntl
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

import pytest

from tests.layouts import picture
from tests.servers import free_ports
from tests.toys import ROOT

README = (ROOT / "README.md").read_text()
BASH = [
    line
    for block in re.findall(r"```bash\n(.*?)```", README, re.S)
    for line in block.split("\n")
    if line
]
PYTHON = re.findall(r"```python\n(.*?)```", README, re.S)
INLINE = re.findall(r"`(make [a-z-]+)`", README)
# These need data that no test has: they are composed in full here, and their networks take a real
# step at full size on the embedded data in tests/experiments/test_full_size.py.
FULL_SIZE = [line for line in BASH if "data_root=" in line]
MAKE = [line for line in BASH if line.startswith("make")]
RUNS = [line for line in BASH if line not in FULL_SIZE + MAKE and "weights_build" not in line]

pytestmark = pytest.mark.slow


def run(line: str, folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable if word.endswith("bin/python") else word for word in shlex.split(line)]
    return subprocess.run([*words, *more], cwd=folder, capture_output=True, text=True)


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which `make quickstart` has been run.

    DCAR_WORKPLACE names a folder to use again.
    """
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    folder = Path(os.environ.get("DCAR_WORKPLACE") or base / "readme")
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # whoever comes second finds it done
        if not (folder / "pictures").exists():
            done = quickstart(folder)
            assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
            (folder / "pictures").mkdir()
            for number in range(20):
                (folder / "pictures" / f"{number}.jpg").write_bytes(picture(str(number)))
                (folder / "pictures" / f"{number}.txt").write_text(f"picture {number}")
    if "PYTEST_XDIST_WORKER" not in os.environ:
        shutil.rmtree(folder / "outputs/simvq", ignore_errors=True)  # of the time before
    return folder


def quickstart(folder: Path) -> subprocess.CompletedProcess[str]:
    """As a user runs it, but with the threads of this process: other tests run beside it."""
    command = ["make", "-C", str(ROOT), "quickstart", f"OUTPUTS={folder}/outputs"]
    return subprocess.run(command, capture_output=True, text=True)


def metrics(workplace: Path) -> dict:
    return json.loads((workplace / "outputs/quickstart/metrics.json").read_text())


def test_the_quickstart_leaves_its_report(workplace: Path) -> None:
    report = (workplace / "outputs/quickstart/report.html").read_text()
    assert report.count("<img") >= 4 and "http://" not in report.replace("http://www.w3.org", "")


def test_the_hybrid_path_beats_the_discrete_one(workplace: Path) -> None:
    figures = metrics(workplace)["tokenizer"]
    assert figures["psnr_hybrid"] >= figures["psnr_discrete"] + 1.5
    assert figures["rfid_mobilenetv2_hybrid"] < figures["rfid_mobilenetv2_discrete"]


def test_the_codebook_lives(workplace: Path) -> None:
    assert metrics(workplace)["tokenizer"]["codebook_usage"] >= 0.8


def test_right_captions_beat_shuffled_ones_on_pairs_never_seen(workplace: Path) -> None:
    figures = metrics(workplace)["generator"]
    assert figures["heldout_token"] <= figures["heldout_token_shuffled"] - 0.3


def test_a_second_quickstart_trains_nothing_again(workplace: Path) -> None:
    path = workplace / "outputs/quickstart/generator_64/checkpoints/last.ckpt"
    before = path.stat().st_mtime_ns
    done = quickstart(workplace)
    assert done.returncode == 0 and path.stat().st_mtime_ns == before
    assert "report:" in done.stdout + done.stderr


@pytest.mark.parametrize("line", RUNS)  # in one process: some take what those before them made
def test_a_command_runs(line: str, workplace: Path) -> None:
    done = run(line, workplace)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("line", FULL_SIZE)
def test_a_full_size_command_composes(line: str, tmp_path: Path) -> None:
    done = run(line, tmp_path, "--print-config")
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("line", [line for line in BASH if "weights_build" in line])
def test_the_vgg_weights_are_made_from_the_package_index(line: str, tmp_path: Path) -> None:
    done = run(line, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "weights/lpips_vgg.safetensors").stat().st_size > 10_000_000


@pytest.mark.parametrize("block", PYTHON)
def test_a_python_block_runs(block: str, workplace: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", block], cwd=workplace, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (workplace / "clock.png").is_file()


def test_tensorboard_opens(workplace: Path) -> None:
    (port,) = free_ports(1)  # whoever else has one open
    command = ["make", "-C", str(ROOT), "tensorboard", f"OUTPUTS={workplace}/outputs"]
    command.append(f"PORT={port}")
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        for _ in range(120):
            try:
                url = f"http://localhost:{port}/data/runs"
                with urllib.request.urlopen(url, timeout=2) as answer:
                    if any("generator_64" in run for run in json.load(answer)):
                        return
            except OSError:
                assert process.poll() is None
            time.sleep(0.5)  # it reads the runs while it answers
        pytest.fail("TensorBoard did not answer within a minute")
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)


def test_every_make_target_that_is_named_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    named = {command.split()[1] for command in [*INLINE, *MAKE]}
    assert named and named <= targets


def test_ci_runs_the_two_commands_the_readme_gives() -> None:
    script = (ROOT / ".ci/run").read_text()
    assert "make lint" in script and "make test" in script


@pytest.mark.skipif(
    shutil.which("npm") is None, reason="npm, which fetches the drawings, is missing"
)
def test_the_embedded_data_are_rebuilt_byte_for_byte(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dcar.data.sources.emoji", "--out", str(tmp_path / "emoji")]
    pytest.importorskip("resvg_py", reason="the extra dcar-lightning[emoji] is not installed")
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for path in sorted((ROOT / "assets/emoji").glob("*.tar")):
        assert (tmp_path / "emoji" / path.name).read_bytes() == path.read_bytes(), path.name
