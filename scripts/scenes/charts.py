"""Draws bar charts of 3 to 6 bars with integer values from 1 to 10."""

from __future__ import annotations

from random import Random

from PIL import Image, ImageDraw

from scenes import fonts
from scenes.paint import Rgb, drawn, visible_on
from scenes.scene import Bar, Chart, Glyph
from scenes.text import char_middles
from scenes.words import CHART_WORDS

LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ"
SMALLEST_SIDE = 168
TOP_VALUE = 10
GROUNDS: tuple[Rgb, ...] = ((255, 255, 255),) * 4 + ((246, 246, 240), (235, 235, 240), (226, 234, 242), (28, 30, 36))


def choose_chart(rng: Random) -> Chart:
    """Labels and values of a chart, most often with one tallest and one shortest bar."""
    count = rng.randint(3, 6)
    values = [rng.randint(1, TOP_VALUE) for _ in range(count)]
    for _ in range(3):
        if values.count(max(values)) == values.count(min(values)) == 1:
            break
        values = [rng.randint(1, TOP_VALUE) for _ in range(count)]
    return Chart(choose_labels(rng, count), tuple(values))


def choose_labels(rng: Random, count: int) -> tuple[str, ...]:
    """Different labels: letters, in or out of order, or short words."""
    if rng.random() < 0.3:
        return tuple(rng.sample(CHART_WORDS, count))
    if rng.random() < 0.4:
        start = rng.choice((0, 0, 0, rng.randrange(len(LETTERS) - count)))
        return tuple(LETTERS[start : start + count])
    return tuple(rng.sample(LETTERS, count))


def draw_chart(
    rng: Random, size: tuple[int, int], chart: Chart, font_path: str
) -> tuple[Image.Image, tuple[Glyph, ...], tuple[Bar, ...]]:
    """The picture of a chart, the characters on it and its bars."""
    width, height = size
    ground = rng.choice(GROUNDS)
    ink: Rgb = (235, 235, 235) if sum(ground) < 200 else (25, 25, 25)
    rule: Rgb = (90, 92, 98) if sum(ground) < 200 else (205, 205, 205)
    picture = Image.new("RGB", size, ground)
    pen = ImageDraw.Draw(picture)
    font = label_font(rng, size, chart, font_path)
    line = text_height(font)
    left, right = round(font.getlength(str(TOP_VALUE))) + rng.randint(8, 12), width - rng.randint(4, 10)
    top, bottom = line + rng.randint(6, 12), height - label_room(font) - rng.randint(5, 9)
    unit = (bottom - top) / TOP_VALUE
    step = rng.choice((1, 2, 2, 5) if unit > line + 3 else (2, 2, 5))
    ruled = rng.random() < 0.8
    glyphs: list[Glyph] = []
    for value in range(0, TOP_VALUE + 1, step):
        y = round(bottom - value * unit)
        if ruled:
            pen.line((left, y, right, y), fill=rule)
        pen.line((left - 3, y, left, y), fill=ink)
        pen.text((left - 5, y), str(value), fill=ink, font=font, anchor="rm")
        glyphs += placed(font, str(value), left - 5 - font.getlength(str(value)), y)
    pen.line((left, top, left, bottom), fill=ink)
    more, bars = draw_bars(rng, pen, chart, (left, bottom, right, unit), (ground, ink), font)
    pen.line((left, bottom, right, bottom), fill=ink)
    return picture, (*glyphs, *more), tuple(bars)


def placed(font: fonts.Font, text: str, x: float, y: float) -> list[Glyph]:
    """The characters of a text that begins at x, its middle at height y."""
    return [Glyph(char, x + middle, y) for char, middle in char_middles(font, text)]


def draw_bars(
    rng: Random,
    pen: ImageDraw.ImageDraw,
    chart: Chart,
    axis: tuple[int, int, int, float],
    paints: tuple[Rgb, Rgb],
    font: fonts.Font,
) -> tuple[list[Glyph], list[Bar]]:
    """Draws the bars on the axis (left, bottom, right, pixels a unit), with labels below and at times values on top."""
    glyphs: list[Glyph] = []
    bars: list[Bar] = []
    left, bottom, right, unit = axis
    ground, ink = paints
    pitch = (right - left) / len(chart.labels)
    thick = pitch * rng.uniform(0.45, 0.8)
    names = [name for name in visible_on(ground) if ink[0] > 100 or name != "black"]
    colours = rng.sample(names, len(chart.labels)) if rng.random() < 0.55 else [rng.choice(names)] * len(chart.labels)
    printed = rng.random() < 0.5
    rise = -font.getbbox("Al", anchor="ls")[1]
    for i, (label, value, colour) in enumerate(zip(chart.labels, chart.values, colours, strict=True)):
        middle = left + (i + 0.5) * pitch
        head = round(bottom - value * unit)
        box = (round(middle - thick / 2), head, round(middle + thick / 2), bottom)
        pen.rectangle(box, fill=drawn(rng, colour))
        column = (round(middle - pitch / 2), head, round(middle + pitch / 2), bottom + 4 + round(rise))
        bars.append(Bar(value, box, column))
        pen.text((middle, bottom + 4 + rise), label, fill=ink, font=font, anchor="ms")
        glyphs += placed(font, label, middle - font.getlength(label) / 2, bottom + 4 + rise / 2)
        if printed:
            pen.text((middle, head - 2), str(value), fill=ink, font=font, anchor="mb")
            glyphs += placed(font, str(value), middle - font.getlength(str(value)) / 2, head - 2 - rise / 2)
    return glyphs, bars


def label_font(rng: Random, size: tuple[int, int], chart: Chart, font_path: str) -> fonts.Font:
    """A font whose labels are legible and fit under their bars."""
    pixels = round(min(size) * rng.uniform(0.065, 0.085))
    pitch = (size[0] - 40) / len(chart.labels)
    while pixels > 10:
        font = fonts.load(font_path, pixels)
        if max(font.getlength(label) for label in chart.labels) < pitch - 3:
            return font
        pixels -= 1
    return fonts.load(font_path, 10)


def label_room(font: fonts.Font) -> int:
    """The height of labels from their tallest letters to their descenders, in pixels."""
    _, top, _, bottom = font.getbbox("Alpgy")
    return int(bottom - top)


def text_height(font: fonts.Font) -> int:
    """The height of digits in a font, in pixels."""
    _, top, _, bottom = font.getbbox("0")
    return int(bottom - top)
