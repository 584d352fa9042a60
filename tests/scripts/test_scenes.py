"""The pictures' answers are right, balanced, reproducible, and the held-out parts stay out of training."""

from __future__ import annotations

import random
import re
from collections import Counter
from random import Random

import numpy as np
import pytest
import scenes
from PIL import Image, ImageChops
from scenes import fonts
from scenes.sample import compose, draw_things
from scenes.scene import Scene, Thing
from scenes.vocabulary import COLOURS, HELDOUT_PAIRS, SHAPES, SIZES
from scenes.wording import FORMS

WORD = re.compile(r"[a-z]+")


def made(seeds: range, split: str = "train", kind: str | None = None) -> list[tuple[scenes.Sample, tuple[Scene, ...]]]:
    return [compose(seed, split=split, size=None, kind=kind, num_questions=6) for seed in seeds]


@pytest.fixture(scope="module")
def training() -> list[tuple[scenes.Sample, tuple[Scene, ...]]]:
    return made(range(500))


@pytest.fixture(scope="module")
def object_pictures() -> list[tuple[scenes.Sample, tuple[Scene, ...]]]:
    return made(range(300), kind="objects")


@pytest.mark.parametrize("kind", scenes.KINDS)
def test_same_seed_same_sample(kind):
    first, second = (scenes.sample(7, kind=kind) for _ in range(2))
    assert first.qas == second.qas
    assert [image.tobytes() for image in first.images] == [image.tobytes() for image in second.images]
    assert scenes.sample(8, kind=kind).images[0].tobytes() != first.images[0].tobytes()


def test_global_random_state_is_neither_read_nor_changed():
    seen = []
    for draw in (False, True):
        random.seed(1)
        np.random.seed(1)
        if draw:
            scenes.sample(3)
        seen.append((random.random(), np.random.rand()))
    assert seen[0] == seen[1]


def test_every_task_occurs_and_every_sample_is_full(training):
    assert {qa.task for sample, _ in training for qa in sample.qas} == set(scenes.TASKS)
    for sample, _ in training:
        assert len(sample.qas) == 6
        assert all(qa.question and qa.answer for qa in sample.qas)
        assert all(image.mode == "RGB" for image in sample.images)
        pair = {qa.task for qa in sample.qas} == {"two"}
        assert len(sample.images) == (2 if pair else 1)
        assert sample.heldout == ()


def test_sizes_follow_the_split(training):
    assert not set(SIZES["train"]) & set(SIZES["heldout"])
    assert {sample.images[0].size for sample, _ in training} == set(SIZES["train"])
    for sample, _ in made(range(60), "heldout"):
        assert (sample.images[0].size in SIZES["heldout"]) == ("size" in sample.heldout)
    given = scenes.sample(1, size=(196, 168), split="heldout")
    assert given.images[0].size == (196, 168)
    assert "size" in given.heldout


def test_heldout_pairs_never_appear_in_training(training):
    assert len(HELDOUT_PAIRS) == 12
    for sample, drawn in training:
        assert not {(thing.colour, thing.shape) for scene in drawn for thing in scene.things} & HELDOUT_PAIRS
        for colour, shape in HELDOUT_PAIRS:
            assert not any(f"{colour} {shape}" in qa.question + qa.answer for qa in sample.qas)


def test_heldout_object_pictures_show_heldout_pairs_when_in_force():
    for sample, (scene,) in made(range(60), "heldout", "objects"):
        shown = {(thing.colour, thing.shape) for thing in scene.things} & HELDOUT_PAIRS
        assert bool(shown) == ("pairs" in sample.heldout)


def test_wordings_of_the_splits_are_disjoint_and_share_their_words():
    train_words: dict[str, set[str]] = {}
    phrasings: Counter[tuple[str, str]] = Counter()
    for form in FORMS.values():
        assert not set(form.train) & set(form.heldout)
        train_words.setdefault(form.task, set()).update(words(form.train))
        phrasings[form.task, "train"] += len(form.train)
        phrasings[form.task, "heldout"] += len(form.heldout)
    for form in FORMS.values():
        assert words(form.heldout) <= train_words[form.task]
    assert all(phrasings[task, "train"] >= 14 and phrasings[task, "heldout"] >= 3 for task in scenes.TASKS)


def words(templates: tuple[str, ...]) -> set[str]:
    return {word for text in templates for word in WORD.findall(re.sub(r"{\w+}", "", text.lower()))}


def test_yes_and_no_are_balanced(training):
    for tasks in ({"yesno"}, {"chart", "two"}):
        answers = Counter(qa.answer for sample, _ in training for qa in sample.qas if qa.task in tasks)
        assert 0.4 < answers["yes"] / (answers["yes"] + answers["no"]) < 0.6


def test_counts_and_positions_are_spread(training):
    counts = Counter(qa.answer for sample, _ in training for qa in sample.qas if qa.task == "count")
    assert set(counts) == set("0123456")
    assert min(counts.values()) > 0.05 * counts.total()
    places = Counter(qa.answer for sample, _ in training for qa in sample.qas if qa.task == "position")
    assert len(places) == 9
    assert min(places.values()) > 0.04 * places.total()


def test_objects_keep_clear_of_each_other(object_pictures):
    for sample, (scene,) in object_pictures:
        for thing in scene.things:
            x0, y0, x1, y1 = thing.box
            assert 0 <= x0 < x1 <= sample.images[0].width
            assert 0 <= y0 < y1 <= sample.images[0].height
            assert max(x1 - x0, y1 - y0) >= 22
            assert thing.colour != scene.background


@pytest.mark.parametrize("shape", SHAPES)
def test_box_is_the_extent_of_the_drawn_pixels(shape):
    for seed in range(8):
        plain = Image.new("RGB", (168, 140), (0, 0, 0))
        picture = plain.copy()
        (thing,) = draw_things(Random(seed), picture, [("white", shape)], [])
        found = ImageChops.difference(picture, plain).convert("L").point([0] * 110 + [255] * 146).getbbox()
        assert found is not None
        assert all(abs(a - b) <= 1 for a, b in zip(found, thing.box, strict=True))


def test_counts_agree_with_the_scene(object_pictures):
    asked = 0
    for sample, (scene,) in object_pictures:
        for qa in sample.qas:
            if qa.task == "count":
                colours, shapes = mentioned(qa.question)
                right = [t for t in scene.things if fits(t, colours, shapes)]
                assert qa.answer == str(len(right)), qa
                asked += 1
    assert asked > 100


def test_presence_agrees_with_the_scene(object_pictures):
    asked = 0
    for sample, (scene,) in object_pictures:
        for qa in sample.qas:
            relation = re.search(r"than|left|right|above|below|under|compared", qa.question.lower())
            if qa.task == "yesno" and not relation:
                colours, shapes = mentioned(qa.question)
                assert qa.answer == ("yes" if any(fits(t, colours, shapes) for t in scene.things) else "no"), qa
                asked += 1
    assert asked > 50


def test_named_objects_have_the_answered_box_place_and_size(object_pictures):
    boxes = 0
    for sample, (scene,) in object_pictures:
        for qa in sample.qas:
            if qa.task == "box":
                colours, shapes = mentioned(qa.question.replace("object", ""))
                found = [t for t in scene.things if fits(t, colours, shapes)]
                assert len(found) == 1
                assert qa.answer == f"[{', '.join(str(side) for side in found[0].box)}]"
                boxes += 1
            if qa.task == "position":
                colours, shapes = mentioned(qa.question)
                (thing,) = [t for t in scene.things if fits(t, colours, shapes)]
                assert qa.answer == place(thing, scene.size)
            if qa.task == "compare":
                colours, shapes = mentioned(qa.answer)
                (thing,) = [t for t in scene.things if fits(t, colours, shapes)]
                spans = sorted(max(t.sides) for t in scene.things)
                assert spans[0] < max(thing.sides) or re.search("small", qa.question.lower())
    assert boxes > 50


def test_descriptions_name_every_object_in_order(object_pictures):
    for sample, (scene,) in object_pictures:
        for qa in sample.qas:
            if qa.task == "describe":
                told = re.findall(rf"an? (\w+) (\w+) (?:at the|in the) ({PLACES})", qa.answer.lower())
                assert Counter(told) == Counter((t.colour, t.shape, place(t, scene.size)) for t in scene.things)
                assert [ORDER.index(spot) for _, _, spot in told] == sorted(ORDER.index(spot) for _, _, spot in told)
                assert len(told) <= 4
                assert qa.answer.endswith(".")


def test_text_and_chart_answers_agree_with_the_scene(training):
    for sample, (scene, *_) in training:
        for qa in sample.qas:
            if qa.task == "text":
                assert scene.text is not None
                assert qa.answer == scene.text.content
                assert 1 <= len(qa.answer) <= 8
            if qa.task == "chart" and qa.answer in (scene.chart.labels if scene.chart else ()):
                assert scene.chart is not None
                value = scene.chart.values[scene.chart.labels.index(qa.answer)]
                lowest = re.search("short|low|small|least", qa.question.lower())
                assert value == (min(scene.chart.values) if lowest else max(scene.chart.values))


def test_heldout_samples_name_their_factors():
    factors = Counter(factor for sample, _ in made(range(80), "heldout") for factor in sample.heldout)
    assert set(factors) == {"pairs", "wording", "background", "size", "fonts"}


def test_without_fonts_pillow_prints(monkeypatch, tmp_path):
    monkeypatch.setenv("SCENES_FONTS", str(tmp_path))
    assert fonts.choose(Random(0), heldout=False) == fonts.FALLBACK
    for kind in ("text", "chart"):
        assert len(scenes.sample(5, kind=kind).qas) == 6


@pytest.mark.parametrize("wrong", [{"split": "test"}, {"kind": "photo"}, {"size": (100, 112)}, {"size": (308, 112)}])
def test_wrong_arguments_are_told(wrong):
    with pytest.raises(ValueError):
        scenes.sample(0, **wrong)


ORDER = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")
PLACES = "|".join(sorted(ORDER, key=len, reverse=True))


def place(thing: Thing, size: tuple[int, int]) -> str:
    """The position by thirds, worked out anew."""
    x, y = (thing.box[0] + thing.box[2]) / 2 / size[0], (thing.box[1] + thing.box[3]) / 2 / size[1]
    return ORDER[3 * (0 if y < 1 / 3 else 1 if y < 2 / 3 else 2) + (0 if x < 1 / 3 else 1 if x < 2 / 3 else 2)]


def mentioned(question: str) -> tuple[set[str], set[str]]:
    """The colours and shapes that a question speaks of."""
    said = WORD.findall(question.lower())
    return set(said) & set(COLOURS), {shape for shape in SHAPES if {shape, f"{shape}s", f"{shape}es"} & set(said)}


def fits(thing: Thing, colours: set[str], shapes: set[str]) -> bool:
    return (not colours or thing.colour in colours) and (not shapes or thing.shape in shapes)
