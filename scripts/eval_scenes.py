"""How often `scenes` is right, by task: on held-out combinations, and on pictures drawn by a second generator.

    python scripts/eval_scenes.py [--model scenes] [--samples 167] [--seed 0] [--device auto] [--out FILE.md] [--card README.md]

Beside each accuracy: what the model answers to the same questions about a mid-grey picture, and what the task's most common
answer would score. --card puts the tables between the marker pairs of a model card; --answers keeps every answer, to read."""

from __future__ import annotations

import argparse
import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import eval_pictures
import scenes
from PIL import Image
from scenes import fonts
from scenes_scoring import ignoring_case, iou, objects_right, score, wilson
from tqdm import tqdm

import vlmfx
from vlmfx.engine.request import SamplingParams

GREY = (128, 128, 128)
BATCH = 64  # questions a call
MAX_TOKENS = 64  # the longest answer, four objects described, has about 40
SEED_SPAN = 10**6  # samples of different --seed are different
FACTORS = ("pairs", "wording", "background", "size", "fonts")
WORDED = ("colour", "shape", "count", "position", "yesno")


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A question, its right answer, the held-out factors of its picture, and what the model said, with the picture and without."""

    images: tuple[Image.Image, ...]
    task: str
    question: str
    expected: str
    heldout: tuple[str, ...] = ()
    answer: str = ""
    blank: str = ""


Measure = Callable[[Asked, str], float | None]  # of an answer to the question; None where it does not apply


@dataclass(frozen=True, kw_only=True)
class Row:
    """A line of the table: what is measured on which tasks, and what the model is meant to reach."""

    label: str
    tasks: tuple[str, ...]
    measure: Measure = lambda asked, answer: score(asked.task, answer, asked.expected)
    aim: float | None = None
    is_accuracy: bool = True  # of whole answers, so that it has an interval


def short_text(asked: Asked, answer: str) -> float | None:
    """The score of texts of up to six characters."""
    return score("text", answer, asked.expected) if len(asked.expected) <= 6 else None


ROWS = (
    Row(label="colour", tasks=("colour",), aim=0.95),
    Row(label="shape", tasks=("shape",), aim=0.95),
    Row(label="count, 0 to 6", tasks=("count",), aim=0.95),
    Row(label="position", tasks=("position",), aim=0.95),
    Row(label="yes or no", tasks=("yesno",), aim=0.95),
    Row(label="– these five", tasks=WORDED, aim=0.95),
    Row(label="text, up to 6 characters", tasks=("text",), aim=0.9, measure=short_text),
    Row(label="text, up to 8", tasks=("text",)),
    Row(
        label="– ignoring case",
        tasks=("text",),
        measure=lambda asked, answer: ignoring_case(answer, asked.expected),
    ),
    Row(label="chart", tasks=("chart",), aim=0.85),
    Row(label="box, IoU ≥ 0.5", tasks=("box",)),
    Row(
        label="– mean IoU",
        tasks=("box",),
        measure=lambda asked, answer: iou(answer, asked.expected),
        is_accuracy=False,
    ),
    Row(label="compare", tasks=("compare",)),
    Row(label="describe, the whole sentence", tasks=("describe",)),
    Row(
        label="– objects right",
        tasks=("describe",),
        measure=lambda asked, answer: objects_right(answer, asked.expected),
        is_accuracy=False,
    ),
    Row(label="two pictures", tasks=("two",)),
    Row(label="all", tasks=scenes.TASKS),
)


def heldout_questions(num_samples: int, seed: int) -> list[Asked]:
    """Six questions about each of num_samples samples of combinations that training held out."""
    samples = (scenes.sample(seed * SEED_SPAN + i, split="heldout") for i in range(num_samples))
    return with_true_boxes(
        [
            Asked(images=s.images, task=qa.task, question=qa.question, expected=qa.answer, heldout=s.heldout)
            for s in samples
            for qa in s.qas
        ]
    )


def picture_questions() -> list[Asked]:
    """The questions about the hundred pictures of the second generator."""
    return with_true_boxes(
        [Asked(images=i.images, task=i.task, question=i.question, expected=i.answer) for i in eval_pictures.items()]
    )


def with_true_boxes(asked: Sequence[Asked]) -> list[Asked]:
    """Those whose boxes are in pixels the model sees: it rounds sides to multiples of 28."""
    return [a for a in asked if a.task != "box" or not any(side % 28 for image in a.images for side in image.size)]


def prompt(images: Sequence[Image.Image], question: str) -> dict[str, Any]:
    """One user message: the pictures, then the question."""
    parts: list[dict[str, Any]] = [{"type": "image", "image": image} for image in images]
    return {"messages": [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]}


def answered(llm: vlmfx.LLM, asked: Sequence[Asked], title: str = "", show: bool = True) -> list[Asked]:
    """The questions with the model's greedy answers, about the picture and about a mid-grey one of its size."""
    params = SamplingParams.greedy(max_tokens=MAX_TOKENS)
    done: list[Asked] = []
    with tqdm(total=len(asked), desc=title, unit="question", disable=not show) as bar:
        for start in range(0, len(asked), BATCH):
            part = asked[start : start + BATCH]
            grey = [tuple(Image.new("RGB", image.size, GREY) for image in a.images) for a in part]
            prompts = [prompt(a.images, a.question) for a in part]
            prompts += [prompt(images, a.question) for images, a in zip(grey, part, strict=True)]
            outputs = llm.generate(prompts, params, use_tqdm=False, on_error="raise")
            texts = [output.outputs[0].text for output in outputs]
            done += [
                replace(a, answer=answer, blank=blank)
                for a, answer, blank in zip(part, texts[: len(part)], texts[len(part) :], strict=True)
            ]
            bar.update(len(part))
    return done


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def accuracy(asked: Sequence[Asked], blank: bool = False) -> float:
    """The share of right answers, or of those given without the picture."""
    return mean([score(a.task, a.blank if blank else a.answer, a.expected) for a in asked])


def table(asked: Sequence[Asked]) -> str:
    """The markdown table of a set of answered questions; a row without questions is left out."""
    common: dict[str, str] = {}
    for task in {a.task for a in asked}:
        common[task] = Counter(a.expected for a in asked if a.task == task).most_common(1)[0][0]
    lines = [
        "| questions | n | right | 95 % interval | blank picture | commonest answer | aim |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in ROWS:
        scored = [(a, value) for a in asked if a.task in row.tasks and (value := row.measure(a, a.answer)) is not None]
        if not scored:
            continue
        share = mean([value for _, value in scored])
        others = [mean([row.measure(a, text) or 0.0 for a, text in given]) for given in (
            [(a, a.blank) for a, _ in scored], [(a, common[a.task]) for a, _ in scored],
        )]  # fmt: skip
        shown = [f"{100 * value:.1f} %" if row.is_accuracy else f"{value:.2f}" for value in (share, *others)]
        cells = [
            row.label,
            str(len(scored)),
            shown[0],
            interval(share, len(scored)) if row.is_accuracy else "",
            *shown[1:],
        ]
        lines.append(f"| {' | '.join(cells)} | {f'{100 * row.aim:.0f} %' if row.aim else ''} |")
    return "\n".join(lines)


def factor_table(asked: Sequence[Asked]) -> str:
    """The markdown table by what was held out: one factor alone, or all that apply to the picture at once."""
    groups: dict[str, list[Asked]] = defaultdict(list)
    for a in asked:
        groups[a.heldout[0] if len(a.heldout) == 1 else "all at once"].append(a)
    lines = ["| held out | n | right | 95 % interval | blank picture |", "|---|---:|---:|---:|---:|"]
    for factor in (*FACTORS, "all at once"):
        if part := groups[factor]:
            share = accuracy(part)
            cells = [
                factor,
                str(len(part)),
                f"{100 * share:.1f} %",
                interval(share, len(part)),
                f"{100 * accuracy(part, blank=True):.1f} %",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def interval(share: float, n: int) -> str:
    low, high = wilson(share, n)
    return f"{100 * low:.1f} – {100 * high:.1f}"


def heldout_section(asked: Sequence[Asked], seed: int, run_on: str) -> str:
    """What was asked, the table by task and the table by factor."""
    families = fonts.split_families(os.environ.get("SCENES_FONTS", fonts.DEFAULT_FOLDER))[1]
    num_families = sum(fonts.FALLBACK not in family for family in families)
    printed = (
        f"texts in {num_families} held-out font families"
        if num_families
        else "no held-out fonts here, texts in Pillow's own"
    )
    pictures = len({id(a.images) for a in asked})
    return (
        f"{len(asked)} questions about {pictures} pictures or pairs (seed {seed}, {printed}; {run_on}).\n\n{table(asked)}\n\n"
        f"By what was held out, all tasks together (each factor has its own mixture of tasks):\n\n{factor_table(asked)}"
    )


def pictures_section(asked: Sequence[Asked], run_on: str) -> str:
    """What was asked, and the table by task."""
    pictures = len({id(a.images) for a in asked})
    return f"{len(asked)} questions about {pictures} pictures or pairs ({run_on}).\n\n{table(asked)}"


def fill(card: str, sections: dict[str, str]) -> str:
    """The card's text with each section between `<!-- table:NAME -->` and `<!-- /table:NAME -->`. Raises ValueError where they lack."""
    for name, section in sections.items():
        start, end = f"<!-- table:{name} -->", f"<!-- /table:{name} -->"
        if card.count(start) != 1 or card.count(end) != 1:
            raise ValueError(f"the card needs {start} and {end} once each; put them where the table belongs.")
        card = re.sub(f"{start}.*?{end}", lambda _, new=f"{start}\n\n{section}\n\n{end}": new, card, flags=re.DOTALL)  # type: ignore[misc]
    return card


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="scenes", help='folder, hub id, or "scenes", the shipped model (default)')
    parser.add_argument("--samples", type=int, default=167, help="held-out samples, of six questions each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, metavar="FILE.md", help="write the tables there too")
    parser.add_argument("--card", type=Path, metavar="FILE.md", help="put the tables between the card's markers")
    parser.add_argument("--answers", type=Path, metavar="FILE.jsonl", help="write every question and answer")
    args = parser.parse_args()
    if args.card:
        fill(
            args.card.read_text(encoding="utf-8"), {"heldout": "", "pictures": ""}
        )  # a wrong card is told before the work
    llm = vlmfx.LLM(args.model, device=args.device)
    run_on = f"{str(llm.model.dtype).removeprefix('torch.')} on {llm.model.device.type}, greedy"
    heldout = answered(llm, heldout_questions(args.samples, args.seed), "held out")
    pictures = answered(llm, picture_questions(), "pictures")
    sections = {
        "heldout": heldout_section(heldout, args.seed, run_on),
        "pictures": pictures_section(pictures, run_on),
    }
    text = f"### Held-out combinations\n\n{sections['heldout']}\n\n### Pictures of the second generator\n\n{sections['pictures']}\n"
    print(f"\n{text}")
    if args.out:
        args.out.write_text(text, encoding="utf-8")
    if args.card:
        args.card.write_text(fill(args.card.read_text(encoding="utf-8"), sections), encoding="utf-8")
    if args.answers:
        with args.answers.open("w", encoding="utf-8") as lines:
            for name, asked in (("heldout", heldout), ("pictures", pictures)):
                for a in asked:
                    said = {k: v for k, v in asdict(replace(a, images=())).items() if k != "images"}
                    print(json.dumps({"set": name, **said}, ensure_ascii=False), file=lines)


if __name__ == "__main__":
    main()
