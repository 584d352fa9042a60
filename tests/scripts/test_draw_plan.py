"""The committed pictures are what the script draws, and any plan can be drawn."""

import sys
from xml.etree import ElementTree

import pytest
from draw_merge import draw_merge
from draw_plan import IMAGES, draw_plan, main

from vlmfx.compile.buckets import UNITS, Plan
from vlmfx.compile.ladders import EMBED, default_plan


@pytest.mark.parametrize(("name", "picture"), [("plan", draw_plan(default_plan())), ("merge", draw_merge())])
def test_the_committed_picture_is_what_the_script_draws(name, picture):
    committed = (IMAGES / f"{name}.svg").read_text(encoding="utf-8")
    assert committed == picture, "run python scripts/draw_plan.py and look at the pictures"


@pytest.mark.parametrize(
    "plan",
    [
        default_plan(programs=EMBED),
        default_plan(programs=tuple(UNITS), max_num_seqs=2000),
        Plan(max_segments=1, max_seqs=1),
        Plan(decode=(1,), max_segments=1, max_seqs=1),
        Plan(prefill=(7, 8, 900), max_segments=1, max_seqs=1),
    ],
)
def test_a_plan_is_drawn_with_its_programs_and_largest_rungs(plan):
    words = [element.text for element in ElementTree.fromstring(draw_plan(plan)).iter() if element.tag.endswith("text")]
    for program in UNITS:
        assert (program in words) == bool(plan.rungs(program))
        assert not plan.rungs(program) or str(plan.rungs(program)[-1]) in words


def test_a_plan_of_a_file_is_drawn(tmp_path, monkeypatch):
    plan = default_plan(programs=EMBED)
    (tmp_path / "plan.json").write_text(plan.to_json(), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["draw_plan.py", str(tmp_path / "plan.json"), "--out", str(tmp_path)])
    main()
    assert (tmp_path / "plan.svg").read_text(encoding="utf-8") == draw_plan(plan)
    assert (tmp_path / "merge.svg").read_text(encoding="utf-8") == draw_merge()
