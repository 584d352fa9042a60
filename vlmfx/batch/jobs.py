"""A line of the input: what it names, the engine's requests that it makes, and the line that answers it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from typing import Any
from uuid import uuid4

from vlmfx.engine.embedding import EmbeddingRequestOutput
from vlmfx.engine.fields import is_unicode
from vlmfx.engine.request import RequestOutput, SamplingParams
from vlmfx.engine.sequence import Request
from vlmfx.errors import InvalidRequest, VlmfxError, as_vlmfx_error, shown
from vlmfx.llm import LLM
from vlmfx.openai.fields import check_model
from vlmfx.openai.requests import chat_request, completion_request, embedding_request, form_of, request_options
from vlmfx.openai.responses import chat_response, completion_response, embedding_response, error_response

CHAT, COMPLETIONS, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
TASKS = {CHAT: "generate", COMPLETIONS: "generate", EMBEDDINGS: "embed"}
KEYS = ("custom_id", "method", "url", "body")

Output = RequestOutput | EmbeddingRequestOutput
Respond = Callable[[list[Any]], dict[str, Any]]  # all outputs of a line, in order → the body


@dataclass(kw_only=True, eq=False)
class Line:
    """Line `number` of the input. custom_id is None where it has none of its own; error says why it cannot be served."""

    number: int
    num_bytes: int
    custom_id: str | None = None
    url: str = ""
    body: Any = None
    error: VlmfxError | None = None

    @property
    def id(self) -> str:
        """The id of its result; of a line without a custom_id the same in each run, to know it by."""
        return f"batch_req_{uuid4().hex}" if self.custom_id is not None else nameless(self.number)


@dataclass(kw_only=True, eq=False)
class Job:
    """A line that is in the engine: its requests, and their outputs by number as they come."""

    line: Line
    requests: list[Request]
    respond: Respond
    outputs: dict[int, Output] = field(default_factory=dict)

    @property
    def is_done(self) -> bool:
        return len(self.outputs) == len(self.requests)

    def body(self) -> dict[str, Any]:
        """The response, once it is done."""
        return self.respond([self.outputs[request.number] for request in self.requests])


def nameless(number: int) -> str:
    """The id of the result of a line that has no custom_id of its own."""
    return f"batch_req_line_{number}"


def read_line(number: int, text: bytes) -> Line:
    """A line of the input; what is wrong with it is its error."""
    line = Line(number=number, num_bytes=len(text))
    at = f"line {number}"
    try:
        value = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        line.error = InvalidRequest(at, f"it is not JSON ({type(error).__name__}); write one object a line.")
        return line
    if not isinstance(value, dict):
        line.error = InvalidRequest(at, f"it is {shown(value)}; write an object with {', '.join(KEYS)}.")
        return line
    custom_id = value.get("custom_id")
    if not isinstance(custom_id, str) or not custom_id or not is_unicode(custom_id):
        line.error = InvalidRequest("custom_id", f"{at} has {shown(custom_id)}; give each line a string of its own.")
        return line
    line.custom_id, line.body, url = custom_id, value.get("body"), value.get("url")
    unknown = [key for key in value if key not in KEYS]
    if unknown:
        line.error = InvalidRequest(shown(unknown[0]), f"a line has no such key; use {', '.join(KEYS)}.")
    elif value.get("method", "POST") != "POST":
        line.error = InvalidRequest("method", f'it is {shown(value["method"])}; use "POST".', found=value["method"])
    elif not isinstance(url, str) or url not in TASKS:
        line.error = InvalidRequest("url", f"it is {shown(url)}; use one of {', '.join(TASKS)}.", found=url)
    else:
        line.url = url
    return line


def make_job(llm: LLM, line: Line, served: str, numbers: count[int]) -> Job:
    """The requests of a line, its media fetched; numbers gives those of the engine. Raises InvalidRequest."""
    task = TASKS[line.url]
    if llm.task != task:
        message = (
            f'{line.url} needs the task "{task}", but this run is for "{llm.task}"; run these lines by themselves with '
            f"--task {task}, into another file."
        )
        raise InvalidRequest("url", message, found=line.url)
    check_model(line.body, served)
    created = int(time.time())
    if line.url == EMBEDDINGS:
        wanted = embedding_request(line.body)
        options = {"pools": True, "dimensions": wanted.dimensions, **request_options(line.body)}
        requests = [llm.request(next(numbers), prompt, **options) for prompt in wanted.prompts]
        return Job(
            line=line,
            requests=requests,
            respond=lambda outputs: embedding_response(outputs, served, created, is_base64=wanted.is_base64),
        )
    is_chat = line.url == CHAT
    prompts, params = _chat(line.body) if is_chat else completion_request(line.body)
    if line.body.get("stream"):
        raise InvalidRequest("stream", "a batch has no streams; leave it out.", found=line.body["stream"])
    form = form_of(line.body, params)
    options = request_options(line.body)
    requests = [llm.request(next(numbers), prompt, params, **options) for prompt in prompts]

    def respond(outputs: list[Any]) -> dict[str, Any]:
        if is_chat:
            return chat_response(outputs[0], served, created, form)
        return completion_response(outputs, served, created, form)

    return Job(line=line, requests=requests, respond=respond)


def _chat(body: Any) -> tuple[list[dict[str, Any]], SamplingParams]:
    """A chat as the one prompt of its line."""
    prompt, params = chat_request(body)
    return [prompt], params


def answer(line: Line, body: dict[str, Any]) -> bytes:
    """The output line of a response. Raises ValueError for a number that JSON has not."""
    return _written(line, 200, body, None)


def failure(line: Line, error: Exception) -> bytes:
    """The output line of a request that failed: OpenAI's body of an error, and its error once more where vLLM has it."""
    status, body = error_response(as_vlmfx_error(error, "the line could not be answered"))
    return _written(line, status, body, body["error"])


def _written(line: Line, status: int, body: dict[str, Any], error: Any) -> bytes:
    response = {"status_code": status, "request_id": f"req_{uuid4().hex}", "body": body}
    result = {"id": line.id, "custom_id": line.custom_id, "response": response, "error": error}
    try:
        return json.dumps(result, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:  # half a surrogate pair, which UTF-8 has not
        return json.dumps(result, allow_nan=False).encode()
