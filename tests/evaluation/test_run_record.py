"""What a run left on disk: facts, flat names of figures, curves over several event files."""

import json
from pathlib import Path

import pytest
from torch.utils.tensorboard import SummaryWriter

from dcar.evaluation.run_record import Curve, RunRecord, read_run


def record(**metrics: float) -> RunRecord:
    named = {name.replace("__", "/"): value for name, value in metrics.items()}
    return RunRecord("run", {"steps": 7, "seconds": None}, named, {})


def test_the_first_split_s_figures_are_bare_and_the_others_prefixed() -> None:
    run = record(val__token=1.0, heldout__token=2.0, codebook__heldout_usage=0.5, train__token=3.0)
    expected = {"token": 1.0, "heldout_token": 2.0, "heldout_codebook_usage": 0.5}
    assert run.figures(["val", "heldout"]) == expected
    assert run.figures(["heldout"]) == {"token": 2.0, "codebook_usage": 0.5}


def test_a_split_s_name_that_begins_another_s_takes_nothing_of_it() -> None:
    run = record(val__token=1.0, val2__token=2.0, codebook__val2_usage=0.5)
    assert run.figures(["val"]) == {"token": 1.0}


def test_what_was_validated_tells_tokenizers_from_generators() -> None:
    tokenizer, generator = record(val__psnr_hybrid=1.0), record(val__token=1.0)
    assert tokenizer.is_tokenizer and not tokenizer.is_generator
    assert generator.is_generator and not generator.is_tokenizer


def test_speed_is_the_median_and_unknown_without_a_curve() -> None:
    assert record().images_per_second is None and record().seconds is None
    curves = {"perf/images_per_second": Curve([1, 2, 3], [1.0, 100.0, 101.0])}
    assert RunRecord("run", {}, {}, curves).images_per_second == 100.0


def test_a_resumed_run_s_event_files_are_one_curve(tmp_path: Path) -> None:
    (tmp_path / "metrics.json").write_text(json.dumps({"steps": 4, "metrics": {"val/token": 2.5}}))
    folder = tmp_path / "tensorboard"
    for part, steps in enumerate(([0, 1], [2, 3])):
        board = SummaryWriter(str(folder), filename_suffix=f".{part}")
        for step in steps:
            board.add_scalar("train/loss", 10 - step, step)
        board.close()
        (written,) = folder.glob(f"*.{part}")  # read in the order of their seconds, here the same
        written.rename(folder / f"events.out.tfevents.{part}.done")
    run = read_run(tmp_path, name="run")
    assert run.steps == 4 and run.metrics == {"val/token": 2.5}
    assert run.curves["train/loss"] == Curve([0, 1, 2, 3], [10.0, 9.0, 8.0, 7.0])


def test_an_unfinished_run_is_named_with_the_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="'stage2' is not finished.*metrics.json"):
        read_run(tmp_path, name="stage2")
