"""vlmfx: vision-language models as pure functions, for CUDA GPUs, Cambricon MLU370 and plain CPUs.

    import vlmfx
    outs = vlmfx.generate("scenes", {"messages": [...]})
    print(outs[0].outputs[0].text)

Names below are imported on first use, so that `import vlmfx` costs milliseconds and no torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlmfx.checkpoint import Model, load
    from vlmfx.compile.abstract import eval_shape
    from vlmfx.compile.stages import jit
    from vlmfx.engine.embedding import (
        EmbeddingOutput,
        EmbeddingRequestOutput,
        ScoringOutput,
        ScoringRequestOutput,
    )
    from vlmfx.engine.request import CompletionOutput, Logprob, RequestOutput, SamplingParams
    from vlmfx.engine.structured_outputs import GuidedDecodingParams, StructuredOutputsParams
    from vlmfx.errors import BatchError, CheckpointError, CompileError, InvalidRequest, UnsupportedModel, VlmfxError
    from vlmfx.llm import LLM
    from vlmfx.offline import count_tokens, embed, generate
    from vlmfx.parity.verify import verify

__version__ = "0.1.0"

_HOME = {
    "LLM": "vlmfx.llm",
    "generate": "vlmfx.offline",
    "embed": "vlmfx.offline",
    "count_tokens": "vlmfx.offline",
    "Model": "vlmfx.checkpoint",
    "load": "vlmfx.checkpoint",
    "SamplingParams": "vlmfx.engine.request",
    "StructuredOutputsParams": "vlmfx.engine.structured_outputs",
    "GuidedDecodingParams": "vlmfx.engine.structured_outputs",
    "RequestOutput": "vlmfx.engine.request",
    "CompletionOutput": "vlmfx.engine.request",
    "Logprob": "vlmfx.engine.request",
    "EmbeddingOutput": "vlmfx.engine.embedding",
    "EmbeddingRequestOutput": "vlmfx.engine.embedding",
    "ScoringOutput": "vlmfx.engine.embedding",
    "ScoringRequestOutput": "vlmfx.engine.embedding",
    "verify": "vlmfx.parity.verify",
    "jit": "vlmfx.compile.stages",
    "eval_shape": "vlmfx.compile.abstract",
    "VlmfxError": "vlmfx.errors",
    "InvalidRequest": "vlmfx.errors",
    "BatchError": "vlmfx.errors",
    "CheckpointError": "vlmfx.errors",
    "CompileError": "vlmfx.errors",
    "UnsupportedModel": "vlmfx.errors",
}

__all__ = [
    "LLM",
    "BatchError",
    "CheckpointError",
    "CompileError",
    "CompletionOutput",
    "EmbeddingOutput",
    "EmbeddingRequestOutput",
    "GuidedDecodingParams",
    "InvalidRequest",
    "Logprob",
    "Model",
    "RequestOutput",
    "SamplingParams",
    "ScoringOutput",
    "ScoringRequestOutput",
    "StructuredOutputsParams",
    "UnsupportedModel",
    "VlmfxError",
    "__version__",
    "count_tokens",
    "embed",
    "eval_shape",
    "generate",
    "jit",
    "load",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'vlmfx' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
