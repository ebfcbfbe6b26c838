"""The long run of benchmarks/long_run.py in small: real processes, real SIGKILLs, the same end."""

from pathlib import Path

import pytest
import torch

from benchmarks.long_run import (
    Job,
    Memory,
    differences,
    outcome,
    run_through,
    run_with_kills,
)


@pytest.mark.slow
def test_a_stage_2_that_is_killed_on_the_way_ends_as_one_left_alone(tmp_path: Path) -> None:
    alone, killed = (
        Job("smoke/stage2", tmp_path / name, steps=20, saves=2) for name in ("alone", "killed")
    )
    memory = run_through(alone)
    kills = run_with_kills(killed, kill_every=8, seed=0)
    assert all(moment in kill for moment, kill in zip(("random", "saving"), kills, strict=True))
    assert memory.marks
    first = outcome(alone)
    assert first["global_step"] == 20 and first["callbacks"] and first["metrics"]
    assert all(first["optimizer_states"][index]["state"] for index in (0, 1))  # the GAN was on
    assert differences(first, outcome(killed)) == []


def test_one_bit_of_difference_is_found_by_its_name() -> None:
    weight = torch.tensor([0.0, 1.0])
    state = {"network": {"weight": weight}, "optimizer_states": [{"step": 1}], "nan": float("nan")}
    other = {"network": {"weight": weight * -1}, "optimizer_states": [{"step": 2}], "nan": 1.0}
    assert differences(state, {**state, "network": {"weight": weight.clone()}}) == []
    assert [line.split(":")[0] for line in differences(state, other)] == [
        "network.weight",
        "optimizer_states.0.step",
        "nan",
    ]
    signed = {**state, "network": {"weight": torch.tensor([-0.0, 1.0])}}
    assert [line.split(":")[0] for line in differences(state, signed)] == ["network.weight"]


def test_a_value_that_one_side_lacks_is_a_difference() -> None:
    assert [line.split(":")[0] for line in differences({"a": [1, None]}, {"a": [1]})] == [
        "a, length",
        "a.1",
    ]


def test_memory_is_compared_after_its_warm_up() -> None:
    used = [1.0, 2.0, *[100.0] * 4, *[110.0] * 4]
    marks = list(zip(range(1, 11), used, strict=True))
    assert Memory(marks).halves() == (100.0, 110.0)
