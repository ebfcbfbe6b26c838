"""Real trainings that are killed, told to stop or lose their data; prints what is left as JSON.

python tests/lit/kill_run.py kills COUNT FOLDER...  SIGKILLs of one process that saves every step
python tests/lit/kill_run.py ranks FOLDER EVENT...  two processes, one told to `terminate`,
                                                    without `data` or without space on its `disk`

The trainings are forks of this process, which has imported everything already.
"""

import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy

from dcar.errors import CheckpointError, DataError, Interrupted
from dcar.lit.checkpoint_io import DurableCheckpointIO, sweep
from dcar.lit.last_checkpoint import LastCheckpoint
from dcar.lit.random_states import RandomStates
from dcar.models.checkpoints import known_digests, read_checkpoint
from tests.servers import free_ports
from tests.toys import ToyData, toy_stage, toy_trainer


class Tell(Callback):
    """Writes the number of each step to a pipe before it is saved; makes checkpoints heavy."""

    def __init__(self, pipe: int):
        self.pipe = pipe

    def on_train_batch_end(self, trainer, *args) -> None:
        os.write(self.pipe, trainer.global_step.to_bytes(4, "little"))

    def on_save_checkpoint(self, trainer, pl_module, checkpoint) -> None:
        checkpoint["ballast"] = torch.zeros(4_000_000)  # so that a write takes a while


def forked(function, *arguments) -> int:
    """The number of a process that calls `function` and ends with what it gives."""
    if pid := os.fork():
        return pid
    code = 70
    try:
        code = function(*arguments) or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def train_on(folder: Path, pipe: int) -> None:
    """Save every step until killed. Lightning calls what saves checkpoints last."""
    last = LastCheckpoint(folder=folder, every_steps=1)
    trainer = toy_trainer(100_000, callbacks=[Tell(pipe), last], plugins=[DurableCheckpointIO()])
    trainer.fit(
        toy_stage(1), datamodule=ToyData(), ckpt_path=last.path if last.path.exists() else None
    )


def wait_for_moment(moment: str, folder: Path, seconds: float) -> None:
    """Until a checkpoint is half written, or has two digests, or just so long."""
    until = time.monotonic() + (seconds if moment == "any" else 30)
    while time.monotonic() < until:
        if moment == "write" and any(p.stat().st_size for p in folder.glob(".step_*.partial")):
            return
        if moment == "commit" and len(known_digests(folder / "last.ckpt")) == 2:
            return


def kill_once(folder: Path, moment: str, seconds: float) -> dict:
    reading, writing = os.pipe()
    pid = forked(train_on, folder, writing)
    os.close(writing)
    told = os.read(reading, 4) + os.read(reading, 4)  # the first save of this process is done
    assert len(told) == 8, "the training ended by itself"
    try:
        wait_for_moment(moment, folder, seconds)
    except FileNotFoundError:  # looked at as it went: a moment too
        pass
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    while more := os.read(reading, 4096):
        told = more
    begun = int.from_bytes(told[-4:], "little")
    return {"moment": moment, "expected": [begun - 1, begun]} | look(folder)


def look(folder: Path) -> dict:
    try:
        step, error = read_checkpoint(folder / "last.ckpt")["global_step"], None
    except CheckpointError as failed:
        step, error = None, str(failed)
    digests = max(len(known_digests(path)) for path in folder.glob("*.ckpt"))
    orphans = [path.name for path in folder.glob(".*")]
    sweep(folder)
    left = [path.name for path in folder.glob(".*")]
    facts = {"step": step, "error": error, "digests": digests}
    return facts | {"orphans": orphans, "orphans_after_sweep": left}


def kills(count: int, folders: list[Path]) -> list[dict]:
    """A third each: at any moment, while a checkpoint is written, while it takes its name."""
    chance = random.Random(0)
    moments = (["any", "write", "commit"] * count)[:count]
    return [
        kill_once(folder, moment, chance.random() * 0.3) | {"folder": str(folder)}
        for moment in moments
        for folder in folders
    ]


class FailingData(ToyData):
    """On the second rank the fourth batch cannot be read."""

    def train_dataloader(self):
        loader = super().train_dataloader()
        read, fails = type(loader).__iter__, self.trainer.global_rank == 1

        class Failing(type(loader)):
            def __iter__(self):
                for number, batch in enumerate(read(self)):
                    if number == 3 and fails:
                        self.position -= 1  # it was not handed out
                        raise DataError("a process that reads data has died")
                    yield batch

        loader.__class__ = Failing
        return loader


class Happens(Callback):
    """SIGTERM to the second rank alone, or a disk without room on the first one."""

    def __init__(self, event: str):
        self.event = event

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if batch_idx != 2:
            return
        if self.event == "terminate" and trainer.global_rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        if self.event == "disk" and trainer.global_rank == 0:
            import resource

            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))


def train_rank(folder: Path, event: str, rank: int, port: int) -> int:
    place = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": 2}
    address = {"LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {k: str(v) for k, v in (place | address | {"TORCHELASTIC_RUN_ID": "x"}).items()}
    torch.set_num_threads(1)
    last = LastCheckpoint(folder=folder, every_steps=100)
    trainer = toy_trainer(
        5,
        callbacks=[last, Happens(event), RandomStates()],
        plugins=[DurableCheckpointIO()],
        devices=2,
        strategy=DDPStrategy(process_group_backend="gloo"),
    )
    data = (FailingData if event == "data" else ToyData)(8, count=64, world=2)
    try:
        trainer.fit(toy_stage(1, norm="ln2d"), datamodule=data)
    except Interrupted as stop:
        return stop.exit_code
    except DataError:
        return 3
    except CheckpointError:
        return 2
    return 0


def ranks(folder: Path, event: str) -> dict:
    (port,) = free_ports(1)
    begun = time.monotonic()
    pids = [forked(train_rank, folder, event, rank, port) for rank in range(2)]
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    found = {"codes": codes, "seconds": time.monotonic() - begun}
    path = folder / "last.ckpt"
    if path.exists():
        saved = read_checkpoint(path)
        loop = saved["loops"]["fit_loop"]["state_dict"]
        found |= {"step": saved["global_step"], "position": loop["combined_loader"]}
        found["batches"] = saved["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]
        found["ranks"] = len(saved["random_states"])
    return found


if __name__ == "__main__":
    if sys.argv[1] == "kills":
        result: object = kills(int(sys.argv[2]), [Path(folder) for folder in sys.argv[3:]])
    else:
        result = {event: ranks(Path(sys.argv[2]) / event, event) for event in sys.argv[3:]}
    print(json.dumps(result))
