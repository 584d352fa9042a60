"""Asks about two pictures at once: task `two`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random

from scenes.questions import QA, Asker, answer_of
from scenes.scene import Scene
from scenes.vocabulary import plural, with_article

ORDINALS = ("first", "second")


def ask_pair(rng: Random, scenes: Sequence[Scene], count: int, *, wording: bool, pairs: bool) -> tuple[QA, ...]:
    """So many different questions about two scenes; `wording` and `pairs` tell what held-out parts are in force."""
    askers = [Asker(rng, scene, wording, pairs) for scene in scenes]
    found: list[QA] = []
    seen: set[str] = set()
    possible = forms(scenes)
    for _ in range(20 * count):
        if len(found) >= count:
            break
        qa = rng.choice(possible)(rng, askers)
        if qa and qa.question not in seen:
            seen.add(qa.question)
            found.append(qa)
    return tuple(found)


PairQuestion = Callable[[Random, Sequence[Asker]], QA | None]


def forms(scenes: Sequence[Scene]) -> list[PairQuestion]:
    """The forms of questions that fit the two scenes, the likelier ones repeated."""
    if all(scene.text for scene in scenes):
        return [ask_text_in]
    if all(len(scene.things) == 1 for scene in scenes):
        return [ask_only, ask_only, ask_same, ask_same, ask_which_has]
    return [ask_more, ask_more, ask_which_has]


def ask_text_in(rng: Random, askers: Sequence[Asker]) -> QA | None:
    """The text in one of the pictures."""
    which = rng.randrange(2)
    text = askers[which].scene.text
    return askers[0].say("text in", text.content, which=ORDINALS[which]) if text else None


def ask_only(rng: Random, askers: Sequence[Asker]) -> QA | None:
    """The colour or shape of the only object in one of the pictures."""
    which = rng.randrange(2)
    (thing,) = askers[which].scene.things
    if rng.random() < 0.5:
        return askers[0].say("colour in", thing.colour, which=ORDINALS[which])
    return askers[0].say("shape in", thing.shape, which=ORDINALS[which])


def ask_same(rng: Random, askers: Sequence[Asker]) -> QA | None:
    """Whether the only objects share their colour or shape."""
    (first,), (second,) = askers[0].scene.things, askers[1].scene.things
    if rng.random() < 0.5:
        return askers[0].say("same colour", answer_of(first.colour == second.colour))
    return askers[0].say("same shape", answer_of(first.shape == second.shape))


def ask_which_has(rng: Random, askers: Sequence[Asker]) -> QA | None:
    """Which picture has an object of a kind that the other lacks."""
    which = rng.randrange(2)
    thing = rng.choice(askers[which].scene.things)
    for colour, shape in rng.sample([(thing.colour, thing.shape), (thing.colour, None), (None, thing.shape)], 3):
        if askers[1 - which].number(colour, shape) == 0:
            sought = with_article(f"{colour or ''} {shape or 'object'}".strip())
            return askers[0].say("which has", ORDINALS[which], one=sought)
    return None


def ask_more(rng: Random, askers: Sequence[Asker]) -> QA | None:
    """Which picture has more objects, of some kind or at all."""
    thing = rng.choice([thing for asker in askers for thing in asker.scene.things])
    colour, shape = rng.choice(
        [(None, None), (None, None), (thing.colour, None), (None, thing.shape), (thing.colour, thing.shape)]
    )
    numbers = [asker.number(colour, shape) for asker in askers]
    if numbers[0] == numbers[1]:
        return None
    many = f"{colour or ''} {plural(shape or 'object')}".strip()
    return askers[0].say("more of", ORDINALS[numbers[1] > numbers[0]], many=many)
