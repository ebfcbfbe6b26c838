"""What TensorBoard shows: grids, codebook histogram, throughput, config."""

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dcar.data.loader import ShardLoader
from dcar.data.transforms import ImageTransform
from dcar.lit.board import TensorBoardLogger
from dcar.lit.callbacks import (
    CodebookHistogram,
    ConfigText,
    ReconstructionGrid,
    SampleGrid,
    SkippedSamples,
    StepProgressBar,
    Throughput,
    fitting,
)
from dcar.lit.last_checkpoint import LastCheckpoint
from tests.shards import build, stream
from tests.toys import ToyData, toy_masked_generator, toy_stage, toy_text_encoder, toy_trainer


def board(module, callbacks, folder: Path, steps: int = 4, **more) -> EventAccumulator:
    logger = TensorBoardLogger(folder, name="", version="")
    trainer = toy_trainer(
        steps,
        callbacks=callbacks,
        logger=logger,
        limit_val_batches=1,
        val_check_interval=2,
        log_every_n_steps=1,
        **more,
    )
    logger.trainer = trainer
    trainer.fit(module, datamodule=ToyData())
    logger.finalize("success")
    return EventAccumulator(str(folder)).Reload()


def test_tokenizer_run_shows_grid_histogram_config_and_grouped_scalars(tmp_path: Path) -> None:
    callbacks = [
        ReconstructionGrid(images=3),
        CodebookHistogram(),
        ConfigText(text="seed: 0"),
        Throughput(every_steps=1, warmup=1),
        SkippedSamples(every_steps=1),  # of a loader that counts none
    ]
    shown = board(toy_stage(2, adversarial=True), callbacks, tmp_path)
    grid = shown.Images("val/reconstruction")[-1]
    assert (grid.width, grid.height) == (4 * 32, 3 * 32)
    assert "codebook/val_counts" in shown.Tags()["histograms"]
    assert any(tag.startswith("config") for tag in shown.Tags()["tensors"])
    groups = {tag.split("/")[0] for tag in shown.Tags()["scalars"]} - {"epoch"}
    assert groups == {"train", "val", "opt", "codebook", "data", "perf"}
    assert all(event.value > 0 for event in shown.Scalars("perf/images_per_second"))
    assert all(0 <= event.value <= 1 for event in shown.Scalars("data/wait_share"))


def test_the_bar_shows_what_fits_into_its_line() -> None:
    metrics = {"train/loss": 4.4521, "val/token": 3.7, "steps": 12}
    widths = [len("train/loss: 4.452"), len(" val/token: 3.700"), len(" steps: 12")]
    for count in (1, 2, 3):
        columns = sum(widths[:count])
        assert list(fitting(metrics, columns)) == list(metrics)[:count]
        assert list(fitting(metrics, columns - 1)) == list(metrics)[: max(1, count - 1)]
    assert fitting({}, 80) == {}


@pytest.mark.parametrize("width", [80, 160])
def test_a_run_s_bar_is_one_line(width: int, capsys: pytest.CaptureFixture[str]) -> None:
    bar = StepProgressBar(every_batches=1, console_kwargs={"width": width})
    toy_trainer(4, callbacks=[bar], enable_progress_bar=True, limit_val_batches=1).fit(
        toy_masked_generator(), datamodule=ToyData()
    )
    lines = [line for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert sum("4/4" in line for line in lines) == 1
    (last,) = [line for line in lines if "/" in line]
    assert "train/loss: " in last and len(last) <= width
    assert ("train/token: " in last) == (width == 160)


def test_generator_run_draws_the_fixed_prompts_beside_the_scalars(tmp_path: Path) -> None:
    callbacks = [SampleGrid(prompts=["a", "b", "c"], columns=2)]
    shown = board(toy_masked_generator(), callbacks, tmp_path)
    steps = [event.step for event in shown.Scalars("val/token")]
    assert len(steps) == 2
    assert [event.step for event in shown.Images("val/samples")] == steps


def test_a_grid_without_prompts_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one prompt"):
        SampleGrid(prompts=[])


def test_samples_that_could_not_be_used_are_counted_by_reason(tmp_path: Path) -> None:
    bad = {"k0005": {"png": b"no"}, "k0020": {"txt": b""}, "k0030": {"png": b"no"}}
    folder = build(tmp_path / "shards", bad=bad)
    loader = ShardLoader(stream(folder, transform=ImageTransform(32), batch_size=4, max_bad=1.0))
    logger = TensorBoardLogger(tmp_path, name="", version="")
    callbacks = [SkippedSamples(every_steps=4)]
    trainer = toy_trainer(9, callbacks=callbacks, logger=logger, log_every_n_steps=1)
    trainer.fit(toy_stage(1), loader)
    logger.finalize("success")
    shown = EventAccumulator(str(tmp_path)).Reload()
    told = [event.value for event in shown.Scalars("data/skipped")]
    assert told == sorted(told) and len(set(told[:4])) == len(set(told[4:8])) == 1  # two looks
    last = {tag: shown.Scalars(tag)[-1].value for tag in shown.Tags()["scalars"]}
    assert last["data/skipped"] == 3
    assert (last["data/skipped_broken_image"], last["data/skipped_no_caption"]) == (2, 1)


def test_grids_are_drawn_in_the_precision_of_the_training(tmp_path: Path) -> None:
    """A frozen T5 in bf16 beside weights in fp32 is what the large configurations have."""
    encoder = toy_text_encoder()
    encoder.trainable = False
    module = toy_masked_generator(text_encoder=encoder.bfloat16())
    shown = board(module, [SampleGrid(prompts=["a", "b"])], tmp_path, precision="bf16-mixed")
    assert len(shown.Images("val/samples")) == 2


def test_the_bar_of_a_resumed_run_ends_where_the_epoch_or_the_steps_do(tmp_path: Path) -> None:
    totals = []

    class Spy(StepProgressBar):
        def _add_task(self, total_batches, description, **more):
            totals.append(total_batches)
            return super()._add_task(total_batches, description, **more)

    def run(steps: int, ckpt: Path | None = None) -> None:
        callbacks = [Spy(), LastCheckpoint(folder=tmp_path, every_steps=100)]
        trainer = toy_trainer(steps, callbacks=callbacks, enable_progress_bar=True)
        trainer.fit(toy_stage(1), datamodule=ToyData(count=24), ckpt_path=ckpt)

    run(3)
    run(5, tmp_path / "last.ckpt")  # three batches of the epoch's six are done
    run(8, tmp_path / "last.ckpt")
    assert totals == [3, 5, 6]  # the bar of the last is used again for the next epoch
