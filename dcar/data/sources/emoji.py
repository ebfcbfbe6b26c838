"""Builds the embedded data set `assets/emoji`: about 8,900 captioned emoji drawings by six hands.

    python -m dcar.data.sources.emoji --out assets/emoji

Needs npm, the network and the extra `dcar-lightning[emoji]`; takes about two minutes. With the
pinned packages and the Pillow and resvg versions of the manifest the result is the same bytes.
"""

import argparse
import importlib.metadata
import io
import json
import logging
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from PIL import Image, features

from dcar.data.shards import write_manifest, write_shards
from dcar.data.sources.emoji_art import (
    LICENCE_TEXTS,
    NAMES,
    SETS,
    ArtSet,
    Draw,
    bitmap_drawings,
    compact_names,
    fetch,
    iconify_drawings,
    slug_names,
)
from dcar.data.sources.emoji_concepts import (
    Concept,
    caption_of,
    keyword_frequency,
    read_concepts,
    read_shortcodes,
)
from dcar.data.sources.emoji_splits import Pair, is_blank, near_copies, split_pairs

SIDE = 128  # pixels
QUALITY = 80
SEED = 2507
VAL_SHARE = 0.05
HELDOUT_SHARE = 0.055
SHARDS = {"train": 10, "val": 4, "heldout": 4}

# FxEmoji's own names where the rule for names finds nothing or the wrong emoji.
FIREFOX_NAMES: dict[str, str | None] = {
    "wave": "water-wave",
    "pout": "person-pouting",
    "pouting": "enraged-face",
    "constructionsign": "construction",
    "construction": "building-construction",
    "keyboard": "musical-keyboard",
    "bow": "ribbon",
    "up": None,
    "down": None,
}
FLAG_LETTERS = range(0x1F1E6, 0x1F200)  # regional indicators

log = logging.getLogger(__name__)


def is_country_flag(code: str) -> bool:
    """Whether the code points are a pair of regional indicators."""
    return all(int(part, 16) in FLAG_LETTERS for part in code.split("-"))


def collect_drawings(concepts: Mapping[str, Concept], cache: Path) -> dict[Pair, Draw]:
    """(code points, style) -> drawing, for all six sets."""
    folders = {art.style: fetch(art.package, cache) for art in SETS}
    slugs = {code: concept.slug for code, concept in concepts.items()}
    names = slug_names(folders, slugs)
    firefox = compact_names(names, read_shortcodes(fetch(NAMES, cache), concepts), list(concepts))
    by_slug = {slug: code for code, slug in slugs.items()}
    for own, slug in FIREFOX_NAMES.items():
        firefox.pop(own, None)
        if slug is not None:
            firefox[own] = by_slug[slug]
    drawings: dict[Pair, Draw] = {}
    for art in SETS:
        folder = folders[art.style]
        known = firefox if art.style == "firefox" else names
        found = bitmap_drawings(folder) if art.style == "3d" else iconify_drawings(folder, known)
        for code, draw in found.items():
            if code in concepts:
                # The 3D package borrows its country flags from Noto's waved set; Iconify's Noto
                # has none, so they are filed where they look at home.
                style = "noto" if art.style == "3d" and is_country_flag(code) else art.style
                drawings.setdefault((code, style), draw)
    return drawings


def render(drawings: Mapping[Pair, Draw]) -> dict[Pair, Image.Image]:
    """Pictures of `SIDE` px of every concept that at least two hands drew, blank ones left out."""
    pictures = {pair: drawings[pair](SIDE) for pair in sorted(drawings)}
    blank = [pair for pair, picture in pictures.items() if is_blank(picture)]
    log.info("left out as blank: %s", blank)
    for pair in blank:
        del pictures[pair]
    hands: dict[str, int] = {}
    for code, _ in pictures:
        hands[code] = hands.get(code, 0) + 1
    return {pair: picture for pair, picture in pictures.items() if hands[pair[0]] >= 2}


def to_webp(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "webp", quality=QUALITY, alpha_quality=100, method=4)
    return buffer.getvalue()


def samples_of(
    pairs: list[Pair], pictures: Mapping[Pair, Image.Image], concepts: Mapping[str, Concept]
) -> Iterator[dict[str, bytes | str]]:
    """Shard samples `<style>/<slug>` of the pairs, in their order."""
    frequency = keyword_frequency(concepts)
    phrases = {art.style: art.phrase for art in SETS}
    for pair in pairs:
        concept = concepts[pair[0]]
        caption = caption_of(concept, phrases[pair[1]], frequency)
        key = f"{pair[1]}/{concept.slug}"
        yield {"__key__": key, "webp": to_webp(pictures[pair]), "txt": caption.encode()}


def write_facts(
    path: Path, splits: Mapping[str, list[Pair]], concepts: Mapping[str, Concept]
) -> None:
    """`concepts.json`: a list of concepts, each with its facts and the split of each drawing."""
    where: dict[str, dict[str, str]] = {}
    for split, pairs in splits.items():
        for code, style in pairs:
            where.setdefault(code, {})[style] = split
    ordered = sorted(where, key=lambda code: concepts[code].slug)
    lines = [
        json.dumps(concepts[code].facts() | {"styles": where[code]}, sort_keys=True)
        for code in ordered
    ]
    path.write_text("[\n" + ",\n".join(lines) + "\n]\n")


def write_licences(folder: Path, cache: Path) -> None:
    """One file a set: whose work it is, what was changed, and the whole licence text."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = fetch(LICENCE_TEXTS, cache) / "licenses"
    for art in SETS:
        licence = json.loads((texts / f"{art.licence}.json").read_text())["licenseText"]
        (folder / f"{art.style}.txt").write_text(_notice(art) + _named(licence, art))
    names = (fetch(NAMES, cache) / "LICENSE").read_text()
    header = f"Names, keywords and categories: {NAMES.name} {NAMES.version} (npm)\n\n"
    (folder / "names.txt").write_text(header + names)


def _notice(art: ArtSet) -> str:
    flags = ""
    if art.style == "noto":
        flags = (
            "The waved country flags were taken from the npm package @lobehub/fluent-emoji-3d\n"
            "1.1.0 (MIT), which carries them beside Microsoft's art; they are drawn as Noto's.\n"
            "Noto Emoji declares its flag images to be in the public domain or otherwise exempt\n"
            "from copyright.\n"
        )
    return (
        f"{art.attribution}\nSource: {art.source}\n"
        f"Taken from: {art.package.name} {art.package.version} (npm)\nLicence: {art.licence}\n"
        f"Changes: drawn or resized at {SIDE} px and stored as lossy WebP.\n{flags}\n{'-' * 78}\n\n"
    )


def _named(text: str, art: ArtSet) -> str:
    """The MIT text with its placeholders filled in; the other texts as they are."""
    if art.licence != "MIT":
        return text
    owner = "Copyright (c) Microsoft Corporation."
    return text.replace("Copyright (c) <year> <copyright holders>", owner)


def build(out: Path, cache: Path) -> dict[str, int]:
    """Write the whole data set to `out`; returns pairs per split."""
    concepts = read_concepts(fetch(NAMES, cache))
    pictures = render(collect_drawings(concepts, cache))
    splits = split_pairs(
        list(pictures), near_copies(pictures), seed=SEED, val=VAL_SHARE, heldout=HELDOUT_SHARE
    )
    shards = {}
    for split, pairs in splits.items():
        per_shard = -(-len(pairs) // SHARDS[split])
        shards[split] = write_shards(samples_of(pairs, pictures, concepts), out, split, per_shard)
    write_facts(out / "concepts.json", splits, concepts)
    write_licences(out / "licenses", cache)
    packages = [art.package for art in SETS] + [NAMES, LICENCE_TEXTS]
    write_manifest(
        out,
        shards,
        seed=SEED,
        settings={
            "side": SIDE,
            "webp_quality": QUALITY,
            "val_share": VAL_SHARE,
            "heldout_share": HELDOUT_SHARE,
        },
        styles={art.style: art.phrase for art in SETS},
        pairs={split: len(pairs) for split, pairs in splits.items()},
        concepts=len({code for code, _ in pictures}),
        packages={package.name: package.version for package in packages},
        versions={
            "pillow": importlib.metadata.version("pillow"),
            "libwebp": features.version_module("webp"),
            "resvg_py": importlib.metadata.version("resvg_py"),
        },
    )
    return {split: len(pairs) for split, pairs in splits.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the embedded emoji data set.")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder to write, e.g. assets/emoji"
    )
    default = Path(tempfile.gettempdir()) / "dcar-emoji-packages"
    parser.add_argument("--cache", type=Path, default=default, help="folder for fetched packages")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    log.info("%s", build(arguments.out, arguments.cache))


if __name__ == "__main__":
    main()
