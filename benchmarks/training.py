"""Speed of training: samples a second, share of the device's peak, and what the framework costs.

python -m benchmarks.training [--exp tokenizer/stage2 generator/pretrain_256 ...] [--small | --full]
    [--batches 8] [--rounds 8] [--batch B] [--precision P ...] [--workers W] [--profile FILE]
    [--set KEY=VALUE ...]

Each experiment is built as `experiments.run` builds it, callbacks and loggers included, with random
weights and without validations and checkpoints. Blocks of `--batches` batches take turns: a plain
loop (forward, backward, clipping, optimizer step of the same module), `Trainer.fit` on batches in
memory, `Trainer.fit` on shards. Overhead is the part of a `Trainer.fit` batch that a plain one does
not take. Processor time says the same where other programs take turns on the cores. Peak is that
of a large matrix product in the training's precision, measured in the same process. Of several
precisions, measured in turn, each is compared with the first.
On a CPU the quickstart's sizes stand in for the paper's (--full takes those). The embedded pictures
are the data; `--set data=shards train_urls=... val_urls=...` takes others.
"""

import argparse
import os
import platform
import statistics
import tempfile
from collections.abc import Sequence
from cProfile import Profile
from typing import Any

import torch
from omegaconf import DictConfig

from benchmarks.training_blocks import MEMORY, PLAIN, PRODUCT, SHARDS, Cost, Turns, measure
from dcar.lit.base import BaseModule
from experiments.components import build
from experiments.config import load_config
from experiments.run import RunOptions, quieten
from experiments.train import build_trainer

EXPERIMENTS = ("tokenizer/stage2", "generator/pretrain_256", "generator/finetune_512")
SMALL = {
    "tokenizer/stage2": "quickstart/stage2",
    "generator/pretrain_256": "quickstart/generator_32",
    "generator/finetune_512": "quickstart/generator_64",
}
GAN = ["criterion.adversarial_weight=0.5", "module.discriminator_start=0"]
BYTES_AS_T5 = ["text_encoder=byte_t5", "text_encoder.dim=768", "text_encoder.max_tokens=300"]
# What an experiment needs from elsewhere (weights of VGG and T5, data) is left out.
CHANGES = {
    "tokenizer/stage2": ["criterion=reconstruction_alex", "criterion.codebook_weight=1.0", *GAN],
    "quickstart/stage2": ["discriminator=patch_small", *GAN],
    "generator/pretrain_256": BYTES_AS_T5,
    "generator/finetune_512": BYTES_AS_T5,
}
NEVER = 10**9  # steps: no validation, no checkpoint, no end
ALWAYS = [f"{key}={NEVER}" for key in ("max_steps", "val_every", "save_every")]
ALWAYS += ["init_from=null", "trainer.devices=1"]

CLOCKS = (("wall", "clock"), ("cpu", "processor"))


def overrides(
    name: str, options: argparse.Namespace, outputs: str, precision: str | None = None
) -> list[str]:
    found = [*ALWAYS, f"outputs={outputs}", *CHANGES.get(name, [])]
    if "tokenizer_from" in load_config(name):  # tokens are made in every step, as at full size
        found += ["tokenizer_from=null", "module.fid_images=0", "++module.cache_tokens=false"]
    else:
        found += ["module.kmeans_vectors=0"]
    if not any(change.startswith("data=") for change in options.set):
        found += ["data=emoji", "data.train.cache=false"]
    for key, value in (
        ("batch_size", options.batch),
        ("trainer.precision", precision),
        ("data.num_workers", options.workers),
    ):
        found += [] if value is None else [f"{key}={value}"]
    return [*found, *options.set]


def share(part: Sequence[Cost], whole: Sequence[Cost], field: str) -> tuple[float, float]:
    """Medians compared, and the quickest blocks compared."""
    parts, wholes = ([getattr(cost, field) for cost in costs] for costs in (part, whole))
    return statistics.median(parts) / statistics.median(wholes), min(parts) / min(wholes)


def line(what: str, costs: Sequence[Cost]) -> None:
    wall, cpu = (sorted(getattr(c, field) * 1e3 for c in costs) for field in ("wall", "cpu"))
    print(
        f"  {what:26s} {statistics.median(wall):8.1f} ms a batch (best {wall[0]:.1f}), "
        f"processor {statistics.median(cpu):8.1f} (best {cpu[0]:.1f})"
    )


def report(turns: Turns, batch_size: int) -> float:
    """Returns samples a second, from memory."""
    device, costs = turns.module.device, turns.costs
    line("plain loop", costs[PLAIN])
    line("Trainer.fit from memory", costs[MEMORY])
    line(f"Trainer.fit, {turns.loader.num_workers} data workers", costs[SHARDS])
    for field, name in CLOCKS:
        median, best = share(costs[PLAIN], costs[MEMORY], field)
        print(f"  overhead by {name:15s}{1 - median:6.1%} (of the best blocks {1 - best:.1%})")
    median, best = share(costs[MEMORY], costs[SHARDS], "wall")
    print(f"  shards to memory           {median:6.1%} of the throughput (best blocks {best:.1%})")
    seconds = statistics.median(cost.wall for cost in costs[MEMORY])
    print(
        f"  {batch_size / seconds:.4g} samples/s of "
        f"{turns.flops[PLAIN] / batch_size / 1e9:.4g} GFLOP, forward and backward"
    )
    for field, name in CLOCKS if device.type == "cpu" else CLOCKS[:1]:
        ours, peak = (
            turns.flops[kind] / statistics.median(getattr(cost, field) for cost in costs[block])
            for kind, block in ((PLAIN, MEMORY), (PRODUCT, PRODUCT))
        )
        print(
            f"  share of the peak by {name:10s} {ours / peak:5.1%} "
            f"({ours / 1e12:.3g} of {peak / 1e12:.3g} TFLOP/s)"
        )
    if device.type == "cuda":
        print(f"  peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
    return batch_size / seconds


def describe(config: DictConfig, module: BaseModule, precision: str) -> None:
    trained = sum(p.numel() for p in module.network.parameters() if p.requires_grad)
    print(
        f"\n{config.exp}: {trained / 1e6:.1f} M parameters train, {config.size} px, "
        f"batch {config.batch_size} x {module.accumulate}, {precision}"
    )


def run(name: str, options: argparse.Namespace, precision: str | None) -> float:
    """Samples a second, from memory; prints all else."""
    with tempfile.TemporaryDirectory() as outputs:
        config = load_config(name, overrides(name, options, outputs, precision))
        torch.manual_seed(config.seed)
        module: BaseModule = build(config.module)
        trainer: Any = build_trainer(config, module, RunOptions())
        loader = build(config.data).train_dataloader()
        batches = loader.stream.batch_size if options.memory is None else options.memory
        memory = [batch for batch, _ in zip(loader, range(batches), strict=False)]
        profile = Profile() if options.profile else None
        block = options.batches + -options.batches % module.accumulate
        turns = Turns(module, memory, loader, batches=block, rounds=options.rounds, profile=profile)
        measure(trainer, turns)
        describe(config, module, trainer.precision)
        speed = report(turns, config.batch_size)
    if profile is not None:
        profile.dump_stats(options.profile)
    return speed


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--exp", nargs="+", default=EXPERIMENTS)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--small", action="store_true", default=not torch.cuda.is_available())
    size.add_argument("--full", dest="small", action="store_false")
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--memory", type=int, default=4, help="batches kept in memory")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--precision", nargs="+", default=[None])
    parser.add_argument("--workers", type=int)
    parser.add_argument("--profile", help="file for `python -m pstats`, of the blocks from memory")
    parser.add_argument("--set", nargs="*", default=[])
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    quieten()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor()
    print(
        f"{device or platform.machine()}, {len(os.sched_getaffinity(0))} cores, "
        f"{torch.get_num_threads()} threads; PyTorch {torch.__version__}"
    )
    for name in options.exp:
        name = SMALL.get(name, name) if options.small else name
        first, *others = options.precision
        reference = run(name, options, first)
        for precision in others:
            times = run(name, options, precision) / reference
            print(f"  {times:.2f} times the samples a second of {first}")


if __name__ == "__main__":
    main()
