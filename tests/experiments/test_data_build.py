"""`--exp=data/build`: settings, dry run, exit codes; real kills and signals of a real command."""

import inspect
import os
import random
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import psutil
import pytest
from hydra.utils import get_class
from omegaconf import OmegaConf

from experiments.config import CONFIGS, REPOSITORY, load_config
from experiments.data_build import make_task
from experiments.run import main
from tests.builds import all_bytes, picture, samples_of
from tests.layouts import tar_bytes

SOURCES = sorted(path.stem for path in (CONFIGS / "source").glob("*.yaml"))


def pictures(folder: Path, count: int, size: tuple[int, int] = (40, 30)) -> Path:
    folder.mkdir()
    for number in range(count):
        (folder / f"{number:03d}.jpg").write_bytes(picture(number, size))
        (folder / f"{number:03d}.txt").write_text(f"words {number}")
    return folder


def arguments(folder: Path, out: Path, *more: str) -> list[str]:
    base = ["--exp=data/build", "source=folder", f"in={folder}", f"out={out}", "processes=1"]
    return [*base, "source.val_share=0", *more]


@pytest.mark.parametrize("name", SOURCES)
def test_a_source_s_file_names_all_its_settings_and_their_defaults(name: str) -> None:
    config = load_config("data/build", [f"source={name}", "in=x", "out=x"])
    given = OmegaConf.to_container(config.source, resolve=True)
    signature = inspect.signature(get_class(given.pop("_target_"))).parameters
    defaults = {key: parameter.default for key, parameter in signature.items()}
    listed = {key: list(v) if isinstance(v, tuple) else v for key, v in defaults.items()}
    assert given == {**listed, "path": "x"}


@pytest.mark.parametrize("name", SOURCES)
def test_shards_are_named_for_their_source(name: str) -> None:
    task = make_task(load_config("data/build", [f"source={name}", "in=x", "out=x"]))
    assert task.prefix == name and type(task.source).__module__.startswith("dcar.data.sources")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["source=foldr"], "did you mean 'folder'"),
        (["source.val_shar=1"], "source.val_shar"),
        (["source.val_share=2"], "val_share is 2"),
        (["source.val_share=lots"], "val_share is lots"),
        ([f"out={REPOSITORY}/README.md"], "README.md is no folder"),
        (["resiz=3"], "did you mean 'resize'"),
        (["resize=big"], "resize=big"),
        (["max_aspect=0.5"], "max_aspect=0.5"),
        (["near_duplicates=true"], "near_duplicates=True"),
        (["near_duplicates=20"], "near_duplicates=20"),
        (["quality=200"], "quality=200"),
        (["samples_per_shard=0"], "samples_per_shard=0"),
        (["processes=0"], "processes=0"),
        (["distributor=process"], "did you mean 'processes'"),
        (["prefix=a/b"], "prefix=a/b"),
        (["skip_broken=often"], "skip_broken=often"),
    ],
)
def test_a_bad_setting_is_exit_2_and_named(overrides, message, tmp_path: Path, capsys) -> None:
    folder = pictures(tmp_path / "in", 1)
    assert main([*arguments(folder, tmp_path / "out"), *overrides]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("missing", ["source", "in", "out"])
def test_what_must_be_given_is_named(missing: str, tmp_path: Path, capsys) -> None:
    given = arguments(tmp_path, tmp_path / "out")[:4]
    assert main([each for each in given if not each.startswith(f"{missing}=")]) == 2
    assert f"{missing} must be given" in capsys.readouterr().err


def test_input_that_is_missing_is_exit_3(tmp_path: Path, capsys) -> None:
    assert main(arguments(tmp_path / "nowhere", tmp_path / "out")) == 3
    assert str(tmp_path / "nowhere") in capsys.readouterr().err


def test_a_dry_run_says_what_would_be_built_and_writes_nothing(tmp_path, capsys) -> None:
    folder = pictures(tmp_path / "in", 10)
    (folder / "003.jpg").write_bytes(b"broken")
    more = ["samples_per_shard=4", "--dry-run", "min_size=20"]
    assert main(arguments(folder, tmp_path / "out", *more)) == 0
    said = capsys.readouterr().out
    assert "train: 3 units, 10 pictures: folder-train-000000 to folder-train-000002" in said
    assert "of the first 3 pictures" in said and "all 10: about" in said
    assert not (tmp_path / "out").exists()


def test_a_dry_run_of_archives_that_begin_with_an_empty_one_looks_at_the_next(
    tmp_path: Path, capsys
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.tar").write_bytes(tar_bytes([]))
    more = ["--exp=data/build", "source=webdataset", f"in={folder}", f"out={tmp_path / 'out'}"]
    assert main([*more, "--dry-run"]) == 3
    assert "holds nothing to build from: 1 unit, no picture" in capsys.readouterr().err
    (folder / "b.tar").write_bytes(tar_bytes([("1.jpg", picture(1)), ("1.txt", b"words")]))
    assert main([*more, "--dry-run"]) == 0
    assert "of the first 1 picture 1 are kept" in capsys.readouterr().out


def test_a_dry_run_of_nothing_says_so(tmp_path: Path, capsys) -> None:
    (tmp_path / "meta_data.json").write_text("{}")
    zipfile.ZipFile(tmp_path / "mjhq30k_imgs.zip", "w").close()
    given = ["--exp=data/build", "source=mjhq", f"in={tmp_path}", f"out={tmp_path / 'out'}"]
    assert main([*given, "--dry-run"]) == 3
    assert "holds nothing to build from: 0 units" in capsys.readouterr().err


def test_a_build_goes_on_without_a_broken_archive_where_it_may(tmp_path, capsys) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.tar").write_bytes(tar_bytes([("1.jpg", picture(1)), ("1.txt", b"words")]))
    (folder / "b.tar").write_bytes(b"no archive at all")
    given = ["--exp=data/build", "source=webdataset", f"in={folder}", f"out={tmp_path / 'out'}"]
    given.append("processes=1")
    assert main(given) == 3 and "b.tar: broken or cut short" in capsys.readouterr().err
    assert main([*given, "skip_broken=true"]) == 0
    assert (
        "1 lost with its archive" in capsys.readouterr().out
        and len(samples_of(tmp_path / "out")) == 1
    )


def test_a_folder_is_built_and_a_second_run_finds_it(tmp_path: Path, capsys) -> None:
    folder = pictures(tmp_path / "in", 10)
    (folder / "003.jpg").write_bytes(b"broken")
    command = arguments(folder, tmp_path / "out", "samples_per_shard=4", "prefix=mine")
    assert main([*command, "processes=2"]) == 0
    said = capsys.readouterr().out
    assert "train: 9 samples in 3 shards" in said and "1 broken image" in said
    assert main(command) == 0
    told = capsys.readouterr().out
    assert "was finished already" in told and "give another folder as out" in told
    assert len(samples_of(tmp_path / "out", "mine-train-*.tar")) == 9


def test_a_build_with_other_settings_is_refused_and_they_are_named(tmp_path, capsys) -> None:
    folder = pictures(tmp_path / "in", 2)
    assert main(arguments(folder, tmp_path / "out")) == 0
    assert main(arguments(folder, tmp_path / "out", "resize=20", "source.val_share=0.5")) == 2
    error = capsys.readouterr().err
    assert "resize was None, is 20" in error and "source.val_share was 0, is 0.5" in error


def test_a_command_that_built_nothing_may_be_corrected(tmp_path: Path, capsys) -> None:
    folder, out = pictures(tmp_path / "in", 2), tmp_path / "out"
    assert main(arguments(tmp_path / "im", out)) == 3
    assert main(arguments(folder, out)) == 0


def test_shards_are_not_put_among_the_pictures(tmp_path: Path, capsys) -> None:
    folder = pictures(tmp_path / "in", 2)
    assert main(arguments(folder, folder)) == 2
    assert "is the folder that is read" in capsys.readouterr().err


# Real kills of a real command.


def start(folder: Path, out: Path, *more: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "experiments.run", *arguments(folder, out, "processes=2", *more)],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def wait_for(process: subprocess.Popen, out: Path, pattern: str, count: int) -> None:
    """Until so many files lie in the folder, or the command has ended."""
    deadline = time.monotonic() + 300
    while process.poll() is None and len(list(out.glob(pattern))) < count:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def workers_of(process: subprocess.Popen) -> list[psutil.Process]:
    children = psutil.Process(process.pid).children()
    return [child for child in children if "spawn_main" in " ".join(child.cmdline())]


WORK = ("samples_per_shard=12", "resize=200", "near_duplicates=4")
MOMENTS = [
    (".build/settings.json", 1),
    (".build/scans/*.json", 2),
    (".folder-*.partial", 1),
    (".build/parts/*.json", 7),
    ("manifest.json", 1),
]


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    return pictures(tmp_path_factory.mktemp("large") / "in", 144, (900, 600))


@pytest.mark.slow
def test_a_build_killed_at_any_moment_goes_on_to_the_same_bytes(large: Path, tmp_path) -> None:
    whole, torn, rng = tmp_path / "whole", tmp_path / "torn", random.Random(0)
    assert start(large, whole, *WORK).wait() == 0
    kills = 0
    for pattern, count in MOMENTS:
        process = start(large, torn, *WORK)
        wait_for(process, torn, pattern, count)
        time.sleep(rng.uniform(0, 0.1))
        kills += process.poll() is None
        process.kill()
        process.communicate()
    process = start(large, torn, *WORK)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    assert kills >= 4 and all_bytes(torn) == all_bytes(whole)


# so many that none of these builds is done before it is stopped
SMALL_UNITS = ("samples_per_shard=2", "resize=200")


@pytest.mark.slow
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_the_build_cleanly(signum: int, code: int, large: Path, tmp_path) -> None:
    process = start(large, tmp_path / "out", *SMALL_UNITS)
    wait_for(process, tmp_path / "out", ".build/parts/*.json", 2)
    workers = workers_of(process)
    if signum == signal.SIGINT:
        os.killpg(process.pid, signum)  # as a terminal does
    else:
        process.send_signal(signum)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == code and "the same command goes on from here" in output
    assert "Traceback" not in output
    assert len(workers) == 2 and not any(worker.is_running() for worker in workers)
    assert list((tmp_path / "out").rglob("*.partial")) == []
    assert main(arguments(large, tmp_path / "out", *SMALL_UNITS)) == 0
    assert len(samples_of(tmp_path / "out")) == 144


@pytest.mark.slow
def test_a_killed_worker_ends_the_build_with_its_name_and_exit_3(large: Path, tmp_path) -> None:
    process = start(large, tmp_path / "out", *SMALL_UNITS)
    wait_for(process, tmp_path / "out", ".build/parts/*.json", 1)
    victim = workers_of(process)[0]
    victim.kill()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 3
    assert f"process {victim.pid} ended with SIGKILL" in output and "Traceback" not in output


def test_archives_are_not_written_where_they_would_be_read(tmp_path: Path, capsys) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.tar").write_bytes(tar_bytes([("1.jpg", picture(1)), ("1.txt", b"a")]))
    given = ["--exp=data/build", f"in={tmp_path}/in", f"out={tmp_path}/in/clean"]
    assert main([*given, "source=webdataset"]) == 2
    assert "lies within the folder that is read" in capsys.readouterr().err
