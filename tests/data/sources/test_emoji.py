"""The embedded data set as it lies in the repository, and the offline parts of its builder."""

import io
import json
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dcar.data.images import read_image
from dcar.data.index import read_shard
from dcar.data.members import Raw
from dcar.data.samples import image_bytes, read_caption
from dcar.data.shards import write_shards
from dcar.data.sources.emoji import SHARDS, is_country_flag, render, samples_of, write_facts
from dcar.data.sources.emoji_art import SETS
from dcar.data.sources.emoji_concepts import CAPTION_BYTES, Concept
from dcar.data.sources.emoji_splits import SAME_CONCEPT_RMSE, features
from dcar.data.storage import expand
from dcar.data.verify import verify

ASSETS = Path(__file__).parents[3] / "assets" / "emoji"
STYLES = {art.style for art in SETS}


@pytest.fixture(scope="module")
def splits() -> dict[str, dict[tuple[str, str], Raw]]:
    """split -> (style, slug) -> raw sample."""
    return {
        split: {
            tuple(str(raw["__key__"]).split("/")): raw
            for path in expand(ASSETS / f"{split}-*.tar")
            for raw in read_shard(path)
        }
        for split in SHARDS
    }


def open_picture(raw: Raw) -> Image.Image:

    return Image.open(io.BytesIO(image_bytes(raw)))


@pytest.mark.parametrize("deep", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_every_shard_is_what_the_manifest_says(deep):
    report = verify(ASSETS, deep=deep, processes=1)
    assert report.has_manifest and not report.counts
    listed = {
        shard["name"] for shard in json.loads((ASSETS / "manifest.json").read_text())["shards"]
    }
    assert listed == {path.name for path in ASSETS.glob("*.tar")}


def test_it_is_as_large_as_promised_and_fits_the_repository(splits):
    pairs = [pair for split in splits.values() for pair in split]
    hands = Counter(slug for _, slug in pairs)
    assert len(pairs) == len(set(pairs)) >= 8000
    assert sum(count >= 2 for count in hands.values()) >= 1800
    assert {style for style, _ in pairs} == STYLES
    assert sum(path.stat().st_size for path in ASSETS.rglob("*") if path.is_file()) <= 40e6
    assert all(count >= 4 for count in SHARDS.values())


def test_each_split_has_its_share_of_the_pairs(splits):
    total = sum(map(len, splits.values()))
    assert len(splits["val"]) / total == pytest.approx(0.05, abs=0.002)
    assert len(splits["heldout"]) / total >= 0.05


def test_a_held_out_pair_is_new_but_its_concept_and_its_style_are_not(splits):
    train, heldout = set(splits["train"]), set(splits["heldout"])
    seen = defaultdict(set)
    for style, slug in train:
        seen[slug].add(style)
    assert not train & heldout and not set(splits["val"]) & (train | heldout)
    for style, slug in heldout:
        assert len(seen[slug] - {style}) >= 2
    assert all(sum(style == other for other, _ in train) > 500 for style in STYLES)
    assert len({slug for _, slug in heldout}) == len(heldout)


def test_no_held_out_drawing_is_a_near_copy_of_its_concept_in_train(splits):
    drawings = defaultdict(list)
    chosen = dict(list(splits["heldout"].items())[::8])
    slugs = {slug for _, slug in chosen}
    for (_, slug), raw in splits["train"].items():
        if slug in slugs:
            drawings[slug].append(features(open_picture(raw).convert("RGBA")))
    for (_, slug), raw in chosen.items():
        own = features(open_picture(raw).convert("RGBA"))
        nearest = min(np.sqrt(((own - other) ** 2).mean()) for other in drawings[slug])
        assert nearest > SAME_CONCEPT_RMSE - 2  # WebP moves colours a little


def test_captions_name_the_style_and_fit_a_byte_tokenizer(splits):
    phrases = {art.style: art.phrase for art in SETS}
    captions = set()
    for split in splits.values():
        for (style, _), raw in split.items():
            caption = read_caption(raw, required=True)
            assert caption.isascii() and len(caption) <= CAPTION_BYTES
            assert f", {phrases[style]}" in caption
            captions.add(caption)
    assert len(captions) == sum(map(len, splits.values()))


def test_pictures_are_square_transparent_and_not_blank(splits):
    for split in splits.values():
        for raw in list(split.values())[::25]:
            picture = open_picture(raw)
            assert (picture.size, picture.mode, picture.format) == ((128, 128), "RGBA", "WEBP")
            ink = (255 - np.asarray(read_image(image_bytes(raw)), dtype=int)).max(axis=-1) > 16
            assert ink.mean() > 0.01


def test_the_facts_agree_with_the_shards(splits):
    concepts = json.loads((ASSETS / "concepts.json").read_text())
    told = {
        (style, concept["slug"]): split
        for concept in concepts
        for style, split in concept["styles"].items()
    }
    assert told == {pair: split for split, pairs in splits.items() for pair in pairs}
    assert all(concept["keywords"] or concept["name"] for concept in concepts)


def test_every_set_comes_with_its_licence():
    words = {
        "MIT": "Permission is hereby granted",
        "Apache-2.0": "Apache License",
        "CC-BY-4.0": "Creative Commons Attribution 4.0",
    }
    for art in SETS:
        text = (ASSETS / "licenses" / f"{art.style}.txt").read_text()
        assert art.attribution in text and words[art.licence] in text
        assert "<year>" not in text


def concept(slug: str) -> Concept:
    return Concept(slug, slug, f"a {slug}", slug, "", "things", ("thing",))


def blot(colour: str, side: int = 128) -> Image.Image:
    picture = Image.new("RGBA", (side, side))
    picture.paste(colour, (side // 4, side // 4, side // 2, side // 2))
    return picture


def test_blank_drawings_and_concepts_of_one_hand_are_left_out():
    drawings = {
        ("1f34e", "noto"): lambda side: blot("red", side),
        ("1f34e", "blob"): lambda side: blot("green", side),
        ("1f34f", "noto"): lambda side: blot("blue", side),
        ("1f34f", "blob"): lambda side: blot("white", side),
    }
    assert set(render(drawings)) == {("1f34e", "noto"), ("1f34e", "blob")}


def test_the_same_pictures_make_the_same_shards_and_facts(tmp_path):
    concepts = {slug: concept(slug) for slug in ("cat", "dog")}
    pairs = [("dog", "noto"), ("cat", "3d"), ("cat", "blob")]
    pictures = {
        pair: blot(colour) for pair, colour in zip(pairs, ("red", "green", "blue"), strict=True)
    }
    built = []
    for folder in (tmp_path / "one", tmp_path / "two"):
        write_shards(samples_of(pairs, pictures, concepts), folder, "train", 2)
        write_facts(folder / "concepts.json", {"train": pairs}, concepts)
        built.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert built[0] == built[1] and len(built[0]) == 3
    assert [raw["__key__"] for raw in read_shard(tmp_path / "one" / "train-000000.tar")] == [
        "noto/dog",
        "3d/cat",
    ]


def test_country_flags_are_told_from_other_flags():
    assert is_country_flag("1f1eb-1f1f7")
    assert not is_country_flag("1f3f3-200d-1f308")
