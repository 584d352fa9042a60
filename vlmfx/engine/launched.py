"""Launched: a step whose programs are launched, and what they draw once they are done."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from vlmfx.device import accelerator
from vlmfx.engine.sampler import Candidates, Scores, sent
from vlmfx.engine.sequence import Request
from vlmfx.engine.sequence import Sequence as Text
from vlmfx.errors import VlmfxError

Failure = tuple[Request, VlmfxError]
Drawn = tuple[Text, int, Candidates | None]  # a text with the token that it drew


class Piece:
    """One program's part of a step: the texts that draw, in order, their ids (n,) on the device, and log-probabilities where a text
    wants them."""

    def __init__(self, texts: Sequence[Text], ids: Tensor, logits: Tensor) -> None:
        self.texts, self.ids = texts, ids
        self.scores = Scores(logits, ids, [t.request.params.logprobs for t in texts])


class Launched:
    """All pieces of a step, and the requests that failed in it. The ids are on their way to the host from the beginning."""

    def __init__(self, pieces: Sequence[Piece], device: torch.device, failed: Sequence[Failure] = ()) -> None:
        self.pieces, self.failed, self.is_read = pieces, failed, False
        ids = [piece.ids for piece in pieces]
        self.ids = (
            ids[0] if len(ids) == 1 else torch.cat(ids) if ids else torch.empty(0, dtype=torch.int64, device=device)
        )
        self._host, self._event = sent(self.ids), None
        if (api := accelerator(device)) is not None:
            self._event = api.Event()
            self._event.record()

    @cached_property
    def texts(self) -> list[Text]:
        """Those that draw, in the order of ids."""
        return [text for piece in self.pieces for text in piece.texts]

    @cached_property
    def rows(self) -> dict[Text, int]:
        """Which of ids each text drew."""
        return {text: row for row, text in enumerate(self.texts)}

    def read(self) -> list[Drawn]:
        """What all texts drew; waits for the device."""
        self.is_read = True
        if self._event is not None:
            self._event.synchronize()
        candidates = [one for piece in self.pieces for one in piece.scores.read()]
        return list(zip(self.texts, self._host.tolist(), candidates, strict=True))
