"""The top of the report: what was done, and the headline figures with what they mean.

`figures` is the content of metrics.json throughout. K codebook size.
"""

import math
from collections.abc import Mapping
from typing import Any

from dcar.evaluation import report_page as html
from dcar.evaluation.report_page import Html, number
from experiments.report_panels import HIGHER, LOWER, PATHS, fid_features_of


def introduction(figures: Mapping[str, Any]) -> Html:
    model, minutes = figures["model"], figures["seconds"]["total"] / 60
    grid = model["size"] // model["downsample"]
    return html.element(
        "p",
        f"{len(figures['runs'])} trainings ran one after another on this machine, "
        f"{number(minutes, 0 if minutes >= 10 else 1)} minutes in all. First a tokenizer learnt to "
        f"turn {model['size']} px pictures into {grid} x {grid} codes out of "
        f"{model['num_codes']:,} plus a continuous residual, and back. Then a generator learnt to "
        "predict codes and residual from a caption. These are small sizes and small drawings: the "
        "page shows that every part of the method works and what it contributes, not how good "
        "large models are.",
    )


def summary(figures: Mapping[str, Any]) -> Html:
    return html.section(
        "In short",
        "The last validation of the finished tokenizer and generator.",
        html.cards([*tokenizer_cards(figures), *generator_cards(figures)]),
    )


def tokenizer_cards(figures: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    found, splits = figures["tokenizer"], figures["splits"]
    features = fid_features_of(found, "rfid_")
    entries = [
        (
            f"Reconstruction, PSNR on {splits[0]}",
            f"{both_paths(found, 'psnr', 2)} dB",
            "hybrid | discrete. How exactly a picture comes back from codes with the residual, and "
            f"from codes alone; {HIGHER}.",
        )
    ]
    if features:
        entries.append(
            (
                f"Reconstruction, rFID on {splits[0]}",
                both_paths(found, f"rfid_{features}", 2),
                f"hybrid | discrete. Distance between the features ({features}) of all real "
                f"and all decoded pictures; {LOWER}. "
                + fid_note(features, figures["images"][splits[0]]),
            )
        )
    entries.append(
        (
            f"Codebook in use on {splits[0]}",
            f"{number(100 * found['codebook_usage'], 1)} %",
            f"of {figures['model']['num_codes']:,} codes occur at all; perplexity "
            f"{number(found['codebook_perplexity'], 0)}, the number of equally frequent codes that "
            "would be as varied.",
        )
    )
    return entries


def both_paths(found: Mapping[str, Any], name: str, digits: int) -> str:
    """Hybrid | discrete, or one dash where neither was measured."""
    values = [found.get(f"{name}_{path}") for path in PATHS]
    if values == [None, None]:
        return "–"
    return " | ".join(number(value, digits) for value in values)


def fid_note(features: str, images: int) -> str:
    if features == "inception":
        return f"From {images} pictures only, so well above what thousands of pictures would give."
    return f"Not Inception's and from {images} pictures: comparable only with itself."


def generator_cards(figures: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    found, splits = figures["generator"], figures["splits"]
    guess = math.log(figures["model"]["num_codes"])
    entries = []
    for split in splits:
        prefix = "" if split == splits[0] else f"{split}_"
        entries.append(
            (
                f"Right | shuffled captions, {split}",
                f"{number(found.get(f'{prefix}token'), 3)} | "
                f"{number(found.get(f'{prefix}token_shuffled'), 3)}",
                "Cross-entropy of hidden codes in nats, with the picture's own caption and with "
                "another's. The gap is what the model takes from the words; guessing blindly costs "
                f"{number(guess)}.",
            )
        )
    features = fid_features_of(found, "gfid_")
    if features:
        entries.append(
            (
                f"Samples, gFID on {splits[0]}",
                number(found[f"gfid_{features}"], 1),
                f"Distance between the features ({features}) of sampled and real pictures; "
                f"{LOWER}. From few pictures, so comparable only between runs of this experiment.",
            )
        )
    minutes = figures["seconds"]["total"] / 60
    entries.append(
        ("Training time", f"{number(minutes, 1)} min", "all runs, validations included.")
    )
    return entries
