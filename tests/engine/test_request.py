"""Results carry vLLM's names; what the server imports to check a request needs no torch."""

import dataclasses
import subprocess
import sys

import pytest

from vlmfx.engine.request import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from vlmfx.errors import VlmfxError


def test_failed_request():
    error = VlmfxError("no")
    result = RequestOutput.failed("r1", error, prompt="hi", prompt_token_ids=(1, 2))
    assert result.outputs == [CompletionOutput(0, "", (), None, None, "error", None)]
    assert (result.error, result.finished, result.prompt_token_ids, result.metrics) == (error, True, [1, 2], None)
    assert result.outputs[0].finished()


def test_results_are_as_mutable_as_vllms():
    output = CompletionOutput(index=0, text="", token_ids=())
    output.text += "a"
    assert not output.finished()
    Logprob(-1.0).decoded_token = "a"
    result = RequestOutput("r", None, [1], [output], finished=False)
    result.finished = True
    with pytest.raises(dataclasses.FrozenInstanceError):
        RequestMetrics(prompt_tokens=1, output_tokens=1).prompt_tokens = 2  # type: ignore[misc]


@pytest.mark.parametrize("module", ["request", "sampling_params", "structured_outputs", "stopping"])
def test_imports_without_torch(module):
    code = f"import sys, vlmfx.engine.{module}; assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
