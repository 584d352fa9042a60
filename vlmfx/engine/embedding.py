"""What an embedding request gets back, under vLLM's names; plain Python.

Source of names: vllm-project/vllm: vllm/outputs.py."""

from __future__ import annotations

import math
from dataclasses import dataclass

from vlmfx.errors import VlmfxError


@dataclass
class EmbeddingOutput:
    """A vector of unit length; empty for a prompt that failed."""

    embedding: list[float]

    @property
    def hidden_size(self) -> int:
        return len(self.embedding)


@dataclass
class EmbeddingRequestOutput:
    """A prompt's embedding. error is set where it failed; its batch mates are not affected."""

    request_id: str
    outputs: EmbeddingOutput
    prompt_token_ids: list[int]
    finished: bool = True
    error: VlmfxError | None = None

    @classmethod
    def failed(cls, request_id: str, error: VlmfxError) -> EmbeddingRequestOutput:
        """The result of a prompt that could not be embedded."""
        return cls(request_id, EmbeddingOutput(embedding=[]), [], error=error)


@dataclass
class ScoringOutput:
    """The cosine of two embeddings, −1 to 1; not a number where one of them failed."""

    score: float


@dataclass
class ScoringRequestOutput:
    """Two prompts' score; prompt_token_ids are the first one's and then the second's."""

    request_id: str
    outputs: ScoringOutput
    prompt_token_ids: list[int]
    finished: bool = True
    error: VlmfxError | None = None


def score_of(first: EmbeddingRequestOutput, second: EmbeddingRequestOutput) -> ScoringRequestOutput:
    """The cosine of two results, whose vectors have unit length."""
    error = first.error or second.error
    score = math.nan
    if error is None:
        dot = math.fsum(a * b for a, b in zip(first.outputs.embedding, second.outputs.embedding, strict=True))
        score = min(1.0, max(-1.0, dot))
    ids = [*first.prompt_token_ids, *second.prompt_token_ids]
    return ScoringRequestOutput(f"{first.request_id}_{second.request_id}", ScoringOutput(score), ids, error=error)
