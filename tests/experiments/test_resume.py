"""Where a training goes on: the last whole checkpoint, and what is said where that is not last."""

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from dcar.errors import CheckpointError
from dcar.lit.checkpoint_io import link_durably, save_durably
from dcar.models.checkpoints import digest_path
from experiments.config import ConfigError
from experiments.resume import find_resume, finished


def checkpoint(step: int) -> dict:
    return {"dcar": {"module": "Toy"}, "global_step": step, "weight": torch.full((999,), step)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """As a run leaves it that was stopped at step 30: the best was at 10."""
    folder = tmp_path / "checkpoints"
    save_durably(checkpoint(10), folder / "best.ckpt")
    for step in (20, 30):
        save_durably(checkpoint(step), folder / f"step_{step:08d}.ckpt")
    link_durably(folder / "step_00000030.ckpt", folder / "last.ckpt")
    return folder


def resumed(folder: Path, ckpt: str | None = "auto") -> str | None:
    config = OmegaConf.create({"output_dir": str(folder.parent), "max_steps": 30})
    path = find_resume(config, ckpt)
    return None if path is None else path.name


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES = [truncate, empty, flip, Path.unlink]


def test_a_run_goes_on_from_last_best_or_a_path_or_begins(folder: Path) -> None:
    assert resumed(folder, "auto") == resumed(folder, "last") == "last.ckpt"
    assert resumed(folder, "best") == "best.ckpt"
    assert resumed(folder, str(folder / "step_00000020.ckpt")) == "step_00000020.ckpt"


def test_the_folder_of_a_run_stands_for_its_last_checkpoint(folder: Path) -> None:
    assert resumed(folder, str(folder.parent)) == "last.ckpt"
    with pytest.raises(CheckpointError, match=r"--ckpt lst: .*did you mean 'last'\?"):
        resumed(folder, "lst")


def test_checkpoints_are_replaced_where_that_is_asked_for_alone(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"--ckpt=auto goes on .* --ckpt=new replaces them"):
        resumed(folder, None)
    assert resumed(folder, "new") is None
    for path in folder.iterdir():
        path.unlink()
    assert resumed(folder, None) is None


@pytest.mark.parametrize("ckpt", ["auto", "last"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_where_last_is_damaged_the_newest_good_one_takes_its_place_and_both_are_named(
    damage, ckpt: str, folder: Path, caplog
) -> None:
    damage(folder / "last.ckpt")  # the same file as that of step 30, unless it is but unlinked
    good = "step_00000030.ckpt" if damage is Path.unlink else "step_00000020.ckpt"
    with caplog.at_level("INFO"):
        assert resumed(folder, ckpt) == good
    (line,) = [r.getMessage() for r in caplog.records]
    assert str(folder / "last.ckpt") in line and str(folder / good) in line
    assert "damaged" in line or "there is no checkpoint" in line


def test_the_best_is_taken_where_it_is_the_newest_that_is_whole(folder: Path) -> None:
    flip(folder / "last.ckpt")
    flip(folder / "step_00000020.ckpt")
    assert resumed(folder) == "best.ckpt"


def test_a_best_of_a_later_step_comes_before_a_step_file(folder: Path) -> None:
    save_durably(checkpoint(25), folder / "best.ckpt")
    flip(folder / "last.ckpt")
    assert resumed(folder) == "best.ckpt"


def test_a_last_checkpoint_that_is_whole_goes_before_a_newer_step(folder: Path, caplog) -> None:
    """As a kill leaves it between the two."""
    save_durably(checkpoint(40), folder / "step_00000040.ckpt")
    assert resumed(folder) == "last.ckpt" and caplog.text == ""


@pytest.mark.parametrize("ckpt", ["auto", "last"])
def test_where_none_is_whole_nothing_is_begun_in_silence(ckpt: str, folder: Path) -> None:
    for path in folder.glob("*.ckpt"):
        truncate(path)
    with pytest.raises(CheckpointError, match=r"last.ckpt is damaged.* no other checkpoint"):
        resumed(folder, ckpt)


def test_without_any_checkpoint_auto_begins_and_last_and_best_are_errors(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    assert resumed(folder) is None
    for ckpt in ("last", "best", "there.ckpt"):
        with pytest.raises(CheckpointError, match=f"--ckpt {ckpt}: there is no checkpoint at"):
            resumed(folder, ckpt)


@pytest.mark.parametrize("damage", [truncate, empty, flip])
def test_a_checkpoint_given_by_name_has_no_substitute(damage, folder: Path) -> None:
    path = folder / "step_00000020.ckpt"
    damage(path)
    with pytest.raises(CheckpointError, match="--ckpt .*step_00000020.ckpt is damaged"):
        resumed(folder, str(path))
    damage(folder / "best.ckpt")
    with pytest.raises(CheckpointError, match="--ckpt best: .*best.ckpt is damaged"):
        resumed(folder, "best")


def test_a_checkpoint_without_a_digest_is_tried(folder: Path) -> None:
    for path in folder.glob("*.sha256"):
        path.unlink()
    assert resumed(folder) == "last.ckpt"
    truncate(folder / "last.ckpt")
    assert resumed(folder) == "step_00000020.ckpt"


def test_what_killed_runs_left_half_written_is_swept(folder: Path) -> None:
    orphan = folder / ".step_00000040.ckpt.999999999.partial"
    orphan.write_bytes(b"half")
    assert resumed(folder) == "last.ckpt" and not orphan.exists()


def test_a_run_is_finished_once_its_steps_are_taken_and_its_metrics_written(folder: Path) -> None:
    config = OmegaConf.create({"output_dir": str(folder.parent), "max_steps": 30})
    path = folder / "last.ckpt"
    assert not finished(None, config) and not finished(path, config)
    (folder.parent / "metrics.json").write_text("{}")
    assert finished(path, config)
    assert not finished(path, OmegaConf.merge(config, {"max_steps": 31}))
    digest_path(path).write_text(f"{'0' * 64}  last.ckpt\n")
    with pytest.raises(CheckpointError, match="damaged"):
        finished(path, config)
