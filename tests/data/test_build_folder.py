"""The folder of a build: begun, gone on with, finished, or another's."""

from pathlib import Path

import pytest

from dcar.data.build_folder import BuildFolder, differences
from dcar.data.build_unit import Part, part_url
from dcar.data.shards import ShardEntry, write_manifest
from dcar.data.sources.source import Unit
from dcar.errors import DataError


def folder(out: Path, **settings) -> BuildFolder:
    base = {"resize": None, "source": {"class": "Toy", "path": "a"}}
    return BuildFolder(str(out), "toy", settings={**base, **settings}, versions={"pillow": "1"})


def test_differences_are_told_at_any_depth() -> None:
    old = {"a": 1, "b": {"c": None, "d": [1]}, "gone": 0}
    new = {"a": 1, "b": {"c": 2, "d": [1]}, "new": 1}
    expected = ["b.c was None, is 2", "gone was 0, is None", "new was None, is 1"]
    assert differences(old, new) == expected and differences(old, old) == []


def test_an_unfinished_build_goes_on_with_the_same_settings_only(tmp_path: Path) -> None:
    folder(tmp_path).open()
    folder(tmp_path).open()
    (tmp_path / "toy-train-000000.tar").write_bytes(b"")
    with pytest.raises(ValueError, match="unfinished build .*resize was None, is 256") as refused:
        folder(tmp_path, resize=256).open()
    assert "source" not in str(refused.value)
    other = BuildFolder(str(tmp_path), "toy", settings=folder(tmp_path).settings, versions={})
    with pytest.raises(ValueError, match="versions.pillow was 1, is None"):
        other.open()


def test_a_build_that_has_built_nothing_takes_other_settings_and_forgets_the_old(tmp_path) -> None:
    folder(tmp_path).open()
    work = tmp_path / ".build"
    (work / "source").mkdir()
    (work / "source" / "table.npy").write_bytes(b"of the old input")
    (work / "lock").touch()
    folder(tmp_path, resize=256).open()
    assert '"resize": 256' in (work / "settings.json").read_text()
    assert not (work / "source" / "table.npy").exists() and (work / "lock").exists()


def test_a_finished_build_is_known_by_its_manifest_alone(tmp_path: Path) -> None:
    begun = folder(tmp_path)
    begun.open()
    write_manifest(tmp_path, {}, build=begun.settings)
    assert not folder(tmp_path).is_finished()
    begun.close()
    assert folder(tmp_path).is_finished()
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]
    assert folder(tmp_path).finished_facts()["build"] == begun.settings
    with pytest.raises(ValueError, match="finished build .*resize was None, is 8"):
        folder(tmp_path, resize=8).finished_facts()


def test_what_a_kill_left_of_a_finished_build_is_cleared(tmp_path: Path) -> None:
    write_manifest(tmp_path, {}, build=folder(tmp_path).settings)
    (tmp_path / ".build" / "parts").mkdir(parents=True)
    (tmp_path / ".build" / "parts" / "train-000000.json").touch()
    assert folder(tmp_path).is_finished()
    folder(tmp_path).finished_facts()
    assert not (tmp_path / ".build").exists()


def test_shards_and_manifests_of_others_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.tar").write_bytes(b"precious")
    with pytest.raises(ValueError, match="holds mine.tar, which this command did not write"):
        folder(tmp_path).open()
    assert [path.name for path in tmp_path.iterdir()] == ["mine.tar"]
    write_manifest(tmp_path, {})
    with pytest.raises(ValueError, match="manifest.json that this command did not write"):
        folder(tmp_path).finished_facts()


def test_two_builds_at_once_are_refused(tmp_path: Path) -> None:
    with folder(tmp_path).locked():
        with pytest.raises(ValueError, match="another build is at work"), folder(tmp_path).locked():
            pass
    with folder(tmp_path).locked():
        assert (tmp_path / ".build").is_dir()


def test_an_input_that_changed_is_refused_and_a_folder_may_be_moved(tmp_path: Path) -> None:
    def units(place: Path, count: int) -> list[Unit]:
        return [Unit("train", n, 1, [f"{place}/.build/source/list", n]) for n in range(count)]

    begun = folder(tmp_path / "a")
    begun.check_units(units(tmp_path / "a", 3))
    begun.check_units(units(tmp_path / "a", 3))
    with pytest.raises(DataError, match="3 units then and makes 4"):
        begun.check_units(units(tmp_path / "a", 4))
    with pytest.raises(DataError, match="holds nothing"):
        begun.check_units([])
    (tmp_path / "a").rename(tmp_path / "b")
    folder(tmp_path / "b").check_units(units(tmp_path / "b", 3))


def test_only_units_with_a_part_and_its_shards_are_built_and_unknown_shards_go(tmp_path) -> None:
    here, units = folder(tmp_path), [Unit("train", n, None, n) for n in range(3)]
    here.open()
    names = {0: "toy-train-000000-000.tar", 1: "toy-train-000001-000.tar"}
    for number, name in names.items():
        part = Part(shards=[ShardEntry(name, 1, 2, "c")])
        part.save(part_url(here.work, units[number]))
        (tmp_path / name).touch()
    (tmp_path / names[1]).unlink()
    assert here.unbuilt(units) == units[1:]
    for name in ("toy-train-000000-001.tar", "toy-train-000002-000.tar", "other.tar"):
        (tmp_path / name).touch()
    Part().save(part_url(here.work, units[2]))
    here.remove_unknown(units)
    assert sorted(path.name for path in tmp_path.glob("*.tar")) == ["other.tar", names[0]]


def test_torn_files_are_swept_and_nothing_else(tmp_path: Path) -> None:
    here = folder(tmp_path)
    here.open()
    torn = [tmp_path / ".toy-train-000000.tar.12.ab.partial", tmp_path / ".build/.x.json.1.partial"]
    kept = [tmp_path / "notes.partial", tmp_path / ".hidden"]
    for path in (*torn, *kept):
        path.touch()
    here.sweep_partials()
    assert [path.exists() for path in (*torn, *kept)] == [False, False, True, True]
