"""Text piece by piece from token ids, as a stream needs it."""

from __future__ import annotations

import re

from vlmfx.processing.tokenizer import UNCLEAN, Tokenizer


class IncrementalDetokenizer:
    """Text piece by piece as ids arrive; all pieces together equal Tokenizer.decode of all ids.

    Each step decodes a short window: the ids behind the last piece (for context: a first token loses its leading
    space) and those whose text is still open, as in huggingface/text-generation-inference:
    server/text_generation_server/models/model.py (decode_token) and vllm-project/vllm:
    vllm/transformers_utils/detokenizer_utils.py. Held back are a last "\\ufffd", which the next byte may complete,
    and runs of byte tokens ("<0x41>"), which the ByteFallback decoder reads as one: a bad byte changes them all.
    """

    MAX_OPEN = 8  # ids with open text, from which on the window is cut where that does not change the text

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._ids: list[int] = []  # the window
        self._num_context = 0  # of which this many are the context
        self._num_chars = 0  # characters of the window's text that are already out
        self._unclean = ""  # out of the window, but clean-up may still change it

    def push(self, token_id: int) -> str:
        """The text that this id makes certain, often empty."""
        token = self._tokenizer.id_to_token(token_id)
        if token is None or token_id in self._skipped:
            return ""
        self._ids.append(token_id)
        if self._tokenizer.has_byte_tokens and re.fullmatch("<0x[0-9A-F]{2}>", token):
            return ""
        text = self._text(self._ids)
        end = len(text) - text.endswith("\ufffd")
        piece, self._num_chars = text[self._num_chars : end], max(self._num_chars, end)
        if end < len(text):
            self._cut(text)
        elif piece:
            self._ids = self._ids[self._num_context :]
            self._num_context = len(self._ids)
            self._num_chars = len(self._text(self._ids))
        return self._clean(piece)

    def finish(self) -> str:
        """What was held back; the detokenizer is then as new."""
        piece = self._clean(self._text(self._ids)[self._num_chars :], last=True)
        self._ids, self._num_context, self._num_chars = [], 0, 0
        return piece

    def _text(self, ids: list[int]) -> str:
        return self._tokenizer.decode_raw(ids, self._skip_special_tokens)

    def _cut(self, text: str) -> None:
        """Drops the front of a long open window, at a place where two decodes give what one gives."""
        if len(self._ids) - self._num_context <= self.MAX_OPEN:
            return
        for at in range(len(self._ids) - 1, len(self._ids) - 5, -1):  # an open character has at most 3 bytes
            front = self._text(self._ids[:at])
            if front + self._text(self._ids[at:]) == text and len(front) <= self._num_chars:
                self._ids, self._num_context, self._num_chars = self._ids[at:], 0, self._num_chars - len(front)
                return

    def _clean(self, piece: str, *, last: bool = False) -> str:
        if not self._tokenizer.cleans_up_spaces:
            return piece
        text = self._unclean + piece
        cut = len(text) if last else max((i + 1 for i, char in enumerate(text) if char not in UNCLEAN), default=0)
        self._unclean = text[cut:]
        return self._tokenizer.cleaned(text[:cut])
