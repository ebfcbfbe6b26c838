"""However a step is split over ranks and micro-batches, the weights are those of one process."""

import os
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch

from dcar.data.loader import ShardLoader
from dcar.data.shards import write_shards
from dcar.data.stream import ShardStream
from dcar.data.transforms import ImageTransform
from dcar.models.draws import Draws
from tests.shards import row

SCRIPT = Path(__file__).with_name("ddp_run.py")
KINDS = ["stage1", "stage2", "stage3", "generator", "generator_masked"]
SPLITS = ["1_4", "2_1", "2_2"]  # ranks_batches of a step


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights after some steps of every kind and split, as KIND_SPLIT.pt (fp32, gloo, CPU)."""
    folder = tmp_path_factory.mktemp("ddp")
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(folder), *KINDS],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_split_step_is_the_step_of_one_process(kind: str, split: str, trained: Path) -> None:
    one, other = (
        torch.load(trained / f"{kind}_{name}.pt", weights_only=True) for name in ("1_1", split)
    )
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=0, atol=1e-5, msg=name)


@pytest.mark.slow
def test_codes_were_revived_from_the_whole_step(trained: Path) -> None:
    weights = torch.load(trained / "stage2_2_2.pt", weights_only=True)
    assert bool(weights["network.quantizer.initialized"])
    assert int(weights["network.quantizer.revivals"]) == 5


def image_numbers(batch: int, *, rank: int, world: int, part: int, parts: int) -> list[int]:
    """What `Draws` calls the images of a micro-batch: seen in the numbers that it gives them."""
    whole = Draws(0).rand(batch * world * parts).tolist()
    mine = Draws(0, rank=rank, world=world, part=part, parts=parts).rand(batch).tolist()
    return [whole.index(value) for value in mine]


def loader(folder: Path, *, rank: int, world: int, batch_size: int) -> ShardLoader:
    stream = ShardStream(
        str(folder / "own-*.tar"),
        transform=ImageTransform(size=8),
        batch_size=batch_size,
        seed=3,
        shuffle=True,
        buffer=16,
        rank=rank,
        world=world,
    )
    return ShardLoader(stream)


@pytest.mark.parametrize("lanes", [1, 2])
@pytest.mark.parametrize(("world", "parts"), [(1, 4), (2, 1), (2, 2), (4, 1)])
def test_the_shard_loader_numbers_images_as_the_draws_do(
    lanes: int, world: int, parts: int, tmp_path: Path
) -> None:
    """The second step of an epoch that `lanes` ranks began: of one process, and split."""
    write_shards([row(f"k{number:03d}") for number in range(40)], tmp_path, "own", 10)
    begun = loader(tmp_path, rank=0, world=lanes, batch_size=8 // lanes)
    next(iter(begun))

    def keys(rank: int, world: int, parts: int) -> list[list[str]]:
        own = loader(tmp_path, rank=rank, world=world, batch_size=8 // world // parts)
        own.load_state_dict(begun.state_dict())
        return [list(batch["key"]) for batch in islice(own, parts)]

    (whole,) = keys(0, 1, 1)
    for rank in range(world):
        for part, own in enumerate(keys(rank, world, parts)):
            numbers = image_numbers(len(own), rank=rank, world=world, part=part, parts=parts)
            assert own == [whole[number] for number in numbers]
