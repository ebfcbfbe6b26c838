"""Views come back the same, and what their labels say is what lies in the picture."""

import io
import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

from dcar.data import views as module
from dcar.data.batches import Batch
from dcar.data.scenes import cut_out, lay, read_drawings
from dcar.data.shard_set import ShardSet
from dcar.data.shards import write_manifest, write_shards
from dcar.data.views import IGNORED, KINDS, SIDE, ViewLoader, ViewSet, half_box, read_names
from tests.toys import ROOT

STYLES = ("flat", "3d")
CONCEPTS = {  # slug -> (phrase, category, colour that no ground has)
    "whale": ("a whale", "animals & nature", (0, 0, 255)),
    "apple": ("an apple", "food & drink", (255, 0, 0)),
    "clock": ("an alarm clock", "objects", (0, 255, 0)),
    "tulip": ("a tulip", "animals & nature", (255, 0, 255)),
}


def drawing(colour: tuple[int, int, int]) -> bytes:
    """A square with a margin; its right edge is black."""
    picture = Image.new("RGBA", (128, 128), (255, 255, 255, 0))
    picture.paste((*colour, 255), (10, 10, 118, 118))
    picture.paste((0, 0, 0, 255), (100, 10, 118, 118))
    file = io.BytesIO()
    picture.save(file, "webp", lossless=True, exact=True)
    return file.getvalue()


@pytest.fixture(scope="module")
def drawings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drawings")
    samples = [
        {"__key__": f"{style}/{slug}", "webp": drawing(colour), "txt": phrase.encode()}
        for style in STYLES
        for slug, (phrase, _, colour) in CONCEPTS.items()
    ]
    entries = write_shards(samples, folder, prefix="train", samples_per_shard=3)
    write_manifest(folder, {"train": entries})
    known = [
        {"slug": slug, "phrase": phrase, "category": category, "keywords": [], "styles": STYLES}
        for slug, (phrase, category, _) in CONCEPTS.items()
    ]
    (folder / "concepts.json").write_text(json.dumps(known))
    return folder


def make(folder: Path, **options) -> ViewSet:
    given = {"concepts": folder / "concepts.json", "seed": 0, "softened": False} | options
    return ViewSet(str(folder / "train-*.tar"), **given)


def blobs(picture: Image.Image) -> dict[str, list[int]]:
    """Sizes in pixels of the connected areas of each concept's colour, but specks."""
    pixels = np.asarray(picture).astype(int)
    found = {}
    for slug, (_, _, colour) in CONCEPTS.items():
        areas, number = ndimage.label(np.abs(pixels - colour).max(axis=2) < 60)
        sizes = [int((areas == area + 1).sum()) for area in range(number)]
        found[slug] = [size for size in sizes if size > 20]
    return found


def test_names_are_sorted_and_a_key_s_labels_are_places_in_them(drawings: Path) -> None:
    names = read_names(drawings / "concepts.json")
    assert names == (("apple", "clock", "tulip", "whale"), ("3d", "flat"))
    assert names.labels("flat/clock") == (1, 1)
    with pytest.raises(ValueError):
        names.labels("flat/unicorn")


def test_a_view_is_the_same_whenever_it_is_drawn(drawings: Path) -> None:
    kinds = {kind: 1 for kind in KINDS if kind != "plain"}  # of which there are few
    one, other, changed = (
        make(drawings, softened=True, kinds=kinds, seed=seed) for seed in (0, 0, 1)
    )
    numbers = range(60)
    first = {number: one.view(number) for number in numbers}
    again = {number: other.view(number) for number in reversed(numbers)}
    assert all(first[number] == again[number] for number in numbers)
    assert len({view.picture.tobytes() for view in first.values()}) == 60
    assert sum(changed.view(number) == first[number] for number in numbers) == 0


def test_distinct_views_come_again_and_are_drawn_once(drawings: Path, monkeypatch) -> None:
    views, endless = make(drawings, distinct=5), make(drawings)
    seen = list(ViewLoader(views, batch_size=4, batches=3, goes_on=True))
    assert [batch["number"] for batch in seen] == [[0, 1, 2, 3], [4, 0, 1, 2], [3, 4, 0, 1]]
    first = endless.view(3).picture.tobytes()
    assert views.view(3).picture.tobytes() == views.view(8).picture.tobytes() == first
    monkeypatch.setattr(ViewSet, "_drawn", None)  # from now on only memory can answer
    assert views.view(13).picture.tobytes() == first
    assert endless.number(8) == 8 and views.number(8) == 3


def test_every_drawing_is_the_subject_once_in_an_epoch(drawings: Path) -> None:
    data = make(drawings)
    keys = [data.view(number).key for number in range(24)]
    epochs = [keys[:8], keys[8:16], keys[16:]]
    assert all(len(set(epoch)) == 8 for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_kinds_come_as_often_as_their_weights_say(drawings: Path) -> None:
    data = make(drawings, kinds={"equal": 1, "different": 3, "single": 0})
    views = [data.view(number) for number in range(400)]
    assert 250 < sum(view.concept == IGNORED for view in views) < 350
    assert {view.count for view in views} == {1, 2, 3}


@pytest.mark.parametrize("kind", KINDS)
def test_labels_are_true_of_the_picture(drawings: Path, kind: str) -> None:
    data = make(drawings, kinds={kind: 1})
    for number in range(60):
        view = data.view(number)
        style, slug = view.key.split("/")
        seen = blobs(view.picture)
        assert view.picture.size == (SIDE, SIDE) and view.picture.mode == "RGB"
        assert view.style == data.names.styles.index(style)
        if kind == "different":
            assert view.concept == IGNORED and len(seen[slug]) >= 1
            assert len([size for sizes in seen.values() for size in sizes]) == view.count + 1
            continue
        assert view.concept == data.names.concepts.index(slug)
        areas = {name: sum(sizes) for name, sizes in seen.items()}
        assert max(areas, key=lambda name: areas[name]) == slug
        if kind == "equal":
            assert len(seen[slug]) == view.count + 1 and sum(areas.values()) == areas[slug]
        if view.count == 0:
            assert len(seen[slug]) == 1 and sum(areas.values()) == areas[slug]


def test_where_a_neighbour_is_seen_objects_are_not_counted(drawings: Path) -> None:
    singles, halves = (make(drawings, kinds={kind: 1}) for kind in ("single", "half"))
    counts = Counter(singles.view(number).count for number in range(300))
    assert set(counts) == {0, IGNORED} and 60 < counts[IGNORED] < 120
    assert {halves.view(number).count for number in range(60)} == {IGNORED}


def test_what_has_a_side_is_never_mirrored(drawings: Path, monkeypatch) -> None:
    monkeypatch.setattr(module, "anywhere", lambda rng: (0, 0, SIDE, SIDE))
    data = make(drawings, kinds={"single": 1})
    black_left: dict[str, set[bool]] = {slug: set() for slug in CONCEPTS}
    for number in range(160):
        view = data.view(number)
        left = view.picture.getpixel((8, SIDE // 2))
        black_left[view.key.split("/")[1]].add(max(left) < 40)
    assert black_left == {
        "whale": {True, False},
        "apple": {True, False},
        "tulip": {True, False},
        "clock": {False},
    }


def test_the_drawing_that_a_view_names_is_nearest_to_a_clean_paste_of_it(monkeypatch) -> None:
    """Real drawings, whole and on white: nothing of them is lost on the way through memory."""
    monkeypatch.setattr(module, "anywhere", lambda rng: (0, 0, SIDE, SIDE))
    monkeypatch.setattr(module, "ground", lambda rng: Image.new("RGB", (SIDE, SIDE), "white"))
    urls, concepts = ROOT / "assets/emoji/val-000000.tar", ROOT / "assets/emoji/concepts.json"
    data = ViewSet(urls, concepts=concepts, seed=0, kinds={"single": 1}, softened=False)
    clean = {}
    for one in read_drawings(ShardSet(urls), concepts):
        canvas = Image.new("RGB", (SIDE, SIDE), "white")
        lay(cut_out(one), canvas, (0, 0, SIDE, SIDE))
        clean[one.key] = np.asarray(canvas).astype(np.float32)
    alone = [view for view in map(data.view, range(60)) if view.count == 0]
    assert len(alone) > 30
    for view in alone:
        pixels = np.asarray(view.picture).astype(np.float32)
        away = {key: distance(pixels, paste) for key, paste in clean.items()}
        assert min(away, key=lambda key: away[key]) == view.key and away[view.key] < 5


def distance(pixels: np.ndarray, other: np.ndarray) -> float:
    """Mean difference of 255 levels, mirrored or not."""
    return min(float(np.abs(pixels - way).mean()) for way in (other, other[:, ::-1]))


def test_the_halves_of_a_scene_meet_in_its_middle() -> None:
    assert half_box(0, is_beside=True) == (0, 0, 32, 64)
    assert half_box(1, is_beside=True) == (32, 0, 64, 64)
    assert half_box(0, is_beside=False, border=3) == (0, 0, 64, 35)
    assert half_box(1, is_beside=False, border=-3) == (0, 35, 64, 64)


def test_boxes_are_as_large_and_as_far_out_as_promised() -> None:
    rng = random.Random(0)
    for _ in range(300):
        left, top, right, bottom = module.anywhere(rng)
        for first, last in ((left, right), (top, bottom)):
            inside = min(last, SIDE) - max(first, 0)
            assert 0.32 * SIDE < last - first < 1.09 * SIDE
            assert inside / (last - first) > 0.8 or inside == SIDE
        left, top, right, bottom = module.at_an_edge(rng)
        width, height = (min(b, SIDE) - max(a, 0) for a, b in ((left, right), (top, bottom)))
        assert 1 <= min(width, height) <= 0.2 * SIDE


def same(one: Batch, two: Batch) -> bool:
    tensors = ("image", *module.LABELS)
    return one["key"] == two["key"] and all(torch.equal(one[name], two[name]) for name in tensors)


def test_batches_are_taken_up_where_a_training_stopped(drawings: Path) -> None:
    def loader(*, goes_on: bool = True) -> ViewLoader:
        return ViewLoader(make(drawings), batch_size=3, batches=4, goes_on=goes_on)

    whole = loader()
    batches = [batch for _ in range(3) for batch in whole]
    assert len(batches) == 12 and len(whole) == 4
    first = batches[0]
    assert first["image"].shape == (3, 3, SIDE, SIDE) and len(first["key"]) == 3
    assert {first[name].shape for name in module.LABELS} == {(3,)}
    stopped, resumed = loader(), loader()
    ahead = iter(stopped)
    for _ in range(3):
        next(ahead)
    resumed.load_state_dict(stopped.state_dict())
    rest = [batch for _ in range(2) for batch in resumed]
    assert len(rest) == 5 and all(same(*pair) for pair in zip(rest, batches[3:8], strict=True))
    again = loader(goes_on=False)
    assert same(next(iter(again)), first) and all(map(same, again, batches[:4]))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"kinds": {"double": 1.0}}, "kinds names \\['double'\\]"),
        ({"kinds": {"plain": 0.0}}, "kinds .* must be weights of 0 and more, one above 0"),
        ({"batch_size": 0}, "batch_size 0 and batches 4"),
    ],
)
def test_settings_that_cannot_be_are_refused(drawings: Path, options, message: str) -> None:
    size = options.pop("batch_size", 2)
    with pytest.raises(ValueError, match=message):
        ViewLoader(make(drawings, **options), batch_size=size, batches=4, goes_on=True)


def test_a_style_of_one_concept_makes_no_pairs(drawings: Path) -> None:
    data = make(drawings, kinds={"half": 1})
    data.by_style = {style: [pieces[0]] for style, pieces in data.by_style.items()}
    with pytest.raises(ValueError, match="the only concept of its style"):
        for number in range(8):
            data.view(number)
