"""A training on two nodes: one is lost, the other ends by itself, and the job is started again."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from dcar.models.checkpoints import read_checkpoint
from tests.experiments.nodes import Node, two_nodes, wait_until, why_there_are_no_nodes

STEPS = 24


@pytest.fixture
def nodes() -> Iterator[tuple[Node, Node]]:
    if missing := why_there_are_no_nodes():
        pytest.skip(missing)
    with two_nodes() as both:
        yield both


def command(outputs: Path) -> list[str]:
    return [
        "--exp=smoke/stage2",
        "--ckpt=auto",
        "init_from=null",
        f"outputs={outputs}",
        f"max_steps={STEPS}",
        f"val_every={STEPS}",
        "save_every=2",
        "module.kmeans_vectors=0",
        "trainer.accelerator=cpu",
        "trainer.devices=1",
        "trainer.num_nodes=2",
        "trainer.strategy=ddp",
        "trainer.timeout_minutes=2",
    ]


def start(nodes: tuple[Node, Node], folder: Path, name: str) -> list[Path]:
    logs = [folder / f"{name}_{node.index}.log" for node in nodes]
    for node, log in zip(nodes, logs, strict=True):
        node.start(command(folder), master=nodes[0], log=log)
    return logs


@pytest.mark.slow
def test_a_lost_node_ends_the_job_which_goes_on_when_it_is_started_again(
    nodes: tuple[Node, Node], tmp_path: Path
) -> None:
    last = tmp_path / "smoke" / "stage2" / "checkpoints" / "last.ckpt"
    survivor, lost = nodes
    (log, _) = start(nodes, tmp_path, "first")
    try:
        wait_until(lambda: last.exists() or not survivor.processes(), 240)
        lost.kill()
        code = survivor.wait(60)  # by itself, sooner than the time limit
    finally:
        output = log.read_text()
    assert code != 0, output
    assert survivor.processes() == []
    assert output.count("error: a process of this training was lost") == 1, output
    assert "Traceback" not in output.partition("ChildFailedError")[0].partition("error: a")[0]
    assert not (last.parents[1] / "metrics.json").exists()  # it had not come to the end
    saved = read_checkpoint(last)["global_step"]  # whole: its sha256 is compared
    assert 2 <= saved < STEPS and saved % 2 == 0

    logs = start(nodes, tmp_path, "second")
    codes = [node.wait(240) for node in nodes]
    assert codes == [0, 0], logs[0].read_text()[-3000:]
    assert [node.processes() for node in nodes] == [[], []]
    assert read_checkpoint(last)["global_step"] == STEPS
    facts = json.loads((last.parents[1] / "metrics.json").read_text())
    assert facts["steps"] == STEPS
