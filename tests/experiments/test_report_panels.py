"""Which curves are shown, and over which runs."""

from dcar.evaluation.run_record import Curve, RunRecord
from experiments.report_panels import curves, fid_features_of, panels_of


def run(name: str, *tags: str) -> RunRecord:
    metrics = {tag: 1.0 for tag in tags}
    return RunRecord(name, {"steps": 5}, metrics, {tag: Curve([1, 5], [2.0, 1.0]) for tag in tags})


TOKENIZER = run("stage3", "train/l1", "val/psnr_hybrid", "val/rfid_inception_hybrid")
GENERATOR = run("generator_64", "train/token", "val/token", "heldout/token_shuffled")


def test_each_half_s_panels_go_over_its_own_runs() -> None:
    shown = panels_of([TOKENIZER], [GENERATOR], ["val", "heldout"])
    for panel, runs in shown:
        expected = GENERATOR if "cross-entropy" in panel.title else TOKENIZER
        assert list(runs) == [expected]


def test_panels_that_nothing_was_logged_for_are_left_out() -> None:
    titles = [panel.title for panel, _ in panels_of([TOKENIZER], [GENERATOR], ["val"])]
    assert "Codes in use" not in titles and "Training loss of the residual head" not in titles
    assert len(titles) == 5


def test_rfid_is_named_after_its_features() -> None:
    shown = [panel for panel, _ in panels_of([TOKENIZER], [GENERATOR], ["val"])]
    (rfid,) = [panel for panel in shown if "rFID" in panel.title]
    assert "inception" in rfid.title and "val/rfid_inception_discrete" in rfid.tags


def test_features_are_read_off_either_path_and_may_be_missing() -> None:
    assert fid_features_of({"psnr": 1, "rfid_mobilenetv2_discrete": 2}, "rfid_") == "mobilenetv2"
    assert fid_features_of({"gfid_inception": 2}, "gfid_") == "inception"
    assert fid_features_of({"psnr": 1}, "rfid_") == ""


def test_every_panel_is_a_picture_in_both_themes() -> None:
    shown = panels_of([TOKENIZER], [GENERATOR], ["val"])
    markup = curves(shown)
    assert markup.count("<img") == markup.count("<source") == len(shown)
