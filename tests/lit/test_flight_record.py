"""Flight records: all of a bad step in one file, which opens safely and leaves no trace."""

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dcar.errors import NonFiniteError
from dcar.lit.averaging import AverageWeights
from dcar.lit.flight_record import largest, output_maxima
from dcar.lit.frozen import Frozen
from dcar.lit.guard import NonFiniteGuard
from tests.lit.nonfinite_run import NAN, Poison, precise_trainer, toy_module
from tests.toys import ToyData, toy_trainer, weights


def record_of(folder: Path, kind: str, *, precision: str = "32-true", **options: Any) -> Any:
    """The record of a training whose batches from the third on hold a NaN, and the module."""
    module = toy_module(kind, guard=NonFiniteGuard(folder=folder), **options)
    module.run_config = {"module": {"_target_": "x"}}
    poison = Poison("input", range(2, 9))
    with pytest.raises(NonFiniteError, match="the loss is not finite"):
        precise_trainer(9, precision, callbacks=[poison]).fit(module, datamodule=ToyData())
    (path,) = folder.glob("*.pt")
    return torch.load(path, weights_only=True), module


def test_a_record_says_where_what_and_with_which_data(tmp_path: Path) -> None:
    record, module = record_of(tmp_path, "2")
    assert record["what"] == "the loss is not finite at step 2"
    place = {"step": 2, "epoch": 0, "rank": 0, "world_size": 1, "precision": "32-true"}
    assert {name: record[name] for name in place} == place
    assert record["dcar"]["module"] == "TokenizerStage2"
    assert record["run_config"] == module.run_config
    assert record["keys"] == [[f"toy/{index}" for index in range(8, 12)]]
    ((batch, index),) = record["batches"]
    assert index == 2 and batch["image"].shape == (4, 3, 32, 32) and batch["image"].isnan().any()
    assert set(record["random_states"][0]) >= {"python", "numpy", "torch"}
    ((network, discriminator),) = record["losses"]
    assert math.isnan(network) and math.isnan(discriminator)


def test_it_holds_the_largest_value_of_each_weight_gradient_and_output(tmp_path: Path) -> None:
    record, module = record_of(tmp_path, "2")
    top = record["largest"]
    for name, parameter in module.named_parameters():
        assert top["weights"][name] == pytest.approx(parameter.abs().max().item()), name
    names = {name for name, p in module.named_parameters() if p.requires_grad}
    assert set(top["gradients"]) == names
    assert math.isnan(top["gradients"]["network.encoder.project_in.conv.weight"])
    outputs = list(top["outputs"])
    assert outputs[0].startswith("network.encoder") and math.isnan(top["outputs"][outputs[0]])
    assert any(name.startswith("discriminator.") for name in outputs)
    assert any(name.startswith("criterion") for name in outputs)  # frozen modules too


def test_its_weights_and_buffers_are_those_before_the_step(tmp_path: Path) -> None:
    record, _ = record_of(tmp_path, "2")
    module = toy_module("2")
    toy_trainer(2).fit(module, datamodule=ToyData())
    assert set(record["state_dict"]) == set(module.state_dict())
    for name, tensor in module.state_dict().items():
        assert torch.equal(record["state_dict"][name], tensor), name


def test_it_holds_every_batch_of_a_step_that_accumulates(tmp_path: Path) -> None:
    record, _ = record_of(tmp_path, "generator", accumulate=2)
    assert record["step"] == 1 and [len(keys) for keys in record["keys"]] == [4, 4]
    assert [index for _, index in record["batches"]] == [2, 3]
    assert [len(losses) for losses in record["losses"]] == [1, 1]
    batch = record["batches"][0][0]
    assert "image" not in batch and batch["ids"].shape == (4, 8, 8)
    assert batch["residual"].isnan().any() and batch["caption"][0] == "toy 8"


def test_in_fp16_it_holds_the_loss_scale_of_the_steps_before(tmp_path: Path) -> None:
    record, _ = record_of(tmp_path, "generator", precision="16-mixed")
    scaler = record["scaler"]
    assert record["precision"] == "16-mixed"
    verdicts = [entry["verdict"] for entry in scaler["history"]]
    assert verdicts == ["overflow", "take", "raise"]  # the first scale is too large for this one
    assert [entry["scale"] for entry in scaler["history"]] == [65536.0, 32768.0, 32768.0]
    assert scaler["now"] == 32768.0


@pytest.mark.parametrize("kind", ["2", "generator"])
def test_writing_a_record_changes_nothing_of_the_training(kind: str, tmp_path: Path) -> None:
    ends, logged = [], []
    for folder in (None, tmp_path):
        module = toy_module(kind, guard=NonFiniteGuard(policy="skip", folder=folder))
        average = AverageWeights(decay=0.9)
        trainer = toy_trainer(4, callbacks=[Poison("gradient", [1]), average])
        torch.manual_seed(0)
        trainer.fit(module, datamodule=ToyData())
        random = torch.rand(1)
        ends.append(weights(module) | average.average.state_dict() | {"random": random})
        logged.append({name: float(value) for name, value in trainer.callback_metrics.items()})
    assert len(list(tmp_path.glob("*.pt"))) == 1
    for name, tensor in ends[0].items():
        assert torch.equal(tensor, ends[1][name]), name
    assert logged[0] == logged[1]


def test_a_record_that_cannot_be_written_hides_nothing(tmp_path: Path, caplog) -> None:
    (tmp_path / "flight").write_text("a file where the folder should be")
    module = toy_module("1", guard=NonFiniteGuard(folder=tmp_path / "flight"))
    trainer = toy_trainer(2, callbacks=[Poison("input", [0])])
    with caplog.at_level(logging.ERROR), pytest.raises(NonFiniteError) as raised:
        trainer.fit(module, datamodule=ToyData())
    assert "record" not in str(raised.value)
    assert f"no flight record at {tmp_path}/flight/flight_step_00000000_rank_0.pt" in caplog.text


def test_no_more_records_than_asked_for_and_none_of_a_dry_run(tmp_path: Path) -> None:
    for settings, count in (({}, 2), ({"fast_dev_run": 1}, 0)):
        folder = tmp_path / str(count)
        guard = NonFiniteGuard(policy="skip", folder=folder, records=2)
        trainer = toy_trainer(4, callbacks=[Poison("input", range(4))], **settings)
        trainer.fit(toy_module("1", guard=guard), datamodule=ToyData())
        assert len(list(folder.glob("*.pt"))) == count


class Doubling(nn.Module):
    def forward(self, values: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return values * 2, {"more": values * 3}


class Owner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.own, self.held = Doubling(), Frozen(Doubling())

    def forward(self, values: torch.Tensor) -> None:
        self.own(values)
        self.held(values)


def test_the_largest_output_is_over_all_calls_and_nan_wins() -> None:
    owner = Owner()
    with output_maxima(owner) as maxima:
        owner(torch.tensor([-4.0]))
        owner(torch.tensor([1.0]))
        assert maxima == {"own": 12.0, "held": 12.0}
        owner.own(torch.tensor([NAN]))
        owner.own(torch.tensor([100.0]))
    owner(torch.tensor([1000.0]))
    assert math.isnan(maxima["own"]) and maxima["held"] == 12.0
    assert largest(torch.empty(0)) == 0.0 and math.isnan(largest(torch.tensor([NAN, 1.0])))
