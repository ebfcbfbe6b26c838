"""Two ranks with half the batch each give the parameters of one process (gloo, CPU, fp32)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).with_name("ddp_run.py")


def trained(kind: str, ranks: int, out: Path) -> dict[str, torch.Tensor]:
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "MASTER_PORT": str(20000 + os.getpid() % 20000),
    }
    done = subprocess.run(
        [sys.executable, str(SCRIPT), kind, str(ranks), str(out)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(out, weights_only=True)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["2", "3", "generator"])
def test_two_ranks_equal_one_process(kind: str, tmp_path: Path) -> None:
    one = trained(kind, 1, tmp_path / "one.pt")
    two = trained(kind, 2, tmp_path / "two.pt")
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-5, atol=1e-5, msg=name)
