"""Emoji sets: pinned packages, names that meet across sets, and drawing."""

import hashlib
import io
import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from dcar.data.sources.emoji_art import (
    SETS,
    Package,
    bitmap_drawings,
    compact_names,
    draw_svg,
    fetch,
    iconify_drawings,
    plain_code,
    slug_names,
)

RED_LEFT = '<path fill="#f00" d="M0 0h16v32H0z"/>'
ICONS = {
    "prefix": "set",
    "width": 32,
    "height": 32,
    "icons": {"red-apple": {"body": RED_LEFT}, "wide": {"body": RED_LEFT, "width": 64}},
    "aliases": {
        "mirror": {"parent": "red-apple", "hFlip": True},
        "turned": {"parent": "red-apple", "rotate": 1},
    },
}


def package(folder: Path, chars: dict[str, str]) -> Path:
    folder.mkdir(parents=True)
    (folder / "icons.json").write_text(json.dumps(ICONS))
    (folder / "chars.json").write_text(json.dumps(chars))
    return folder


def archive_of(path: Path) -> str:
    with tarfile.open(path, "w:gz") as tar:
        info = tarfile.TarInfo("package/hello.txt")
        info.size = 2
        tar.addfile(info, io.BytesIO(b"hi"))
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_without_npm_the_error_names_the_package(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="npm is needed .* @scope/name@1.2.3"):
        fetch(Package("@scope/name", "1.2.3", "0" * 64), tmp_path)


def test_when_npm_fails_the_error_names_the_package_and_the_reason(tmp_path, monkeypatch):
    npm = tmp_path / "npm"
    npm.write_text("#!/bin/sh\necho registry is away >&2\nexit 1\n")
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    with pytest.raises(RuntimeError, match="name@1.2.3: registry is away"):
        fetch(Package("name", "1.2.3", "0" * 64), tmp_path / "cache")


def test_a_package_that_is_there_is_unpacked_without_the_network(tmp_path):
    digest = archive_of(tmp_path / "scope-name-1.2.3.tgz")
    folder = fetch(Package("@scope/name", "1.2.3", digest), tmp_path)
    assert (folder / "hello.txt").read_text() == "hi"


def test_another_archive_than_the_pinned_one_is_refused(tmp_path):
    archive_of(tmp_path / "name-1.2.3.tgz")
    with pytest.raises(RuntimeError, match="name@1.2.3.*expected 0000"):
        fetch(Package("name", "1.2.3", "0" * 64), tmp_path)


def test_every_set_is_pinned_and_has_a_style_of_its_own():
    assert len({art.style for art in SETS}) == len({art.phrase for art in SETS}) == 6
    assert all(len(art.package.sha256) == 64 and art.package.version[0].isdigit() for art in SETS)


def test_code_points_lose_case_and_variation_selectors():
    assert plain_code("1F3F3-FE0F-200D-1F308") == "1f3f3-200d-1f308"


def test_drawings_come_by_the_sets_own_table_or_else_by_name(tmp_path):
    by_table = iconify_drawings(package(tmp_path / "a", {"1F34E-FE0F": "red-apple"}), {})
    assert set(by_table) == {"1f34e"}
    named = {"red-apple": "1f34e", "mirror": "1f34f", "turned": "1f350"}
    assert set(iconify_drawings(package(tmp_path / "b", {}), named)) == {"1f34e", "1f34f"}


def test_slugs_of_one_set_name_the_pictures_of_another(tmp_path):
    folders = {style: package(tmp_path / style, {}) for style in ("twemoji", "flat")}
    folders["noto"] = package(tmp_path / "noto", {"1f34e": "red-apple", "1f9ff": "wide"})
    icons = json.loads((folders["noto"] / "icons.json").read_text())
    icons["aliases"]["apple-red"] = {"parent": "red-apple"}
    (folders["noto"] / "icons.json").write_text(json.dumps(icons))
    names = slug_names(folders, {"1f34e": "ruddy-apple"})
    assert names == {"ruddy-apple": "1f34e", "red-apple": "1f34e", "apple-red": "1f34e"}


def test_compacted_names_come_from_slugs_unicode_and_short_codes():
    names = compact_names(
        {"clock-face": "1f550"}, {"23f0": ["wake_up"]}, ["23f0", "1f468-200d-1f466"]
    )
    assert names == {"clockface": "1f550", "alarmclock": "23f0", "wakeup": "23f0"}


def test_a_bitmap_is_found_by_its_code_points_and_shrunk(tmp_path):
    (tmp_path / "assets").mkdir()
    Image.new("RGBA", (64, 64), (255, 0, 0, 255)).save(tmp_path / "assets" / "0023-fe0f.webp")
    picture = bitmap_drawings(tmp_path)["0023"](16)
    assert (picture.size, picture.mode) == ((16, 16), "RGBA")


def icon(**changes) -> dict:
    return {"body": RED_LEFT, "left": 0, "top": 0, "width": 32, "height": 32, **changes}


def test_an_svg_is_drawn_on_a_transparent_square_and_can_be_mirrored():
    pytest.importorskip("resvg_py", reason="drawing SVG needs the extra dcar-lightning[emoji]")
    plain, mirrored = draw_svg(icon(), False, 32), draw_svg(icon(), True, 32)
    assert [plain.getpixel((x, 9)) for x in (4, 28)] == [(255, 0, 0, 255), (0, 0, 0, 0)]
    assert mirrored.getpixel((28, 9)) == (255, 0, 0, 255)


def test_an_oblong_svg_is_centred():
    pytest.importorskip("resvg_py", reason="drawing SVG needs the extra dcar-lightning[emoji]")
    picture = draw_svg(icon(width=64), False, 64)
    column = [picture.getpixel((4, y))[3] for y in (4, 32, 60)]
    assert column == [0, 255, 0]
