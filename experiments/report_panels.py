"""Which curves the report shows, each over the runs of its half of the method."""

from collections.abc import Mapping, Sequence
from typing import Any

from dcar.evaluation import report_page as html
from dcar.evaluation.charts import DARK, LIGHT, Panel, curves_png
from dcar.evaluation.report_page import Html
from dcar.evaluation.run_record import RunRecord

Panels = Sequence[tuple[Panel, Sequence[RunRecord]]]
LOWER, HIGHER = "lower is better", "higher is better"
PATHS = ("hybrid", "discrete")


def panels_of(
    tokenizers: Sequence[RunRecord], generators: Sequence[RunRecord], splits: Sequence[str]
) -> Panels:
    """The curves worth a look, of those that were logged."""
    features = fid_features_of(tokenizers[-1].figures(splits), "rfid_")
    psnr = {f"{split}/psnr_{path}": f"{path}, {split}" for split in splits for path in PATHS}
    rfid = {
        f"{split}/rfid_{features}_{path}": f"{path}, {split}" for split in splits for path in PATHS
    }
    right = {f"{split}/token": f"right captions, {split}" for split in splits}
    wrong = {f"{split}/token_shuffled": f"shuffled captions, {split}" for split in splits}
    tokens = {
        key: label for pair in zip(right.items(), wrong.items(), strict=True) for key, label in pair
    }
    of_tokenizer = [
        Panel("Training losses", LOWER, {"train/l1": "L1", "train/lpips": "LPIPS"}),
        Panel("PSNR of reconstructions", f"dB, {HIGHER}", psnr),
        Panel(f"rFID of reconstructions ({features})", LOWER, rfid),
        Panel("Codes in use", "share", {f"codebook/{split}_usage": split for split in splits}),
    ]
    of_generator = [
        Panel("Training cross-entropy", f"nats, {LOWER}", {"train/token": "tokens"}),
        Panel("Training loss of the residual head", LOWER, {"train/residual": "residual"}),
        Panel("Validation cross-entropy", f"nats, {LOWER}", tokens),
    ]
    both = [(panel, tokenizers) for panel in of_tokenizer]
    both += [(panel, generators) for panel in of_generator]
    return [(panel, runs) for panel, runs in both if panel.has_data(runs)]


def fid_features_of(figures: Mapping[str, Any], prefix: str) -> str:
    """The network of a Frechet distance, from the name it is logged under; empty for none."""
    names = [key.removeprefix(prefix) for key in figures if key.startswith(prefix)]
    return names[0].removesuffix("_hybrid").removesuffix("_discrete") if names else ""


def curves(panels: Panels) -> Html:
    charts = [
        html.figure(
            [
                html.chart(
                    *(curves_png([entry], theme) for theme in (LIGHT, DARK)), alt=entry[0].title
                )
            ]
        )
        for entry in panels
    ]
    return html.section(
        "Curves",
        "Runs follow one another from left to right; a dotted line is where the next one starts. "
        "Faint lines are the logged values, strong ones their running average; dots are "
        "validations, made with averaged weights.",
        html.tiles(charts, width=22),
    )
