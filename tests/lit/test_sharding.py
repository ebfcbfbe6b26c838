"""FSDP2 on two ranks (gloo, CPU, fp32) trains as one process does and writes its checkpoints."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dcar.lit.averaging import AverageWeights
from dcar.lit.sharding import hold_pieces, load_whole, own_piece, shard_network, whole, whole_state
from dcar.models.checkpoints import read_checkpoint
from tests.lit.sharding_run import BATCH, IMAGES, STEPS, toy_module
from tests.toys import ToyData, toy_stage, toy_trainer

SCRIPT = Path(__file__).with_name("sharding_run.py")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharding")
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(folder)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def last(folder: Path) -> dict[str, Any]:
    return read_checkpoint(folder / "last.ckpt")


def facts(runs: Path, name: str) -> dict[str, Any]:
    ranks = 1 if name == "one" else 2
    return json.loads((runs / f"facts_{ranks}.json").read_text())[name]


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert type(tensor) is Tensor, f"{name} is not whole"
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=1e-5, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["two", "parts"])  # parts: accumulated, activations recomputed
def test_sharded_ranks_write_the_checkpoint_of_one_process(name: str, runs: Path) -> None:
    one, two = last(runs / "one"), last(runs / name)
    assert two["global_step"] == STEPS
    assert_close(two["state_dict"], one["state_dict"])
    assert_close(two["network"], one["network"])
    ours, theirs = two["optimizer_states"][0], one["optimizer_states"][0]
    assert ours["param_groups"] == theirs["param_groups"]
    for number, entry in theirs["state"].items():
        assert_close(ours["state"][number], entry)
    moved = one["state_dict"]["network.generator.transformer.output.weight"]
    assert moved.abs().max() > 1e-2  # it starts at zero


@pytest.mark.slow
def test_muon_takes_the_steps_of_one_process_on_sharded_ranks(runs: Path) -> None:
    one, two = last(runs / "muon_one")["state_dict"], last(runs / "muon_two")["state_dict"]
    names = [name for name, tensor in one.items() if ".blocks." in name and tensor.ndim == 2]
    assert len(names) > 10
    assert_close({name: two[name] for name in names}, {name: one[name] for name in names})
    adamw = last(runs / "one")["state_dict"]
    assert all((one[name] - adamw[name]).abs().max() > 1e-3 for name in names)


@pytest.mark.slow
def test_a_head_alone_learns_on_sharded_ranks_what_it_learns_in_one_process(runs: Path) -> None:
    one, two = (last(runs / f"head_{count}")["state_dict"] for count in ("one", "two"))
    assert_close(two, one)
    assert one["network.generator.residual_head.denoiser.output.weight"].abs().max() > 1e-2
    assert not one["network.generator.transformer.output.weight"].any()  # as it began


@pytest.mark.slow
def test_a_rank_holds_half_the_weights_and_the_norm_is_of_all_gradients(runs: Path) -> None:
    one, two = facts(runs, "one"), facts(runs, "two")
    assert max(two["pieces"]) < 0.51 * max(one["pieces"])
    assert two["norms"] == pytest.approx(one["norms"], rel=1e-5)
    assert min(two["norms"].values()) > 1  # so gradients were clipped


@pytest.mark.slow
def test_ranks_with_unlike_validations_validate_and_go_on(runs: Path) -> None:
    assert facts(runs, "two")["pictures"] == 2  # each drawn by the first rank alone


@pytest.mark.slow
def test_a_sharded_run_goes_on_exactly(runs: Path) -> None:
    straight, resumed = last(runs / "two"), last(runs / "resumed")
    assert facts(runs, "resumed")["norms"].keys() == {"4", "5"}
    for part in ("state_dict", "network"):
        for name, tensor in straight[part].items():
            assert torch.equal(resumed[part][name], tensor), name


@pytest.mark.slow
def test_one_process_goes_on_with_what_sharded_ranks_wrote(runs: Path) -> None:
    module, average = toy_module(), AverageWeights(decay=0.9)
    toy_trainer(STEPS, callbacks=[average]).fit(
        module,
        datamodule=ToyData(BATCH, count=IMAGES),
        ckpt_path=runs / "two" / "step_00000003.ckpt",
        weights_only=True,
    )
    assert average.average is not None
    assert_close(module.state_dict(), last(runs / "one")["state_dict"])
    assert_close(average.average.state_dict(), last(runs / "one")["network"])
    again = toy_module()
    again.load_network(runs / "two" / "last.ckpt", expected=("MaskedARGenerator",))
    assert_close(again.network.state_dict(), last(runs / "one")["network"])


def test_a_network_that_is_not_the_generator_s_is_refused_by_name() -> None:
    mesh: Any = None  # not looked at
    with pytest.raises(ValueError, match="TokenizerStage2 trains with trainer.strategy=ddp"):
        shard_network(toy_stage(2).network, mesh, module_name="TokenizerStage2")


def test_tensors_and_modules_that_are_not_sharded_are_taken_as_they_are() -> None:
    module, other = nn.Linear(2, 3), nn.Linear(2, 3)
    assert whole(module.weight) is module.weight and own_piece(module.weight) is module.weight
    load_whole(other, whole_state(module))
    hold_pieces(other)
    assert torch.equal(other.weight, module.weight)
    with pytest.raises(RuntimeError, match="Missing key"):
        load_whole(other, {"weight": module.weight})
