"""Bodies of /tokenize and /detokenize, as vLLM has them, media among them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vlmfx.engine.fields import boolean, refuse, token_ids
from vlmfx.errors import InvalidRequest
from vlmfx.openai.fields import TEMPLATE, checked
from vlmfx.openai.requests import conversation

TOKENIZE = TEMPLATE | {"model", "prompt", "messages", "add_special_tokens", "return_token_strs", "tools"}
MAX_IDS = 2**20


@dataclass(frozen=True, kw_only=True)
class TokenizeRequest:
    """prompt: as `LLM.generate` takes it. adds_special: False leaves out those that the tokenizer puts around a text. shows_texts:
    whether each token's text is wanted, too."""

    prompt: dict[str, Any]
    adds_special: bool = True
    shows_texts: bool = False


def tokenize_request(body: Any) -> TokenizeRequest:
    """What a body of /tokenize asks for. Raises InvalidRequest."""
    fields = checked(body, TOKENIZE)
    shows_texts = boolean("return_token_strs", fields.get("return_token_strs", False))
    adds_special = boolean("add_special_tokens", fields.get("add_special_tokens", "prompt" in fields))
    if "messages" in fields:
        if "prompt" in fields:
            raise InvalidRequest("prompt", "it stands beside messages; leave one of the two out.")
        if adds_special:
            raise InvalidRequest(
                "add_special_tokens", "a chat template writes its own special tokens; leave it out, or false."
            )
        prompt = conversation(fields)
        if fields.get("tools"):
            prompt["chat_template_kwargs"] = {"tools": fields["tools"], **prompt.get("chat_template_kwargs", {})}
        return TokenizeRequest(prompt=prompt, shows_texts=shows_texts)
    alone = sorted((TEMPLATE | {"tools"}) & fields.keys())
    if alone:
        raise InvalidRequest(alone[0], "it plays no part without messages; remove it.", found=fields[alone[0]])
    text = fields.get("prompt")
    if not isinstance(text, str) or not text:
        refuse("prompt", text, "a string of at least one character", "give it, or messages")
    return TokenizeRequest(prompt={"prompt": text}, adds_special=adds_special, shows_texts=shows_texts)


def detokenize_request(body: Any, vocab_size: int) -> list[int]:
    """The ids of a body of /detokenize, of a model with so many. Raises InvalidRequest."""
    ids = checked(body, frozenset({"model", "tokens"})).get("tokens")
    token_ids("tokens", ids)
    assert isinstance(ids, list)
    if len(ids) > MAX_IDS:
        raise InvalidRequest("tokens", f"it holds {len(ids)} ids, expected at most {MAX_IDS}; send more requests.")
    if ids and (largest := max(ids)) >= vocab_size:
        refuse("tokens", largest, f"ids below {vocab_size}, the model's vocabulary", "look ids up with /tokenize")
    return ids
