"""A long training without and with kills: the same weights at the end, memory flat, quick restarts.

python -m benchmarks.long_run [--exp smoke/stage2 smoke/pretrain_256] [--steps 2000]
    [--kill-every 200] [--save-every 50] [--restarts 3] [--folder FOLDER] [--set KEY=VALUE ...]

Each training is a process of `python -m experiments.run`, once left alone and once killed with
SIGKILL after about every 200 steps, in turn at a random moment and while a checkpoint is being
written, and started again with --ckpt=auto until it is done. Weights, averages, optimizers,
schedules and logged values are then compared bit by bit. Memory is that of the run left alone: the
mean of its second half to that of its first after a warm-up. A restart is timed from the start of
the process to its first step, against a fresh start. With --folder the runs stay there, and the
same command goes on with what is left of them.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from torch import Tensor

from dcar.lit.last_checkpoint import step_files
from dcar.models.checkpoints import read_checkpoint
from experiments.config import REPOSITORY, load_config

STATE = ("global_step", "state_dict", "network", "optimizer_states", "lr_schedulers", "callbacks")
OF_TIME = ("Timer", "ModelCheckpoint")  # callbacks whose state names seconds and paths
# Freed memory goes back to the system: by default glibc keeps a part of it, more or less by chance.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MALLOC_TRIM_THRESHOLD_": "131072",
    "MALLOC_MMAP_THRESHOLD_": "131072",
}
LOGGED = ("train/", "val/", "codebook/", "opt/")  # values of the last step, not of the clock


@dataclass(frozen=True)
class Job:
    """A training of `steps` steps in a folder of its own. saves: a checkpoint every so many."""

    experiment: str
    outputs: Path
    steps: int
    saves: int
    settings: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        return self.outputs / self.experiment

    @property
    def command(self) -> list[str]:
        changes = {
            "outputs": self.outputs,
            "max_steps": self.steps,
            "save_every": self.saves,
            "val_every": max(1, self.steps // 8),  # the first comes before memory counts
            "trainer.log_every_n_steps": 20,
            # decoded pictures kept in memory would grow for the whole first epoch
            "data.train.cache": False,
            "data.val.val.cache": False,
            "init_from": "null",
        }
        if "tokenizer_from" in load_config(self.experiment):
            changes |= {"tokenizer_from": "null"}
        pairs = [f"{key}={value}" for key, value in changes.items()]
        arguments = [f"--exp={self.experiment}", "--ckpt=auto", *pairs, *self.settings]
        return [sys.executable, "-m", "experiments.run", *arguments]

    def reached(self) -> int:
        """The step of the newest checkpoint, 0 without any."""
        return max(step_files(self.folder / "checkpoints"), default=0)

    def is_saving(self) -> bool:
        return any((self.folder / "checkpoints").glob(".step_*.partial"))

    def is_done(self) -> bool:
        return (self.folder / "metrics.json").exists()


class Process:
    """One start of a job. Raises RuntimeError with what it printed where it ends badly."""

    def __init__(self, job: Job):
        job.outputs.mkdir(parents=True, exist_ok=True)
        self.job, self.began, self.is_killed = job, time.perf_counter(), False
        self.log = job.outputs / f"{job.experiment.replace('/', '_')}.log"
        with open(self.log, "w") as log:
            self.popen = subprocess.Popen(
                job.command,
                cwd=REPOSITORY,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | ENVIRONMENT,
            )
        self.process = psutil.Process(self.popen.pid)

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *raised: object) -> None:
        self.kill()

    def kill(self) -> None:
        self.popen.kill()
        self.popen.wait()
        self.is_killed = True

    def is_running(self) -> bool:
        code = self.popen.poll()
        if code not in (None, 0) and not self.is_killed:
            raise RuntimeError(f"{self.job.experiment} ended with {code}: {self.log.read_text()}")
        return code is None

    def wait_for(self, event: Callable[[], bool], *, every: float = 0.02) -> bool:
        """Whether the event has come before the end of the process."""
        while self.is_running():
            if event():
                return True
            time.sleep(every)
        return False

    def used(self) -> "Cost":
        times = self.process.cpu_times()
        return Cost(time.perf_counter() - self.began, times.user + times.system)


class Cost(NamedTuple):
    """Seconds on the clock and on the processor."""

    wall: float
    cpu: float


@dataclass
class Memory:
    """Resident megabytes of a process over time, with the step they were seen at."""

    marks: list[tuple[int, float]] = field(default_factory=list)

    def halves(self) -> tuple[float, float]:
        """Means over the halves of the steps after the first fifth, in which caches fill."""
        last = self.marks[-1][0]
        settled = [(step, used) for step, used in self.marks if step > last / 5]
        first = [used for step, used in settled if step <= last * 3 / 5]
        second = [used for step, used in settled if step > last * 3 / 5]
        return statistics.mean(first), statistics.mean(second)

    def __str__(self) -> str:
        some = self.marks[:: max(1, len(self.marks) // 10)]
        return ", ".join(f"{step}: {used:.0f}" for step, used in some)


def run_through(job: Job) -> Memory:
    """Let the job come to its end; its memory."""
    memory = Memory()

    def watch() -> bool:
        if step := job.reached():
            memory.marks.append((step, process.process.memory_info().rss / 2**20))
        return False

    with Process(job) as process:
        process.wait_for(watch, every=0.2)
    return memory


def kill(process: Process, rng: random.Random, goal: int, *, while_saving: bool) -> str:
    """Kill after step `goal`: before the next checkpoint, or in the middle of writing one.

    Returns what was done, nothing where the process has come to its end before.
    """
    job = process.job
    process.wait_for(lambda: job.reached() >= goal - job.saves)
    before = time.perf_counter()
    process.wait_for(lambda: job.reached() >= goal)
    between_saves = time.perf_counter() - before
    if while_saving:
        process.wait_for(job.is_saving, every=0.0005)
    else:
        time.sleep(rng.uniform(0, between_saves))
    if not process.is_running():
        return ""
    process.kill()
    left = ", half a checkpoint left" if job.is_saving() else ""
    return f"after step {goal} {'while saving' if while_saving else 'at random'}{left}"


def run_with_kills(job: Job, *, kill_every: int, seed: int) -> list[str]:
    """Kill the job again and again until it is done; what was done to it."""
    rng = random.Random(seed)
    kills: list[str] = []
    while not job.is_done():
        reached = job.reached()
        goal = reached + kill_every - reached % kill_every
        with Process(job) as process:
            if goal < job.steps:
                kills.append(kill(process, rng, goal, while_saving=len(kills) % 2 == 1))
            process.wait_for(lambda: False)
    return [done for done in kills if done]


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Values of nested containers by name."""
    if isinstance(value, list | tuple):
        value = dict(enumerate(value))
    if not isinstance(value, dict):
        yield name, value
        return
    yield f"{name}, length", len(value)
    for key, inner in value.items():
        yield from leaves(inner, f"{name}.{key}" if name else str(key))


def same(first: Any, second: Any) -> bool:
    """Equal in every bit; a NaN is a NaN."""
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        first, second = first.contiguous(), second.contiguous()
        alike = first.shape == second.shape and first.dtype == second.dtype
        bits = [tensor.reshape(-1).view(torch.uint8) for tensor in (first, second)]
        return alike and torch.equal(*bits)
    both_nan = first != first and second != second
    return type(first) is type(second) and (first == second or both_nan)


def shown(value: Any) -> str:
    return f"tensor of {tuple(value.shape)}" if isinstance(value, Tensor) else str(value)[:80]


def differences(first: Any, second: Any) -> list[str]:
    """Names of the values that are not the same in both."""
    ours, theirs = dict(leaves(first)), dict(leaves(second))
    missing = object()
    return [
        f"{name}: {shown(ours.get(name, 'missing'))} against {shown(theirs.get(name, 'missing'))}"
        for name in {**ours, **theirs}
        if not same(ours.get(name, missing), theirs.get(name, missing))
    ]


def outcome(job: Job) -> dict[str, Any]:
    """What a finished job has come to, without what depends on the time and the folder."""
    checkpoint = read_checkpoint(job.folder / "checkpoints" / "last.ckpt")
    state = {key: checkpoint[key] for key in STATE}
    state["callbacks"] = {
        key: value for key, value in state["callbacks"].items() if not key.startswith(OF_TIME)
    }
    state["data"] = checkpoint["loops"]["fit_loop"]["state_dict"]["combined_loader"]
    metrics = json.loads((job.folder / "metrics.json").read_text())["metrics"]
    kept = {key: value for key, value in metrics.items() if key.startswith(LOGGED)}
    return state | {"metrics": kept}


def first_step(job: Job) -> Cost:
    """What the job takes from the start of its process to its next step, which it saves."""
    before = job.reached()
    with Process(job) as process:
        if not process.wait_for(lambda: job.reached() > before):
            raise RuntimeError(f"{job.experiment} was at its end already, at step {before}")
        return process.used()


def restart_costs(experiment: str, outputs: Path, rounds: int) -> tuple[list[Cost], list[Cost]]:
    """First steps of fresh starts and of restarts from a checkpoint, in turns."""
    fresh, resumed = [], []
    for number in range(rounds):
        job = Job(experiment, outputs / f"start_{number}", steps=1000, saves=1)
        fresh.append(first_step(job))
        resumed.append(first_step(job))
    return fresh, resumed


def compare(experiment: str, outputs: Path, options: argparse.Namespace) -> None:
    settings = tuple(options.set)
    alone, killed = (
        Job(experiment, outputs / name, options.steps, options.save_every, settings)
        for name in ("alone", "killed")
    )
    print(f"\n{experiment}, {options.steps} steps", flush=True)
    if not alone.is_done():
        memory = run_through(alone)
        first, second = memory.halves()
        print(f"  MiB by step {memory}")
        print(f"  memory {first:.0f} MiB, then {second:.0f}: {second / first - 1:+.2%} (bar: 2 %)")
    kills = run_with_kills(killed, kill_every=options.kill_every, seed=options.seed)
    for kill in kills:
        print(f"  killed {kill}")
    found = differences(outcome(alone), outcome(killed))
    print(f"  {len(kills)} kills: {'equal bit by bit' if not found else 'NOT equal'}")
    for name in found[:20]:
        print(f"    {name}")


def report_restarts(experiment: str, outputs: Path, rounds: int) -> None:
    fresh, resumed = restart_costs(experiment, outputs, rounds)
    for name in Cost._fields:
        starts, restarts = ([getattr(cost, name) for cost in costs] for costs in (fresh, resumed))
        print(
            f"  to the first step by {name:4s} time: fresh {min(starts):.1f} s, "
            f"restarted {min(restarts):.1f} s: {min(restarts) / min(starts):.2f} x (bar: 1.2)"
        )


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--exp", nargs="+", default=["smoke/stage2", "smoke/pretrain_256"])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--kill-every", type=int, default=200)
    parser.add_argument("--save-every", type=int, default=50)
    parser.add_argument("--restarts", type=int, default=3, help="rounds; 0 leaves them out")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--set", nargs="*", default=[])
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    with tempfile.TemporaryDirectory() as temporary:
        outputs = options.folder or Path(temporary)
        for experiment in options.exp:
            compare(experiment, outputs, options)
            if options.restarts:
                report_restarts(experiment, Path(temporary), options.restarts)


if __name__ == "__main__":
    main()
