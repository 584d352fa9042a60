"""docs/models.md is what scripts/models_page.py writes today."""

from __future__ import annotations

import models_page

from vlmfx.checkpoint import FAMILIES


def test_the_committed_page_is_current():
    assert models_page.PAGE.read_text(encoding="utf-8") == models_page.page(), "run python scripts/models_page.py"


def test_every_family_is_on_it_twice():
    text = models_page.PAGE.read_text(encoding="utf-8")
    for family in FAMILIES.values():
        assert text.count(f"`{family}`") >= 2
