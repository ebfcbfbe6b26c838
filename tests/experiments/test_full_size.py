"""The paper's sizes take a real training step on a CPU, on the embedded data."""

from pathlib import Path

import pytest

from experiments.run import main

SMALL_BATCH = ["--dry-run", "batch_size=1", "trainer.precision=bf16-mixed", "data=emoji"]
BYTES_AS_T5 = ["text_encoder=byte_t5", "text_encoder.dim=768", "text_encoder.max_tokens=300"]


@pytest.mark.slow
def test_stage_2_at_full_size_takes_a_step(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = [*SMALL_BATCH, "criterion=reconstruction_alex", "module.discriminator_start=0"]
    settings += ["criterion.codebook_weight=1.0", "criterion.adversarial_weight=0.5"]
    assert main(["--exp=tokenizer/stage2", *settings]) == 0


@pytest.mark.slow
def test_the_generator_at_full_size_takes_a_step(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = [*SMALL_BATCH, *BYTES_AS_T5, "accumulate=1", "module.fid_images=0"]
    assert main(["--exp=generator/pretrain_256", *settings]) == 0
