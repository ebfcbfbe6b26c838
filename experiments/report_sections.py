"""The words and tables of the report: each section says what it shows, for a newcomer.

`figures` is the content of metrics.json throughout. K codebook size.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from dcar.evaluation import report_page as html
from dcar.evaluation.charts import DARK, LIGHT, usage_png
from dcar.evaluation.report_page import Html, number
from experiments.report_panels import Panels, curves, fid_features_of
from experiments.report_pictures import COLUMN_NAMES, Pictures, Sample
from experiments.report_summary import both_paths, introduction, summary

SPLIT_NOTES = {
    "train": ("Training captions", "The model has learnt from these very pictures."),
    "val": (
        "Validation captions",
        "Pictures kept out of training. The same subject was seen in another style, sometimes as a "
        "drawing that looks nearly the same.",
    ),
    "heldout": (
        "Held-out captions",
        "This subject and this style were never seen together, only each with others, and no "
        "training picture is a near copy: the test of composition.",
    ),
}


def sections(figures: Mapping[str, Any], pictures: Pictures, panels: Panels) -> list[Html]:
    """The whole page below its title."""
    return [
        introduction(figures),
        summary(figures),
        reconstruction(figures, pictures),
        samples(figures, pictures.samples),
        unmasking(pictures),
        stages(figures),
        codebook(figures, pictures.counts),
        curves(panels),
        run_table(figures),
        environment(figures),
    ]


def reconstruction(figures: Mapping[str, Any], pictures: Pictures) -> Html:
    main = figures["splits"][0]
    rows = [
        html.figure(
            [html.image(cell, alt=name) for cell, name in zip(row, COLUMN_NAMES, strict=True)],
            " | ".join(COLUMN_NAMES),
        )
        for row in pictures.rows
    ]
    return html.section(
        "Through the tokenizer and back",
        f"Pictures of {main}, which the tokenizer never trained on. Discrete: decoded from codes "
        "alone. Hybrid: codes plus the continuous residual that they leave out, so it should lie "
        "closer to the input. Error x4: what the hybrid path still gets wrong, four times enlarged "
        "(black is perfect).",
        html.tiles(rows, width=26),
    )


def samples(figures: Mapping[str, Any], groups: Mapping[str, Sequence[Sample]]) -> Html:
    settings = ", ".join(
        f"{key} {value}" for key, value in figures["sampler"].items() if key[0] != "_"
    )
    total = sum(map(len, groups.values()))
    content = []
    for split, group in groups.items():
        pairs = [
            html.figure(
                [
                    html.image(sample.real, alt=f"real picture: {sample.prompt}"),
                    html.image(sample.drawn, alt=f"drawn by the model: {sample.prompt}"),
                ],
                f"{sample.prompt} (seed {sample.seed})",
            )
            for sample in group
        ]
        title, note = SPLIT_NOTES.get(split, (f"Captions of {split}", ""))
        content += [html.element("h3", title), html.element("p", note, css="note")]
        content.append(html.tiles(pairs, width=13))
    return html.section(
        "From a caption to a picture",
        "In each pair the real picture of the caption is left, and what the model drew from the "
        "caption alone is right. Nothing was picked by hand: the first pictures that training "
        "reads, others spaced evenly through their set, and seeds 0 to "
        f"{total - 1} in order. Sampler: {settings}.",
        *content,
    )


def unmasking(pictures: Pictures) -> Html:
    prompt = next(iter(pictures.samples.values()))[0].prompt
    frames = [
        html.figure([html.image(frame.picture, alt=frame.caption)], frame.caption)
        for frame in pictures.frames
    ]
    return html.section(
        "One picture, step by step",
        f"“{prompt}”: all codes start unknown (grey). Each step predicts every unknown code and "
        "keeps those it is surest of (outlined), so few are fixed early and many late; at the end "
        "the residual head adds what codes cannot say.",
        html.tiles(frames, width=8),
    )


def stages(figures: Mapping[str, Any]) -> Html:
    runs = {name: run["figures"] for name, run in figures["runs"].items()}
    kept = {name: found for name, found in runs.items() if "psnr_hybrid" in found}
    features = fid_features_of(figures["tokenizer"], "rfid_")
    names = {"psnr": ("PSNR, dB", 2), "ssim": ("SSIM", 3), "lpips": ("LPIPS", 3)}
    names |= {f"rfid_{features}": (f"rFID ({features})", 2)} if features else {}
    rows = []
    for prefix, split in prefixes(figures["splits"]):
        if f"{prefix}psnr_hybrid" not in figures["tokenizer"]:  # not all splits validate it
            continue
        for name, (label, digits) in names.items():
            cells = [both_paths(found, f"{prefix}{name}", digits) for found in kept.values()]
            rows.append([f"{label}, {split}", *cells])
        usage = [percent(found.get(f"{prefix}codebook_usage")) for found in kept.values()]
        rows.append([f"codebook in use, {split}", *usage])
    return html.section(
        "What each tokenizer stage does",
        "Pairs are hybrid | discrete. Stage 1 trains without the codebook, so its discrete path "
        "means nothing yet. Stage 2 trains everything through the codes. Stage 3 freezes encoder "
        "and codes and teaches the decoder to read both paths. PSNR and SSIM: higher is better; "
        "LPIPS and rFID: lower is better.",
        html.table(["after", *kept], rows),
    )


def prefixes(splits: Sequence[str]) -> list[tuple[str, str]]:
    """How the figures of each split are prefixed, and its name."""
    return [("" if split == splits[0] else f"{split}_", split) for split in splits]


def percent(share: float | None) -> str:
    return "–" if share is None else f"{number(100 * share, 1)} %"


def codebook(figures: Mapping[str, Any], counts: Sequence[int]) -> Html:
    light, dark = usage_png(counts, LIGHT), usage_png(counts, DARK)
    main = figures["splits"][0]
    return html.section(
        "How the codebook is used",
        f"Each code's number of uses over the {figures['images'][main]} pictures of {main}. A flat "
        "curve spends the codes evenly; a long grey end would mean codes that died in training.",
        html.chart(light, dark, alt="sorted counts of the codes"),
    )


def run_table(figures: Mapping[str, Any]) -> Html:
    rows = [
        [
            name,
            number(run.get("steps"), 0),
            number(run.get("images_per_second"), 0),
            number(run.get("seconds"), 0),
            number(run.get("trained_parameters"), 0),
            number(run.get("parameters"), 0),
            run.get("precision", "–"),
            run.get("device", "–"),
        ]
        for name, run in figures["runs"].items()
    ]
    header = ["run", "steps", "images/s", "seconds", "trained", "parameters", "precision", "device"]
    return html.section(
        "Runs",
        "images/s is the median while training; seconds are of the whole run; trained counts the "
        "parameters that moved.",
        html.table(header, rows),
    )


def environment(figures: Mapping[str, Any]) -> Html:
    parts = [
        [f"parameters, {part}", number(count, 0)] for part, count in figures["parameters"].items()
    ]
    rows = [*parts, *(list(entry) for entry in figures["versions"].items())]
    return html.section(
        "Model and machine",
        "What made these figures. All of them, with more digits, are in metrics.json beside this "
        "page; the pictures are in the folder report.",
        html.table(["", ""], rows),
    )
