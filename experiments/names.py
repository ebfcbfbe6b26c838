"""What names on the command line mean: checkpoints, models, and the known name that is nearest."""

import difflib
from collections.abc import Sequence
from pathlib import Path

from dcar.errors import CheckpointError

SHIPPED = Path(__file__).parents[1] / "dcar/weights"  # weights_io has it too, but imports torch


def nearest(word: str, known: Sequence[str]) -> str:
    """`; did you mean 'X'?` with the closest of `known`, or nothing where none is close."""
    matches = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {matches[0]!r}?" if matches else ""


def places(reference: str, outputs: str, *, models_first: bool = False) -> list[Path]:
    """Checkpoints and configs of model folders that a name may mean, in the order of looking.

    It is the folder of a run or a model, a shipped model's name, or an experiment's.
    """

    def within(run: Path) -> list[Path]:
        checkpoints = [run / "checkpoints" / "last.ckpt"]
        models = [run / "config.json", run / "model" / "config.json"]
        return [*models, *checkpoints] if models_first else [*checkpoints, *models]

    shipped = SHIPPED / reference / "config.json"
    named = [*within(Path(reference)), shipped, *within(Path(outputs) / reference)]
    return list(dict.fromkeys(named))  # of an absolute path they are the same


def first_found(reference: str, outputs: str, *, models_first: bool = False) -> Path | None:
    """The given checkpoint, or the first of its `places`: a checkpoint or a model's folder."""
    path = Path(reference)
    if path.is_file():
        return path
    found = (p for p in places(reference, outputs, models_first=models_first) if p.is_file())
    place = next(found, None)
    return place.parent if place and place.name == "config.json" else place


def find_checkpoint(reference: str | None, outputs: str) -> str | None:
    """`first_found`; where nothing is, the checkpoint that the experiment will write."""
    if reference is None:
        return None
    if place := first_found(reference, outputs):
        return str(place)
    run = Path(reference) if Path(reference).is_dir() else Path(outputs) / reference
    return str(run / "checkpoints" / "last.ckpt")


def find(reference: str, outputs: str, *, key: str, models_first: bool = True) -> Path:
    """`first_found`; raises CheckpointError naming the key and where it was looked for."""
    if place := first_found(reference, outputs, models_first=models_first):
        return place
    given = f"{key}={reference}"
    if within := models_within(Path(reference)):
        raise CheckpointError(
            f"{given} is no model itself; there are {', '.join(map(str, within))} in it"
        )
    shipped = sorted(path.parent.name for path in SHIPPED.glob("*/config.json"))
    folders = dict.fromkeys(map(str, (Path(reference), Path(outputs) / reference)))
    raise CheckpointError(
        f"{given} is no checkpoint, no model that comes with the package ({', '.join(shipped)})"
        f"{nearest(reference, shipped)}, and no folder of a model or a run: there is no "
        f"config.json, model/config.json or checkpoints/last.ckpt in {' or '.join(folders)}"
    )


def models_within(folder: Path) -> list[Path]:
    """What can be drawn from in the folders of a recipe: models, and generators being trained."""
    from dcar.models.checkpoints import read_checkpoint  # with torch, which few names need

    models = [config.parent for config in folder.glob("*/model/config.json")]
    unfinished = [
        path
        for path in folder.glob("*/checkpoints/last.ckpt")
        if path.parents[1] / "model" not in models
        and read_checkpoint(path, mapped=True)["dcar"]["module"] == "MaskedARGenerator"
    ]
    return sorted(models + unfinished)
