"""Trains a toy module with gloo on a number of ranks and saves its weights.

python tests/lit/ddp_run.py {2|generator} RANKS OUT.pt
"""

import sys
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from lightning.pytorch.strategies import DDPStrategy

from tests.toys import ToyData, toy_generator, toy_masked_generator, toy_stage, toy_trainer

# Adam divides by the gradient's size: where that is rounding noise, so is its step
SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)


def main(kind: str, ranks: int, out: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if kind == "generator":
        module = toy_masked_generator(generator=toy_generator(scale=None), optimizer=SGD)
    else:
        module = toy_stage(
            int(kind),
            adversarial=True,
            norm="ln2d",
            revival_decay=0.9,
            kmeans_vectors=512,
            optimizer=SGD,
        )
    strategy = "auto"
    if ranks > 1:
        alternates = len(module.optimized()) > 1
        strategy = DDPStrategy(process_group_backend="gloo", find_unused_parameters=alternates)
    trainer = toy_trainer(3, devices=ranks, strategy=strategy)
    trainer.fit(module, datamodule=ToyData(8, count=32, world=ranks))
    if trainer.is_global_zero:
        torch.save(module.state_dict(), out)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
