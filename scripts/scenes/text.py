"""Draws text pictures: a word, number or code in some font, size, colour and place."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from random import Random

from PIL import Image, ImageDraw

from scenes import fonts
from scenes.paint import Rgb, clip, drawn, readable_on
from scenes.scene import Glyph, Print
from scenes.words import WORDS

CODE_LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ"
CODE_DIGITS = "23456789"
CASELESS_SHAPES = frozenset("cosuvwxz")
CONSONANTS = ("b", "c", "d", "f", "g", "h", "k", "l", "m", "n", "p", "r", "s", "t", "v", "z", "br", "st", "tr", "ch")
VOWELS = ("a", "e", "i", "o", "u", "a", "e", "o", "ai", "ou", "ee")
LENGTHS = (1, 2, 3, 4, 5, 6, 7, 8)
LENGTH_WEIGHTS = (2, 4, 9, 11, 11, 9, 5, 4)
KINDS = ("code", "random", "number", "word")
KIND_WEIGHTS = (44, 16, 20, 20)
SMALLEST_CAPITAL, LARGEST_CAPITAL = 14.5, 60.0
STEEPEST = 8.0
PANEL_SHARE = 0.25
MEASURED_AT = 64


def choose_content(rng: Random) -> tuple[str, str]:
    """A text of 1 to 8 characters, and whether it is a word, number or code."""
    kind = rng.choices(KINDS, KIND_WEIGHTS)[0]
    if kind == "code":
        return random_code(rng, rng.choices(LENGTHS, LENGTH_WEIGHTS)[0]), "code"
    if kind == "number":
        return random_number(rng), "number"
    word = rng.choice(WORDS) if kind == "word" else random_word(rng)
    return rng.choice((word, word.upper(), word.title())), "word"


def random_code(rng: Random, length: int) -> str:
    """Capitals and digits without O, I, 0 and 1; single characters and some codes are letters only."""
    share = 0.0 if length == 1 else rng.choice((0.0, 0.3, 0.5))
    return "".join(rng.choice(CODE_DIGITS if rng.random() < share else CODE_LETTERS) for _ in range(length))


def random_number(rng: Random) -> str:
    """One to six digits, at times with a decimal point."""
    length = rng.choices((1, 2, 3, 4, 5, 6), (2, 4, 5, 5, 4, 3))[0]
    digits = rng.choice("123456789") + "".join(rng.choice("0123456789") for _ in range(length - 1))
    if length > 1 and rng.random() < 0.25:
        point = rng.randrange(1, length)
        return f"{digits[:point]}.{digits[point:]}"
    return digits


def random_word(rng: Random) -> str:
    """A pronounceable word of 3 to 8 letters, in which capitals and small letters differ."""
    while True:
        parts = rng.randint(1, 3)
        word = "".join(rng.choice(CONSONANTS) + rng.choice(VOWELS) for _ in range(parts))
        if rng.random() < 0.6:
            word += rng.choice("bdgklmnprt")
        if 3 <= len(word) <= 8 and not set(word) <= CASELESS_SHAPES:
            return word


def altered(rng: Random, content: str, kind: str) -> str:
    """A text much like the given one: one character changed, or another text of the kind."""
    if rng.random() < 0.35:
        other = {"code": lambda: random_code(rng, len(content)), "number": lambda: random_number(rng)}.get(kind)
        other = other or (lambda: rng.choice(WORDS))
        candidate = other()
    else:
        at = rng.randrange(len(content))
        old = content[at]
        pool = CODE_DIGITS if old.isdigit() else CODE_LETTERS if old.isupper() else "abdeghkmnprt"
        new = rng.choice([char for char in pool if char != old])
        candidate = content if old == "." else content[:at] + new + content[at + 1 :]
    return candidate if candidate.lower() != content.lower() else content + "2"


def print_text(rng: Random, picture: Image.Image, ground: Rgb, font_path: str) -> tuple[Print, tuple[Glyph, ...]]:
    """Prints a text on the picture, at times on a label of its own; what was printed, and its characters' places."""
    while True:
        content, kind = choose_content(rng)
        fitting = fitting_mask(rng, content, font_path, picture.size)
        if fitting:
            break
    mask, glyphs = fitting
    panel = rng.random() < PANEL_SHARE or not readable_on(ground)
    x, y = (rng.randint(0, side - part) for side, part in zip(picture.size, mask.size, strict=True))
    box = (x, y, x + mask.width, y + mask.height)
    if panel:
        ground = draw_panel(rng, picture, ground, box)
    colour = rng.choice(readable_on(ground))
    picture.paste(drawn(rng, colour), (x, y), mask)
    return Print(content, kind, colour, box, panel), tuple(Glyph(g.char, g.x + x, g.y + y) for g in glyphs)


def draw_panel(rng: Random, picture: Image.Image, ground: Rgb, box: Sequence[int]) -> Rgb:
    """Draws a light or dark label under the box; its colour."""
    shade = rng.choice((rng.randint(228, 252), rng.randint(228, 252), rng.randint(12, 40)))
    red, green, blue = (clip(shade + rng.uniform(-8, 8)) for _ in range(3))
    edge = rng.randint(2, 9)
    area = (box[0] - edge, box[1] - edge, box[2] + edge, box[3] + edge)
    line = tuple(clip(0.5 * channel) for channel in ground) if rng.random() < 0.4 else None
    ImageDraw.Draw(picture).rounded_rectangle(area, rng.choice((0, 3, 6)), fill=(red, green, blue), outline=line)
    return red, green, blue


def fitting_mask(
    rng: Random, content: str, font_path: str, size: tuple[int, int]
) -> tuple[Image.Image, list[Glyph]] | None:
    """The text's mask, slightly turned, with a little air round it, and its characters; None where it does not fit legibly."""
    capital, width, height = measure(font_path, content)
    smallest = SMALLEST_CAPITAL if content.upper() == content else 18.0
    wanted = smallest * (LARGEST_CAPITAL / smallest) ** rng.random()
    scale = min(wanted / capital, 0.9 * size[0] / width, 0.8 * size[1] / height)
    if scale * capital < smallest:
        return None
    angle = rng.uniform(-STEEPEST, STEEPEST) if rng.random() < 0.4 else 0.0
    for shrink in (1.0, 0.85, 0.72):
        if shrink * scale * capital < smallest:
            break
        mask, glyphs = render(content, font_path, round(MEASURED_AT * scale * shrink + 0.4), angle)
        if mask.width <= size[0] and mask.height <= size[1]:
            return mask, glyphs
    return None


@lru_cache(maxsize=512)
def capital_height(font_path: str) -> float:
    """The height of a capital at the measuring size."""
    _, top, _, bottom = fonts.load(font_path, MEASURED_AT).getbbox("H")
    return bottom - top


def measure(font_path: str, content: str) -> tuple[float, float, float]:
    """The height of a capital, and the text's width and height, all at the measuring size."""
    left, top, right, bottom = fonts.load(font_path, MEASURED_AT).getbbox(content)
    return capital_height(font_path), right - left, bottom - top


def render(content: str, font_path: str, size: int, angle: float) -> tuple[Image.Image, list[Glyph]]:
    """The text's mask at a font size, turned by an angle in degrees, and its characters' places on the mask."""
    font = fonts.load(font_path, size)
    left, top, right, bottom = font.getbbox(content)
    air = 3
    mask = Image.new("L", (int(right - left) + 2 * air, int(bottom - top) + 2 * air))
    ImageDraw.Draw(mask).text((air - left, air - top), content, fill=255, font=font)
    middle = mask.height / 2
    glyphs = [Glyph(char, air - left + x, middle) for char, x in char_middles(font, content)]
    if not angle:
        return mask, glyphs
    turned = mask.rotate(angle, Image.Resampling.BICUBIC, expand=True)
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    offsets = [(g.char, g.x - mask.width / 2) for g in glyphs]
    return turned, [Glyph(char, turned.width / 2 + x * cos, turned.height / 2 - x * sin) for char, x in offsets]


def char_middles(font: fonts.Font, content: str) -> list[tuple[str, float]]:
    """Each character with the middle of its advance, counted from the text's origin."""
    ends = [0.0, *(font.getlength(content[: i + 1]) for i in range(len(content)))]
    return [(char, (ends[i] + ends[i + 1]) / 2) for i, char in enumerate(content)]
