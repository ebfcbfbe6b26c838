"""The table of where pictures lie."""

from pathlib import Path

import numpy as np

from dcar.data.sources.imagenet_index import (
    Row,
    count,
    load,
    mixed,
    save,
    table,
    told_apart,
    wnids,
)


def rows(number: int) -> list[Row]:
    return [
        Row("train.tar", 512 * n, n, f"n{n % 5:08d}_{n}.JPEG", f"n{n % 5:08d}")
        for n in range(number)
    ]


def test_rows_come_back_from_any_piece_of_the_file(tmp_path: Path) -> None:
    url = str(tmp_path / "table.npy")
    save(url, table(rows(100)))
    assert count(url) == 100
    assert list(load(url, 0, 100)) == rows(100)
    assert list(load(url, 37, 41)) == rows(100)[37:41]
    assert wnids(url) == [f"n{n:08d}" for n in range(5)]


def test_names_of_any_length_and_script_survive_the_chunks() -> None:
    long = [Row(f"täin/{'x' * n}", 0, -1, f"{n}ß", "n1") for n in (1, 200)]
    filler = [Row("a", 0, -1, "b", "c")] * 2**14  # as many as are made into an array at a time
    found = table([*long[:1], *filler, *long[1:]])
    assert len(found) == 2**14 + 2
    assert found["file"][-1].decode() == long[1].file and found["name"][0].decode() == "1ß"


def test_no_rows_make_an_empty_table() -> None:
    assert len(table([])) == 0


def test_mixing_depends_on_the_names_alone() -> None:
    forth, back = table(rows(400)), table(reversed(rows(400)))
    assert (mixed(forth) == mixed(back)).all()
    assert sorted(mixed(forth)["name"]) == sorted(forth["name"])


def test_every_run_of_mixed_rows_has_all_classes() -> None:
    by_class = sorted(rows(1000), key=lambda row: row.wnid)
    found = mixed(table(by_class))
    for start in range(0, 1000, 50):
        assert len(np.unique(found["wnid"][start : start + 50])) == 5


def test_only_names_that_repeat_are_given_their_class() -> None:
    given = [Row("f", 0, -1, name, wnid) for wnid in ("n1", "n22") for name in ("1.JPEG", "2.png")]
    alone = Row("f", 0, -1, "a name that is longer than the others.JPEG", "n1")
    found = told_apart(table([*given[:3], alone]))
    names = [b"n1/1.JPEG", b"2.png", b"n22/1.JPEG", alone.name.encode()]
    assert found["name"].tolist() == names
    assert found["wnid"].tolist() == [b"n1", b"n1", b"n22", b"n1"]
    unlike = table(rows(20))
    assert told_apart(unlike) is unlike


def test_names_that_are_not_utf_8_come_back(tmp_path: Path) -> None:
    url, row = str(tmp_path / "table.npy"), Row("n1/caf\udce9.JPEG", 0, -1, "caf\udce9.JPEG", "n1")
    save(url, table([row]))
    assert list(load(url, 0, 1)) == [row]
