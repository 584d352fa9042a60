"""Bodies of /v1/score, as vLLM has them: the cosine of two prompts' vectors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlmfx.engine.embedding import ScoringRequestOutput
from vlmfx.engine.fields import refuse
from vlmfx.errors import InvalidRequest
from vlmfx.openai.fields import checked
from vlmfx.openai.requests import MAX_PROMPTS
from vlmfx.openai.responses import list_of, new_id

SIDES = (("text_1", "text_2"), ("queries", "documents"))
BESIDE = ("mm_processor_kwargs", "media_io_kwargs", "chat_template")
SCORE = frozenset({"model", "priority", "cache_salt", *BESIDE, *(name for pair in SIDES for name in pair)})


@dataclass(frozen=True, kw_only=True)
class ScoreRequest:
    """Prompts as `LLM.embed` takes them; one of `first` stands for all of `second`, else they are as many."""

    first: list[dict[str, Any]]
    second: list[dict[str, Any]]


def score_request(body: Any) -> ScoreRequest:
    """What a body of /v1/score asks for: texts, or {"content": [parts of a message]}, on each side.

    Raises InvalidRequest."""
    fields = checked(body, SCORE)
    given = [pair for pair in SIDES if set(pair) & fields.keys()]
    if len(given) != 1:
        raise InvalidRequest(SIDES[0][0], "give text_1 and text_2, or queries and documents, and not both.")
    beside = {name: fields[name] for name in BESIDE if name in fields}
    first, second = (_side(name, fields.get(name), beside) for name in given[0])
    if len(first) not in (1, len(second)):
        message = f"{len(first)} were given for {len(second)} of {given[0][1]}; give one for all, or as many."
        raise InvalidRequest(given[0][0], message, found=len(first), expected=len(second))
    if len(first) + len(second) > MAX_PROMPTS:
        message = f"there are {len(first) + len(second)} prompts, expected at most {MAX_PROMPTS}; send more requests."
        raise InvalidRequest(given[0][1], message)
    return ScoreRequest(first=first, second=second)


def score_response(
    outputs: Sequence[ScoringRequestOutput], num_tokens: int, model_name: str, created: int, *, id: str | None = None
) -> dict[str, Any]:
    """The body of scores, in order; num_tokens: of all prompts, each counted once."""
    data = [{"index": i, "object": "score", "score": output.outputs.score} for i, output in enumerate(outputs)]
    return list_of(data, num_tokens, model_name, created, id or new_id("score"))


def _side(name: str, given: Any, beside: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The prompts of one side. As in vLLM each part of a mapping that stands alone is a prompt, and in a list each mapping is."""
    if isinstance(given, Mapping) and isinstance(given.get("content"), list):
        items: Any = [{**given, "content": [part]} for part in given["content"]]
    else:
        items = [given] if isinstance(given, str) else given
    expected = 'a string, {"content": [parts]}, or a list of them'
    if not isinstance(items, list) or not items:
        refuse(name, given, expected, "give at least one")
    prompts: list[dict[str, Any]] = []
    for item in items:
        if isinstance(item, str) and item:
            prompts.append({"prompt": item, **{key: beside[key] for key in beside if key != "chat_template"}})
        elif isinstance(item, Mapping) and set(item) == {"content"} and isinstance(item["content"], list):
            message = {"role": "user", "content": item["content"]}
            prompts.append({"messages": [message], "add_generation_prompt": False, **beside})
        else:
            refuse(name, item, expected, "correct it")
    return prompts
