"""A hundred evaluation pictures with questions, drawn apart from the training generator.

All it shares with the trainer's pictures is the contract, `docs/scenes-tasks.md`. Shapes are inside-tests sampled
sixteen times a pixel; of the questions a picture allows, the one whose answer was given least so far is asked.

    python scripts/eval_pictures.py OUT_DIR        # PNGs and questions.jsonl, to look at
"""

from __future__ import annotations

import io
import json
import os
import random
import sys
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

Rgb = tuple[int, int, int]
Box = tuple[int, int, int, int]
Asked = list[tuple[str, str]]  # questions that may be asked of a picture, with their answers
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

COLOURS: dict[str, Rgb] = {
    **{"red": (214, 45, 48), "orange": (243, 134, 36), "yellow": (248, 214, 56), "green": (50, 154, 74)},
    **{"blue": (40, 100, 208), "purple": (136, 64, 170), "pink": (240, 146, 184), "brown": (122, 78, 46)},
    **{"black": (30, 28, 32), "white": (241, 242, 240), "gray": (134, 132, 130)},
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "heart", "diamond", "hexagon")
TWIN = {"circle": "ring", "ring": "circle", "square": "diamond", "diamond": "square"}  # never both in one picture
TURN = {"square": 10, "cross": 10, "diamond": 8, "heart": 16}
WORDS = "garden monday river bread exit open piano seven cloud market winter pepper kettle ferry gate lunch tiger radio"
BAR_WORDS = ("Ann", "Bob", "Kim", "Tea", "Fish", "Milk", "Rice", "Jan", "May", "Dog", "Cat", "Hen")
COUNTS = [1] * 8 + [2] * 8 + [3] * 10 + [4] * 10 + [5] * 7 + [6] * 7  # objects in the fifty scenes


@dataclass(frozen=True)
class Item:
    """One question about one picture, or about two."""

    images: tuple[Image.Image, ...]
    task: str
    question: str
    answer: str


@dataclass(frozen=True)
class Thing:
    """A drawn object and its box in pixels; the right and lower edges lie just outside it."""

    colour: str
    shape: str
    box: Box

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"

    @property
    def centre(self) -> tuple[float, float]:
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2

    def times(self, other: Thing) -> float:
        """How many times as large as `other`, by the less telling of the longer and the shorter sides."""
        mine, theirs = (sorted((t.box[2] - t.box[0], t.box[3] - t.box[1])) for t in (self, other))
        return min(a / b for a, b in zip(mine, theirs, strict=True))


@dataclass(frozen=True)
class Scene:
    """A picture of objects; `ground` is the background's colour name, empty where it has none."""

    image: Image.Image
    things: list[Thing]
    ground: str
    palette: list[str]  # colours easy to tell from the background

    def unique(self) -> list[Thing]:
        names = Counter(t.name for t in self.things)
        return [t for t in self.things if names[t.name] == 1]

    def place(self, thing: Thing) -> str | None:
        """The third of the picture that holds the thing's centre; None near a third's border."""
        parts = []
        for at, side, words in zip(thing.centre, self.image.size, (("left", "right"), ("top", "bottom")), strict=True):
            if min(abs(at / side - 1 / 3), abs(at / side - 2 / 3)) < 0.045:
                return None
            parts.append((words[0], "", words[1])[int(3 * at / side)])
        return " ".join(p for p in reversed(parts) if p) or "center"


def inside(shape: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Whether points lie in the shape of radius 1 about the origin, v upwards."""
    if shape == "circle" or shape == "ring":
        return (np.hypot(u, v) <= 1) & (np.hypot(u, v) >= (0.56 if shape == "ring" else 0))
    if shape == "square":
        return np.maximum(abs(u), abs(v)) <= 0.88
    if shape == "cross":
        return np.minimum(abs(u), abs(v)) <= np.where(np.maximum(abs(u), abs(v)) <= 1, 0.31, -1)
    if shape == "diamond":
        return abs(u) / 0.74 + abs(v) <= 1
    if shape == "heart":
        x, y = 1.22 * u, 1.22 * v + 0.1
        return (x**2 + y**2 - 1) ** 3 <= x**2 * y**3
    corners = {"triangle": 3, "star": 5, "hexagon": 6}[shape]
    bend = np.pi / corners  # fold the plane into one half-sector, bounded by a single edge
    angle = abs(np.mod(np.arctan2(u, v) + bend, 2 * bend) - bend)
    x, y = np.hypot(u, v) * np.cos(angle), np.hypot(u, v) * np.sin(angle)
    inner = 0.42 if shape == "star" else np.cos(bend)
    return (x - 1) * inner * np.sin(bend) - y * (inner * np.cos(bend) - 1) <= 0


def coverage(shape: str, across: float, degrees: float) -> np.ndarray:
    """How much of each pixel the shape covers, cut to the shape's extent."""
    n = int(across * 1.15) + 4
    y, x = (np.mgrid[: 4 * n, : 4 * n] + 0.5 - 2 * n) / (2 * across)
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    cover = inside(shape, c * x - s * y, -s * x - c * y).reshape(n, 4, n, 4).mean(axis=(1, 3))
    rows, columns = np.nonzero(cover >= 0.12)
    return cover[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]


def shade(rng: random.Random, colour: str) -> Rgb:
    """The colour as drawn: a little lighter or darker, and of a slightly other hue unless it has none."""
    shift, tint = rng.randint(-6, 6), 1 if colour in ("black", "white", "gray") else 5
    r, g, b = (min(255, max(0, c + shift + rng.randint(-tint, tint))) for c in COLOURS[colour])
    return r, g, b


def backdrop(rng: random.Random, width: int, height: int) -> tuple[np.ndarray, str, list[str]]:
    """Pixels of a background, its colour name if it is plain, and the colours easy to tell from it."""
    kind = rng.choice(("plain", "plain", "plain", "paper", "sky", "wood", "slate"))
    noise = np.random.default_rng(rng.getrandbits(32))
    down = np.linspace(0, 1, height)[:, None, None]
    name, tones = "", {"paper": [(238, 232, 215)], "wood": [(214, 178, 132)], "slate": [(52, 64, 70)]}.get(kind, [])
    if kind == "plain":
        name = rng.choice([*COLOURS, "white", "white", "black"])
        tones = [shade(rng, name)]
    elif kind == "sky":
        tones = [(165, 205, 238), (226, 238, 246), (178, 206, 150)]
    pixels = np.ones((height, width, 3)) * np.array(tones[0])
    if kind == "sky":
        air = np.array(tones[0]) * (1 - down) + np.array(tones[1]) * down
        pixels = np.where(down < rng.uniform(0.6, 0.75), air, np.array(tones[2]) - 15 * down) + pixels * 0
    elif kind == "wood":
        plank = np.floor(down * rng.randint(3, 6))
        pixels = pixels + 7 * np.sin(9.1 * plank) + 3 * np.sin(160 * down + 3 * np.linspace(0, 1, width)[None, :, None])
    elif kind in ("paper", "slate"):
        pixels = pixels + noise.normal(0, 4, (height, width, 1))
    apart = [c for c, rgb in COLOURS.items() if all(sum(abs(np.subtract(rgb, t))) >= 190 for t in tones)]
    near = {"wood": ("brown",), "sky": ("blue", "green"), "slate": ("gray",)}.get(kind, ())  # what one may call it
    apart = [c for c in apart if c not in near]
    apart += ["pink"] if name == "white" else ["white"] if name == "pink" else []  # nearer, yet easy to tell
    return pixels, name, apart


def finish(rng: random.Random, pixels: np.ndarray) -> Image.Image:
    """A picture of the pixels, in half the cases a little worn."""
    wear = rng.choice(("", "", "", "noise", "blur", "jpeg", "light"))
    if wear == "noise":
        pixels = pixels + np.random.default_rng(rng.getrandbits(32)).normal(0, 5, pixels.shape)
    elif wear == "light":
        pixels = pixels * rng.choice((0.95, 1.04))
    image = Image.fromarray(np.clip(pixels + 0.5, 0, 255).astype(np.uint8))
    if wear == "blur":
        image = image.filter(ImageFilter.GaussianBlur(0.7))
    elif wear == "jpeg":
        held = io.BytesIO()
        image.save(held, "JPEG", quality=72)
        image = Image.open(held).convert("RGB")
    return image


def kinds(rng: random.Random, n: int, palette: list[str]) -> list[tuple[str, str]]:
    """Colour and shape of n objects: any mixture, or many of a few kinds."""
    few = n > 2 and rng.random() < 0.55
    shapes: list[str] = []
    for shape in rng.sample(SHAPES, len(SHAPES)):
        if TWIN.get(shape) not in shapes:
            shapes.append(shape)
    shapes, colours = (shapes[:2], rng.sample(palette, min(2, len(palette)))) if few else (shapes, palette)
    return [(rng.choice(colours), rng.choice(shapes)) for _ in range(n)]


def spots(rng: random.Random, n: int) -> list[tuple[float, float]]:
    """Centres as parts of the picture: anywhere, in the cells of a three-by-three lattice, or along a line."""
    layout = rng.choice(("anywhere", "lattice", "lattice", "line"))
    if layout == "lattice":
        cells = rng.sample([(x, y) for x in range(3) for y in range(3)], n)
        return [((x + rng.uniform(0.4, 0.6)) / 3, (y + rng.uniform(0.4, 0.6)) / 3) for x, y in cells]
    if layout == "line" and n <= 4:
        flat, across = rng.random() < 0.5, rng.uniform(0.2, 0.8)
        line = [((i + 0.5) / n, across + rng.uniform(-0.04, 0.04)) for i in range(n)]
        return line if flat else [(y, x) for x, y in line]
    return [(rng.uniform(0.1, 0.9), rng.uniform(0.1, 0.9)) for _ in range(n)]


def try_scene(rng: random.Random, n: int) -> Scene | None:
    """A scene of n objects that keep clear of one another; None where they do not fit."""
    least = 112 if n <= 2 else 150 if n <= 4 else 180
    width, height = rng.randint(least, 280), rng.randint(least, 280)
    if rng.random() < 0.5:
        width, height = round(width / 28) * 28, round(height / 28) * 28
    pixels, ground, palette = backdrop(rng, width, height)
    most = min(width, height) * (0.62, 0.45, 0.4, 0.33, 0.3, 0.3)[n - 1]
    things: list[Thing] = []
    for (colour, shape), (cx, cy) in zip(kinds(rng, n, palette), spots(rng, n), strict=True):
        turn = rng.uniform(-1, 1) * TURN.get(shape, 180)
        cover = coverage(shape, rng.uniform(30, max(34, most)), turn)
        tall, wide = cover.shape
        x, y = round(cx * width - wide / 2), round(cy * height - tall / 2)
        x, y = max(3, min(x, width - 3 - wide)), max(3, min(y, height - 3 - tall))
        box = (x, y, x + wide, y + tall)
        if min(tall, wide) < 24 or any(touching(box, t.box) for t in things):
            return None
        part = pixels[y : y + tall, x : x + wide]
        part += cover[:, :, None] * (np.array(shade(rng, colour)) - part)
        things.append(Thing(colour, shape, box))
    return Scene(finish(rng, pixels), things, ground, palette)


def touching(a: Box, b: Box, gap: int = 5) -> bool:
    return a[0] < b[2] + gap and b[0] < a[2] + gap and a[1] < b[3] + gap and b[1] < a[3] + gap


def scene(rng: random.Random, n: int) -> Scene:
    return next(s for _ in range(2000) if (s := try_scene(rng, n)))


@lru_cache
def font_files() -> list[str]:
    """Upright fonts of the machine, sorted by name."""
    folders = [*os.environ.get("SCENES_FONTS", "").split(os.pathsep), "/usr/share/fonts"]
    found = {p.name: str(p) for d in folders if d for p in sorted(Path(d).rglob("*.ttf"))}
    known = ("DejaVuSans", "DejaVuSerif", "Liberation", "Carlito")
    odd = ("Oblique", "Italic", "ExtraLight")
    return [found[n] for n in sorted(found) if n.startswith(known) and not any(o in n for o in odd)]


def font(rng: random.Random, size: int, letters: str = "") -> Font:
    files = [f for f in font_files() if letters in Path(f).name]
    return ImageFont.truetype(rng.choice(files), size) if files else ImageFont.load_default(size)


def text_picture(rng: random.Random, kind: str) -> tuple[Image.Image, str, str, str]:
    """A picture of a word, number or code: image, text, the text's colour and the background's, if it has a name."""
    if kind == "word":
        text = rng.choice((str.lower, str.upper, str.title))(rng.choice(WORDS.split()))
    elif kind == "number":
        text = rng.choice((str(rng.randint(2, 9999)), f"{rng.randint(1, 99)}.{rng.randint(1, 9)}"))
    else:
        text = "".join(rng.choices("ABCDEFGHJKLMNPQRSTUVWXYZ23456789", k=rng.randint(2, 6)))
    width, height = rng.randint(160, 280), rng.randint(112, 200)
    pixels, ground, palette = backdrop(rng, width, height)
    light = np.array([0.3, 0.59, 0.11])
    colour = rng.choice([c for c in palette if abs((np.array(COLOURS[c]) - pixels.mean((0, 1))) @ light) > 75] or ["?"])
    face = font(rng, rng.randint(26, 56))
    left, top, right, bottom = ImageDraw.Draw(Image.new("L", (1, 1))).textbbox((0, 0), text, font=face)
    wide, tall = int(right - left) + 24, int(bottom - top) + 24
    layer = Image.new("L", (wide, tall))
    draw = ImageDraw.Draw(layer)
    draw.text((12 - left, 12 - top), text, fill=255, font=face)
    if rng.random() < 0.3:  # a sign's frame
        draw.rounded_rectangle((1, 1, wide - 2, tall - 2), 7, outline=255, width=2)
    layer = layer.rotate(rng.uniform(-6, 6), Image.Resampling.BICUBIC, expand=True)
    if colour == "?" or layer.width > width or layer.height > height or bottom - top < 15:
        return text_picture(rng, kind)
    x, y = rng.randint(0, width - layer.width), rng.randint(0, height - layer.height)
    part = pixels[y : y + layer.height, x : x + layer.width]
    part += np.asarray(layer)[:, :, None] / 255 * (np.array(shade(rng, colour)) - part)
    return finish(rng, pixels), text, colour, ground


def chart_picture(rng: random.Random) -> tuple[Image.Image, dict[str, int]]:
    """A bar chart with its axis at the left and a grid line a unit, or with the values above the bars."""
    n = rng.randint(3, 6)
    width, height = rng.randint(190 + 12 * max(0, n - 4), 280), rng.randint(224, 280)
    letters = "".join(rng.sample("ABCDEFGHKLMNPRSTUVWXYZ", n)) if rng.random() < 0.4 else "ABCDEFGH"[:n]
    labels = rng.sample(BAR_WORDS, n) if n < 6 and width > 54 * n and rng.random() < 0.7 else list(letters)
    values = [rng.randint(1, 10) for _ in range(n)]
    if values.count(max(values)) > 1 or values.count(min(values)) > 1:
        return chart_picture(rng)
    bars = dict(zip(labels, values, strict=True))
    axis, dark = rng.random() < 0.5, rng.random() < 0.25
    ink, paper, grid = ((236,) * 3, (38, 42, 50), (74, 78, 86)) if dark else ((40,) * 3, (252, 251, 247), (214,) * 3)
    image = Image.new("RGB", (width, height), paper)
    draw, face = ImageDraw.Draw(image), font(rng, 14, "Sans")
    x0, y0, unit = 28, height - 26, (height - 26 - 22) / 10
    if axis:
        for value in range(11):
            draw.line((x0, y0 - value * unit, width - 8, y0 - value * unit), fill=grid)
            draw.text((x0 - 6, y0 - value * unit), str(value), fill=ink, font=face, anchor="rm")
    pitch, fat = (width - 8 - x0) / n, rng.uniform(0.5, 0.75)
    shared = rng.choice(("red", "blue", "green", "purple", "orange"))
    hues = rng.sample([c for c in COLOURS if c not in ("black", "white", "gray", "brown")], n)
    for i, (label, value) in enumerate(bars.items()):
        middle, top = x0 + (i + 0.5) * pitch, y0 - value * unit
        fill = shade(rng, shared if n % 2 else hues[i])
        draw.rectangle((middle - fat * pitch / 2, top, middle + fat * pitch / 2, y0), fill=fill)
        draw.text((middle, y0 + 5), label, fill=ink, font=face, anchor="ma")
        if not axis:
            draw.text((middle, top - 3), str(value), fill=ink, font=face, anchor="mb")
    draw.line((x0, y0 - 10 * unit, x0, y0, width - 8, y0), fill=ink, width=2)
    return image, bars


def plural(noun: str) -> str:
    return noun + ("es" if noun.endswith("s") else "s")


def a(noun: str) -> str:
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def ask_colour(s: Scene, rng: random.Random) -> Asked:
    shapes = Counter(t.shape for t in s.things)
    way = rng.choice(("What color is the {}?", "What colour is the {}?"))
    asked = [(way.format(t.shape), t.colour) for t in s.things if shapes[t.shape] == 1]
    asked += [("What color is this object?", t.colour) for t in s.things if len(s.things) == 1]
    return asked + [("What color is the background?", s.ground)] * (s.ground != "" and rng.random() < 0.3)


def ask_shape(s: Scene, rng: random.Random) -> Asked:
    colours = Counter(t.colour for t in s.things)
    ways = ("What shape is the {} object?", "What is the shape of the {} thing?", "Which shape is {}?")
    asked = [(rng.choice(ways).format(t.colour), t.shape) for t in s.things if colours[t.colour] == 1]
    return asked + ([("What shape do you see here?", s.things[0].shape)] if len(s.things) == 1 else [])


def tellable(s: Scene) -> tuple[list[str], list[str]]:
    """Colours and shapes a question may name without a doubt, drawn or not."""
    return s.palette, [k for k in SHAPES if TWIN.get(k) not in {t.shape for t in s.things}]


def ask_count(s: Scene, rng: random.Random) -> Asked:
    colours, shapes = tellable(s)
    names = [t.name for t in s.things]
    asked = [("How many objects are in the picture?", len(names))] * 2
    asked += [(f"How many {c} things can you see?", sum(c in n.split() for n in names)) for c in colours]
    asked += [(f"How many {plural(k)} are there?", sum(k in n.split() for n in names)) for k in shapes]
    asked += [(f"How many {plural(n)} do you see?", names.count(n)) for n in names]
    return [(q, str(n)) for q, n in asked]


def ask_position(s: Scene, rng: random.Random) -> Asked:
    ways = ("Where is the {}?", "Where in the picture is the {}?", "In which part of the image is the {}?")
    return [(rng.choice(ways).format(t.name), p) for t in s.unique() if (p := s.place(t))]


def ask_box(s: Scene, rng: random.Random) -> Asked:
    if any(side % 28 for side in s.image.size):
        return []
    ways = ("Give the bounding box of the {} as [x0, y0, x1, y1].", "What are the box coordinates of the {}?")
    return [(rng.choice(ways).format(t.name), "[{}, {}, {}, {}]".format(*t.box)) for t in s.unique()]


def ask_compare(s: Scene, rng: random.Random) -> Asked:
    asked = []
    for big, small in permutations(s.unique(), 2):
        if big.times(small) >= 1.45:
            one, two = rng.sample((big.name, small.name), 2)
            asked += [(f"Which is {rng.choice(('bigger', 'larger'))}, the {one} or the {two}?", big.name)]
            asked += [(f"Which one is smaller, the {one} or the {two}?", small.name)]
    return asked


def ask_yesno(s: Scene, rng: random.Random) -> Asked:
    colours, shapes = tellable(s)
    words = {w for t in s.things for w in t.name.split()}
    names = {t.name for t in s.things}
    what = [(f"Is there {a(k)} in the picture?", k in words) for k in shapes]
    what += [(f"Can you see {a(c)} object?", c in words) for c in colours]
    both = [(f"Is there {a(f'{c} {k}')}?", f"{c} {k}" in names) for c in colours for k in shapes if {c, k} & words]
    relate, size = [], []
    for one, two in permutations(s.unique(), 2):
        for axis, sides in enumerate((("to the left of", "to the right of"), ("above", "below"))):
            gap = (two.centre[axis] - one.centre[axis]) / s.image.size[axis]
            ask = f"Is the {one.name} {{}} the {two.name}?"
            relate += [(ask.format(w), (gap > 0) == (w == sides[0])) for w in sides if abs(gap) >= 0.18]
        if max(one.times(two), two.times(one)) >= 1.45:
            size += [(f"Is the {one.name} bigger than the {two.name}?", one.times(two) > 1)]
    group = rng.choice([g for g in (what, both, relate, relate, size) if g])
    return [(q, ("no", "yes")[true]) for q, true in group]


def ask_describe(s: Scene, rng: random.Random) -> Asked:
    order = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")
    places = {p: t for t in s.things if (p := s.place(t))}
    if len(places) < len(s.things) or len(s.things) > 4:
        return []
    parts = [f"{a(places[p].name)} {'in' if p == 'center' else 'at'} the {p}" for p in order if p in places]
    sentence = " and ".join([", ".join(parts[:-1]), parts[-1]] if parts[1:] else parts) + "."
    return [(rng.choice(("Describe this picture.", "What is in this image?")), sentence[0].upper() + sentence[1:])]


ASKS = (  # what scenes are asked, and how often
    *(("box", 15, ask_box), ("compare", 15, ask_compare), ("describe", 12, ask_describe), ("colour", 28, ask_colour)),
    *(("shape", 30, ask_shape), ("count", 34, ask_count), ("position", 32, ask_position), ("yesno", 36, ask_yesno)),
)


class Survey:
    """The items so far; of several possible questions, the one with the rarest answer is asked."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.items: list[Item] = []
        self.used: Counter[tuple[str, str]] = Counter()

    def fresh(self) -> random.Random:
        """A generator of its own for a picture whose course depends on the machine's fonts."""
        return random.Random(self.rng.random())

    def ask(self, task: str, images: tuple[Image.Image, ...], asked: Asked) -> bool:
        """Asks one of the questions, if there is one that this picture was not asked."""
        before = {i.question for i in self.items if i.images is images}
        asked = [q for q in asked if q[0] not in before]
        if not asked:
            return False
        self.rng.shuffle(asked)
        question, answer = min(asked, key=lambda q: self.used[task, q[1]])
        self.used[task, answer] += 1
        self.items.append(Item(images, task, question, answer))
        return True

    def scenes(self) -> None:
        """Fifty pictures of objects; tasks that few scenes allow come first, then those furthest behind their quota."""
        left = {task: quota for task, quota, _ in ASKS}

        def urgency(entry: tuple[str, int, object]) -> tuple[bool, bool, float]:
            task, quota, _ = entry
            return left[task] <= 0, task not in ("box", "compare"), -left[task] / quota

        for done, n in enumerate(self.rng.sample(COUNTS, len(COUNTS))):
            s = scene(self.rng, n)
            images, wanted = (s.image,), max(1, -(-sum(left.values()) // (len(COUNTS) - done)))
            for task, _, ask in sorted(ASKS, key=urgency):
                if wanted and self.ask(task, images, ask(s, self.rng)):
                    left[task], wanted = left[task] - 1, wanted - 1

    def texts(self) -> None:
        """Twenty-six pictures of text."""
        ways = {"word": "What word is this?", "number": "What number is shown?", "code": "What is the code here?"}
        for i in range(26):
            kind = ("word", "number", "code")[i % 3]
            image, text, colour, ground = text_picture(self.fresh(), kind)
            images, asked = (image,), (ways[kind], "What does it say?", "Read the text in the image.")
            self.ask("text", images, [(q, text) for q in asked])
            if ground and i % 2:
                self.ask("colour", images, [("What is the background color?", ground)])
            elif ground:
                sentence = f'The text "{text}" in {colour} on {a(ground)} background.'
                self.ask("describe", images, [("Describe the picture.", sentence)])

    def charts(self) -> None:
        """Thirteen bar charts."""
        for i in range(13):
            image, bars = chart_picture(self.fresh())
            images, high, low = (image,), max(bars, key=lambda b: bars[b]), min(bars, key=lambda b: bars[b])
            for way in ("What is the value of bar {}?", "How high is the bar {}?")[: 1 + i % 2]:
                self.ask("chart", images, [(way.format(b), str(v)) for b, v in bars.items()])
            if i % 3 < 2:
                self.ask("chart", images, [(f"Which bar is the {('tallest', 'shortest')[i % 2]}?", (high, low)[i % 2])])
            if i % 3:
                self.ask("chart", images, [("How many bars does the chart have?", str(len(bars)))])
            else:
                sentence = f"A bar chart with {len(bars)} bars, {high} is the tallest."
                self.ask("describe", images, [("Describe this chart.", sentence)])

    def two_single(self) -> None:
        """Two pictures of one object each, alike in either colour or shape."""
        while True:
            one, two = scene(self.rng, 1), scene(self.rng, 1)
            t, u = one.things[0], two.things[0]
            if (t.colour == u.colour) != (t.shape == u.shape):
                break
        images = (one.image, two.image)
        for which, thing in (("first", t), ("second", u)):
            asked = [(f"What color is the object in the {which} picture?", thing.colour)]
            self.ask("two", images, [*asked, (f"What shape is in the {which} picture?", thing.shape)])
        same = [("Are the objects in the two pictures the same color?", ("no", "yes")[t.colour == u.colour])]
        self.ask("two", images, [*same, ("Do both pictures show the same shape?", ("no", "yes")[t.shape == u.shape])])

    def two_many(self) -> None:
        """Two pictures with different numbers of objects."""
        one, two = (scene(self.rng, n) for n in self.rng.sample(range(1, 7), 2))
        colours, shapes = ([w for w in x if w in y] for x, y in zip(tellable(one), tellable(two), strict=True))
        kinds = [(c, f"{c} objects") for c in colours] + [(k, plural(k)) for k in shapes]
        asked = [("Which picture has more objects?", len(one.things) - len(two.things))]
        for word, kind in kinds:
            m, n = (sum(word in (t.colour, t.shape) for t in s.things) for s in (one, two))
            asked += [(f"Which picture has more {kind}?", m - n)] * (m != n and m + n > 1)
        images = (one.image, two.image)
        for some in (asked[:1], asked[1:]):
            self.ask("two", images, [(q, ("first", "second")[n < 0]) for q, n in some])

    def two_texts(self) -> None:
        """Two pictures of text."""
        pair = [text_picture(self.fresh(), self.rng.choice(("word", "code", "number")))[:2] for _ in range(2)]
        images = (pair[0][0], pair[1][0])
        for which, (_, text) in zip(("first", "second"), pair, strict=True):
            self.ask("two", images, [(f"What does the {which} picture say?", text)])


def items(seed: int = 20240) -> list[Item]:
    """About three hundred questions about a hundred pictures or pairs of pictures."""
    survey = Survey(seed)
    survey.scenes()
    survey.texts()
    survey.charts()
    for i in range(11):
        (survey.two_single, survey.two_many, survey.two_texts)[i % 3]()
    return survey.items


def main(out: Path) -> None:
    """Writes the pictures and a line of JSON a question."""
    out.mkdir(parents=True, exist_ok=True)
    asked = items()
    number: dict[int, int] = {}  # of a picture or pair, by its identity
    with (out / "questions.jsonl").open("w", encoding="utf-8") as lines:
        for item in asked:
            stem = number.setdefault(id(item.images), len(number))
            pngs = [f"{stem:03d}{'ab'[i]}.png" for i in range(len(item.images))]
            for png, image in zip(pngs, item.images, strict=True):
                image.save(out / png)
            row = {"images": pngs, "task": item.task, "question": item.question, "answer": item.answer}
            print(json.dumps(row, ensure_ascii=False), file=lines)
    print(f"{len(number)} pictures, {len(asked)} questions:", dict(Counter(i.task for i in asked)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
