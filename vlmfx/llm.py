"""LLM and generate: prompts in, texts out, with the names and results that vLLM's users know."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm

from vlmfx import checkpoint
from vlmfx.checkpoint import Model
from vlmfx.engine import engine
from vlmfx.engine.request import RequestOutput, SamplingParams
from vlmfx.engine.sequence import Request
from vlmfx.errors import BatchError, InternalError, InvalidRequest, VlmfxError
from vlmfx.processing.prompt import prepare

log = logging.getLogger("vlmfx")

OnError = Literal["return", "raise"]
# Arguments of vLLM's that are known and not to be had yet, with the one value that asks for nothing.
NOT_YET = {
    "tensor_parallel_size": 1,
    "pipeline_parallel_size": 1,
    "quantization": None,
    "task": "generate",
    "enable_lora": False,
}


class LLM:
    """A loaded model and what it needs to answer.

    model: a folder, a hub id, "scenes" (shipped) or a Model. Options as in vLLM: dtype, device, max_model_len, max_num_seqs,
    chat_template, revision, trust_remote_code. Raises CheckpointError, DeviceError, or InvalidRequest for an option."""

    def __init__(
        self,
        model: str | Path | Model,
        *,
        dtype: str | torch.dtype | None = None,
        device: str | torch.device | None = None,
        max_model_len: int | None = None,
        max_num_seqs: int = 16,
        chat_template: str | Path | None = None,
        revision: str | None = None,
        hf_token: str | bool | None = None,
        trust_remote_code: bool = False,
        **others: Any,
    ) -> None:
        for name, value in others.items():
            if name not in NOT_YET:
                raise InvalidRequest(name, f"LLM has no option {name}; remove it.", found=value)
            if value != NOT_YET[name]:
                raise InvalidRequest(
                    name,
                    f"{value!r} is not implemented; leave it at {NOT_YET[name]!r}.",
                    found=value,
                    expected=NOT_YET[name],
                )
        if not isinstance(max_num_seqs, int) or max_num_seqs < 1:
            raise InvalidRequest(
                "max_num_seqs", f"it is {max_num_seqs!r}; use a whole number of 1 or more.", found=max_num_seqs
            )
        loading: dict[str, Any] = {
            "dtype": dtype, "device": device, "max_model_len": max_model_len, "chat_template": chat_template, "revision": revision,
            "hf_token": hf_token,
        }  # fmt: skip
        if isinstance(model, Model):
            given = [name for name, value in loading.items() if value not in (None, "auto")]
            if given:
                raise InvalidRequest(given[0], "the model is loaded already; pass it to vlmfx.load instead.")
            self.model = model
        else:
            self.model = checkpoint.load(model, trust_remote_code=trust_remote_code, **loading)
        self.max_num_seqs = max_num_seqs

    def generate(
        self,
        prompts: Any,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        on_error: OnError = "return",
        on_text: Callable[[int, str], None] | None = None,
    ) -> list[RequestOutput]:
        """One RequestOutput a prompt, in order.

        prompts: one or a list of "text" | {"prompt", "multi_modal_data", "mm_processor_kwargs"} | {"prompt_token_ids", ...} |
        {"messages"}. sampling_params: one for all, or one a prompt; None is greedy to EOS or min(512, rest of the context).
        on_text(number, text) is called with new text of each prompt as it comes. A single prompt that is wrong raises
        InvalidRequest. In a list its place holds a result with `error` set and the others finish; with on_error="raise" a
        BatchError follows that carries all outputs."""
        if on_error not in ("return", "raise"):
            raise InvalidRequest("on_error", f'it is {on_error!r}; use "return" or "raise".', found=on_error)
        is_single = not isinstance(prompts, (list, tuple))
        items = [prompts] if is_single else list(prompts)
        params = _params_for(items, sampling_params)
        results: list[RequestOutput | None] = [None] * len(items)
        requests: list[Request] = []
        arrival = time.perf_counter()
        for number, (item, param) in enumerate(zip(items, params, strict=True)):
            try:
                inputs = prepare(self.model.processor, item)
                requests.append(Request(number=number, inputs=inputs, params=param, arrival=arrival))
            except Exception as error:
                failure = _as_vlmfx_error(error)
                if is_single:
                    raise failure from failure.__cause__
                results[number] = RequestOutput.failed(str(number), failure, prompt=_text_of(item))
        outputs = engine.run(self.model, requests, max_num_seqs=self.max_num_seqs, on_text=on_text or _ignore)
        for output in tqdm(
            outputs, total=len(requests), desc="generate", unit="prompt", disable=not use_tqdm or len(items) < 2
        ):
            results[int(output.request_id)] = output
        done = [r for r in results if r is not None]
        failed = [r for r in done if r.error is not None]
        if failed:
            message = f"{len(failed)} of {len(done)} prompts failed; the first: {failed[0].error}"
            if on_error == "raise":
                raise BatchError(message, done)
            warnings.warn(message, stacklevel=2)
        return done


def generate(
    model: str | Path | Model | LLM,
    prompts: Any,
    sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    *,
    use_tqdm: bool = True,
    on_error: OnError = "return",
    on_text: Callable[[int, str], None] | None = None,
    **options: Any,
) -> list[RequestOutput]:
    """`LLM(model, **options).generate(prompts, sampling_params)`; an LLM or Model is used as it is, a name loads on each call."""
    if isinstance(model, LLM):
        if options:
            raise InvalidRequest(next(iter(options)), "the LLM is built already; pass the option to LLM instead.")
        llm = model
    else:
        if not isinstance(model, Model):
            log.info("generate loads %s on each call; keep vlmfx.LLM(...) or vlmfx.load(...) to load it once", model)
        llm = LLM(model, **options)
    return llm.generate(prompts, sampling_params, use_tqdm=use_tqdm, on_error=on_error, on_text=on_text)


def _params_for(items: list[Any], given: SamplingParams | Sequence[SamplingParams] | None) -> list[SamplingParams]:
    if given is None:
        return [SamplingParams.greedy()] * len(items)
    params: list[Any] = list(given) if isinstance(given, (list, tuple)) else [given] * len(items)
    for value in params:
        if not isinstance(value, SamplingParams):
            kind = type(value).__name__
            raise InvalidRequest(
                "sampling_params", f"found a {kind}; pass one SamplingParams, or a list of them.", found=kind
            )
    if len(params) != len(items):
        raise InvalidRequest(
            "sampling_params",
            f"{len(params)} were given for {len(items)} prompts; pass one, or one a prompt.",
            found=len(params),
            expected=len(items),
        )
    return params


def _as_vlmfx_error(error: Exception) -> VlmfxError:
    """The error itself if it is one of ours; else an InternalError that it caused, logged with its traceback."""
    if isinstance(error, VlmfxError):
        return error
    log.error("a prompt could not be prepared", exc_info=error)
    failure = InternalError(
        f"the prompt could not be prepared ({type(error).__name__}: {error}); please report it with the log's traceback."
    )
    failure.__cause__ = error
    return failure


def _text_of(item: Any) -> str | None:
    text = item.get("prompt") if isinstance(item, dict) else item
    return text if isinstance(text, str) else None


def _ignore(number: int, text: str) -> None:
    """No streaming."""
