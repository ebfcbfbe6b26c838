"""Two nodes on one machine: network namespaces joined by a cable, and torchrun in each."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]
PORT = 29511


def ip(*arguments: str) -> str:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


def why_there_are_no_nodes() -> str | None:
    """What is missing for namespaces, None where they can be made."""
    if shutil.which("ip") is None:
        return "there is no `ip` (package iproute2)"
    probe = f"dcar{os.getpid()}x"
    try:
        ip("netns", "add", probe)
        ip("-n", probe, "link", "add", "probe0", "type", "veth", "peer", "name", "probe1")
    except OSError as error:
        return f"no network namespaces with veth pairs (they need root): {error}"
    finally:
        subprocess.run(["ip", "netns", "del", probe], capture_output=True)
    return None


class Node:
    """A namespace with one network interface beside its loopback."""

    def __init__(self, index: int):
        self.index = index
        self.name, self.interface = f"dcar{os.getpid()}n{index}", f"dcar{index}"
        self.address = f"10.213.77.{index + 1}"
        self.process: subprocess.Popen[str] | None = None

    def configure(self) -> None:
        ip("-n", self.name, "addr", "add", f"{self.address}/30", "dev", self.interface)
        for interface in ("lo", self.interface):
            ip("-n", self.name, "link", "set", interface, "up")

    def start(self, arguments: Sequence[str], *, master: "Node", log: Path) -> None:
        """torchrun of `python -m experiments.run ARGUMENTS`, its output in `log`."""
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2"]
        torchrun += ["--nproc-per-node=1", f"--node-rank={self.index}"]
        torchrun += [f"--master-addr={master.address}", f"--master-port={PORT}"]
        with open(log, "w") as output:
            self.process = subprocess.Popen(
                ["ip", "netns", "exec", self.name, *torchrun, "-m", "experiments.run", *arguments],
                env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": self.interface},
                stdout=output,
                stderr=subprocess.STDOUT,
                text=True,
                cwd=ROOT,
            )

    def wait(self, seconds: float) -> int:
        """The exit code. Raises subprocess.TimeoutExpired where it does not end by itself."""
        assert self.process is not None
        return self.process.wait(seconds)

    def processes(self) -> list[int]:
        return [int(pid) for pid in ip("netns", "pids", self.name).split()]

    def kill(self) -> None:
        """Every process of the node at once, as when its power goes."""
        for pid in self.processes():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:  # gone with its parent
                pass
        if self.process is not None:
            self.process.wait(30)


@contextmanager
def two_nodes() -> Iterator[tuple[Node, Node]]:
    nodes = Node(0), Node(1)
    try:
        for node in nodes:
            ip("netns", "add", node.name)
        first, second = nodes
        cable = ["link", "add", first.interface, "netns", first.name, "type", "veth"]
        ip(*cable, "peer", "name", second.interface, "netns", second.name)
        for node in nodes:
            node.configure()
        yield nodes
    finally:
        for node in nodes:
            if node.name in ip("netns", "list"):
                node.kill()
                ip("netns", "del", node.name)


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    """Raises TimeoutError where the condition stays false."""
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            raise TimeoutError(f"not within {seconds} s")
        time.sleep(0.02)
