"""Request: what a user asked for. Sequence: one text of it on its way through the cache."""

from __future__ import annotations

import math
import secrets
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vlmfx.engine.completion import Completion
from vlmfx.engine.embedding import EmbeddingRequestOutput
from vlmfx.engine.fields import integer, is_unicode, number, refuse
from vlmfx.engine.prepared import Item, Prepared
from vlmfx.engine.request import RequestOutput, SamplingParams
from vlmfx.engine.token_rules import TokenRules
from vlmfx.errors import VlmfxError
from vlmfx.processing.inputs import ModelInputs


@dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """A request whose prompt's length is known, and whose pixels `load` makes, in another thread.

    number names it, and of those of one priority the smaller one goes first; lower priorities go first. arrival is when the user asked
    and deadline when it is too late, by time.perf_counter; prompt is its text, where it has one; taps names the values that its output
    is to carry; only requests of one salt share what is cached. pools: whether a vector of so many dimensions (None: all) is wanted, and
    no text. Raises InvalidRequest for what a caller may set: priority, deadline, salt."""

    number: int
    num_tokens: int
    load: Callable[[], ModelInputs]
    params: SamplingParams
    arrival: float
    prompt: str | None = None
    taps: tuple[str, ...] = ()
    priority: int = 0
    salt: str = ""
    deadline: float | None = None
    pools: bool = False
    dimensions: int | None = None
    is_ready: bool = False  # whether load takes no time
    seed: int = field(default_factory=lambda: secrets.randbits(63))  # of draws, where params has none

    def __post_init__(self) -> None:
        integer("priority", self.priority, -(2**63), 2**63 - 1, "lower ones go first")
        if self.deadline is not None:
            number("deadline", self.deadline, -math.inf, math.inf, "leave it out for none")
        if not isinstance(self.salt, str) or not is_unicode(self.salt):
            refuse("salt", self.salt, "a string of valid Unicode", "leave it out to share what is cached")

    @classmethod
    def ready(cls, number: int, inputs: ModelInputs, params: SamplingParams, arrival: float) -> Request:
        """The request of inputs that are there."""
        return cls(
            number=number,
            num_tokens=len(inputs.token_ids),
            load=lambda: inputs,
            params=params,
            arrival=arrival,
            prompt=inputs.prompt,
            is_ready=True,
        )

    def max_len(self, most: int) -> int:
        """The most tokens that prompt and answer may have together, where there is room for `most`."""
        return self.num_tokens + self.params.token_budget(most - self.num_tokens)

    @property
    def order(self) -> tuple[int, int]:
        """Requests of lower order go first."""
        return self.priority, self.number

    def __lt__(self, other: Request) -> bool:
        return self.order < other.order

    def failed(self, error: VlmfxError) -> RequestOutput | EmbeddingRequestOutput:
        """The result of a request that could not be served."""
        if self.pools:
            return EmbeddingRequestOutput.failed(str(self.number), error)
        return RequestOutput.failed(str(self.number), error, prompt=self.prompt)


class Sequence:
    """What the scheduler and the runner know of one text.

    num_computed: its tokens whose keys and values are in the cache, or will be when the steps that are launched are done.
    num_in_flight: tokens that launched steps draw and nobody has read yet, at most 2. blocks: of the cache, in order, int32.
    rules: of its tokens, None where there are none. is_running: whether it has blocks; is_open: whether it has neither ended nor failed."""

    def __init__(
        self,
        request: Request,
        prepared: Prepared,
        completion: Completion,
        max_len: int,
        rules: TokenRules | None = None,
    ) -> None:
        self.request, self.prepared, self.completion, self.max_len = request, prepared, completion, max_len
        self.rules = rules
        self.num_prompt = len(prepared.inputs.token_ids)
        self.num_computed = 0
        self.num_in_flight = 0
        self.num_preempted = 0
        self.num_published = 0  # blocks that others can find
        self.blocks: array[int] = array("i")
        self.keys: list[bytes] = list(prepared.keys)
        self.pins: set[bytes] = set()
        self.forks: list[Sequence] = []  # those that begin where this one's prompt ends
        self.is_running = False
        self.is_open = True

    @property
    def num_known(self) -> int:
        """Tokens of prompt and answer that the host has read."""
        return self.num_prompt + len(self.completion.token_ids)

    @property
    def num_tokens(self) -> int:
        """Tokens of prompt and answer, the one in flight among them."""
        return self.num_known + self.num_in_flight

    @property
    def is_decoding(self) -> bool:
        """Whether its newest token is the only one that is not computed, and was drawn."""
        return self.num_computed == self.num_tokens - 1 and self.num_computed >= self.num_prompt

    @property
    def seed(self) -> int:
        params = self.request.params
        return self.request.seed if params.seed is None else params.seed

    def token_ids(self, start: int, end: int) -> list[int]:
        """Known tokens from start to end."""
        prompt, answer = self.prepared.inputs.token_ids, self.completion.token_ids
        return prompt[start:end] + answer[max(start - self.num_prompt, 0) : max(end - self.num_prompt, 0)]

    def positions(self, start: int, end: int) -> Tensor:
        """(end − start,) or (3, end − start) int64."""
        inputs = self.prepared.inputs
        if end <= self.num_prompt:
            return inputs.positions[..., start:end]
        first = inputs.next_position + max(start - self.num_prompt, 0)
        answer = torch.arange(first, first + end - max(start, self.num_prompt))
        answer = answer.expand(*inputs.positions.shape[:-1], -1)
        return torch.cat((inputs.positions[..., start:], answer), -1)

    def items(self, start: int, end: int) -> list[Item]:
        """The media whose rows some token from start to end reads, in order."""
        return [item for item in self.prepared.items if item.first < end and start < item.end]
