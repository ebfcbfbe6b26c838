"""fp16 that is really fp16, on a CPU too: what computes in which precision, and does it learn."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from dcar.lit.last_checkpoint import LastCheckpoint
from dcar.lit.precision import precision_plugin
from experiments.run import main
from tests.lit.nonfinite_run import INF, Poison, Watch, precise_trainer, toy_module
from tests.toys import ToyData, weights

DTYPES = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16, "32-true": None}


def test_fp16_on_a_cpu_is_asked_for_by_a_plugin_and_nothing_else_is() -> None:
    plugin = precision_plugin("16-mixed", "cpu")
    assert plugin is not None and plugin.precision == "16-mixed"
    assert isinstance(plugin.scaler, torch.amp.GradScaler) and plugin.scaler.is_enabled()
    for precision in ("bf16-mixed", "32-true"):
        assert precision_plugin(precision, "cpu") is None
    assert precision_plugin("16-mixed", "cuda") is None
    has_gpu = torch.cuda.is_available() or torch.backends.mps.is_available()
    assert (precision_plugin("16-mixed", "auto") is None) == has_gpu


class Dtypes(Callback):
    """What autocast computes in, and what linear and convolutional layers give, while training."""

    def __init__(self) -> None:
        self.autocast: set[torch.dtype | None] = set()
        self.outputs: set[torch.dtype] = set()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        for module in pl_module.modules():
            if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
                module.register_forward_hook(self.note)

    def note(self, module: Any, inputs: Any, output: torch.Tensor) -> None:
        is_on = torch.is_autocast_enabled("cpu")
        self.autocast.add(torch.get_autocast_dtype("cpu") if is_on else None)
        self.outputs.add(output.dtype)


@pytest.mark.parametrize("kind", ["2", pytest.param("generator", marks=pytest.mark.slow)])
@pytest.mark.parametrize("precision", DTYPES)
def test_networks_compute_in_the_precision_that_was_asked_for(kind: str, precision: str) -> None:
    dtypes = Dtypes()
    trainer = precise_trainer(1, precision, callbacks=[dtypes])
    trainer.fit(toy_module(kind), datamodule=ToyData())
    assert trainer.precision == precision
    assert DTYPES[precision] in dtypes.autocast
    assert (DTYPES[precision] or torch.float32) in dtypes.outputs
    assert (trainer.precision_plugin.state_dict() != {}) == (precision == "16-mixed")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["2", "generator"])
def test_thirty_steps_in_half_precision_learn_as_fp32_does(kind: str) -> None:
    class Losses(Callback):
        def __init__(self) -> None:
            self.values: list[float] = []

        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            self.values.append(float(trainer.callback_metrics["train/loss"]))

    curves = {}
    for precision in DTYPES:
        losses = Losses()
        module = toy_module(kind, **{} if kind == "generator" else {"discriminator": None})
        trainer = precise_trainer(30, precision, callbacks=[losses], log_every_n_steps=1)
        trainer.fit(module, datamodule=ToyData())
        curves[precision] = torch.tensor(losses.values)
        assert module.guard.skipped - module.guard.overflowed == 0
        assert module.guard.overflowed <= 1  # of the first scale
    reference = curves["32-true"]
    assert reference[-4:].mean() < 0.95 * reference[:4].mean()
    for precision, tolerance in (("16-mixed", 0.03), ("bf16-mixed", 0.08)):
        gap = (curves[precision][-8:].mean() / reference[-8:].mean() - 1).abs()
        assert gap < tolerance, precision


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["2", "generator"])
def test_resuming_in_fp16_is_bit_equal_with_overflows_before_and_after(
    kind: str, tmp_path: Path
) -> None:
    """7 steps straight against 3 in the middle of an epoch and 4: the scaler goes on as well."""

    def run(steps: int, ckpt: Path | None = None) -> tuple[dict[str, torch.Tensor], Watch]:
        module, watch = toy_module(kind), Watch()
        poison = Poison("gradient", [1, 5], value=INF)
        last = LastCheckpoint(folder=tmp_path / str(steps), every_steps=100)
        trainer = precise_trainer(steps, "16-mixed", callbacks=[poison, last, watch])
        trainer.fit(module, datamodule=ToyData(), ckpt_path=ckpt)
        return weights(module), watch

    straight, seen = run(7)
    run(3)
    resumed, seen_again = run(7, tmp_path / "3" / "last.ckpt")
    assert seen.verdicts[1] == seen.verdicts[5] == "overflow" and seen.verdicts[6] == "take"
    assert seen_again.verdicts == seen.verdicts[3:] and seen_again.scalers == seen.scalers[3:]
    for name, tensor in straight.items():
        assert torch.equal(tensor, resumed[name]), name


@pytest.mark.slow
def test_the_command_trains_in_fp16_on_a_cpu(tmp_path: Path) -> None:
    precision = ["trainer.precision=16-mixed", "trainer.accelerator=cpu"]
    assert main(["--exp=smoke/stage1", f"outputs={tmp_path}", "max_steps=3", *precision]) == 0
    facts = json.loads((tmp_path / "smoke" / "stage1" / "metrics.json").read_text())
    assert facts["precision"] == "16-mixed" and facts["metrics"]["opt/loss_scale"] > 0
    assert facts["metrics"]["opt/skipped_steps"] <= 1
