"""Finds fonts, split by family into those the model is trained on and those held out.

Fonts are looked for under the folders of the environment variable SCENES_FONTS (separated by os.pathsep), else under
/usr/share/fonts; without any, Pillow's own font serves both splits.

The shipped model's fonts came from the Debian packages fonts-dejavu-core, fonts-dejavu-extra, fonts-liberation,
fonts-freefont-ttf, fonts-roboto-unhinted, fonts-roboto-slab, fonts-open-sans, fonts-lato, fonts-cantarell,
fonts-inconsolata, fonts-firacode, fonts-hack, fonts-jetbrains-mono, fonts-ebgaramond, fonts-vollkorn,
fonts-linuxlibertine, fonts-comfortaa, fonts-quicksand, fonts-cabin, fonts-oxygen, fonts-play,
fonts-crosextra-carlito, fonts-crosextra-caladea, fonts-urw-base35, fonts-sil-gentiumplus, fonts-sil-andika,
fonts-sil-charis, fonts-junction, fonts-mononoki, fonts-adf-universalis, fonts-adf-gillius and fonts-adf-verana.
"""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path
from random import Random

from PIL import ImageFont

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

HELDOUT_FAMILIES = (
    "cantarell",
    "robotoslab",
    "freemono",
    "nimbusmono",
    "oxygen",
    "gilliusadf",
    "caladea",
    "urwbookman",
)
SKIPPED: tuple[str, ...] = (
    "thin",
    "hairline",
    "extralight",
    "initial",
    "keyboard",
    "symbol",
    "math",
    "d050000l",
    "z003",
    "dingbat",
)
SKIPPED += ("emoji", "lohit", "noto", "wqy", "ipa")
FALLBACK = ""
DEFAULT_FOLDER = "/usr/share/fonts"
PRIVATE_USE = "\ue83a"


@lru_cache(maxsize=4096)
def load(path: str, size: int) -> Font:
    """The font of a file at a size in pixels; Pillow's own for an empty path."""
    if path == FALLBACK:
        return ImageFont.load_default(size)
    return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)


def choose(rng: Random, heldout: bool) -> str:
    """The path of a random font of the split, every family as likely as the others."""
    families = split_families(os.environ.get("SCENES_FONTS", DEFAULT_FOLDER))[heldout]
    return rng.choice(rng.choice(families))


@lru_cache(maxsize=8)
def split_families(folders: str) -> tuple[tuple[tuple[str, ...], ...], tuple[tuple[str, ...], ...]]:
    """The families (tuples of paths) for training and those held out, found under the folders."""
    families: dict[str, list[str]] = {}
    for path in font_files(folders):
        family = usable_family(path)
        if family:
            families.setdefault(family, []).append(path)
    groups: tuple[list[tuple[str, ...]], list[tuple[str, ...]]] = ([], [])
    for family in sorted(families):
        groups[family.startswith(HELDOUT_FAMILIES)].append(tuple(families[family]))
    return tuple(groups[0]) or ((FALLBACK,),), tuple(groups[1]) or ((FALLBACK,),)


def font_files(folders: str) -> list[str]:
    """Every .ttf and .otf file under the folders, by file name."""
    paths = [path for folder in folders.split(os.pathsep) if folder for path in Path(folder).rglob("*.[to]tf")]
    return [str(path) for path in sorted(paths, key=lambda path: (path.name, str(path)))]


def usable_family(path: str) -> str | None:
    """The family's name without spaces in lower case, None for a font that cannot print the texts."""
    if any(word in Path(path).stem.lower() for word in SKIPPED):
        return None
    try:
        font = ImageFont.truetype(path, 20, layout_engine=ImageFont.Layout.BASIC)
        missing = bytes(font.getmask(PRIVATE_USE))
        glyphs = {bytes(font.getmask(char)) for char in "Ag7Qa"}
    except OSError:
        return None
    if missing in glyphs or len(glyphs) < 5:
        return None
    return "".join(char for char in (font.getname()[0] or Path(path).stem).lower() if char.isalnum())
