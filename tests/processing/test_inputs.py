"""inputs: placeholders grow to their images' rows, and the feature index counts them."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmfx.errors import InvalidRequest
from vlmfx.processing.inputs import MediaLayout, check_ratio, expand_placeholders, index_features, plain_positions

MARK = 9


def layouts_of(rows: list[int]) -> list[MediaLayout]:
    return [MediaLayout(num_rows=n, grid=(1, 1, n)) for n in rows]


@st.composite
def prompts(draw):
    """(ids with one MARK an image, the images' rows)."""
    rows = draw(st.lists(st.integers(1, 6), max_size=5))
    pieces = draw(st.lists(st.lists(st.integers(0, 8), max_size=4), min_size=len(rows) + 1, max_size=len(rows) + 1))
    ids = list(pieces[0])
    for piece in pieces[1:]:
        ids += [MARK, *piece]
    return ids, rows


@settings(deadline=None)
@given(prompts())
def test_each_placeholder_becomes_the_rows_of_its_image(case):
    ids, rows = case
    expanded = expand_placeholders(ids, MARK, layouts_of(rows))
    expected, remaining = [], iter(rows)
    for token in ids:
        expected += [MARK] * next(remaining) if token == MARK else [token]
    assert expanded == expected
    assert expand_placeholders(expanded, MARK, layouts_of(rows)) == expanded
    index = index_features(expanded, MARK)
    assert [i for i in index.tolist() if i >= 0] == list(range(sum(rows)))
    assert [t == MARK for t in expanded] == [i >= 0 for i in index.tolist()]


@settings(deadline=None)
@given(prompts(), st.integers(-2, 2).filter(bool))
def test_another_number_of_images_is_refused(case, more):
    ids, rows = case
    rows = [n + 5 for n in rows]  # more than a run of these ids can hold: no run may pass for an image's rows
    other = rows[:more] if more < 0 else [*rows, *[7] * more]
    if len(other) == len(rows):
        return
    with pytest.raises(InvalidRequest) as caught:
        expand_placeholders(ids, MARK, layouts_of(other))
    assert (caught.value.found, caught.value.expected) == (len(rows), len(other))


def test_a_ratio_is_refused_only_beyond_the_most():
    check_ratio(1, 64, 64, "image")
    check_ratio(64, 1, 64, "image")
    for height, width in ((1, 65), (65, 1)):
        with pytest.raises(InvalidRequest, match=f"image: its sides are {width} x {height}, a ratio over 64") as caught:
            check_ratio(height, width, 64, "image")
        assert (caught.value.found, caught.value.expected) == (65, 64)


def test_plain_positions():
    positions, following = plain_positions(None, [7, 7, 8], {})
    assert (positions.tolist(), following) == ([0, 1, 2], 3)
