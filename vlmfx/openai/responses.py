"""Bodies of responses, of finished outputs: OpenAI's keys, and vLLM's beside them."""

from __future__ import annotations

import base64
import struct
from collections.abc import Sequence
from typing import Any
from uuid import uuid4

from vlmfx.engine.embedding import EmbeddingRequestOutput
from vlmfx.engine.request import CompletionOutput, RequestOutput
from vlmfx.errors import DeadlineExceeded, EngineFull, ImageNotFound, InvalidRequest, ModelNotFound, VlmfxError
from vlmfx.openai.logprobs import chat_logprobs, completion_logprobs, prompt_logprobs
from vlmfx.openai.requests import Form

# Errors, the narrower ones first → their status, and the code that clients know.
KINDS = (
    (ModelNotFound, 404, "model_not_found"),
    (ImageNotFound, 404, "image_not_found"),
    (InvalidRequest, 400, None),
    (EngineFull, 503, None),
    (DeadlineExceeded, 504, None),
)


def chat_response(
    output: RequestOutput, model_name: str, created: int, form: Form | None = None, *, id: str | None = None
) -> dict[str, Any]:
    """The body of a chat's answers. created: seconds since 1970."""
    form = form or Form()

    def choice(one: CompletionOutput) -> dict[str, Any]:
        return {
            "index": one.index,
            "message": {"role": "assistant", "content": one.text, "refusal": None},
            "logprobs": chat_logprobs(one, form),
            **_ending(one, form),
        }

    return {
        "id": id or new_id("chatcmpl"),
        "object": "chat.completion",
        "created": created,
        "model": model_name,
        "choices": [choice(one) for one in output.outputs],
        "usage": usage([output]),
        "prompt_logprobs": prompt_logprobs(output.prompt_logprobs),
        **({"prompt_token_ids": list(output.prompt_token_ids)} if form.returns_ids else {}),
    }


def completion_response(
    outputs: Sequence[RequestOutput],
    model_name: str,
    created: int,
    form: Form | None = None,
    *,
    id: str | None = None,
) -> dict[str, Any]:
    """The body of the completions of one or several prompts, n a prompt, in the order of the prompts."""
    form = form or Form()
    choices: list[dict[str, Any]] = []
    for output in outputs:
        for one in output.outputs:
            choice = {
                "index": len(choices),
                "text": one.text,
                "logprobs": completion_logprobs(one, form),
                **_ending(one, form),
                "prompt_logprobs": prompt_logprobs(output.prompt_logprobs),
            }
            if form.returns_ids:
                choice["prompt_token_ids"] = list(output.prompt_token_ids)
            choices.append(choice)
    return {
        "id": id or new_id("cmpl"),
        "object": "text_completion",
        "created": created,
        "model": model_name,
        "choices": choices,
        "usage": usage(outputs),
    }


def embedding_response(
    outputs: Sequence[EmbeddingRequestOutput],
    model_name: str,
    created: int,
    *,
    is_base64: bool = False,
    id: str | None = None,
) -> dict[str, Any]:
    """The body of vectors, in the order of the prompts."""
    data = [
        {
            "object": "embedding",
            "index": index,
            "embedding": to_base64(output.outputs.embedding) if is_base64 else list(output.outputs.embedding),
        }
        for index, output in enumerate(outputs)
    ]
    num_tokens = sum(len(output.prompt_token_ids) for output in outputs)
    return list_of(data, num_tokens, model_name, created, id or new_id("embd"))


def list_of(data: list[dict[str, Any]], num_tokens: int, model_name: str, created: int, id: str) -> dict[str, Any]:
    """The body around vectors or scores, of prompts of so many tokens."""
    return {
        "id": id,
        "object": "list",
        "created": created,
        "model": model_name,
        "data": data,
        "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens, "completion_tokens": 0},
    }


def error_response(error: VlmfxError) -> tuple[int, dict[str, Any]]:
    """(HTTP status, the body) of a request that failed: 400 where the request is at fault, 404 where it names what is not there."""
    status, code = next(((status, code) for kind, status, code in KINDS if isinstance(error, kind)), (500, None))
    param = error.field if isinstance(error, InvalidRequest) else None
    return status, error_body(str(error), status, param=param, code=code)


def error_body(message: str, status: int, *, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """OpenAI's form of an error."""
    kind = "invalid_request_error" if 400 <= status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def usage(outputs: Sequence[RequestOutput]) -> dict[str, int]:
    """Tokens of the prompts, each counted once, and of all their answers."""
    num_prompt = sum(len(output.prompt_token_ids) for output in outputs)
    num_answer = sum(len(one.token_ids) for output in outputs for one in output.outputs)
    return {"prompt_tokens": num_prompt, "completion_tokens": num_answer, "total_tokens": num_prompt + num_answer}


def to_base64(vector: Sequence[float]) -> str:
    """Little-endian float32 in base64, as OpenAI's clients ask for by default."""
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode("ascii")


def new_id(kind: str) -> str:
    """An id that nothing else has: "chatcmpl-1b4e28ba2fa1..."."""
    return f"{kind}-{uuid4().hex}"


def _ending(one: CompletionOutput, form: Form) -> dict[str, Any]:
    ending = {"finish_reason": one.finish_reason, "stop_reason": one.stop_reason}
    return {**ending, "token_ids": list(one.token_ids)} if form.returns_ids else ending
