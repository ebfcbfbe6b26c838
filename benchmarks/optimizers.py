"""How long a step of `optimizer=muon` takes: ours, with torch's Muon, and AdamW for all weights.

python -m benchmarks.optimizers [--exp mini/generator] [--device cpu] [--without-torch]
What an experiment trains, with random gradients; the three take turns in one process, and the
figures are medians of ten steps each. torch's Muon computes in bf16 always: on a CPU without
instructions for it leave it out by --without-torch.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import torch
from torch.optim import AdamW, Muon, Optimizer

from dcar.lit.optimizers import MuonAdamW
from dcar.lit.stepping import parameter_groups
from experiments.components import build
from experiments.config import load_config


def step_of_torch(ours: MuonAdamW) -> Callable[[], None]:
    """Steps of torch's two optimizers, on the weights that ours has for each of its own."""
    muon, *plain = ours.param_groups  # one group of matrices
    settings = {name: muon[name] for name in ("lr", "momentum", "weight_decay")}
    parts: list[Optimizer] = [
        Muon(muon["params"], adjust_lr_fn="match_rms_adamw", **settings),
        AdamW([{"params": group["params"]} for group in plain], fused=True),
    ]

    def step() -> None:
        for part in parts:
            part.step()

    return step


def seconds(step: Callable[[], object], device: torch.device) -> float:
    begun = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--exp", default="mini/generator")
    parser.add_argument("--device", default="cpu", type=torch.device)
    parser.add_argument("--without-torch", action="store_true")
    options = parser.parse_args()
    config = load_config(options.exp, ["optimizer=muon"])
    trained = {"generator": build(config.generator)}
    if (text_encoder := build(config.text_encoder)).trainable:
        trained["text_encoder"] = text_encoder
    network = torch.nn.ModuleDict(trained).to(options.device)
    for parameter in network.parameters():
        parameter.grad = torch.randn_like(parameter) * 1e-3
    ours = build(config.optimizer)(parameter_groups([network]))
    steps = {
        "AdamW": AdamW(network.parameters(), fused=True).step,
        "Muon and AdamW": ours.step,
        "torch's Muon and AdamW": step_of_torch(ours),
    }
    if options.without_torch:
        del steps["torch's Muon and AdamW"]
    rounds = [[seconds(step, options.device) for step in steps.values()] for _ in range(12)][2:]
    machine = platform.processor() or platform.machine()
    if options.device.type == "cuda":
        machine = torch.cuda.get_device_name(options.device)
    size = sum(parameter.numel() for parameter in network.parameters())
    print(f"{options.exp}, {size:,} weights; {machine}, {torch.get_num_threads()} threads")
    for name, times in zip(steps, zip(*rounds, strict=True), strict=True):
        print(f"{name}: {statistics.median(times) * 1e3:.1f} ms a step")


if __name__ == "__main__":
    main()
