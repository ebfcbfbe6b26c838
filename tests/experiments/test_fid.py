"""`--exp=eval/fid`: the distance of two sets of shards, and what it refuses to compare."""

import importlib.util
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dcar.models.features import fid_features
from experiments.run import main
from tests.prediction_toys import Row, picture, write_pictures

DRAWN, REAL = (5, 2), (4, 5)  # pictures a shard


def as_row(image: Image.Image) -> Row:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return {"png": buffer.getvalue()}


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> Path:
    """Drawn pictures of 32 x 32; real ones of 40 x 32, among them the drawn ones' originals."""
    root = tmp_path_factory.mktemp("sets")
    small = {number: as_row(picture(50 + number, (32, 32))) for number in range(sum(DRAWN))}
    write_pictures(root / "drawn", DRAWN, changed=small)
    write_pictures(root / "real", REAL)
    return root


def fid(sets: Path, out: Path, *overrides: str) -> int:
    arguments = [
        "--exp=eval/fid",
        f"generated={sets}/drawn/*.tar",
        f"real={sets}/real/*.tar",
        f"out={out}",
        "fid_features=mobilenetv2",
        "batch_size=3",
        "num_workers=0",
        "device=cpu",
        *overrides,
    ]
    return main(arguments)


def features_of(pictures: list[Image.Image]) -> np.ndarray:
    pixels = torch.stack([torch.from_numpy(np.array(one)).permute(2, 0, 1) for one in pictures])
    return fid_features("mobilenetv2")(pixels).double().numpy()  # (n, F)


def frechet(one: np.ndarray, other: np.ndarray) -> float:
    """By the eigenvalues of the product of centred Gram matrices: F is larger than n."""
    shift = ((one.mean(0) - other.mean(0)) ** 2).sum()
    a, b = (x - x.mean(0) for x in (one, other))
    a, b = a / np.sqrt(len(a) - 1), b / np.sqrt(len(b) - 1)
    cross = np.linalg.svd(a @ b.T, compute_uv=False).sum()  # trace of the root of the product
    return float(shift + (a**2).sum() + (b**2).sum() - 2 * cross)


def test_the_distance_is_that_of_the_pictures_in_one_shape(sets: Path, tmp_path: Path) -> None:
    assert fid(sets, tmp_path / "fid.json") == 0
    drawn = features_of([picture(50 + number, (32, 32)) for number in range(7)])
    real = features_of([picture(number).crop((4, 0, 36, 32)) for number in range(9)])
    found = json.loads((tmp_path / "fid.json").read_text())
    assert found["fid"] == pytest.approx(frechet(drawn, real), rel=1e-3)
    assert (found["features"], found["shape"]) == ("mobilenetv2", [32, 32])
    assert (found["generated"]["images"], found["real"]["images"]) == (7, 9)


def test_a_set_is_at_no_distance_from_itself(sets: Path, tmp_path: Path) -> None:
    out = tmp_path / "fid.json"
    assert fid(sets, out, f"real={sets}/drawn/*.tar", "num_workers=1") == 0
    assert abs(json.loads(out.read_text())["fid"]) < 1e-2


@pytest.mark.parametrize(
    ("changed", "code", "message"),
    [
        ({4: as_row(picture(4, (32, 24)))}, 3, "toys/004 in train-0-000000.tar is of 32 x 24"),
        ({1: {"png": b"broken"}}, 3, "1 of 7 samples could not be used"),
    ],
)
def test_pictures_that_cannot_be_compared_are_named(
    sets: Path,
    tmp_path: Path,
    changed: dict[int, Row],
    code: int,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = write_pictures(tmp_path / "drawn", DRAWN, changed=changed)
    assert fid(sets, tmp_path / "fid.json", f"generated={folder}/*.tar") == code
    assert message in capsys.readouterr().err
    assert not (tmp_path / "fid.json").exists()


# as eval/generate and data/build leave them when they are stopped
@pytest.mark.parametrize("mark", [".progress/begun", ".build/settings.json"])
def test_a_set_that_is_not_finished_is_not_measured(
    mark: str, sets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_pictures(tmp_path / "drawn", DRAWN)
    (folder / "manifest.json").unlink()
    (folder / mark).parent.mkdir()
    (folder / mark).touch()
    assert fid(sets, tmp_path / "fid.json", f"generated={folder}/*.tar") == 3
    assert f"generated: {folder} is not finished" in capsys.readouterr().err


@pytest.mark.parametrize("side", ["generated", "real"])
@pytest.mark.parametrize(("count", "more"), [(1, []), (2, ["max_bad=1.0"])])
def test_one_picture_is_too_few_and_none_too(
    sets: Path,
    tmp_path: Path,
    side: str,
    count: int,
    more: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    broken: dict[int, Row] = {n: {"png": b"broken"} for n in range(count)} if more else {}
    folder = write_pictures(tmp_path / "few", (count,), changed=broken)
    assert fid(sets, tmp_path / "fid.json", f"{side}={folder}/*.tar", *more) == 2
    told = f"{side}={folder}/*.tar has {0 if more else 1} pictures: the distance needs two"
    assert told in capsys.readouterr().err


def test_real_pictures_are_not_cropped_at_random(
    sets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fid(sets, tmp_path / "fid.json", "crop=random") == 2
    assert "crop=random is none of adm, center" in capsys.readouterr().err


def test_a_dry_run_looks_at_one_batch_and_writes_nothing(sets: Path, tmp_path: Path) -> None:
    assert fid(sets, tmp_path / "fid.json", "--dry-run") == 0
    assert not list(tmp_path.iterdir())


def test_an_extra_that_is_missing_is_a_line(
    sets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if importlib.util.find_spec("torch_fidelity") is not None:
        pytest.skip("the extra eval is installed")
    assert fid(sets, tmp_path / "fid.json", "fid_features=inception") == 2
    printed = capsys.readouterr().err
    assert "dcar-lightning[eval]" in printed and "Traceback" not in printed
