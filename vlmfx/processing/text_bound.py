"""TextBound: how many tokens a text has at least, told without tokenizing it, which takes seconds and hundreds of MiB per MiB of text.

A byte of a text weighs 1 / (bytes of the longest token that it is in), so that what one token stands for weighs at most 1, and a text
has at least as many tokens as it weighs: of English some fifth to seventh of those it has, and never more."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import tokenizers
from tokenizers import AddedToken, models

PIECE = 2**16  # characters that are normalised and weighed at once
SLACK = 8  # tokens by which a piece may weigh more by itself than inside its text: marks that are composed across a cut
WIDEST = 4  # bytes of a character in UTF-8: none weighs more than 1
NORMALIZERS = {"Sequence", "NFC", "Prepend", "Replace"}
PRE_TOKENIZERS = {"Sequence", "ByteLevel", "Split", "Metaspace", "Digits"}
BLANKS = sorted({byte for code in range(0x3001) if chr(code).isspace() for byte in chr(code).encode()})


class TextBound:
    """For a byte-pair encoding whose every byte is in some token: by a byte-level alphabet or by tokens of bytes. What other tokenizers
    can drop or take together as one unknown token has no weight, up to all of it."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._normalizer = backend.normalizer
        added: list[AddedToken] = list(backend.get_added_tokens_decoder().values())
        # Blanks beside these are theirs, however many.
        self._stripping = [token for token in added if token.lstrip or token.rstrip]
        self._weights = _weights(backend, added)

    def least(self, text: str, enough: int) -> int:
        """The least number of tokens of a text without lone surrogates; what is over `enough` is not looked for."""
        if not self._weights.any():
            return 0
        weight = 0.0
        for piece in _pieces(self._without_stripped(text)):
            normal = piece if self._normalizer is None else self._normalizer.normalize_str(piece)
            counts = np.bincount(np.frombuffer(normal.encode(), np.uint8), minlength=256)
            weight += max(0.0, float(counts @ self._weights) - SLACK)
            if weight > enough + 1:
                break
        return math.floor(weight)

    def _without_stripped(self, text: str) -> str:
        for token in self._stripping:
            if token.content in text:
                parts = text.split(token.content)
                if token.rstrip:
                    parts[1:] = [part.lstrip() for part in parts[1:]]
                if token.lstrip:
                    parts[:-1] = [part.rstrip() for part in parts[:-1]]
                text = token.content.join(parts)
        return text


def _pieces(text: str) -> Iterator[str]:
    return (text[start : start + PIECE] for start in range(0, len(text), PIECE))


def _weights(backend: tokenizers.Tokenizer, added: list[AddedToken]) -> np.ndarray:
    """(256,) float64: what each byte of a normalised text weighs; 0 where a tokenizer may pass over it."""
    model, none = backend.model, np.zeros(256)
    before, splits = _parts(backend.normalizer), _parts(backend.pre_tokenizer)
    if not isinstance(model, models.BPE) or model.continuing_subword_prefix or model.end_of_word_suffix:
        return none
    if {part["type"] for part in before} - NORMALIZERS or {part["type"] for part in splits} - PRE_TOKENIZERS:
        return none
    if any(part.get("behavior") == "Removed" or part.get("replacement", "▁") != "▁" for part in splits):
        return none
    if any("Regex" in part.get("pattern", {}) for part in before):  # which may take any amount of text together
        return none
    vocabulary = backend.get_vocab(with_added_tokens=False)
    is_byte_level = any(part["type"] == "ByteLevel" for part in splits)
    alphabet = _byte_level_alphabet() if is_byte_level else {}
    names = alphabet if is_byte_level else {f"<0x{byte:02X}>": byte for byte in range(256)}
    if not is_byte_level and not (model.byte_fallback and names.keys() <= vocabulary.keys()):
        return none
    longest = np.zeros(256)
    contents = [token.content for token in added]
    normal = [] if backend.normalizer is None else [backend.normalizer.normalize_str(content) for content in contents]
    texts = [content.encode() for content in (*contents, *normal)]
    for token in vocabulary:
        texts.append(bytes(map(alphabet.__getitem__, token)) if alphabet.keys() >= set(token) else token.encode())
    for text in sorted(texts, key=len):
        longest[list(set(text))] = len(text)
    if not is_byte_level:  # a blank may become "▁" only after the text is normalised
        longest[ord(" ")] = longest[[*b" ", *"▁".encode()]].max()
    is_known = np.zeros(256, bool)
    is_known[[byte for name, byte in names.items() if name in vocabulary]] = True
    if before and any(token.normalized and (token.lstrip or token.rstrip) for token in added):
        is_known[BLANKS] = False  # such a token may be written in other ways, and takes the blanks beside these, too
    return np.where(is_known, 1 / np.maximum(longest, WIDEST), 0.0)


def _parts(component: Any) -> list[dict[str, Any]]:
    """A normalizer or pre-tokenizer, and those that it is made of."""
    if component is None:
        return []
    parts = [json.loads(component.__getstate__())]
    for part in parts:  # grows as it is read
        parts += part.get("normalizers", []) + part.get("pretokenizers", [])
    return parts


def _byte_level_alphabet() -> dict[str, int]:
    """The character that stands for each byte in a byte-level vocabulary, as in openai/gpt-2: src/encoder.py, bytes_to_unicode."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + i): byte for i, byte in enumerate(hidden)}
