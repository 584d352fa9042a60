"""Scores and their tables: right answers count, wrong and malformed ones do not, and every gold answer is right by its own measure."""

from __future__ import annotations

import eval_scenes
import pytest
import scenes
from eval_scenes import Asked
from hypothesis import given, settings
from hypothesis import strategies as st
from scenes_scoring import ignoring_case, iou, objects_right, score, wilson

SIDES = st.integers(0, 279)
BOXES = st.tuples(SIDES, SIDES, st.integers(1, 280), st.integers(1, 280)).map(
    lambda b: f"[{b[0]}, {b[1]}, {b[0] + b[2]}, {b[1] + b[3]}]"
)


@pytest.mark.parametrize(
    ("task", "answer", "expected", "right"),
    [
        ("colour", " Red\n", "red", 1),
        ("colour", "dark red", "red", 0),
        ("colour", "", "red", 0),
        ("position", "Top Left", "top left", 1),
        ("position", "top", "top left", 0),
        ("count", "3", "3", 1),
        ("count", "13", "3", 0),
        ("text", "K7QX", "K7QX", 1),
        ("text", "k7QX", "K7QX", 0),
        ("text", " K7QX ", "K7QX", 1),
        ("chart", "b", "B", 0),
        ("two", "Second", "second", 1),
        ("two", "garden", "Garden", 0),
        ("two", "Yes", "yes", 1),
        ("describe", "A red star at the top.", "A red star at the top.", 1),
        ("describe", "a red star at the top.", "A red star at the top.", 0),
        ("box", "[10, 10, 20, 20]", "[10, 10, 20, 30]", 1),
        ("box", "[10, 10, 20, 19]", "[10, 10, 20, 30]", 0),
    ],
)
def test_score(task, answer, expected, right):
    assert score(task, answer, expected) == right


def test_gold_answers_score_full_marks():
    seen = set()
    for seed in range(60):
        for qa in scenes.sample(seed, split="heldout").qas:
            seen.add(qa.task)
            assert score(qa.task, qa.answer, qa.answer) == 1
            assert qa.task != "describe" or objects_right(qa.answer, qa.answer) in (1, None)
    assert seen == set(scenes.TASKS)


@pytest.mark.parametrize(
    "malformed", ["", "12", "[1, 2, 3]", "[1, 2, 3, x]", "[9, 9, 3, 3]", "[1, 1, 1, 5]", "[1, 2, 3, 4] 5"]
)
def test_what_is_no_box_overlaps_nothing(malformed):
    assert iou(malformed, "[1, 2, 30, 40]") == 0


@given(BOXES, BOXES)
@settings(deadline=None)
def test_iou_is_symmetric_within_bounds_and_1_for_the_same(a, b):
    assert iou(a, b) == iou(b, a)
    assert 0 <= iou(a, b) <= 1
    assert (iou(a, b) == 1) == (a == b)


@given(BOXES, BOXES)
@settings(deadline=None, max_examples=25)
def test_iou_counts_pixels(a, b):
    first, second = ({(x, y) for x in range(x0, x1) for y in range(y0, y1)} for x0, y0, x1, y1 in map(eval, (a, b)))
    assert iou(a, b) == pytest.approx(len(first & second) / len(first | second))


def test_objects_right():
    expected = "A red star at the top left, a blue ring in the center and a green ring at the bottom."
    assert objects_right(expected, expected) == 1
    assert objects_right("A red star at the top left.", expected) == pytest.approx(1 / 3)
    assert objects_right(
        "A red star at the top, a blue ring in the center and a pink ring at the left.", expected
    ) == pytest.approx(1 / 3)
    assert objects_right("nothing", expected) == 0
    # Naming everything is no way to be right.
    assert objects_right("A red star at the top and a blue star at the top.", "A red star at the top.") == 0.5
    assert objects_right("A bar chart", "A bar chart with 4 bars, A is the tallest.") is None


def test_ignoring_case():
    assert ignoring_case("monday ", "Monday")
    assert not ignoring_case("Munday", "Monday")


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (95, 100, 0.8882, 0.9785), (7, 7, 0.6457, 1.0)],
)
def test_wilson_gives_the_textbook_bounds(right, n, low, high):
    assert wilson(right / n, n) == pytest.approx((low, high), abs=1e-4)


def test_tables_show_accuracy_blank_and_commonest_answer():
    colours = [("red", "red", "red"), ("red", "blue", "red"), ("blue", "blue", "red"), ("green", "green", "red")]
    asked = [
        Asked(images=(), task="colour", question="?", expected=e, answer=a, blank=b, heldout=("pairs",))
        for e, a, b in colours
    ]
    boxes = [("[0, 0, 10, 10]", ("size",)), ("[0, 0, 10, 4]", ("pairs", "size"))]
    asked += [
        Asked(images=(), task="box", question="?", expected="[0, 0, 10, 10]", answer=answer, heldout=factors)
        for answer, factors in boxes
    ]
    rows = {line.split(" | ")[0].strip("| "): line for line in eval_scenes.table(asked).splitlines()}
    assert rows["colour"] == "| colour | 4 | 75.0 % | 30.1 – 95.4 | 50.0 % | 50.0 % | 95 % |"
    assert rows["– mean IoU"] == "| – mean IoU | 2 | 0.70 |  | 0.00 | 1.00 |  |"
    assert rows["all"].startswith("| all | 6 | 66.7 % |")
    assert "text, up to 8" not in rows
    factors = eval_scenes.factor_table(asked).splitlines()
    assert [line.split(" | ")[:3] for line in factors[2:]] == [
        ["| pairs", "4", "75.0 %"],
        ["| size", "1", "100.0 %"],
        ["| all at once", "1", "0.0 %"],
    ]


def test_a_card_is_filled_between_its_markers():
    card = "a\n<!-- table:heldout -->\nold\n<!-- /table:heldout -->\nb\n"
    filled = eval_scenes.fill(card, {"heldout": r"new \1"})
    assert filled == "a\n<!-- table:heldout -->\n\nnew \\1\n\n<!-- /table:heldout -->\nb\n"
    assert eval_scenes.fill(filled, {"heldout": r"new \1"}) == filled
    with pytest.raises(ValueError, match="table:pictures"):
        eval_scenes.fill(card, {"pictures": "new"})


def test_only_boxes_that_the_model_sees_in_pixels_are_asked():
    asked = eval_scenes.picture_questions() + eval_scenes.heldout_questions(3, seed=0)
    assert {a.task for a in asked} == set(scenes.TASKS)
    assert not any(side % 28 for a in asked if a.task == "box" for image in a.images for side in image.size)
