"""The six permissive emoji sets: which packages they come from and how to draw one emoji of each.

A set gives `drawings`: code points -> a function that draws the emoji as an RGBA picture.
Code points are written as lower-case hexadecimal joined by "-", variation selectors left out.
"""

import hashlib
import io
import json
import shutil
import subprocess
import tarfile
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from PIL import Image, ImageOps

Draw = Callable[[int], Image.Image]  # side in pixels -> RGBA picture of that side


@dataclass(frozen=True)
class Package:
    """One npm package, pinned by version and by the sha256 of its archive."""

    name: str
    version: str
    sha256: str


NAMES = Package(
    "emojibase-data", "17.0.0", "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a"
)
LICENCE_TEXTS = Package(
    "spdx-license-list",
    "6.10.0",
    "d80c9febdcb88dbd6dc4ceffc1143dce273ca741e9d7b596b023afd77e37da98",
)


@dataclass(frozen=True)
class ArtSet:
    """One hand: the folder its pictures get, the words that name it in a caption, its source."""

    style: str
    phrase: str
    package: Package
    licence: str
    attribution: str
    source: str


def _iconify(name: str, version: str, sha256: str) -> Package:
    return Package(f"@iconify-json/{name}", version, sha256)


SETS = (
    ArtSet(
        style="3d",
        phrase="3d style",
        package=Package(
            "@lobehub/fluent-emoji-3d",
            "1.1.0",
            "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
        ),
        licence="MIT",
        attribution="Fluent Emoji (3D), Copyright (c) Microsoft Corporation",
        source="https://github.com/microsoft/fluentui-emoji",
    ),
    ArtSet(
        style="flat",
        phrase="flat style",
        package=_iconify(
            "fluent-emoji-flat",
            "1.2.6",
            "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
        ),
        licence="MIT",
        attribution="Fluent Emoji (flat), Copyright (c) Microsoft Corporation",
        source="https://github.com/microsoft/fluentui-emoji",
    ),
    ArtSet(
        style="noto",
        phrase="noto style",
        package=_iconify(
            "noto", "1.2.9", "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad"
        ),
        licence="Apache-2.0",
        attribution="Noto Emoji, Copyright Google LLC",
        source="https://github.com/googlefonts/noto-emoji",
    ),
    ArtSet(
        style="blob",
        phrase="blob style",
        package=_iconify(
            "noto-v1", "1.2.5", "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37"
        ),
        licence="Apache-2.0",
        attribution="Noto Emoji, the first generation (blob), Copyright Google Inc.",
        source="https://github.com/googlefonts/noto-emoji",
    ),
    ArtSet(
        style="twemoji",
        phrase="twemoji style",
        package=_iconify(
            "twemoji", "1.2.5", "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7"
        ),
        licence="CC-BY-4.0",
        attribution="Twemoji, Copyright Twitter, Inc and other contributors (graphics: CC-BY 4.0)",
        source="https://github.com/jdecked/twemoji",
    ),
    ArtSet(
        style="firefox",
        phrase="firefox style",
        package=_iconify(
            "fxemoji", "1.2.2", "f3e72b3c59d05e1db03b7e308d55c0d05bd7ba3f625a90da1b79313c12858eef"
        ),
        licence="Apache-2.0",
        attribution="FxEmojis (Firefox OS), Copyright Mozilla Foundation",
        source="https://github.com/mozilla/fxemoji",
    ),
)


def fetch(package: Package, cache: Path) -> Path:
    """The package's unpacked folder, downloaded with `npm pack` the first time.

    Raises RuntimeError naming the package when npm is missing, fails, or sends another archive.
    """
    spec = f"{package.name}@{package.version}"
    stem = f"{package.name.strip('@').replace('/', '-')}-{package.version}"
    archive, folder = cache / f"{stem}.tgz", cache / stem
    if not archive.exists():
        _download(spec, cache)
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    if digest != package.sha256:
        raise RuntimeError(f"{spec}: {archive} has sha256 {digest}, expected {package.sha256}")
    if not folder.exists():
        partial_folder = folder.with_suffix(".partial")
        shutil.rmtree(partial_folder, ignore_errors=True)
        with tarfile.open(archive) as tar:
            tar.extractall(partial_folder, filter="data")
        partial_folder.rename(folder)
    return folder / "package"


def _download(spec: str, cache: Path) -> None:
    if shutil.which("npm") is None:
        raise RuntimeError(f"npm is needed to fetch the package {spec}: install Node.js with npm")
    cache.mkdir(parents=True, exist_ok=True)
    command = ["npm", "pack", "--silent", "--pack-destination", str(cache), spec]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"npm could not fetch the package {spec}: {done.stderr.strip()}")


def plain_code(code: str) -> str:
    """'1F3F3-FE0F' -> '1f3f3': lower case, variation selectors left out."""
    return "-".join(part for part in code.lower().split("-") if part != "fe0f")


def compact(name: str) -> str:
    """Letters and digits alone, as FxEmoji writes its names: 'alarm clock' -> 'alarmclock'."""
    return "".join(letter for letter in name.lower() if letter.isascii() and letter.isalnum())


def draw_svg(icon: Mapping, mirrored: bool, side: int) -> Image.Image:
    """An Iconify icon (body, left, top, width, height) centred in a transparent square."""
    import resvg_py

    left, top, width, height = (icon[key] for key in ("left", "top", "width", "height"))
    span = max(width, height)
    box = f"{left - (span - width) / 2} {top - (span - height) / 2} {span} {span}"
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{box}" width="{side}" height="{side}">{icon["body"]}</svg>'
    )
    png = resvg_py.svg_to_bytes(svg_string=svg, width=side, height=side, skip_system_fonts=True)
    picture = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    return ImageOps.mirror(picture) if mirrored else picture


def draw_bitmap(path: Path, side: int) -> Image.Image:
    """A picture file with alpha, shrunk to `side`."""
    picture = Image.open(path).convert("RGBA")
    return picture.resize((side, side), Image.Resampling.LANCZOS)


def iconify_drawings(folder: Path, names: Mapping[str, str]) -> dict[str, Draw]:
    """Drawings of an Iconify package, by its own code point table where it has one, else by name.

    names: slug (or, for slugs without hyphens, compacted name) -> code points.
    """
    icons = json.loads((folder / "icons.json").read_text())
    table = json.loads((folder / "chars.json").read_text())
    codes = {slug: plain_code(code) for code, slug in table.items()} if table else names
    defaults = {"left": 0, "top": 0, "width": icons["width"], "height": icons["height"]}
    drawings: dict[str, Draw] = {}
    for slug, icon in icons["icons"].items():
        if slug in codes:
            drawings.setdefault(codes[slug], partial(draw_svg, {**defaults, **icon}, False))
    for slug, alias in icons.get("aliases", {}).items():
        if (
            slug in codes
            and set(alias) <= {"parent", "hFlip"}
            and alias["parent"] in icons["icons"]
        ):
            parent = {**defaults, **icons["icons"][alias["parent"]]}
            drawings.setdefault(codes[slug], partial(draw_svg, parent, alias.get("hFlip", False)))
    return drawings


def bitmap_drawings(folder: Path) -> dict[str, Draw]:
    """Drawings of a package of files named by code points."""
    paths = sorted((folder / "assets").glob("*.webp"))
    return {plain_code(path.stem): partial(draw_bitmap, path) for path in paths}


def slug_names(folders: Mapping[str, Path], concepts: Mapping[str, str]) -> dict[str, str]:
    """slug -> code points, from the concepts' own slugs and from the sets that publish a table.

    concepts: code points -> slug. Iconify's slugs are shared over its sets, so the tables of Noto,
    Twemoji and Fluent name the pictures of the sets that have none.
    """
    names = {slug: code for code, slug in concepts.items()}
    for style in ("noto", "twemoji", "flat"):
        table = json.loads((folders[style] / "chars.json").read_text())
        own = {slug: plain_code(code) for code, slug in table.items()}
        own = {slug: code for slug, code in own.items() if code in concepts}
        for slug, code in own.items():
            names.setdefault(slug, code)
        aliases = json.loads((folders[style] / "icons.json").read_text()).get("aliases", {})
        for slug, alias in aliases.items():
            if set(alias) == {"parent"} and alias["parent"] in own:
                names.setdefault(slug, own[alias["parent"]])
    return names


def compact_names(
    names: Mapping[str, str], shortcodes: Mapping[str, list[str]], codes: list[str]
) -> dict[str, str]:
    """Compacted name -> code points, from slugs, Unicode character names and short codes."""
    compacted: dict[str, str] = {}
    for slug, code in names.items():
        compacted.setdefault(compact(slug), code)
    for code in codes:
        if "-" not in code:
            compacted.setdefault(compact(unicodedata.name(chr(int(code, 16)), code)), code)
    for code, aliases in shortcodes.items():
        for alias in aliases:
            compacted.setdefault(compact(alias), code)
    return compacted
