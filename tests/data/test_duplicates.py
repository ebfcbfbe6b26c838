"""Near-duplicates: the same as comparing all pairs, first come first kept, fast for millions."""

import io
import time

import numpy as np
import pytest
from PIL import Image

from dcar.data import duplicates
from dcar.data.duplicates import find_duplicates, perceptual_hash
from tests.builds import picture


def all_pairs(hashes: np.ndarray, distance: int) -> np.ndarray:
    """The definition, quadratic."""
    kept: list[int] = []
    for place, value in enumerate(hashes):
        if not kept or (np.bitwise_count(hashes[kept] ^ value) > distance).all():
            kept.append(place)
    return ~np.isin(np.arange(len(hashes)), kept)


def random_hashes(rng: np.random.Generator, count: int) -> np.ndarray:
    return rng.integers(0, 2**64, count, dtype=np.uint64, endpoint=False)


def with_neighbours(count: int = 150) -> np.ndarray:
    """Hashes, copies of them, and ones that differ in up to 10 bits, mixed."""
    rng = np.random.default_rng(0)
    base = random_hashes(rng, count)
    found = [base, base]
    for flips in (1, 2, 3, 4, 5, 6, 8, 10):
        moved = base.copy()
        for place in range(count):
            for bit in rng.choice(64, flips, replace=False):
                moved[place] ^= np.uint64(1) << np.uint64(bit)
        found.append(moved)
    return rng.permutation(np.concatenate(found))


def test_keys_are_longer_where_many_hashes_would_share_short_ones() -> None:
    counts = [1000, 500_000, 600_000, 5_000_000]
    assert [duplicates.shared_blocks(count, 8) for count in counts] == [3, 3, 4, 4]
    assert [duplicates.shared_blocks(count, 4) for count in counts] == [3, 3, 3, 3]


@pytest.mark.parametrize("by_chance", [4, 0])  # keys of three blocks, of four
@pytest.mark.parametrize("distance", [0, 1, 3, 4, 6, 8])
def test_it_finds_what_comparing_all_pairs_finds(
    distance: int, by_chance: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(duplicates, "BY_CHANCE", by_chance)
    hashes = with_neighbours()
    assert np.array_equal(find_duplicates(hashes, distance=distance), all_pairs(hashes, distance))


def test_the_first_is_kept_and_a_chain_is_not_followed() -> None:
    a, b, c = 0b0, 0b11, 0b1111  # a near b near c; b is gone, so c stays
    hashes = np.array([a, b, c, a], dtype=np.uint64)
    assert find_duplicates(hashes, distance=2).tolist() == [False, True, False, True]


def test_many_copies_of_one_picture_are_no_trouble() -> None:
    hashes = np.full(200_000, 7, dtype=np.uint64)
    assert find_duplicates(hashes, distance=4).sum() == 199_999


def around(center: int, count: int, flips: int) -> np.ndarray:
    """Hashes that differ from one in up to so many bits."""
    rng, found = np.random.default_rng(0), np.full(count, center, dtype=np.uint64)
    for place in range(count):
        for bit in rng.choice(64, rng.integers(flips + 1), replace=False):
            found[place] ^= np.uint64(1) << np.uint64(bit)
    return found


@pytest.mark.parametrize(("flips", "distance"), [(2, 4), (3, 2), (4, 4), (4, 8), (8, 3)])
def test_crowds_of_look_alikes_are_told_apart_as_by_comparing_all(flips, distance) -> None:
    hashes = np.concatenate([around(0, 600, flips), around(2**63 - 1, 600, flips)])
    hashes = np.random.default_rng(1).permutation(np.concatenate([hashes, with_neighbours(20)]))
    assert np.array_equal(find_duplicates(hashes, distance=distance), all_pairs(hashes, distance))


def test_many_look_alikes_take_no_more_than_a_moment() -> None:
    begun = time.process_time()
    assert find_duplicates(around(7, 5000, 3), distance=6).sum() > 4900
    assert time.process_time() - begun < 5


def test_no_hashes_have_no_duplicates() -> None:
    assert find_duplicates(np.empty(0, dtype=np.uint64), distance=4).tolist() == []


@pytest.mark.parametrize("distance", [-1, 9])
def test_an_impossible_distance_is_named(distance: int) -> None:
    with pytest.raises(ValueError, match=f"near_duplicates={distance}"):
        find_duplicates(np.zeros(2, dtype=np.uint64), distance=distance)


@pytest.mark.slow
def test_the_time_grows_as_the_number_of_hashes_and_not_as_its_square() -> None:
    rng, seconds = np.random.default_rng(0), []
    for count in (100_000, 400_000):
        hashes = random_hashes(rng, count)
        begun = time.process_time()
        assert not find_duplicates(hashes, distance=4).any()
        seconds.append(time.process_time() - begun)
    assert seconds[1] < 8 * seconds[0]


def image(seed: int, size: tuple[int, int] = (480, 360)) -> Image.Image:
    return Image.open(io.BytesIO(picture(seed, size)))


def test_a_picture_that_was_resized_and_saved_again_keeps_its_hash_within_a_few_bits() -> None:
    original = image(1)
    smaller, file = original.resize((240, 180)), io.BytesIO()
    smaller.save(file, "WEBP", quality=80)
    again = perceptual_hash(Image.open(file))
    assert (perceptual_hash(original) ^ again).bit_count() <= 4
    assert (perceptual_hash(image(2)) ^ again).bit_count() > 12
