"""The table of where pictures lie."""

from pathlib import Path

import numpy as np

from dcar.data.sources.imagenet_index import Row, count, load, mixed, save, table, wnids


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
