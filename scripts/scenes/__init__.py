"""Seeded synthetic pictures with questions and answers, the training data of the shipped model."""

from scenes.questions import QA
from scenes.sample import KINDS, Sample, compose, sample
from scenes.vocabulary import HELDOUT_PAIRS, SIZES

TASKS: tuple[str, ...] = (
    "colour",
    "shape",
    "count",
    "position",
    "box",
    "compare",
    "yesno",
    "text",
    "chart",
    "describe",
    "two",
)

__all__ = ["HELDOUT_PAIRS", "KINDS", "QA", "SIZES", "TASKS", "Sample", "compose", "sample"]
