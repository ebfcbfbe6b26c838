"""What a name means: paths, runs, experiments and shipped models, and errors that say where."""

from pathlib import Path

import pytest

from dcar.errors import CheckpointError
from dcar.models.checkpoints import SHIPPED
from experiments.names import find, find_checkpoint, nearest


def put(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{}")
    return path


def test_a_checkpoint_is_found_by_path_and_by_experiment(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    put(path)
    assert find_checkpoint(str(path), "outputs") == str(path)
    assert find_checkpoint("smoke/stage1", "out") == "out/smoke/stage1/checkpoints/last.ckpt"
    assert find_checkpoint(None, "outputs") is None
    last = tmp_path / "run/checkpoints/last.ckpt"
    assert find_checkpoint("run", str(tmp_path)) == str(last)  # to be written
    last.parent.mkdir(parents=True)
    assert find_checkpoint(str(tmp_path / "run"), "outputs") == str(last)  # its folder, empty
    last.touch()
    for reference, outputs in (("run", str(tmp_path)), (str(tmp_path / "run"), "outputs")):
        assert find_checkpoint(reference, outputs) == str(last)


def test_a_model_folder_is_found_by_path_and_by_a_shipped_model_s_name(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    assert find_checkpoint(str(folder), "outputs") == str(folder)
    shipped = str(SHIPPED / "mini")
    assert find_checkpoint("mini", str(tmp_path)) == shipped
    trained = tmp_path / "mini" / "model"  # what the recipe of that name leaves
    trained.mkdir(parents=True)
    (trained / "config.json").write_text("{}")
    assert find_checkpoint("mini", str(tmp_path)) == shipped
    assert find("mini", str(tmp_path), key="ckpt") == SHIPPED / "mini"
    assert find_checkpoint(str(trained.parent), "outputs") == str(trained)


@pytest.mark.parametrize("models_first", [False, True])
def test_a_run_s_folder_gives_its_checkpoint_or_its_model(
    models_first: bool, tmp_path: Path
) -> None:
    last = put(tmp_path / "run" / "checkpoints" / "last.ckpt")
    folder = put(tmp_path / "run" / "model" / "config.json").parent
    for reference in ("run", str(tmp_path / "run")):
        wanted = folder if models_first else last
        assert find(reference, str(tmp_path), key="ckpt", models_first=models_first) == wanted
    for path in (last, folder):
        assert find(str(path), str(tmp_path), key="ckpt", models_first=models_first) == path


def test_a_run_without_a_model_gives_its_checkpoint(tmp_path: Path) -> None:
    last = put(tmp_path / "run" / "checkpoints" / "last.ckpt")
    for reference in ("run", str(tmp_path / "run")):
        assert find(reference, str(tmp_path), key="init_from") == last


def test_what_is_not_there_is_an_error_that_says_where_it_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError,
        match=r"key=mimi is no checkpoint.*mean .mini.*last.ckpt in mimi or .*/mimi$",
    ):
        find("mimi", str(tmp_path), key="key")


def test_the_nearest_name_is_told_where_one_is_near() -> None:
    assert nearest("stage11", ["stage1", "generator"]) == "; did you mean 'stage1'?"
    assert nearest("x", ["stage1", "generator"]) == ""
