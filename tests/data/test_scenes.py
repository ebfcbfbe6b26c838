"""Scenes come back the same, hold what their captions say, and stream like shards."""

import io
import json
import pickle
from collections import Counter
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dcar.data.loader import ShardLoader
from dcar.data.members import BadSample
from dcar.data.scene_words import COLOURS
from dcar.data.scenes import KINDS, Placed, Scene, SceneSet
from dcar.data.shard_set import ShardSet
from dcar.data.shards import write_manifest, write_shards
from dcar.data.stream import Part, ShardStream
from dcar.data.transforms import ImageTransform
from dcar.errors import DataError

SIDE = 32
STYLES = {"flat style", "3d style"}
CONCEPTS = {  # slug -> (phrase, category, colour)
    "apple": ("an apple", "food & drink", (255, 0, 0)),
    "whale": ("a whale", "animals & nature", (0, 0, 255)),
    "clock": ("an alarm clock", "objects", (0, 255, 0)),
}


def drawing(colour: tuple[int, int, int]) -> bytes:
    """A disc in the left two thirds of a square with nothing around it."""
    picture = Image.new("RGBA", (64, 64), (255, 255, 255, 0))
    picture.paste((*colour, 255), (8, 12, 40, 52))
    file = io.BytesIO()
    picture.save(file, "webp", lossless=True, exact=True)
    return file.getvalue()


@pytest.fixture(scope="module")
def drawings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drawings")
    samples = [
        {"__key__": f"{style}/{slug}", "webp": drawing(colour), "txt": phrase.encode()}
        for style in ("flat", "3d")
        for slug, (phrase, _, colour) in CONCEPTS.items()
    ]
    entries = write_shards(samples, folder, prefix="train", samples_per_shard=4)
    write_manifest(folder, {"train": entries})
    known = [
        {"slug": slug, "phrase": phrase, "category": category, "keywords": ["one", "two"]}
        for slug, (phrase, category, _) in CONCEPTS.items()
    ]
    (folder / "concepts.json").write_text(json.dumps(known))
    return folder


def scenes(folder: Path, **options) -> SceneSet:
    given = {"concepts": folder / "concepts.json", "scenes": 101, "side": SIDE} | options
    return SceneSet(str(folder / "train-*.tar"), **given)


def test_a_drawing_that_cannot_be_read_is_named(drawings: Path, tmp_path: Path) -> None:
    for path in drawings.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    shard = tmp_path / "train-000001.tar"
    shard.write_bytes(shard.read_bytes()[:600])  # in the picture of its first sample
    with pytest.raises(DataError, match=r"train-000001.tar: sample \d: lost with its shard"):
        scenes(tmp_path).read(0, 0)


def test_a_scene_is_the_same_whenever_and_wherever_it_is_drawn(drawings: Path) -> None:
    one, other = scenes(drawings), pickle.loads(pickle.dumps(scenes(drawings)))
    assert sum(one.counts) == 101 and len(one.counts) == 2
    places = [
        (shard, position) for shard, count in enumerate(one.counts) for position in range(count)
    ]
    first = [one.read(*place) for place in places]
    assert [other.read(*place) for place in reversed(places)][::-1] == first
    assert len({raw["__key__"] for raw in first}) == 101
    assert len({raw["png"] for raw in first}) > 70  # of six drawings
    assert scenes(drawings, seed=1).read(0, 0) != first[0]
    with pytest.raises(BadSample):
        one.read(0, one.counts[0])


def test_kinds_come_as_often_as_their_weights_say(drawings: Path) -> None:
    data = scenes(drawings, kinds={"single": 3, "counting": 1, "position": 0})
    counted = Counter(data.scene(number).kind for number in range(400))
    assert set(counted) == {"single", "counting"} and 250 < counted["single"] < 350


def colour_in(picture: np.ndarray, box: tuple[int, int, int, int]) -> str:
    """The concept whose colour most of what is drawn in a box has."""
    left, top, right, bottom = box
    pixels = picture[top:bottom, left:right].reshape(-1, 3).astype(int)
    near = {
        slug: (np.abs(pixels - colour).sum(1) < 120).sum()
        for slug, (_, _, colour) in CONCEPTS.items()
    }
    return max(near, key=near.get)


@pytest.mark.parametrize("kind", list(KINDS))
def test_the_picture_holds_what_is_said_where_it_is_said(drawings: Path, kind: str) -> None:
    data = scenes(drawings, kinds={kind: 1})
    for number in range(40):
        scene = data.scene(number)
        picture = np.asarray(scene.picture)
        assert picture.shape == (SIDE, SIDE, 3)
        for placed in scene.placed:
            assert colour_in(picture, placed.box) == placed.drawing.key.split("/")[1]
            assert min(placed.box) >= 0 and max(placed.box) <= SIDE
        check_words(scene)


def check_words(scene: Scene) -> None:
    phrases = [placed.drawing.subject.phrase for placed in scene.placed]
    styles = {placed.drawing.subject.style for placed in scene.placed}
    assert len(styles) == 1 and all(other not in scene.caption for other in STYLES - styles)
    if scene.kind == "counting":
        number = {2: "two", 3: "three", 4: "four"}[len(phrases)]
        (plural,) = {placed.drawing.subject.plural for placed in scene.placed}
        assert scene.caption.startswith(f"{number} {plural}")
        assert all(apart(one, other) for one, other in combinations(scene.placed, 2))
        return
    assert all(phrase in scene.caption for phrase in phrases)
    if scene.kind == "single":
        (ground,) = scene.ground
        article = "an" if ground == "orange" else "a"
        told = f"{phrases[0]} on {article} {ground} background"
        is_told = told in scene.caption
        assert is_told or (ground == "white" and "background" not in scene.caption)
        check_ground(scene, ground, SIDE - 1)
    if scene.kind == "position":
        check_places(scene, phrases)
    if scene.kind == "two_colours":
        for phrase, name, corner in zip(phrases, scene.ground, (0, SIDE - 1), strict=True):
            assert f"{phrase} on {name}" in scene.caption
            check_ground(scene, name, corner)


def check_ground(scene: Scene, name: str, column: int) -> None:
    pixel = scene.picture.getpixel((column, 0))
    assert max(abs(a - b) for a, b in zip(pixel, COLOURS[name], strict=True)) <= 12


def apart(one: Placed, other: Placed) -> bool:
    """Hardly any of one lies on the other."""
    lefts, tops, rights, bottoms = zip(one.box, other.box, strict=True)
    overlap = [max(0, min(rights) - max(lefts)), max(0, min(bottoms) - max(tops))]
    return overlap[0] * overlap[1] < (one.box[2] - one.box[0]) ** 2 / 4


def check_places(scene: Scene, phrases: list[str]) -> None:
    (x1, y1), (x2, y2) = (placed.box[:2] for placed in scene.placed)
    is_told_first = scene.caption.index(phrases[0]) < scene.caption.index(phrases[1])
    true = {
        "left of": x1 < x2,
        "right of": x1 > x2,
        " above ": y1 < y2,
        " below ": y1 > y2,
    }
    for words, is_so in true.items():
        if words in scene.caption:
            assert is_so == is_told_first


def test_only_what_may_be_is_mirrored(drawings: Path) -> None:
    data = scenes(drawings, kinds={"single": 1})
    placed = [data.scene(number).placed[0] for number in range(200)]
    mirrored = Counter(one.drawing.key.split("/")[1] for one in placed if one.is_mirrored)
    assert set(mirrored) == {"apple", "whale"}


def test_a_mixture_of_shards_and_scenes_streams_the_same_on_workers(drawings: Path) -> None:
    def keys(workers: int) -> list[str]:
        mixture = {"scenes": Part(scenes(drawings), 3.0), "own": Part(plain(drawings), 1.0)}
        stream = ShardStream(
            mixture=mixture,
            transform=ImageTransform(SIDE),
            batch_size=4,
            seed=0,
            shuffle=True,
            samples_per_epoch=40,
        )
        batches = list(ShardLoader(stream, num_workers=workers))
        assert batches[0]["image"].shape == (4, 3, SIDE, SIDE) and all(batches[0]["caption"])
        return [key for batch in batches for key in batch["key"]]

    assert keys(0) == keys(2)
    assert 20 < sum(key.startswith("scene/") for key in keys(0)) < 38


def plain(folder: Path) -> ShardSet:
    return ShardSet(str(folder / "train-*.tar"))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"kinds": {"double": 1.0}}, "kinds names \\['double'\\]"),
        ({"scenes": 1}, "scenes=1 must be at least the 2 shards"),
        ({"kinds": {"single": 0.0}}, "kinds .* must be weights of 0 and more, one above 0"),
        ({"kinds": {"single": 1.0, "counting": -1.0}}, "kinds .* must be weights"),
    ],
)
def test_settings_that_cannot_be_are_refused(drawings: Path, options, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        scenes(drawings, **options)


def test_a_drawing_that_is_not_known_is_named(drawings: Path, tmp_path: Path) -> None:
    (tmp_path / "concepts.json").write_text("[]")
    with pytest.raises(ValueError, match="flat/apple is not in"):
        scenes(drawings, concepts=tmp_path / "concepts.json")


@pytest.mark.parametrize(
    "phrase, kind, message",
    [
        ("a whale", "position", "kinds has position: 3d style needs drawings of two things"),
        ("a whale", "two_colours", "kinds has two_colours"),
        ("the flag of Japan", "counting", "kinds has counting, and no drawing's name has a plural"),
    ],
)
def test_drawings_that_a_kind_cannot_be_made_of_are_refused(
    tmp_path: Path, phrase: str, kind: str, message: str
) -> None:
    picture = drawing((255, 0, 0))
    samples = [{"__key__": "3d/it", "webp": picture, "txt": phrase.encode()}]
    entries = write_shards(samples, tmp_path, prefix="train", samples_per_shard=4)
    write_manifest(tmp_path, {"train": entries})
    known = [{"slug": "it", "phrase": phrase, "category": "flags", "keywords": []}]
    (tmp_path / "concepts.json").write_text(json.dumps(known))
    assert scenes(tmp_path, kinds={"single": 1.0}).scene(0).placed
    with pytest.raises(ValueError, match=message):
        scenes(tmp_path, kinds={kind: 1.0})
