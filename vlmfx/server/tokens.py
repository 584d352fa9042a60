"""/tokenize and /detokenize: prompts to token ids, images counted from their headers, and back. Texts that are far too long for the model
are refused before they are tokenized, as everywhere."""

from __future__ import annotations

from functools import partial
from typing import Any

from fastapi import Request, Response

from vlmfx.openai.tokens import TokenizeRequest, detokenize_request, tokenize_request
from vlmfx.processing.prompt import check_text, plan
from vlmfx.server.calls import Call, call_of
from vlmfx.server.replies import reply
from vlmfx.server.service import Service
from vlmfx.server.urls import names_urls


async def tokenize(service: Service, request: Request) -> Response:
    """The ids of a text or a chat, as the model would be given them. Raises InvalidRequest."""

    call = call_of(request.scope)

    def read(body: Any) -> TokenizeRequest:
        service.check(body, "/tokenize", None)
        asked = tokenize_request(body)
        call.fetches = names_urls(asked.prompt)
        return asked

    asked = await service.read_json(request, read)
    made = partial(_tokenized, service, asked, call)
    return await service.wanted(request, reply(made, service.pool_aside(call)))


async def detokenize(service: Service, request: Request) -> Response:
    """The text of ids, special tokens written out. Raises InvalidRequest."""

    def read(body: Any) -> list[int]:
        service.check(body, "/detokenize", None)
        return detokenize_request(body, service.processor.vocab_size)

    ids = await service.read_json(request, read)
    replying = reply(partial(_detokenized, service, ids), service.pool_aside(call_of(request.scope)))
    return await service.wanted(request, replying)


def _tokenized(service: Service, asked: TokenizeRequest, call: Call) -> dict[str, Any]:
    with service.charged_to(call):
        return _counted(service, asked, service.with_images(call, asked.prompt))


def _detokenized(service: Service, ids: list[int]) -> dict[str, Any]:
    return {"prompt": service.processor.tokenizer.decode(ids, skip_special_tokens=False)}


def _counted(service: Service, asked: TokenizeRequest, prompt: dict[str, Any]) -> dict[str, Any]:
    processor = service.processor
    if asked.adds_special or "messages" in prompt:
        ids = plan(processor, prompt).expanded.token_ids
    else:
        check_text(processor, prompt["prompt"])
        ids = processor.tokenizer.encode(prompt["prompt"], add_special_tokens=False)
    shown = [processor.tokenizer.id_to_token(i) for i in ids] if asked.shows_texts else None
    return {"count": len(ids), "max_model_len": service.max_model_len, "tokens": ids, "token_strs": shown}
