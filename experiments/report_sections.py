"""The words and tables of the report: each section says what it shows, for a newcomer.

`figures` is the content of metrics.json throughout. K codebook size.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from dcar.evaluation import report_page as html
from dcar.evaluation.charts import DARK, LIGHT, usage_png
from dcar.evaluation.report_page import Html, number
from experiments.report_panels import PATHS, Panels, curves, fid_features_of
from experiments.report_pictures import COLUMN_NAMES, Pictures, Sample
from experiments.report_summary import introduction, summary

SPLIT_NOTES = {
    "train": "Training captions: the model has learnt from these very pictures.",
    "val": "Validation captions: pictures kept out of training, where the same subject may occur "
    "in another style that looks nearly the same.",
    "heldout": "Held-out captions: this subject and this style were never seen together, each was "
    "seen with others, and no training picture is a near copy. This is the test of composition.",
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
        "alone. Hybrid: codes plus the continuous residual that they leave out, which is why it is "
        "sharper. Error x4: what the hybrid path still gets wrong, four times enlarged (black is "
        "perfect).",
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
        content.append(html.element("h3", SPLIT_NOTES.get(split, f"Captions of {split}.")))
        content.append(html.tiles(pairs, width=13))
    return html.section(
        "From a caption to a picture",
        "In each pair the real picture of the caption is left, and what the model drew from the "
        f"caption alone is right. Nothing was picked by hand: captions are spaced evenly through "
        f"each set, seeds are 0 to {total - 1} in order. Sampler: {settings}.",
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
    features = fid_features_of(next(iter(kept.values())), "rfid_")
    names = {"psnr": ("PSNR, dB", 2), "ssim": ("SSIM", 3), "lpips": ("LPIPS", 3)}
    names |= {f"rfid_{features}": ("rFID", 2)} if features else {}
    rows = [
        [
            f"{label}, {path}{suffix}",
            *(number(found.get(f"{prefix}{name}_{path}"), digits) for found in kept.values()),
        ]
        for prefix, suffix in prefixes(figures["splits"])
        for name, (label, digits) in names.items()
        for path in PATHS
    ]
    rows += [
        [
            f"codebook in use, %{suffix}",
            *(number(percent(found.get(f"{prefix}codebook_usage")), 1) for found in kept.values()),
        ]
        for prefix, suffix in prefixes(figures["splits"])
    ]
    return html.section(
        "What each tokenizer stage does",
        "Stage 1 trains without the codebook, so its discrete path is noise by design. Stage 2 "
        "trains everything through the codes. Stage 3 freezes encoder and codes and teaches the "
        "decoder to read both paths. PSNR and SSIM: higher is better; LPIPS and rFID: lower is "
        "better.",
        html.table(["after", *kept], rows),
    )


def prefixes(splits: Sequence[str]) -> list[tuple[str, str]]:
    """How a split's figures are named, and what a reader sees of that."""
    return [("" if split == splits[0] else f"{split}_", f" ({split})") for split in splits]


def percent(value: float | None) -> float | None:
    return None if value is None else 100 * value


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
