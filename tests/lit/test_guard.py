"""Steps that are not finite: judged alike on all ranks, never taken, and what each policy does."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dcar.lit.guard import KeptBuffers, NonFiniteGuard, StepCheck, check_over_ranks
from experiments.run import main
from tests.lit.nonfinite_run import INF, NAN, fit_poisoned
from tests.toys import ROOT

SCRIPT = Path(__file__).with_name("nonfinite_run.py")
GOOD, BAD_LOSS, BAD_GRADIENT = (
    StepCheck(*flags) for flags in ((True, True), (False, False), (True, False))
)


def judged(guard: NonFiniteGuard, *checks: StepCheck, scale: float | None = None) -> list[str]:
    scaled = [replace(check, scale=scale) for check in checks]
    return [guard.judge(check, step=step) for step, check in enumerate(scaled)]


def test_a_policy_that_does_not_exist_is_refused_with_those_that_do() -> None:
    with pytest.raises(ValueError, match="policy='stop' is not one of raise, skip, rollback"):
        NonFiniteGuard(policy="stop")
    for name in ("limit", "records"):
        with pytest.raises(ValueError, match=f"{name}=-1 must be at least"):
            NonFiniteGuard(**{name: -1})


@pytest.mark.parametrize("policy", ["raise", "skip", "rollback"])
def test_a_bad_step_is_dealt_with_by_policy_and_a_good_one_is_taken(policy: str) -> None:
    guard = NonFiniteGuard(policy=policy)
    assert judged(guard, GOOD, BAD_LOSS, BAD_GRADIENT, GOOD) == ["take", policy, policy, "take"]
    assert guard.skipped == 2 and guard.overflowed == 0


def test_so_many_bad_steps_in_a_row_are_an_error_under_every_policy() -> None:
    guard = NonFiniteGuard(policy="skip", limit=3)
    assert judged(guard, BAD_LOSS, BAD_LOSS, GOOD) == ["skip", "skip", "take"]
    assert judged(guard, BAD_LOSS, BAD_LOSS, BAD_LOSS) == ["skip", "skip", "raise"]
    assert "step 5, 3 steps in a row" in guard.describe(BAD_LOSS, step=5)


def test_the_row_goes_on_where_a_run_is_resumed() -> None:
    guard, resumed = NonFiniteGuard(policy="skip", limit=3), NonFiniteGuard(policy="skip", limit=3)
    judged(guard, BAD_LOSS, BAD_LOSS)
    resumed.load_state_dict(guard.state_dict())
    assert judged(resumed, BAD_LOSS) == ["raise"] and resumed.skipped == 3


def test_a_gradient_that_overflows_in_fp16_is_no_error_while_the_scale_can_fall() -> None:
    guard = NonFiniteGuard(limit=1)
    assert judged(guard, *[BAD_GRADIENT] * 5, scale=2.0) == ["overflow"] * 5
    assert guard.overflowed == 5 and guard.in_a_row == 0
    assert judged(guard, BAD_GRADIENT, scale=1.0) == ["raise"]
    assert judged(NonFiniteGuard(), BAD_LOSS, scale=2.0) == ["raise"]
    assert guard.scales[-1] == {"step": 0, "scale": 1.0, "verdict": "raise"}


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_one_value_among_losses_or_norms_is_enough(value: float) -> None:
    good, bad = torch.ones(3), torch.tensor([1.0, value, 1.0])
    assert check_over_ranks(good, good) == StepCheck(True, True)
    assert check_over_ranks(bad, good) == StepCheck(False, True, False, True)
    assert check_over_ranks(good, bad) == StepCheck(True, False, True, False)


def test_buffers_come_back_even_where_they_were_replaced() -> None:
    module = nn.BatchNorm1d(2)
    module.register_buffer("own", torch.ones(1))
    kept = KeptBuffers([module])
    module(torch.tensor([[NAN, 1.0], [2.0, 3.0]]))
    module.own = torch.zeros(1)
    kept.restore()
    assert module.running_mean.tolist() == [0, 0] and int(module.num_batches_tracked) == 0
    assert module.own.tolist() == [1]


def assert_harmless(found: dict[str, Any], verdict: str) -> None:
    """The third of four steps was not taken, and no number anywhere was ever bad."""
    assert found["verdicts"] == ["take", "take", verdict, "take"] and found["step"] == 4
    assert found["broken"] == [] and found["error"] == "" and found["skipped"] == 1
    assert all(tensor.isfinite().all() for tensor in found["weights"].values())


@pytest.mark.parametrize("kind", ["2", "generator"])
@pytest.mark.parametrize("what", ["input", "gradient"])
def test_weights_buffers_averages_and_optimizers_stay_finite(
    kind: str, what: str, tmp_path: Path
) -> None:
    assert_harmless(fit_poisoned(tmp_path, kind=kind, what=what, policy="skip"), "skip")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["1", "3"])
@pytest.mark.parametrize("what", ["input", "gradient", "discriminator"])
def test_the_other_stages_stay_finite_too(kind: str, what: str, tmp_path: Path) -> None:
    found = fit_poisoned(tmp_path, kind=kind, what=what, policy="skip", value=INF)
    assert_harmless(found, "skip")


def test_a_skipped_step_leaves_everything_as_it_was(tmp_path: Path) -> None:
    """One whose batch is bad ends where the run before that batch ended, BatchNorm included."""
    two = fit_poisoned(tmp_path / "two", kind="2", what="nothing", policy="skip", steps=2)
    three = fit_poisoned(tmp_path / "three", kind="2", what="input", policy="skip", steps=3)
    assert three["verdicts"][-1] == "skip"
    for name, tensor in two["weights"].items():
        assert torch.equal(three["weights"][name], tensor), name


def test_weights_that_are_already_nan_end_the_run_at_the_limit(tmp_path: Path) -> None:
    found = fit_poisoned(tmp_path, kind="1", what="weight", policy="skip", steps=9, limit=3)
    assert found["verdicts"] == ["take", "take", "skip", "skip"] and found["step"] == 4
    assert "the loss is not finite at step 4, 3 steps in a row" in found["error"]


def run_on_two_ranks(folder: Path, cases: dict[str, Any], seconds: int = 240) -> list[Any]:
    """What each rank found."""
    folder.mkdir(exist_ok=True)
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), str(folder), json.dumps(cases)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        _, errors = process.communicate(timeout=seconds)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, 9)
    assert process.returncode == 0, errors[-3000:]
    return [torch.load(folder / f"found_{rank}.pt", weights_only=True) for rank in (0, 1)]


DDP = {"strategy": "ddp", "rank": 1}
POLICY_CASES = {
    f"{kind} {what} {policy}": DDP | {"kind": kind, "what": what, "policy": policy}
    for kind in ("2", "generator")
    for what, policy in (("input", "skip"), ("gradient", "rollback"), ("reduced", "skip"))
}
FSDP2 = {"strategy": "fsdp2", "rank": 1, "kind": "generator", "record": True}
POLICY_CASES |= {
    "pieces skip": FSDP2 | {"what": "reduced", "policy": "skip"},
    "pieces rollback": FSDP2 | {"what": "input", "policy": "rollback"},
}
RAISING = DDP | {"kind": "2", "what": "input", "policy": "raise", "record": True}
LIMITED = DDP | {"kind": "generator", "what": "weight", "policy": "skip", "limit": 2}
HALF = DDP | {"kind": "generator", "precision": "16-mixed", "steps": 6, "policy": "skip"}
OVERFLOWED = HALF | {"what": "reduced", "batches": [4], "value": INF}
CODEBOOK = DDP | {"kind": "2", "what": "nothing", "policy": "raise", "steps": 50, "norm": "ln2d"}
CASES = POLICY_CASES | {
    "raise": RAISING,
    "limit": LIMITED,
    "overflow": OVERFLOWED,
    "codebook": CODEBOOK,
}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_on_two_ranks(tmp_path_factory.mktemp("ranks"), CASES)


@pytest.mark.slow
@pytest.mark.parametrize("name", POLICY_CASES)
def test_what_is_bad_on_one_rank_is_not_taken_on_either(
    name: str, two_ranks: list[dict[str, Any]]
) -> None:
    first, second = (found[name] for found in two_ranks)
    for found in (first, second):
        assert_harmless(found, POLICY_CASES[name]["policy"])
    # BatchNorm's running statistics are each rank's own until the next forward pass
    for key, tensor in first["weights"].items():
        assert "running" in key or torch.equal(second["weights"][key], tensor), key


@pytest.mark.slow
def test_all_ranks_raise_and_the_rank_with_the_bad_loss_keeps_the_record(
    two_ranks: list[dict[str, Any]],
) -> None:
    for found in (ranks["raise"] for ranks in two_ranks):
        assert found["step"] == 2 and found["verdicts"] == ["take", "take"]
        (path,) = found["records"]
        assert path.endswith("flight_step_00000002_rank_1.pt")
        assert f"the loss is not finite at step 2; the record of it is {path}" in found["error"]
        assert torch.load(path, weights_only=True)["rank"] == 1


@pytest.mark.slow
def test_a_record_of_weights_in_pieces_is_whole(two_ranks: list[dict[str, Any]]) -> None:
    (path,) = two_ranks[0]["pieces rollback"]["records"]
    record = torch.load(path, weights_only=True)
    whole = two_ranks[0]["pieces rollback"]["weights"]
    shapes = {name: tensor.shape for name, tensor in record["state_dict"].items()}
    assert shapes == {name: tensor.shape for name, tensor in whole.items()}
    assert record["rank"] == 1 and any(map(math.isnan, record["largest"]["outputs"].values()))
    assert all(map(math.isfinite, record["largest"]["weights"].values()))


@pytest.mark.slow
def test_the_limit_ends_all_ranks(two_ranks: list[dict[str, Any]]) -> None:
    for found in (ranks["limit"] for ranks in two_ranks):
        assert "the loss is not finite at step 3, 2 steps in a row" in found["error"]


@pytest.mark.slow
def test_an_overflow_seen_by_one_rank_lowers_the_scale_of_both(
    two_ranks: list[dict[str, Any]],
) -> None:
    first, second = (ranks["overflow"] for ranks in two_ranks)
    assert first["scalers"] == second["scalers"]
    assert first["verdicts"] == second["verdicts"] and first["verdicts"][4:] == ["overflow", "take"]
    before, after = first["scalers"][3:5]
    assert after["scale"] == before["scale"] / 2 and after["_growth_tracker"] == 0


@pytest.mark.slow
def test_the_codebook_is_the_same_on_every_rank_after_fifty_steps(
    two_ranks: list[dict[str, Any]],
) -> None:
    first, second = (ranks["codebook"]["weights"] for ranks in two_ranks)
    names = [name for name in first if ".quantizer." in name]
    assert int(first["network.quantizer.revivals"]) == 50
    for name in names:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.slow
def test_the_command_ends_with_exit_code_4_and_names_the_record(tmp_path: Path, capsys) -> None:
    sick = "criterion._target_=tests.lit.nonfinite_run.SickCriterion"
    assert main(["--exp=smoke/stage1", f"outputs={tmp_path}", sick]) == 4
    folder = tmp_path / "smoke" / "stage1"
    path = folder / "flight" / "flight_step_00000003_rank_0.pt"
    assert f"error: the loss is not finite at step 3; the record of it is {path}" in (
        capsys.readouterr().err
    )
    saved = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 2
    # a class that is not ours is run only where it is allowed by name
    assert main(["--exp=debug/replay", f"record={path}"]) == 2
    assert "names 'tests.lit.nonfinite_run.SickCriterion': refused" in capsys.readouterr().err
    allow = "allow=[tests.lit.nonfinite_run.SickCriterion]"
    assert main(["--exp=debug/replay", f"record={path}", allow]) == 0
    assert "not reproduced" in capsys.readouterr().out  # it is sick at its fourth call alone
