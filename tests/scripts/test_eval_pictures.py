"""The evaluation pictures: the same each time, complete, and answered in the contract's forms."""

import re
import time
from collections import Counter

import pytest
from eval_pictures import COLOURS, SHAPES, Item, items

COLOUR, SHAPE = "|".join(COLOURS), "|".join(SHAPES)
PLACE = "(?:top|bottom) (?:left|right)|top|bottom|left|right|center"
CHARACTERS = r"[A-Za-z]{1,8}|\d{1,8}|\d+\.\d+|[A-HJ-NP-Z2-9]{1,8}"
OBJECT = f"an? (?:{COLOUR}) (?:{SHAPE}) (?:in the center|at the (?!center)(?:{PLACE}))"
FORMS = {
    "colour": COLOUR,
    "shape": SHAPE,
    "count": "[0-6]",
    "position": PLACE,
    "box": r"\[\d+, \d+, \d+, \d+\]",
    "compare": f"(?:{COLOUR}) (?:{SHAPE})",
    "yesno": "yes|no",
    "text": CHARACTERS,
    "chart": "[1-9]|10|[A-Z]|[A-Z][a-z]+",
    "describe": f'(?i:{OBJECT}(?:(?:, {OBJECT})* and {OBJECT})?\\.)|The text "(?:{CHARACTERS})" in (?:{COLOUR}) '
    rf"on an? (?:{COLOUR}) background\.|A bar chart with [3-6] bars, \w+ is the tallest\.",
    "two": f"first|second|yes|no|{COLOUR}|{SHAPE}|{CHARACTERS}",
}


@pytest.fixture(scope="module")
def asked() -> list[Item]:
    start = time.perf_counter()
    found = items()
    assert time.perf_counter() - start < 10
    return found


def pixels(asked: list[Item]) -> list[tuple]:
    return [(i.task, i.question, i.answer, *(p.tobytes() for p in i.images)) for i in asked]


def test_the_same_seed_gives_the_same_items(asked):
    assert pixels(items()) == pixels(asked)


def test_a_hundred_pictures_and_every_task(asked):
    assert len({id(i.images) for i in asked}) == 100
    tasks = Counter(i.task for i in asked)
    assert set(tasks) == set(FORMS)
    assert all(10 <= n <= 40 for n in tasks.values())
    assert all(tasks[t] >= 25 for t in ("colour", "shape", "count", "position", "yesno", "text", "chart"))


def test_pictures_keep_to_the_sizes(asked):
    for item in asked:
        assert len(item.images) == (2 if item.task == "two" else 1)
        for image in item.images:
            assert image.mode == "RGB"
            assert all(112 <= side <= 280 for side in image.size)
            assert item.task != "box" or not any(side % 28 for side in image.size)


def test_answers_have_the_forms_of_the_contract(asked):
    for item in asked:
        assert re.fullmatch(FORMS[item.task], item.answer), item


def test_no_question_is_asked_twice_of_a_picture(asked):
    assert max(Counter((id(i.images), i.question) for i in asked).values()) == 1


def test_boxes_lie_inside_their_pictures(asked):
    for item in (i for i in asked if i.task == "box"):
        x0, y0, x1, y1 = map(int, re.findall(r"\d+", item.answer))
        assert 0 <= x0 < x1 <= item.images[0].width
        assert 0 <= y0 < y1 <= item.images[0].height


def test_no_answer_dominates(asked):
    for task in ("colour", "shape", "count", "position", "yesno"):
        answers = Counter(i.answer for i in asked if i.task == task)
        assert max(answers.values()) <= 0.6 * sum(answers.values()), task
