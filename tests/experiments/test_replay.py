"""Replaying a flight record: the step is reproduced, explained, and runs no stranger's code."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.callbacks import Callback
from omegaconf import OmegaConf

from dcar.errors import CheckpointError, NonFiniteError
from dcar.lit.base import BaseModule
from dcar.lit.guard import NonFiniteGuard
from experiments.components import build
from experiments.config import experiment_names, load_config
from experiments.replay import (
    TARGETS,
    build_module,
    check_names,
    module_config,
    not_finite,
    read_record,
    repeat,
    replay,
)
from experiments.run import RunOptions, main
from tests.lit.nonfinite_run import Poison, precise_trainer
from tests.toys import ToyData

TRAININGS = (
    "finetune/decoder",
    "finetune/generator",
    "finetune/lora",
    "finetune/residual_head",
    "finetune/tokenizer",
    "generator/",
    "judge",
    "quickstart/",
    "smoke/",
    "tokenizer/",
)
COMMAND = "--exp=debug/replay"
OVERRIDES = {
    "smoke/stage2": ["init_from=null", "module.kmeans_vectors=0"],
    "smoke/pretrain_256": ["tokenizer_from=null"],
}


class LargeWeights(Callback):
    """From the batch with this number on, a decoder whose numbers only fp32 can hold."""

    def __init__(self, number: int):
        self.number = number

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        if trainer.fit_loop.epoch_loop.total_batch_idx == self.number:
            first = next(pl_module.network.decoder.parameters())
            first.data.mul_(1e6)


def failed_run(
    name: str,
    folder: Path,
    callback: Callback,
    *,
    precision: str = "32-true",
    accumulate: int = 1,
) -> tuple[Path, BaseModule]:
    """A record of a training by an experiment's own config, on toy pictures."""
    given = [f"outputs={folder}", f"accumulate={accumulate}", *OVERRIDES[name]]
    config = load_config(name, given)
    guard = NonFiniteGuard(folder=folder / "flight")
    module: BaseModule = build(
        config.module, guard=guard, optimizer=partial(torch.optim.SGD, lr=1e-4)
    )
    run_config: Any = OmegaConf.to_container(config, resolve=True)
    module.run_config = run_config
    trainer = precise_trainer(6, precision, callbacks=[callback])
    if precision == "16-mixed":  # from a scale of 1 on, a gradient's overflow is an error
        trainer.precision_plugin.scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    with pytest.raises(NonFiniteError):
        trainer.fit(module, datamodule=ToyData())
    (path,) = (folder / "flight").glob("*.pt")
    return path, module


def replayed(path: Path, capsys: pytest.CaptureFixture[str], *overrides: str) -> str:
    capsys.readouterr()
    assert main([COMMAND, f"record={path}", *overrides]) == 0
    return capsys.readouterr().out


def test_data_that_are_not_finite_are_named_with_their_sample(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, _ = failed_run("smoke/stage2", tmp_path, Poison("input", [3]))
    said = replayed(path, capsys)
    assert "the loss is not finite at step 3: TokenizerStage2 in 32-true" in said
    assert "inputs: NOT FINITE: image of toy/12" in said
    assert "first output that is not finite: network.encoder" in said
    assert said.strip().endswith(
        "reproduced, also in fp32: the data are not finite: image of toy/12"
    )
    assert said.count("on this CPU in") == 1  # what it happened in is fp32


@pytest.mark.slow
def test_numbers_beyond_fp16_are_told_from_those_that_no_precision_holds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    callback = LargeWeights(3)
    path, _ = failed_run("smoke/stage2", tmp_path, callback, precision="16-mixed")
    said = replayed(path, capsys)
    assert "in 16-mixed" in said and "loss scale: 1" in said
    assert "first output that is not finite: network.decoder.project_in" in said
    assert "reproduced, and finite in fp32: a value leaves the range of fp16" in said
    assert "trainer.precision=bf16-mixed" in said
    assert "not reproduced: in bf16-mixed" in replayed(path, capsys, "precision=bf16-mixed")


def test_weights_that_were_nan_before_the_step_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, _ = failed_run("smoke/pretrain_256", tmp_path, Poison("weight", [3]))
    said = replayed(path, capsys)
    assert "weights before the step: NOT FINITE: network.generator" in said
    assert "reproduced, also in fp32: the weights were not finite before the step" in said


@pytest.mark.parametrize("precision", ["32-true", pytest.param("16-mixed", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", OVERRIDES)
def test_losses_and_gradients_are_exactly_those_of_the_step(
    name: str, precision: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a step that a fault of the device has spoilt at the end: one gradient alone."""
    path, _ = failed_run(name, tmp_path, Poison("reduced", [3]), precision=precision)
    record = read_record(path)
    (bad,) = not_finite(record["largest"]["gradients"])
    repetition = replay(load_config("debug/replay", [f"record={path}"]), RunOptions())[0]
    assert repetition.precision == precision and repetition.is_finite
    assert repetition.losses == record["losses"]
    for parameter, value in record["largest"]["gradients"].items():
        if parameter != bad:
            assert repetition.gradients[parameter] == pytest.approx(value, rel=1e-5), parameter
    said = capsys.readouterr().out
    assert f"recorded gradients not finite: 1 of {len(repetition.gradients)}: {bad}" in said
    assert "not reproduced: " in said


@pytest.mark.slow
def test_a_step_that_accumulates_is_repeated_whole_as_another_rank_s_share(tmp_path: Path) -> None:
    """The draws are those of the place that the record names."""
    path, _ = failed_run("smoke/pretrain_256", tmp_path, Poison("reduced", [5]), accumulate=2)
    record = read_record(path)
    assert record["epoch"] == 1 and [index for _, index in record["batches"]] == [0, 1]
    built = build_module(record)
    repetition, largest = repeat(built, record, "32-true"), record["largest"]["gradients"]
    assert repetition.losses == record["losses"]
    for name in set(largest) - set(not_finite(largest)):
        assert repetition.gradients[name] == pytest.approx(largest[name], rel=1e-5), name
    elsewhere = build_module(record | {"rank": 1, "world_size": 2})
    assert repeat(elsewhere, record, "32-true").losses != record["losses"]


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in experiment_names() if n.startswith(TRAININGS)])
def test_every_shipped_training_could_be_replayed(name: str) -> None:
    """Its classes are in the table; nothing of its data, checkpoints or metrics is asked for."""
    given = [] if name == "judge" else ["init_from=x"]
    run_config: Any = OmegaConf.to_container(load_config(name, given), resolve=True)
    node = module_config(run_config)
    assert node.get("init_from") is None and node.get("tokenizer_from") is None
    assert node.val_names == [] and "metrics" not in node


STRANGE = [
    ({"_target_": "os.system", "command": "touch x"}, "names 'os.system': refused"),
    ({"a": [{"_target_": "dcar.models.checkpoints.os.system"}]}, "os.system': refused"),
    ({"_target_": "hydra.utils.get_object", "path": "os.system"}, "names 'os.system': refused"),
    ({"_target_": "hydra.utils.get_object"}, "names None: refused"),
    ({"x": "${oc.env:HOME}"}, "holds the interpolation '${oc.env:HOME}': refused"),
    ({"x": {"y": "${oc.create:{_target_: os.system}}"}}, "the interpolation .*: refused"),
]


@pytest.mark.parametrize(("node", "said"), STRANGE)
def test_a_record_from_a_stranger_runs_nothing_of_its_own(node: Any, said: str) -> None:
    pattern = said.replace("$", r"\$").replace("{", r"\{").replace("}", r"\}")
    with pytest.raises(CheckpointError, match=pattern):
        check_names({"module": node}, TARGETS)


def test_a_class_of_one_s_own_is_allowed_by_name() -> None:
    node = {"_target_": "mine.Net", "width": 3}
    with pytest.raises(CheckpointError, match=r"where you trust it, add allow=\[mine.Net\]"):
        check_names(node, TARGETS)
    check_names(node, [*TARGETS, "mine.Net"])


def test_a_strange_record_is_refused_before_anything_is_built(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    marker = tmp_path / "ran"
    node = {"_target_": "os.system", "command": f"touch {marker}"}
    record = {"dcar": {}, "batches": [], "run_config": {"module": node}, "precision": "32-true"}
    torch.save(record, tmp_path / "x.pt")
    assert main([COMMAND, f"record={tmp_path / 'x.pt'}"]) == 2
    assert "names 'os.system': refused" in capsys.readouterr().err and not marker.exists()


def test_what_is_no_record_is_refused_by_its_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "last.ckpt"
    assert main([COMMAND, f"record={path}"]) == 2
    assert f"there is no checkpoint at {path}" in capsys.readouterr().err
    torch.save({"dcar": {}, "state_dict": {}}, path)
    assert main([COMMAND, f"record={path}"]) == 2
    assert f"{path} is no flight record of an experiment" in capsys.readouterr().err


def test_a_precision_that_a_cpu_does_not_have_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = {"dcar": {}, "batches": [], "run_config": {"module": {}}, "precision": "32-true"}
    torch.save(record, tmp_path / "x.pt")
    assert main([COMMAND, f"record={tmp_path / 'x.pt'}", "precision=8"]) == 2
    assert "precision=8 is not one of 32-true, 16-mixed, bf16-mixed" in capsys.readouterr().err
