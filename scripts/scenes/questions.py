"""Asks about one picture: questions with answers computed from what was drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from random import Random

from scenes.scene import Scene, Thing, is_larger, position, relations
from scenes.text import altered
from scenes.vocabulary import (
    COLOURS,
    HELDOUT_PAIRS,
    POSITIONS,
    SHAPES,
    at_position,
    plural,
    with_article,
)
from scenes.wording import FORMS, ask

MOST_COUNTED = 6
MOST_DESCRIBED = 4
COUNT_WEIGHTS = (0.25, 0.16, 0.55, 1.6, 3.2, 6.0, 9.0)
NOUNS = ("object", "object", "thing", "shape", "one")
SIDE_BY_SIDE = 0.08


@dataclass(frozen=True)
class QA:
    """One question of a task and its answer."""

    task: str
    question: str
    answer: str


@dataclass
class Asker:
    """Asks about one scene; `focus` are the things that the questions should prefer."""

    rng: Random
    scene: Scene
    heldout_wording: bool = False
    heldout_pairs: bool = False
    focus: Sequence[Thing] = field(default_factory=tuple)
    loyalty: float = 0.6

    def say(self, form: str, answer: str, **slots: str) -> QA:
        """The question of a form with its answer."""
        return QA(FORMS[form].task, ask(self.rng, form, self.heldout_wording, slots), answer)

    def pick(self, things: Sequence[Thing]) -> Thing:
        """One of the things, often one in focus."""
        wanted = [thing for thing in things if thing in self.focus]
        return self.rng.choice(wanted if wanted and self.rng.random() < self.loyalty else things)

    def may_name(self, colour: str, shape: str) -> bool:
        """Whether the split may speak of a shape of that colour at all."""
        return self.heldout_pairs or (colour, shape) not in HELDOUT_PAIRS

    def number(self, colour: str | None = None, shape: str | None = None) -> int:
        """How many things are of a colour, of a shape, or both."""
        return sum(colour in (None, thing.colour) and shape in (None, thing.shape) for thing in self.scene.things)

    def place_of(self, thing: Thing) -> str | None:
        """The thing's position where it is clear and no other thing's centre lies near it."""
        place = position(thing, self.scene.size)
        others = [position(other, self.scene.size) for other in self.scene.things if other is not thing]
        return None if place in others or None in others else place

    def refer(self, thing: Thing, hide: str | None = None) -> str | None:
        """An unambiguous reference to the thing, without its colour or shape where that is asked."""
        colour, shape, rng = thing.colour, thing.shape, self.rng
        noun = rng.choice(NOUNS) if self.scene.text is None else "shape"
        options: list[str] = []
        if hide is None and self.number(colour, shape) == 1:
            options += [f"the {colour} {shape}"] * 4 + [f"the {shape} that is {colour}"]
        if hide != "shape" and self.number(shape=shape) == 1:
            options += [f"the {shape}"] * (2 if hide is None else 3)
        if hide != "colour" and self.number(colour=colour) == 1:
            options += [f"the {colour} {noun}"] * (1 if hide is None else 3)
        if hide is not None and self.scene.text is None and noun != "one":
            options += self.indirect(thing, noun)
        return rng.choice(options) if options else None

    def indirect(self, thing: Thing, noun: str) -> list[str]:
        """References by place or size."""
        options = []
        place = self.place_of(thing)
        if place and len(self.scene.things) > 1:
            options += [f"the {noun} {at_position(place)}"] * 2
        others = [other for other in self.scene.things if other is not thing]
        if others and all(is_larger(thing, other) for other in others):
            options.append(f"the largest {noun}")
        if others and all(is_larger(other, thing) for other in others):
            options.append(f"the smallest {noun}")
        return options


def ask_colour(asker: Asker) -> QA | None:
    """The colour of an object, of the text or of the background."""
    scene, rng = asker.scene, asker.rng
    named = scene.background if not (scene.text and scene.text.panel) else None
    if named and rng.random() < (0.5 if scene.text else 0.15):
        return asker.say("colour of background", named)
    if scene.text and (not scene.things or rng.random() < 0.4):
        return asker.say("colour of text", scene.text.colour)
    if not scene.things:
        return None
    thing = asker.pick(scene.things)
    if len(scene.things) == 1 and not scene.text and rng.random() < 0.6:
        return asker.say("colour of only", thing.colour)
    reference = asker.refer(thing, "colour")
    return asker.say("colour of", thing.colour, a=reference) if reference else None


def ask_shape(asker: Asker) -> QA | None:
    """The shape of an object."""
    scene = asker.scene
    if not scene.things:
        return None
    thing = asker.pick(scene.things)
    if len(scene.things) == 1 and not scene.text and asker.rng.random() < 0.6:
        return asker.say("shape of only", thing.shape)
    reference = asker.refer(thing, "shape")
    return asker.say("shape of", thing.shape, a=reference) if reference else None


def ask_count(asker: Asker) -> QA | None:
    """How many objects of some kind there are, every number about as often."""
    scene, rng = asker.scene, asker.rng
    if scene.text or not scene.things:
        return None
    by_number: dict[int, list[str]] = {}
    for kind, number in countable(asker):
        by_number.setdefault(number, []).append(kind)
    numbers = sorted(number for number in by_number if number <= MOST_COUNTED)
    if not numbers:
        return None
    number = rng.choices(numbers, [COUNT_WEIGHTS[number] for number in numbers])[0]
    return asker.say("count of", str(number), many=rng.choice(by_number[number]))


def countable(asker: Asker) -> list[tuple[str, int]]:
    """Kinds that can be counted, some of them absent, with their numbers."""
    rng, scene = asker.rng, asker.scene
    pairs = {(thing.colour, thing.shape) for thing in scene.things}
    colours = sorted({colour for colour, _ in pairs})
    shapes = sorted({shape for _, shape in pairs})
    kinds = [(rng.choice(("objects", "objects", "shapes", "things")), len(scene.things))]
    kinds += [(f"{colour} {rng.choice(('objects', 'shapes', 'things'))}", asker.number(colour)) for colour in colours]
    kinds += [(plural(shape), asker.number(shape=shape)) for shape in shapes]
    kinds += [
        (f"{colour} {plural(shape)}", asker.number(colour, shape))
        for colour in colours
        for shape in shapes
        if asker.may_name(colour, shape)
    ]
    absent_shape, absent_colour = rng.choice(SHAPES), rng.choice(list(COLOURS))
    if absent_shape not in shapes:
        kinds.append((plural(absent_shape), 0))
    if absent_colour not in colours and absent_colour != scene.background:
        kinds.append((f"{absent_colour} {rng.choice(('objects', 'shapes'))}", 0))
    return kinds


def ask_position(asker: Asker) -> QA | None:
    """Where an object is."""
    scene, rng = asker.scene, asker.rng
    if not scene.things:
        return None
    thing = asker.pick(scene.things)
    place = position(thing, scene.size)
    if place is None or (place == "center" and len(scene.things) == 1 and rng.random() < 0.2):
        return None
    reference = asker.refer(thing)
    if reference and len(scene.things) == 1 and not scene.text and rng.random() < 0.3:
        reference = f"the {rng.choice(('object', 'shape', 'thing'))}"
    return asker.say("position of", place, a=reference) if reference else None


def ask_box(asker: Asker) -> QA | None:
    """The box of an object."""
    if not asker.scene.things:
        return None
    thing = asker.pick(asker.scene.things)
    reference = asker.refer(thing)
    return asker.say("box of", f"[{', '.join(map(str, thing.box))}]", a=reference) if reference else None


def ask_compare(asker: Asker) -> QA | None:
    """Which of two objects, or of all, is larger or smaller."""
    rng, things = asker.rng, list(asker.scene.things)
    if len(things) < 2:
        return None
    form = rng.choice(("larger", "smaller"))
    if rng.random() < 0.25:
        for thing in things:
            others = [other for other in things if other is not thing]
            if all(is_larger(*pair) for pair in ordered(form, thing, others)) and asker.number(*naming(thing)) == 1:
                return asker.say("largest" if form == "larger" else "smallest", thing.name)
    first = asker.pick(things)
    second = rng.choice([thing for thing in things if thing is not first])
    winner = first if is_larger(*ordered(form, first, [second])[0]) else second
    loser = second if winner is first else first
    if not is_larger(*ordered(form, winner, [loser])[0]) or asker.number(*naming(winner)) > 1:
        return None
    references = [asker.refer(first), asker.refer(second)]
    rng.shuffle(references)
    if references[0] is None or references[1] is None:
        return None
    return asker.say(f"{form} of", winner.name, a=references[0], b=references[1])


def naming(thing: Thing) -> tuple[str, str]:
    """The thing's colour and shape."""
    return thing.colour, thing.shape


def ordered(form: str, thing: Thing, others: Sequence[Thing]) -> list[tuple[Thing, Thing]]:
    """Pairs whose first must be the larger for the thing to win over each of the others."""
    return [(thing, other) if form == "larger" else (other, thing) for other in others]


def ask_yesno(asker: Asker) -> QA | None:
    """Whether something is there or some relation holds; yes as often as no."""
    wanted = asker.rng.random() < 0.5
    if asker.scene.text and (not asker.scene.things or asker.rng.random() < 0.6):
        return ask_text_yesno(asker, wanted)
    if len(asker.scene.things) > 1 and asker.rng.random() < 0.5:
        found = ask_relation(asker, wanted)
        if found:
            return found
    return ask_presence(asker, wanted)


def answer_of(wanted: bool) -> str:
    """`yes` or `no`."""
    return "yes" if wanted else "no"


def ask_text_yesno(asker: Asker, wanted: bool) -> QA | None:
    """Whether the text is the given one."""
    text = asker.scene.text
    assert text is not None
    content = text.content if wanted else altered(asker.rng, text.content, text.kind)
    if len(content) > 8:
        return None
    said = f"the number {content}" if text.kind == "number" and asker.rng.random() < 0.3 else f'"{content}"'
    form = "is there" if said[0] != '"' else "is text"
    return asker.say(form, answer_of(wanted), **{"one" if form == "is there" else "said": said})


def ask_relation(asker: Asker, wanted: bool) -> QA | None:
    """Whether one object lies so towards another, or is larger or smaller than it."""
    rng, size = asker.rng, asker.scene.size
    first = asker.pick(asker.scene.things)
    second = rng.choice([thing for thing in asker.scene.things if thing is not first])
    holding = sorted(relations(first, second, size))
    if is_larger(first, second):
        holding.append("larger")
    if is_larger(second, first):
        holding.append("smaller")
    if not holding:
        return None
    relation = rng.choice(holding)
    references = [asker.refer(first), asker.refer(second)]
    if not wanted:
        references.reverse()
    if references[0] is None or references[1] is None:
        return None
    return asker.say(f"is {relation}", answer_of(wanted), a=references[0], b=references[1])


def ask_presence(asker: Asker, wanted: bool) -> QA | None:
    """Whether there is a colour, a shape or both; the hardest absent kinds share one of the two with an object."""
    rng, scene = asker.rng, asker.scene
    if not scene.things:
        return None
    thing = asker.pick(scene.things)
    colour, shape = thing.colour, thing.shape
    what = rng.choices(("both", "colour", "shape"), (6, 2, 2))[0]
    if not wanted:
        colours = [name for name in COLOURS if not asker.number(name)]
        shapes = [name for name in SHAPES if not asker.number(shape=name)]
        if what == "both":
            pool = absent_pairs(asker)
            if not pool:
                return None
            colour, shape = rng.choice(pool)
        elif what == "colour":
            colour = rng.choice([name for name in colours if name != scene.background])
        elif shapes:
            shape = rng.choice(shapes)
        else:
            return None
    if what == "both":
        return asker.say("is there", answer_of(wanted), one=with_article(f"{colour} {shape}"))
    if what == "shape":
        return asker.say("is there", answer_of(wanted), one=with_article(shape))
    noun = rng.choice(("shape",) if scene.text else ("object", "shape", "thing"))
    return asker.say("is there", answer_of(wanted), one=with_article(f"{colour} {noun}"))


def absent_pairs(asker: Asker) -> list[tuple[str, str]]:
    """Kinds that are not there: of an object's colour, of an object's shape, or (at times) of neither."""
    rng, scene = asker.rng, asker.scene
    colours = [thing.colour for thing in scene.things]
    shapes = [thing.shape for thing in scene.things]
    manner = rng.choices(("mixed", "colour", "shape", "any"), (4, 3, 3, 2))[0]
    pairs = [
        (colour, shape)
        for colour in (colours if manner in ("mixed", "colour") else COLOURS)
        for shape in (shapes if manner in ("mixed", "shape") else SHAPES)
    ]
    return [pair for pair in pairs if not asker.number(*pair) and asker.may_name(*pair)]


def ask_text(asker: Asker) -> QA | None:
    """What is printed."""
    text = asker.scene.text
    if text is None:
        return None
    form = "text" if asker.rng.random() < 0.65 else f"text {text.kind}"
    return asker.say(form, text.content)


def ask_chart(asker: Asker) -> QA | None:
    """A bar's value, the tallest or shortest bar, their number, or which of two is taller."""
    chart, rng = asker.scene.chart, asker.rng
    if chart is None:
        return None
    form = rng.choices(("value", "tallest", "shortest", "count", "taller"), (5, 2, 2, 1, 2))[0]
    if form == "count":
        return asker.say("bar count", str(len(chart.labels)))
    first, second = rng.sample(range(len(chart.labels)), 2)
    if form == "value":
        return asker.say("bar value", str(chart.values[first]), label=chart.labels[first])
    if form == "taller":
        if chart.values[first] == chart.values[second]:
            return None
        answer = answer_of(chart.values[first] > chart.values[second])
        return asker.say("bar taller", answer, label=chart.labels[first], other=chart.labels[second])
    extreme = max(chart.values) if form == "tallest" else min(chart.values)
    if chart.values.count(extreme) > 1:
        return None
    return asker.say(f"bar {form}", chart.labels[chart.values.index(extreme)])


def ask_describe(asker: Asker) -> QA | None:
    """The description of the picture."""
    sentence = describe(asker.scene)
    return asker.say("describe", sentence) if sentence else None


def describe(scene: Scene) -> str | None:
    """The picture in one sentence, None where the contract has none for it."""
    if scene.chart:
        values = scene.chart.values
        if values.count(max(values)) > 1:
            return None
        return f"A bar chart with {len(values)} bars, {scene.chart.labels[values.index(max(values))]} is the tallest."
    if scene.text:
        if scene.things or scene.text.panel or scene.background is None:
            return None
        ground = with_article(scene.background)
        return f'The text "{scene.text.content}" in {scene.text.colour} on {ground} background.'
    return describe_things(scene)


def describe_things(scene: Scene) -> str | None:
    """The objects in reading order, None where they are many or their order is not clear."""
    order = [place for row in POSITIONS for place in row]
    placed: list[tuple[int, float, Thing, str]] = []
    for thing in scene.things:
        place = position(thing, scene.size)
        if place is None:
            return None
        placed.append((order.index(place), thing.centre[0], thing, place))
    placed.sort(key=lambda entry: entry[:2])
    for before, after in pairwise(placed):
        if before[0] == after[0] and after[1] - before[1] < SIDE_BY_SIDE * scene.size[0]:
            return None
    if not 1 <= len(placed) <= MOST_DESCRIBED:
        return None
    parts = [f"{with_article(thing.name)} {at_position(place)}" for _, _, thing, place in placed]
    sentence = parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
    return f"{sentence[0].upper()}{sentence[1:]}."


Question = Callable[[Asker], QA | None]

QUESTIONS: dict[str, Question] = {
    "colour": ask_colour,
    "shape": ask_shape,
    "count": ask_count,
    "position": ask_position,
    "box": ask_box,
    "compare": ask_compare,
    "yesno": ask_yesno,
    "text": ask_text,
    "chart": ask_chart,
    "describe": ask_describe,
}
WEIGHTS: dict[str, dict[str, float]] = {
    "objects": {
        "colour": 1.0,
        "shape": 1.0,
        "count": 1.3,
        "position": 1.1,
        "box": 1.1,
        "compare": 2.6,
        "yesno": 1.5,
        "describe": 0.8,
    },
    "text": {"text": 3.0, "describe": 0.8, "colour": 0.8, "shape": 0.4, "position": 0.3, "box": 0.3, "yesno": 1.2},
    "chart": {"chart": 5.0, "describe": 0.6},
}
FOCUSED = ("colour", "shape", "position", "box", "yesno")
PATIENCE = 12


def ask_all(asker: Asker, kind: str, count: int) -> tuple[QA, ...]:
    """So many different questions about the scene, the first about a thing in focus."""
    rng = asker.rng
    weights = dict(WEIGHTS[kind])
    found: list[QA] = []
    seen: set[str] = set()
    if asker.focus:
        asker.loyalty = 1.0
        found += focused(asker)[:count]
        asker.loyalty = 0.6
    for _ in range(PATIENCE * count):
        if len(found) >= count:
            break
        task = rng.choices(list(weights), list(weights.values()))[0]
        qa = QUESTIONS[task](asker)
        if qa is None or qa.question in seen:
            continue
        seen.add(qa.question)
        found.append(qa)
        weights[task] *= 0.0 if task == "describe" else 0.6
    return tuple(found)


def focused(asker: Asker) -> list[QA]:
    """One question about a thing in focus, if any can be asked."""
    for task in asker.rng.sample(FOCUSED, len(FOCUSED)):
        qa = QUESTIONS[task](asker)
        if qa:
            return [qa]
    return []
