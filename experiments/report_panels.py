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
    paths = {f"psnr_{path}": path for path in PATHS}
    rfid = {f"rfid_{features}_{path}": path for path in PATHS}
    captions = {"token": "right captions", "token_shuffled": "shuffled captions"}
    usage = {f"codebook/{split}_usage": split for split in splits}
    of_tokenizer = [
        Panel("Training losses", LOWER, {"train/l1": "L1", "train/lpips": "LPIPS"}),
        per_split("PSNR of reconstructions", f"dB, {HIGHER}", paths, splits),
        per_split(f"rFID of reconstructions ({features})", LOWER, rfid, splits),
        Panel("Codes in use", "share of the codebook", usage),
    ]
    of_generator = [
        Panel("Training cross-entropy", f"nats, {LOWER}", {"train/token": "tokens"}),
        Panel("Training loss of the residual head", LOWER, {"train/residual": "residual"}),
        per_split("Validation cross-entropy", f"nats, {LOWER}", captions, splits),
    ]
    both = [(panel, tokenizers) for panel in of_tokenizer]
    both += [(panel, generators) for panel in of_generator]
    return [(panel, runs) for panel, runs in both if panel.has_data(runs)]


def per_split(title: str, unit: str, names: Mapping[str, str], splits: Sequence[str]) -> Panel:
    """A colour a name; dashed for every split but the first."""
    tags = {f"{split}/{name}": f"{names[name]}, {split}" for split in splits for name in names}
    dashed = [tag for tag in tags if not tag.startswith(f"{splits[0]}/")]
    return Panel(title, unit, tags, frozenset(dashed))


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
