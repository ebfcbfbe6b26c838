"""Trains toy modules alone and on two ranks, split in several ways, and saves their weights.

python tests/lit/ddp_run.py FOLDER KIND...  writes FOLDER/KIND_RANKS_ACCUMULATE.pt
"""

import os
import socket
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NoReturn

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from dcar.lit.base import BaseModule
from experiments.strategy import resolve_strategy
from tests.toys import ToyData, toy_generator, toy_masked_generator, toy_stage, toy_trainer

# Adam divides by the gradient's size: where that is rounding noise, so is its step
SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
STEPS, BATCH, IMAGES = 5, 8, 32  # the fifth step is of the second epoch
SPLITS = {1: (1, 4), 2: (1, 2)}  # ranks: batches that a step is accumulated over


def build(kind: str, accumulate: int) -> BaseModule:
    torch.manual_seed(0)
    common = {"optimizer": SGD, "accumulate": accumulate}
    if kind.startswith("generator"):
        generator = toy_generator(scale=None, caption_drop=0.3)
        generator.residual_positions = "masked" if kind == "generator_masked" else "all"
        return toy_masked_generator(generator=generator, **common)
    stage = int(kind[-1])
    return toy_stage(
        stage,
        adversarial=stage > 1,
        norm="ln2d",  # batch statistics differ between a batch and its halves by their nature
        revival_decay=0.9,
        kmeans_vectors=512 if stage == 2 else 0,
        discriminator_start=1,
        **common,
    )


def train(kind: str, ranks: int, accumulate: int) -> BaseModule:
    module = build(kind, accumulate)
    settings = {"devices": ranks, "num_nodes": 1, "accelerator": "cpu", "strategy": "auto"}
    strategy = resolve_strategy(
        settings | {"timeout_minutes": 2}, alternates=len(module.optimized()) > 1
    )
    trainer = toy_trainer(STEPS, devices=ranks, strategy=strategy)
    trainer.fit(module, datamodule=ToyData(BATCH // accumulate, count=IMAGES, world=ranks))
    assert trainer.global_step == STEPS and trainer.world_size == ranks
    return module


def train_all(folder: Path, kinds: list[str], ranks: int) -> None:
    for kind in kinds:
        for accumulate in SPLITS[ranks]:
            module = train(kind, ranks, accumulate)
            if module.global_rank == 0:
                torch.save(module.state_dict(), folder / f"{kind}_{ranks}_{accumulate}.pt")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_forked(task: Callable[[int], None]) -> NoReturn:
    """Call task(ranks) as the only rank and as each of two, in children that share the imports."""
    environment = {"MASTER_ADDR": "127.0.0.1", "NODE_RANK": "0"}
    ports = {1: str(free_port()), 2: str(free_port())}
    children = []
    for ranks, rank in ((1, 0), (2, 0), (2, 1)):
        if pid := os.fork():
            children.append(pid)
            continue
        os.environ |= environment | {"LOCAL_RANK": str(rank), "MASTER_PORT": ports[ranks]}
        try:
            torch.set_num_threads(1)
            task(ranks)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    sys.exit(any(os.waitpid(pid, 0)[1] for pid in children))


if __name__ == "__main__":
    run_forked(partial(train_all, Path(sys.argv[1]), sys.argv[2:]))
