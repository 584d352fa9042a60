"""Draws one sample: the picture or two, and the questions with their answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from PIL import Image

from scenes import backgrounds, charts, fonts, layout, text
from scenes.disturb import disturb
from scenes.paint import Rgb, drawn, visible_on
from scenes.pairs import ask_pair
from scenes.questions import QA, Asker, ask_all
from scenes.scene import Scene, Thing
from scenes.shapes import draw_mask
from scenes.vocabulary import COLOURS, HELDOUT_PAIRS, SHAPES, SIZES, UNNAMED_BACKGROUNDS

KINDS = ("objects", "text", "chart", "pair")
KIND_WEIGHTS = (55, 20, 15, 10)
FACTORS: dict[str, tuple[str, ...]] = {
    "objects": ("pairs", "wording", "background", "size"),
    "text": ("fonts", "wording", "background", "size"),
    "chart": ("fonts", "wording", "size"),
    "pair": ("pairs", "wording", "background", "size"),
}
ALL_FACTORS_SHARE = 0.25
GROUND_WEIGHTS = {"white": 6, "black": 2, "gray": 2}
UNNAMED_SHARE = 0.15
SHAPE_BY_TEXT_SHARE = 0.25
TEXT_PAIR_SHARE = 0.2
SIDES = range(112, 281, 28)

ANY, REPEATED, HELDOUT = "any", "repeated", "heldout"

Kind = tuple[str, str]


@dataclass(frozen=True)
class Sample:
    """One or two pictures with questions; `heldout` names the held-out factors in force."""

    images: tuple[Image.Image, ...]
    qas: tuple[QA, ...]
    heldout: tuple[str, ...] = ()


def sample(
    seed: int,
    *,
    split: str = "train",
    size: tuple[int, int] | None = None,
    kind: str | None = None,
    num_questions: int = 6,
) -> Sample:
    """The sample of a seed; `size` is (width, height) and `kind` objects, text, chart or pair, both drawn when None."""
    return compose(seed, split=split, size=size, kind=kind, num_questions=num_questions)[0]


def compose(
    seed: int, *, split: str, size: tuple[int, int] | None, kind: str | None, num_questions: int
) -> tuple[Sample, tuple[Scene, ...]]:
    """The sample of a seed with the scenes that its pictures show."""
    if split not in SIZES:
        raise ValueError(f"no such split: {split!r} (there are {', '.join(SIZES)})")
    if kind is not None and kind not in KINDS:
        raise ValueError(f"no such kind: {kind!r} (there are {', '.join(KINDS)})")
    if size is not None and not all(side in SIDES for side in size):
        raise ValueError(f"sides must be multiples of 28 from 112 to 280, not {size}")
    rng = Random(f"{seed}/{split}/{size}/{kind}")
    chosen = kind or rng.choices(KINDS, KIND_WEIGHTS)[0]
    if chosen == "chart" and size is not None and min(size) < charts.SMALLEST_SIDE:
        raise ValueError(f"a chart needs sides of at least {charts.SMALLEST_SIDE}, not {size}")
    force = frozenset(choose_factors(rng, chosen)) if split == "heldout" else frozenset()
    if size is not None:
        force = force - {"size"} | ({"size"} if size in SIZES["heldout"] else set())
    else:
        size = choose_size(rng, chosen, "size" in force)
    images, scenes = draw(rng, chosen, size, force)
    qas = ask_about(rng, chosen, scenes, force, num_questions)
    factors = tuple(sorted(force)) if split == "heldout" else ()
    return Sample(images, qas, factors), scenes


def choose_factors(rng: Random, kind: str) -> tuple[str, ...]:
    """The held-out factors in force: all that apply to the kind in a quarter of the samples, else one."""
    return FACTORS[kind] if rng.random() < ALL_FACTORS_SHARE else (rng.choice(FACTORS[kind]),)


def choose_size(rng: Random, kind: str, heldout: bool) -> tuple[int, int]:
    """A size of the split that the kind fits in."""
    sizes = SIZES["heldout" if heldout else "train"]
    return rng.choice([size for size in sizes if kind != "chart" or min(size) >= charts.SMALLEST_SIDE])


def draw(
    rng: Random, kind: str, size: tuple[int, int], force: frozenset[str]
) -> tuple[tuple[Image.Image, ...], tuple[Scene, ...]]:
    """The pictures of a sample and their scenes."""
    if kind == "pair":
        drawn_scenes = draw_pair(rng, size, force)
    elif kind == "chart":
        drawn_scenes = [draw_chart(rng, size, force)]
    elif kind == "text":
        drawn_scenes = [draw_text(rng, size, force)]
    else:
        drawn_scenes = [draw_objects(rng, size, choose_roles(rng, "pairs" in force), force)]
    return tuple(image for image, _ in drawn_scenes), tuple(scene for _, scene in drawn_scenes)


def ask_about(rng: Random, kind: str, scenes: Sequence[Scene], force: frozenset[str], count: int) -> tuple[QA, ...]:
    """The questions of a sample."""
    wording, pairs = "wording" in force, "pairs" in force
    if kind == "pair":
        return ask_pair(rng, scenes, count, wording=wording, pairs=pairs)
    focus = [thing for thing in scenes[0].things if (thing.colour, thing.shape) in HELDOUT_PAIRS]
    return ask_all(Asker(rng, scenes[0], wording, pairs, focus), kind, count)


def choose_ground(rng: Random) -> tuple[str | None, Rgb]:
    """A background's colour name, None for some pale or dark shades without one, and its RGB."""
    if rng.random() < UNNAMED_SHARE:
        return None, rng.choice(UNNAMED_BACKGROUNDS)
    name = rng.choices(list(COLOURS), [GROUND_WEIGHTS.get(name, 1) for name in COLOURS])[0]
    return name, drawn(rng, name)


def choose_roles(rng: Random, heldout_pairs: bool) -> list[str]:
    """What objects a picture gets: one, some different ones, or many of a kind."""
    manner = rng.random()
    if manner < 0.2:
        roles = [ANY]
    elif manner < 0.55:
        roles = [ANY] * rng.choices((2, 3, 4, 5), (4, 4, 3, 2))[0]
    else:
        roles = [REPEATED] * rng.choices((2, 3, 4, 5, 6), (2, 3, 4, 5, 6))[0]
        roles += [ANY] * rng.randint(0, 8 - len(roles))
    if heldout_pairs:
        roles[-1] = HELDOUT
    return roles


def settle(rng: Random, roles: Sequence[str], colours: Sequence[str]) -> list[Kind]:
    """Colours and shapes for the roles, all in colours that may be used; the repeated share one or both."""
    allowed = [(c, s) for c in colours for s in SHAPES if (c, s) not in HELDOUT_PAIRS]
    repeated = rng.choice(allowed)
    share = rng.choice(("both", "colour", "shape"))
    kinds: list[Kind] = []
    for role in roles:
        if role == REPEATED:
            pool = [pair for pair in allowed if matches(pair, repeated, share)]
        elif role == HELDOUT:
            pool = sorted(pair for pair in HELDOUT_PAIRS if pair[0] in colours)
        else:
            near = rng.choice(kinds) if kinds and rng.random() < 0.5 else None
            pool = [pair for pair in allowed if not near or matches(pair, near, rng.choice(("colour", "shape")))]
            pool = [pair for pair in pool if pair not in kinds] or allowed
        kinds.append(rng.choice(pool))
    return kinds


def matches(pair: Kind, other: Kind, share: str) -> bool:
    """Whether two kinds have the colour, the shape or both in common."""
    return (share == "shape" or pair[0] == other[0]) and (share == "colour" or pair[1] == other[1])


def draw_objects(
    rng: Random, size: tuple[int, int], roles: Sequence[str], force: frozenset[str]
) -> tuple[Image.Image, Scene]:
    """A picture of objects."""
    name, ground = choose_ground(rng)
    picture = backgrounds.paint(rng, size, ground, "heldout" if "background" in force else "train")
    kinds = settle(rng, roles, visible_on(ground))
    rng.shuffle(kinds)
    things = draw_things(rng, picture, kinds, [])
    smallest = min(min(thing.sides) for thing in things)
    return disturb(rng, picture, delicate=smallest < 32), Scene(size, name, things)


def draw_things(
    rng: Random, picture: Image.Image, kinds: Sequence[Kind], blocked: Sequence[layout.Box]
) -> tuple[Thing, ...]:
    """Draws the objects, away from the blocked boxes; those that found room."""
    things = []
    places = layout.place(rng, picture.size, [shape for _, shape in kinds], blocked)
    for (colour, shape), found in zip(kinds, places, strict=True):
        if found is None:
            continue
        x, y, radius = found
        mask, (left, top, right, bottom) = draw_mask(rng, shape, radius)
        x, y = x - mask.width // 2, y - mask.height // 2
        picture.paste(drawn(rng, colour), (x, y), mask)
        things.append(Thing(colour, shape, (x + left, y + top, x + right, y + bottom)))
    return tuple(things)


def draw_text(rng: Random, size: tuple[int, int], force: frozenset[str]) -> tuple[Image.Image, Scene]:
    """A picture of a text, at times with an object beside it."""
    name, ground = choose_ground(rng)
    picture = backgrounds.paint(rng, size, ground, "heldout" if "background" in force else "train")
    printed, glyphs = text.print_text(rng, picture, ground, fonts.choose(rng, "fonts" in force))
    things: tuple[Thing, ...] = ()
    if rng.random() < SHAPE_BY_TEXT_SHARE:
        colours = [colour for colour in visible_on(ground) if colour != printed.colour]
        kinds = settle(rng, [ANY], colours)
        edge = 10 if printed.panel else 0
        x0, y0, x1, y1 = printed.box
        things = draw_things(rng, picture, kinds, [(x0 - edge, y0 - edge, x1 + edge, y1 + edge)])
    small = printed.box[3] - printed.box[1] < 40
    return disturb(rng, picture, delicate=small), Scene(size, name, things, text=printed, glyphs=glyphs)


def draw_chart(rng: Random, size: tuple[int, int], force: frozenset[str]) -> tuple[Image.Image, Scene]:
    """A picture of a bar chart."""
    chart = charts.choose_chart(rng)
    picture, glyphs, bars = charts.draw_chart(rng, size, chart, fonts.choose(rng, "fonts" in force))
    return disturb(rng, picture, delicate=True), Scene(size, None, chart=chart, glyphs=glyphs, bars=bars)


def draw_pair(rng: Random, size: tuple[int, int], force: frozenset[str]) -> list[tuple[Image.Image, Scene]]:
    """Two pictures of texts, of one object each (often alike), or of different numbers of objects."""
    if "pairs" not in force and rng.random() < TEXT_PAIR_SHARE:
        return [draw_text(rng, size, force) for _ in range(2)]
    if rng.random() < 0.5:
        return draw_single_pair(rng, size, force)
    while True:
        pair = [draw_objects(rng, size, choose_roles(rng, "pairs" in force), force) for _ in range(2)]
        if len(pair[0][1].things) != len(pair[1][1].things):
            return pair


def draw_single_pair(rng: Random, size: tuple[int, int], force: frozenset[str]) -> list[tuple[Image.Image, Scene]]:
    """Two pictures of one object each, that share colour or shape in about half of all cases."""
    first = draw_objects(rng, size, [HELDOUT if "pairs" in force else ANY], force)
    (thing,) = first[1].things
    colour = thing.colour if rng.random() < 0.45 else rng.choice(list(COLOURS))
    shape = thing.shape if rng.random() < 0.45 else rng.choice(SHAPES)
    if (colour, shape) in HELDOUT_PAIRS and "pairs" not in force:
        return [first, draw_objects(rng, size, [ANY], force)]
    return [first, draw_one(rng, size, (colour, shape), force)]


def draw_one(rng: Random, size: tuple[int, int], kind: Kind, force: frozenset[str]) -> tuple[Image.Image, Scene]:
    """A picture of one object of a kind, on a background that it stands out from."""
    while True:
        name, ground = choose_ground(rng)
        if kind[0] in visible_on(ground):
            break
    picture = backgrounds.paint(rng, size, ground, "heldout" if "background" in force else "train")
    things = draw_things(rng, picture, [kind], [])
    return disturb(rng, picture, delicate=min(things[0].sides) < 32), Scene(size, name, things)
