"""What the sampling ops take, from the parameters of requests; and what they give, by row."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from vlmfx.compile.executor import moved
from vlmfx.compile.programs import Sampling
from vlmfx.device import accelerator
from vlmfx.engine.request import SamplingParams
from vlmfx.errors import ShapeError
from vlmfx.ops.sample import MAX_VOCAB
from vlmfx.ops.token_logprobs import token_logprobs

Candidates = dict[int, tuple[float, int]]  # id → (log-probability, rank)
_SMALLEST, _LARGEST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max


def state(
    params: Sequence[SamplingParams],
    seeds: Sequence[int],
    positions: Sequence[int],
    device: torch.device,
    sample_indices: Sequence[int] | None = None,
) -> Sampling | None:
    """What `vlmfx.ops.sample` draws the rows' next tokens by, None where all are greedy.

    positions[i] is the index of the drawn token in its sequence, sample_indices[i] (32 bits) which of the n answers of its request the
    sequence is, by default the first, 0; with seeds[i] (64 bits) they key the draw. Temperature, top_p and min_p are rounded to float32."""
    if not any(p.temperature > 0 for p in params):
        return None
    # A temperature that float32 would round to 0 is not greedy: it draws among the best.
    degrees = [within_float32(p.temperature) if p.temperature > 0 else 0.0 for p in params]
    # By way of numpy, which takes a third of the time that torch takes to read a list.
    floats = np.array([degrees, [p.top_p for p in params], [p.min_p for p in params]], np.float32)
    top_k = np.array([min(p.top_k, MAX_VOCAB) for p in params], np.int32)
    samples = [0] * len(params) if sample_indices is None else sample_indices
    keys = np.array([[_signed(s), j, _signed(i)] for s, j, i in zip(seeds, samples, positions, strict=True)], np.int64)
    temperature, top_p, min_p = torch.from_numpy(floats).to(device).unbind()
    key = torch.from_numpy(keys).to(device)
    return Sampling(
        temperature=temperature,
        top_k=torch.from_numpy(top_k).to(device),
        top_p=top_p,
        min_p=min_p,
        seed=key[:, 0],
        position=key[:, 1:],
    )


def within_float32(value: float) -> float:
    """The positive number next to a positive one that float32 makes neither 0 nor infinite."""
    return min(max(value, _SMALLEST), _LARGEST)


def logprobs(logits: Tensor, ids: Tensor, num: Sequence[int | None]) -> list[Candidates | None]:
    """logits (rows, vocab), the sampled ids (rows,) → for each row {id: (log-probability, rank)}, or None where num is.

    The sampled id comes first, then the num most likely by rank; rank 1 is the most likely, and of equal logits the
    lower id ranks first. float32 log-softmax of the logits as given, before temperature and filters. Raises
    ShapeError."""
    return Scores(logits, ids, num).read()


class Scores:
    """What `logprobs` gives, on its way: computed and then sent to the host, which waits for it in `read` and no sooner."""

    def __init__(self, logits: Tensor, ids: Tensor, num: Sequence[int | None]) -> None:
        if logits.dim() != 2 or not logits.shape[0] == ids.numel() == len(num):
            raise ShapeError(
                f"logprobs: logits have shape {tuple(logits.shape)} beside {ids.numel()} ids and {len(num)} numbers; "
                "pass (rows, vocab) logits and one of each a row."
            )
        self._num_rows = len(num)
        self._asked = [(i, n) for i, n in enumerate(num) if n is not None]
        self._found: tuple[Tensor, ...] = ()
        if self._asked:
            rows: Tensor = moved(torch.tensor([i for i, _ in self._asked]), logits.device)
            most = min(max(n for _, n in self._asked), logits.shape[1])
            self._found = tuple(map(sent, token_logprobs(logits[rows], ids.flatten()[rows], most)))

    def read(self) -> list[Candidates | None]:
        """By row; on a GPU only once what was launched is known to be done."""
        out: list[Candidates | None] = [None] * self._num_rows
        table = zip(self._asked, *(tensor.tolist() for tensor in self._found), strict=True) if self._found else ()
        for (row, n), (first, *rest), (value, *others), own_rank in table:
            found = out[row] = {first: (value, own_rank)}
            for r, (token, logprob) in enumerate(zip(rest[:n], others[:n], strict=True)):
                found.setdefault(token, (logprob, r + 1))
        return out


def sent(tensor: Tensor) -> Tensor:
    """The tensor on the host; from a GPU or MLU it is on its way, and there once a later event is."""
    if accelerator(tensor.device) is None:
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


def _signed(word: int) -> int:
    """The int64 with the bits of a number of 64, signed or not."""
    return (word + 2**63) % 2**64 - 2**63
