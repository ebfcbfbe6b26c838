"""Shards to shards by the command: any number of ranks and workers, killed and taken up again."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy

from experiments.predict import PATIENCE, resolve_strategy
from experiments.run import main
from tests.prediction_toys import UNEVEN, shard_bytes, tokenizer_checkpoint, write_pictures
from tests.servers import free_ports
from tests.toys import ROOT, SIZE


@pytest.fixture(scope="module")
def toys(tmp_path_factory) -> Path:
    """Pictures in shards of uneven size, and a tokenizer."""
    root = tmp_path_factory.mktemp("toys")
    write_pictures(root / "pictures", UNEVEN, changed={6: {"png": b"broken"}})
    tokenizer_checkpoint(root / "stage2.ckpt")
    return root


def command(toys: Path, out: Path, *overrides: str) -> list[str]:
    return [
        "--exp=data/precompute",
        f"tokenizer_from={toys}/stage2.ckpt",
        f"in={toys}/pictures/train-*.tar",
        f"out={out}",
        f"size={SIZE}",
        f"outputs={out}/..",
        "batch_size=3",
        "max_bad=0.1",
        "num_workers=0",
        "trainer.accelerator=cpu",
        "trainer.devices=1",
        *overrides,
    ]


def start(arguments: list[str]) -> subprocess.Popen[str]:
    ports = {"MASTER_PORT": str(free_ports(1)[0])}
    return subprocess.Popen(
        [sys.executable, "-m", "experiments.run", *arguments],
        cwd=ROOT,
        env=os.environ | ports | {"OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )


@pytest.fixture(scope="module")
def straight(toys: Path) -> dict[str, bytes]:
    """What one uninterrupted process leaves."""
    assert main(command(toys, toys / "straight")) == 0
    return shard_bytes(toys / "straight")


def test_each_input_shard_becomes_an_output_shard_of_its_name(
    toys: Path, straight: dict[str, bytes]
) -> None:
    shards = {path.name for path in (toys / "pictures").glob("*.tar")}
    assert set(straight) == shards | {f".progress/{name}.json" for name in shards} | {
        "manifest.json"
    }
    manifest = json.loads(straight["manifest.json"])
    assert manifest["source"] == "pictures" and manifest["dropped"] == {"broken image": 1}
    assert [shard["samples"] for shard in manifest["shards"]] == [5, 1, 7, 3]


def test_workers_change_nothing(toys: Path, straight: dict[str, bytes], tmp_path: Path) -> None:
    assert main(command(toys, tmp_path / "out", "num_workers=3")) == 0
    assert shard_bytes(tmp_path / "out") == straight


def test_only_what_is_missing_is_made_again(
    toys: Path, straight: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    some = f"in=[{toys}/pictures/train-0-000000.tar,{toys}/pictures/train-2-000000.tar]"
    assert main(command(toys, out, some, "max_bad=0")) == 0
    assert len(json.loads((out / "manifest.json").read_text())["shards"]) == 2
    times = {path: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    for _ in range(2):  # the second time there is nothing left to do
        assert main(command(toys, out)) == 0
        assert {path: path.stat().st_mtime_ns for path in times} == times
        assert shard_bytes(out) == straight


def test_other_settings_need_another_folder(
    toys: Path, straight: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also for shards that are not there yet: one manifest speaks for all of them."""
    new = write_pictures(tmp_path / "new", (2,), split="val")
    assert main(command(toys, toys / "straight", "crop=adm", f"in={new}/*.tar")) == 2
    assert "crop: 'adm' here, 'center' there" in capsys.readouterr().err
    assert shard_bytes(toys / "straight") == straight


def test_other_pictures_under_the_same_names_are_not_taken_for_done(
    toys: Path, straight: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_pictures(tmp_path / "other", UNEVEN[::-1], split="train")
    assert main(command(toys, toys / "straight", f"in={other}/*.tar")) == 2
    error = capsys.readouterr().err
    assert "straight/train-0-000000.tar was made from another shard of this name than" in error
    assert f"{other}/train-0-000000.tar" in error and "samples: 3 here, 5 there" in error
    assert shard_bytes(toys / "straight") == straight


def test_shards_are_never_written_over_those_they_are_made_from(
    tmp_path: Path, toys: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = write_pictures(tmp_path / "pictures", (2,))
    before = shard_bytes(pictures)
    for out in (pictures, tmp_path / "x" / ".." / "pictures"):
        assert main(command(toys, out, f"in={pictures}/*.tar", f"outputs={tmp_path}")) == 2
        assert "holds the input, whose shards would be replaced" in capsys.readouterr().err
    assert shard_bytes(pictures) == before


def test_without_a_manifest_of_the_input_a_run_goes_on_all_the_same(
    toys: Path, tmp_path: Path
) -> None:
    """And comes to the same bytes, as long as no input shard is touched."""
    pictures = write_pictures(tmp_path / "pictures", (2, 2))
    (pictures / "manifest.json").unlink()
    source = f"in={pictures}/*.tar"
    assert main(command(toys, tmp_path / "out", source)) == 0
    whole = shard_bytes(tmp_path / "out")
    (tmp_path / "out" / ".progress" / "train-1-000000.tar.json").unlink()
    assert main(command(toys, tmp_path / "out", source)) == 0
    assert shard_bytes(tmp_path / "out") == whole


def test_too_many_bad_samples_give_the_exit_code_of_data(
    toys: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(toys, tmp_path / "out", "max_bad=0.01")) == 3
    assert "1 of 17 samples could not be used" in capsys.readouterr().err
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_dry_run_writes_nothing(toys: Path, tmp_path: Path) -> None:
    assert main([*command(toys, tmp_path / "out"), "--dry-run"]) == 0
    assert list(tmp_path.iterdir()) == []


def test_input_that_is_not_there_is_named_before_anything_large_is_loaded(
    toys: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torn = tmp_path / "torn.ckpt"
    torn.write_bytes(b"no checkpoint")
    assert main(command(toys, tmp_path, "in=nowhere/*.tar", f"checkpoint={torn}")) == 3
    assert "nowhere/*.tar" in capsys.readouterr().err


@pytest.mark.parametrize("foreign", ["train-2-000000.tar", "manifest.json"])
def test_shards_of_another_kind_are_never_written_over(
    toys: Path, tmp_path: Path, foreign: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / foreign).write_bytes(b"mine")
    assert main(command(toys, out)) == 2
    assert f"{out}/{foreign} was not written by this command" in capsys.readouterr().err
    assert shard_bytes(out) == {foreign: b"mine"}


def test_a_shard_that_a_kill_has_left_without_its_record_is_made_again(
    toys: Path, straight: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    (out / ".progress").mkdir(parents=True)
    (out / ".progress" / "begun").touch()
    (out / "train-0-000000.tar").write_bytes(b"of the first shard")
    assert main(command(toys, out)) == 0
    assert shard_bytes(out) == straight


def test_a_shard_that_is_none_is_told_in_a_line_from_a_worker_too(
    toys: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "in" / "train-0-000000.tar"
    path.parent.mkdir()
    path.write_bytes(b"<html>" * 500)
    given = command(toys, tmp_path / "out", f"in={path}", "num_workers=1")
    assert main(given) == 3
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert line.startswith(f"error: {path}: ReadError") and "Traceback" not in line


def test_a_device_that_is_not_there_is_a_line(
    toys: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main(command(toys, tmp_path / "out", "trainer.accelerator=gpu")) == 2
    assert "error: trainer: " in capsys.readouterr().err


def test_a_rank_that_is_done_waits_as_long_as_it_takes() -> None:
    one = {"devices": 1, "accelerator": "cpu", "num_nodes": 1, "strategy": "auto"}
    assert resolve_strategy(one) == "auto"
    assert resolve_strategy(one | {"devices": 2, "strategy": "fsdp"}) == "fsdp"
    strategy = resolve_strategy(one | {"num_nodes": 2})
    assert isinstance(strategy, DDPStrategy) and strategy._timeout == PATIENCE
    assert PATIENCE.days >= 7


@pytest.mark.slow
def test_two_ranks_write_what_one_does(
    toys: Path, straight: dict[str, bytes], tmp_path: Path
) -> None:
    run = start(command(toys, tmp_path / "out", "trainer.devices=2"))
    _, errors = run.communicate(timeout=300)
    assert run.returncode == 0, errors[-3000:]
    assert "2 shards" in errors  # this rank's part of the four
    assert shard_bytes(tmp_path / "out") == straight


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code", "times"), [(signal.SIGKILL, -signal.SIGKILL, 2), (signal.SIGTERM, 143, 1)]
)
def test_a_run_that_is_stopped_goes_on_to_the_same_bytes(
    toys: Path, number: int, code: int, times: int, tmp_path: Path
) -> None:
    """Stopped each time one more of 12 shards has appeared."""
    pictures = write_pictures(tmp_path / "pictures", (40,) * 12)
    source, out = f"in={pictures}/train-*.tar", tmp_path / "out"
    for _ in range(times):
        before = set(out.glob("*.tar"))
        run = start(command(toys, out, source))
        while run.poll() is None and set(out.glob("*.tar")) == before:
            time.sleep(0.002)
        run.send_signal(number)
        run.communicate(timeout=300)
        assert run.returncode == code and not (out / "manifest.json").exists()
    for folder in (out, tmp_path / "whole"):
        assert main(command(toys, folder, source)) == 0
    assert shard_bytes(out) == shard_bytes(tmp_path / "whole")
