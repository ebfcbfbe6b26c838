"""Loss curves of one training in several precisions and seeds: do they differ by more than noise?

    python -m benchmarks.precision --exp=quickstart/stage2 --steps=500 --seeds=3 [key=value ...]

Runs of one seed see the same batches and the same random numbers. For each precision the last third
of the curve is compared with fp32's: the mean difference within a seed, against the spread of
fp32's own seeds. A training that starts from another needs that one's checkpoint in `outputs`.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from experiments.config import load_config
from experiments.run import RunOptions, quieten
from experiments.train import train

REFERENCE = "32-true"


def loss_curve(folder: Path) -> Tensor:
    """`train/loss` as TensorBoard has it, (logged steps,)."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return torch.tensor([event.value for event in events.Scalars("train/loss")])


def run(experiment: str, precision: str, seed: int, steps: int, overrides: list[str]) -> Tensor:
    with tempfile.TemporaryDirectory() as folder:
        settings = [
            f"max_steps={steps}",
            f"seed={seed}",
            f"trainer.precision={precision}",
            "trainer.log_every_n_steps=1",
            f"val_every={steps}",
            f"save_every={steps}",
            f"output_dir={folder}",
        ]
        train(load_config(experiment, [*settings, *overrides]), RunOptions())
        return loss_curve(Path(folder) / "tensorboard")


def report(precision: str, curves: Tensor, reference: Tensor) -> str:
    """Both (seeds, steps): one line, with differences in the unit of the loss."""
    tail = curves.shape[1] * 2 // 3
    ours, theirs = curves[:, tail:].mean(1), reference[:, tail:].mean(1)  # (seeds,)
    spread = float(theirs.std()) if len(theirs) > 1 else float("nan")
    difference = float((ours - theirs).mean())
    return (
        f"{precision:<11} loss {float(ours.mean()):.4f}  difference {difference:+.4f}  "
        f"spread of {REFERENCE}'s seeds {spread:.4f}  ratio {abs(difference) / spread:.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--exp", default="smoke/stage1")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--precisions", nargs="+", default=["16-mixed", "bf16-mixed"])
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_intermixed_args()
    quieten()
    curves = {
        precision: torch.stack(
            [
                run(options.exp, precision, seed, options.steps, options.overrides)
                for seed in range(options.seeds)
            ]
        )
        for precision in [REFERENCE, *options.precisions]
    }
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"{options.exp}, {options.steps} steps, {options.seeds} seeds, {device}")
    for precision, values in curves.items():
        print(report(precision, values, curves[REFERENCE]))


if __name__ == "__main__":
    main()
