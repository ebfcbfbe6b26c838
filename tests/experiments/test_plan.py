"""`--exp=plan`: every training is planned as it stands; figures against torch and a real step."""

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from omegaconf import OmegaConf
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from dcar.evaluation.cost_devices import DEVICES
from dcar.evaluation.cost_steps import TokenizerStep, meter_step, without_values
from dcar.evaluation.costs import held_bytes, parameter_counts
from experiments.components import build
from experiments.config import ConfigError, _compose, experiment_names, load_config
from experiments.plan import (
    TRAINING,
    chosen_device,
    optimizer_values,
    target_config,
    training_steps,
)
from experiments.run import main
from tests.toys import ToyData, ToyImages, ToyLoader, toy_trainer

GAN = [
    "discriminator=patch_small",
    "criterion.adversarial_weight=0.5",
    "module.discriminator_start=0",
    "module.kmeans_vectors=0",
]
SHALLOW = ["exp=smoke/pretrain_256", "precomputed=true", "precomputed_text=true"]
SHALLOW += ["overrides=generator.transformer.depth=1 generator/residual_head=none"]
NO_FID = ["fid_features=null", "module.fid_images=0", "module.cache_tokens=false"]


def steps(name: str, *overrides: str) -> Any:
    config = load_config("plan", [f"exp={name}", *overrides])
    return training_steps(config, target_config(config))


@pytest.mark.slow
@pytest.mark.parametrize("name", experiment_names())
def test_every_training_has_a_step_to_plan_and_no_other_task(name: str) -> None:
    if _compose(name, []).task != TRAINING:
        with pytest.raises(ConfigError, match="can be planned|give the training to plan"):
            steps(name)
        return
    step, early_step, late = steps(name)
    counts = parameter_counts(step)
    part = "decoder" if isinstance(step, TokenizerStep) else "transformer"
    assert counts[part]["trained"] > 0 and step.checkpointing()
    assert (early_step is None) == (late == 0)
    assert all(p.is_meta for module in step.parts().values() for p in module.parameters())


def test_the_paper_s_sizes_are_what_is_planned() -> None:
    counts = parameter_counts(steps("generator/pretrain_256")[0])
    assert counts["transformer"]["trained"] + counts["residual head"]["trained"] == 671_263_680
    assert counts["text encoder"] == {"trained": 0, "frozen": 109_628_544}
    assert counts["tokenizer"] == {"trained": 0, "frozen": 323_880_748}


@pytest.mark.parametrize(("stage", "trained"), [(1, 323_356_460), (2, 323_880_748)])
def test_a_stage_trains_what_it_trains(stage: int, trained: int) -> None:
    counts = parameter_counts(steps(f"tokenizer/stage{stage}")[0])
    names = ("encoder", "quantizer", "decoder")
    assert sum(counts[name]["trained"] for name in names) == trained


def test_stage_3_trains_the_decoder_and_the_discriminator_alone() -> None:
    counts = parameter_counts(steps("tokenizer/stage3")[0])
    trained = {name for name, row in counts.items() if row["trained"]}
    assert trained == {"decoder", "discriminator"}


def test_a_discriminator_that_joins_late_is_planned_late() -> None:
    step, early_step, late = steps("tokenizer/stage2")
    assert late == 20_000 and early_step.discriminator is None is not step.discriminator


@pytest.mark.parametrize(
    ("overrides", "holds"),
    [
        (["devices=1", "accumulate=1"], False),
        (["devices=1", "accumulate=2"], True),
        (["devices=2", "accumulate=1"], True),
        (["devices=2", "accumulate=1", "overrides=trainer.strategy=fsdp2"], False),
    ],
)
def test_gradients_are_held_by_accumulation_and_by_the_buckets_of_ddp(overrides, holds) -> None:
    assert steps("smoke/pretrain_256", *overrides)[0].holds_gradients is holds


@pytest.mark.parametrize(
    ("override", "encodes", "reads"),
    [
        ("mfu=0.4", True, True),
        ("precomputed=true", False, True),
        ("precomputed_text=true", True, 0),
    ],
)
def test_precomputed_inputs_are_left_out(override: str, encodes: bool, reads: bool) -> None:
    step = steps("smoke/pretrain_256", override)[0]
    assert step.encodes == encodes and step.reads == reads


def test_tokens_that_are_cached_cost_nothing_after_the_first_epoch() -> None:
    assert not steps("quickstart/generator_64")[0].encodes


def test_keys_of_the_plan_are_those_of_the_training() -> None:
    given = ["batch_size=3", "accumulate=5", "size=64", "max_steps=7", "precision=32-true"]
    more = 'overrides=learning_rate=0.5 "prompts=[a b]"'
    target = target_config(load_config("plan", ["exp=quickstart/generator_32", *given, more]))
    assert (target.batch_size, target.accumulate, target.size, target.max_steps) == (3, 5, 64, 7)
    assert target.trainer.precision == "32-true" and target.learning_rate == 0.5
    assert target.prompts == ["a b"]


def test_numbers_of_one_s_own_replace_those_of_a_device() -> None:
    given = ["device=a100_40", "memory_gib=20", "peak_tflops=200", "fp32_tflops=10"]
    device = chosen_device(load_config("plan", given))
    assert (device.memory_gib, device.half, device.single) == (20, 200, 10)
    assert device.convolution == DEVICES["a100_40"].convolution


@pytest.mark.parametrize(
    ("optimizer", "values"),
    [("torch.optim.AdamW", 2), ("torch.optim.SGD", 0), ("torch.optim.RMSprop", 1)],
)
def test_an_optimizer_s_state_is_counted_by_a_step_of_it(optimizer: str, values: int) -> None:
    node = OmegaConf.create({"_target_": optimizer, "_partial_": True, "lr": 0.1})
    assert optimizer_values(node, [nn.Sequential(nn.Linear(40, 30), nn.LayerNorm(30))]) == values


def test_muon_keeps_one_value_for_its_matrices_and_two_for_all_else() -> None:
    node = load_config("smoke/pretrain_256", ["optimizer=muon"]).optimizer
    names = {"token_embedding": nn.Embedding(50, 40), "inner": nn.Linear(40, 30)}
    assert optimizer_values(node, [nn.ModuleDict(names)]) == (2 * 2000 + 1200 + 2 * 30) / 3230


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "exp=NAME"),
        (["exp=generator/pretrain"], "did you mean 'generator/pretrain_256'"),
        (["exp=data/build"], "exp=data/build is no training"),
        (["exp=quickstart"], "exp=quickstart is no training"),
        (["exp=smoke/stage1", "device=h10"], "did you mean 'h100'"),
        (["exp=smoke/stage1", "devices=0"], "devices=0"),
        (["exp=smoke/stage1", "mfu=45"], "mfu=45"),
        (["exp=smoke/stage1", "reserve=1"], "reserve=1"),
        (["exp=smoke/stage1", "peak_tflops=0"], "half of the device is 0.0"),
        (["exp=smoke/stage1", "precision=64-true"], "precision=64-true"),
        (["exp=smoke/stage1", "overrides=batch_sise=3"], "did you mean 'batch_size'"),
        (["exp=generator/pretrain_256", "overrides=text_encoder.name=no/such"], "'no/such'"),
    ],
)
def test_what_cannot_be_planned_exits_with_2_and_is_named(overrides, message, capsys) -> None:
    assert main(["--exp=plan", *overrides]) == 2
    printed = capsys.readouterr().err
    assert message in printed and printed.count("\n") == 1


@pytest.mark.slow
def test_a_plan_is_printed_and_written(tmp_path: Path, capsys) -> None:
    out = tmp_path / "new" / "plan.json"
    assert main(["--exp=plan", *SHALLOW, "devices=2", "device=rtx3090", f"out={out}"]) == 0
    printed = capsys.readouterr().out
    heading = "smoke/pretrain_256 at 32 px on 2 x rtx3090"
    for words in (heading, "transformer", "largest batch", "hours"):
        assert words in printed
    plan = json.loads(out.read_text())
    assert plan["exp"] == "smoke/pretrain_256" and plan["schedule"]["global_batch"] == 8
    assert set(plan["ways"]) == {"kept", "recomputed"} and plan["ways"]["kept"]["hours"] > 0


@pytest.mark.slow
def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    assert main(["--exp=plan", "--dry-run", *SHALLOW, f"out={out}"]) == 0
    assert not out.exists()


@pytest.mark.slow
def test_the_paper_s_transformer_works_as_much_as_its_sizes_say() -> None:
    step = steps("generator/pretrain_256", "precomputed=true", "precomputed_text=true")[0]
    with without_values(step):
        flops = meter_step(step, 2, half=torch.float16).flops["transformer", "half"]
    # 2 FLOPs a weight and token, in 28 blocks and the output layer, on 64 tokens ...
    tokens = 64 * 2 * (28 * (4 + 2 + 8) * 1152**2 + 1152 * 16_384)
    # ... in the projections of 300 text tokens, and in attention to both
    text = 300 * 2 * (28 * 2 * 1152**2 + 768 * 1152 + 1152**2)
    attention = 28 * 4 * 64 * (64 + 300) * 1152
    assert flops.forward == 2 * (tokens + text + attention)
    assert flops.backward == pytest.approx(2 * flops.forward, rel=0.01)


def forward_of_torch(step: Any) -> int:
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:
        step.run(2, lambda loss: None)
    return counter.get_total_flops()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tokenizer/stage2", "generator/finetune_512"])
def test_flops_at_full_size_are_those_of_torch_s_counter(name: str) -> None:
    step = steps(name)[0]
    with without_values(step):
        ours = meter_step(step, 2, half=torch.float16)
        theirs = forward_of_torch(step)
    forward = sum(flops.forward for flops in ours.flops.values())
    assert forward == pytest.approx(theirs, rel=0.02)


class LongCaptions(ToyImages):
    """Pictures with captions that fill the text encoder, as a plan assumes."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        return super().__getitem__(index) | {"caption": "a " * 250}


class Data(ToyData):
    def __init__(self, batch_size: int, size: int):
        super().__init__(batch_size)
        self.size = size

    def train_dataloader(self) -> ToyLoader:
        return ToyLoader(LongCaptions(4 * self.batch_size, size=self.size), self.batch_size)


class Measured(Callback):
    """FLOPs of the second batch and most bytes allocated in the third, of a real training."""

    def __init__(self, folder: Path):
        self.trace, self.peak = folder / "trace.json", 0
        self.counter = FlopCounterMode(display=False)

    def on_train_batch_start(self, *arguments: Any) -> None:
        if arguments[-1] == 2:
            gc.collect()
            self.profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
            self.profiler.__enter__()

    def on_train_batch_end(self, *arguments: Any) -> None:
        if arguments[-1] == 0:
            self.counter.__enter__()  # the next batch is made into tokens before it starts
        if arguments[-1] == 1:
            self.counter.__exit__(None, None, None)
        if arguments[-1] == 2:
            self.profiler.__exit__(None, None, None)
            self.profiler.export_chrome_trace(str(self.trace))
            self.peak = peak_of(json.loads(self.trace.read_text())["traceEvents"])


def peak_of(events: list[dict[str, Any]]) -> int:
    memory = [event for event in events if event.get("name") == "[memory]"]
    memory.sort(key=lambda event: event["ts"])
    first = memory[0]["args"]
    before = first["Total Allocated"] - first["Bytes"]
    return max(event["args"]["Total Allocated"] for event in memory) - before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("quickstart/stage2", GAN),
        ("quickstart/generator_64", NO_FID),
        (
            "quickstart/generator_64",
            [*NO_FID, "checkpoint_activations=true"],
        ),
    ],
)
def test_a_real_training_step_takes_what_is_planned(name, overrides, tmp_path) -> None:
    target = load_config(name, ["init_from=null", "batch_size=16", *overrides])
    if "tokenizer_from" in target:
        target.tokenizer_from = None
    measured = Measured(tmp_path)
    toy_trainer(3, callbacks=[measured]).fit(build(target.module), Data(16, target.size))
    step = training_steps(load_config("plan", [f"exp={name}"]), target)[0]
    with without_values(step):
        plan = meter_step(step, 16, half=None, as_cuda=False)
        with FlopCounterMode(display=False) as counter:
            step.run(16, torch.Tensor.backward)
    assert counter.get_total_flops() == measured.counter.get_total_flops() > 0
    assert plan.peak_bytes == pytest.approx(measured.peak, rel=0.15)
    assert plan.peak_bytes > held_bytes(step.networks())  # activations, not weights, decide
