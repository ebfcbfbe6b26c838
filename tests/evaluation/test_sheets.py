"""Sheets of pictures and the PNG files they are written to."""

from pathlib import Path

from PIL import Image

from dcar.evaluation.sheets import captioned_grid, save_png


def test_a_png_carries_its_prompt_and_seed(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.png"
    save_png(Image.new("RGB", (2, 2)), path, {"prompt": "ein Äpfel", "seed": 3})
    with Image.open(path) as picture:
        assert picture.text == {"prompt": "ein Äpfel", "seed": "3"}


def test_a_captioned_grid_places_pictures_in_rows() -> None:
    pictures = [Image.new("RGB", (8, 8), color) for color in ("red", "lime", "blue")]
    grid = captioned_grid(pictures, ["a", "b", "word " * 50], columns=2, side=40)
    assert grid.size == (80, 2 * 74)
    assert grid.getpixel((60, 20)) == (0, 255, 0) and grid.getpixel((20, 94)) == (0, 0, 255)
    assert grid.getpixel((60, 100)) == (255, 255, 255)


def test_a_picture_that_is_not_square_keeps_its_shape() -> None:
    grid = captioned_grid([Image.new("RGB", (20, 10), "red")], ["a"], columns=1, side=40)
    column = [grid.getpixel((20, y)) for y in range(40)]
    assert column == [(255, 255, 255)] * 10 + [(255, 0, 0)] * 20 + [(255, 255, 255)] * 10


def test_a_caption_stays_under_its_own_picture() -> None:
    pictures = [Image.new("RGB", (8, 8), "white")] * 2
    grid = captioned_grid(pictures, ["W" * 60, ""], columns=2, side=60)
    assert grid.crop((0, 60, 60, 94)).getextrema() != ((255, 255),) * 3
    assert grid.crop((60, 0, 120, 94)).getextrema() == ((255, 255),) * 3


def test_a_caption_that_is_cut_says_so() -> None:
    """The ellipsis is the only thing that tells the two captions apart."""
    cut, whole = (
        captioned_grid([Image.new("RGB", (40, 40))], [text], columns=1, side=60).tobytes()
        for text in ("WWWW WWWW WWWW", "WWWW WWWW")
    )
    assert cut != whole


def test_captions_of_other_scripts_are_legible() -> None:
    """Letters that the font does not have would all be the same box."""
    pages = [
        captioned_grid([Image.new("RGB", (40, 40))], [text], columns=1, side=80).tobytes()
        for text in ("я", "ж")
    ]
    assert pages[0] != pages[1]
