"""The paper's sizes take a real training step on a CPU, on the embedded data, in 9 GB."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.toys import ROOT

# in fp32 where a CPU has no instructions for bf16, which would be a hundred times slower
SMALL_BATCH = ["--dry-run", "batch_size=1", "trainer.precision=auto", "data=emoji"]
BYTES_AS_T5 = ["text_encoder=byte_t5", "text_encoder.dim=768", "text_encoder.max_tokens=300"]
ALONE = ["accumulate=1", "module.fid_images=0"]
# pictures of a quarter of the area: the networks are what has its full size
GAN = ["size=128", "criterion=reconstruction_alex", "criterion.codebook_weight=1.0"]
GAN += ["criterion.adversarial_weight=0.5", "module.discriminator_start=0"]
# AdamW's moments and the average, 8 GB of the generator, are in stage 2's step
NOTHING_KEPT = ["optimizer._target_=torch.optim.SGD", "~optimizer.betas", "~callbacks.average"]


def run(*arguments: str) -> tuple[int, int]:
    """Exit code and peak memory, in bytes, of a process that ends with all that it took."""
    process = subprocess.Popen([sys.executable, "-m", "experiments.run", *arguments], cwd=ROOT)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, usage.ru_maxrss * 1024


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("tokenizer/stage2", GAN),
        ("generator/pretrain_256", [*BYTES_AS_T5, *ALONE, *NOTHING_KEPT]),
    ],
)
def test_a_step_at_full_size_is_taken_in_nine_gigabytes(
    name: str, settings: list[str], tmp_path: Path
) -> None:
    code, peak = run(f"--exp={name}", f"outputs={tmp_path}", *SMALL_BATCH, *settings)
    assert code == 0
    assert peak < 9e9
    assert not list(tmp_path.iterdir())
