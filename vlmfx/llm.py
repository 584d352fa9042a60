"""LLM, generate and embed: prompts in, texts or vectors out, with the names and results that vLLM's users know."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any, Literal, TypeVar

import torch
from tqdm import tqdm

from vlmfx import __version__, checkpoint
from vlmfx.checkpoint import Model
from vlmfx.compile import buckets
from vlmfx.compile.counter import CompileCounter, Compiles
from vlmfx.engine.drain import Made, drain
from vlmfx.engine.embedding import EmbeddingRequestOutput, ScoringRequestOutput, score_of
from vlmfx.engine.engine import NOT_PREPARED, Engine
from vlmfx.engine.executors import executor_for
from vlmfx.engine.options import NAMES, NUM_MAKERS, EngineOptions
from vlmfx.engine.pooler import check_dimensions
from vlmfx.engine.recording import record_to
from vlmfx.engine.request import RequestOutput, SamplingParams
from vlmfx.engine.sequence import Request
from vlmfx.engine.taps import checked
from vlmfx.engine.warm_up import warm_up
from vlmfx.errors import BatchError, InvalidRequest, as_vlmfx_error, shown
from vlmfx.options import check_others
from vlmfx.processing.inputs import ModelInputs
from vlmfx.processing.limits import limits_of
from vlmfx.processing.media import MediaPolicy
from vlmfx.processing.prompt import Plan, check_settings, complete, count_tokens, plan, with_options
from vlmfx.processing.video import sampling_of

log = logging.getLogger("vlmfx")

QUICK_TOKENS = 4096  # whose keys are made in a millisecond

OnError = Literal["return", "raise"]
Output = TypeVar("Output", RequestOutput, EmbeddingRequestOutput, ScoringRequestOutput)
Result = TypeVar("Result", RequestOutput, EmbeddingRequestOutput)


class LLM:
    """A loaded model and what it needs to answer.

    model: a folder, a hub id, "scenes" (shipped) or a Model. Options as in vLLM: those of EngineOptions (max_num_seqs,
    gpu_memory_utilization, ...), dtype, device, max_model_len, chat_template, revision, trust_remote_code, limit_mm_per_prompt
    ({"image": 2}), media_io_kwargs ({"video": {"num_frames": 8}}, or "fps": how video files are sampled, 32 frames by default) and
    mm_processor_kwargs ({"num_crops": 16}), of which a prompt's own win, allowed_local_media_path (the folder that file: URLs may lie
    in; by default there is none), allowed_media_domains, and private_media_hosts (hosts with a private address that URLs may name; by
    default none); task is "generate", or "embed" (also "embedding") for embed and score. backend: how programs run, "auto" (a bundle's
    own, graphs on a GPU, else "eager"), "eager" (enforce_eager=True too), "cuda_graph", "mlu_graph" or "inductor", for the buckets of
    plan (a Plan or its file); strict refuses what the plan does not cover, which otherwise runs uncompiled. record: a new file for what
    is asked and what each step does, which `vlmfx replay` runs again. Raises CheckpointError, DeviceError, or InvalidRequest for an
    option."""

    def __init__(
        self,
        model: str | Path | Model,
        *,
        dtype: str | torch.dtype | None = None,
        device: str | torch.device | None = None,
        max_model_len: int | None = None,
        chat_template: str | Path | None = None,
        revision: str | None = None,
        hf_token: str | bool | None = None,
        limit_mm_per_prompt: Mapping[str, int] | str | None = None,
        media_io_kwargs: Mapping[str, Any] | None = None,
        mm_processor_kwargs: Mapping[str, Any] | None = None,
        allowed_local_media_path: str | Path | None = None,
        allowed_media_domains: Sequence[str] | None = None,
        private_media_hosts: Sequence[str] | None = None,
        trust_remote_code: bool = False,
        task: str = "generate",
        backend: str = "auto",
        plan: buckets.Plan | str | Path | None = None,
        strict: bool = False,
        enforce_eager: bool = False,
        record: str | Path | None = None,
        **others: Any,
    ) -> None:
        engine_options = EngineOptions(**{name: others.pop(name) for name in NAMES if name in others})
        check_others(others)
        self.task = checkpoint.resolve_task(task)
        media: dict[str, Any] = {
            "allowed_local_media_path": allowed_local_media_path, "allowed_media_domains": allowed_media_domains,
            "private_media_hosts": private_media_hosts,
        }  # fmt: skip
        loading: dict[str, Any] = {
            "dtype": dtype, "device": device, "max_model_len": max_model_len, "chat_template": chat_template, "revision": revision,
            "hf_token": hf_token,
        }  # fmt: skip
        media = {name: value for name, value in media.items() if value is not None}
        MediaPolicy(**media)  # what is wrong in these shows before the model is loaded
        limits_of(limit_mm_per_prompt)
        sampling_of(media_io_kwargs)
        settings = None if mm_processor_kwargs is None else check_settings(mm_processor_kwargs)
        if isinstance(model, Model):
            given = [name for name, value in loading.items() if value not in (None, "auto")]
            if given:
                raise InvalidRequest(given[0], "the model is loaded already; pass it to vlmfx.load instead.")
            if self.task == "generate" and not model.has_head:
                raise InvalidRequest(
                    "task",
                    'the model was loaded for "embed", without its output matrix; pass task="embed".',
                    found=task,
                )
            self.model = model
        else:
            self.model = checkpoint.load(model, trust_remote_code=trust_remote_code, task=self.task, **loading)
        changes = (limit_mm_per_prompt, media or None, media_io_kwargs, settings)
        if any(change is not None for change in changes):
            processor = with_options(self.model.processor, limit_mm_per_prompt, media, media_io_kwargs, settings)
            self.model = replace(self.model, processor=processor)
        self._counter = CompileCounter()
        backend = "eager" if enforce_eager else backend
        self.executor = executor_for(
            self.model, task=self.task, options=engine_options, backend=backend, plan=plan, strict=strict
        )
        self._in_use = Lock()
        kind = self.model.device.type
        self.engine = Engine(
            self.model,
            self.executor,
            max_num_seqs=engine_options.num_seqs(kind),
            max_num_batched_tokens=engine_options.max_num_batched_tokens,
            feature_cache_bytes=engine_options.mm_feature_cache_bytes,
            caches_prefixes=engine_options.enable_prefix_caching,
            overlaps=engine_options.overlaps(kind),
            observer=None if record is None else record_to(record, self._header(model, engine_options, backend)),
        )

    def _header(self, model: object, options: EngineOptions, backend: str) -> dict[str, Any]:
        """What a recording says of how it was made: options that make an LLM alike."""
        made, executor, kind = self.model, self.executor, self.model.device.type
        assert executor.layout is not None
        return {
            "vlmfx": __version__,
            "torch": torch.__version__,
            "model": str(model) if isinstance(model, (str, Path)) else None,
            "options": {
                **asdict(options),
                "max_num_seqs": options.num_seqs(kind),
                "async_scheduling": options.overlaps(kind),
                "num_gpu_blocks_override": executor.layout.num_blocks,
                "task": self.task,
                "dtype": str(made.dtype).removeprefix("torch."),
                "device": kind,
                "max_model_len": made.max_model_len,
                "backend": backend,
                "plan": executor.plan.as_dict() if executor.plan is not None and made.bundle is None else None,
            },
        }

    @property
    def compiles(self) -> Compiles:
        """What was compiled in this process since the LLM was made: nothing by one that is warm, or runs a bundle."""
        return self._counter.compiles

    def generate(
        self,
        prompts: Any,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        on_error: OnError = "return",
        on_text: Callable[[int, str], None] | None = None,
        taps: Sequence[str] | None = None,
    ) -> list[RequestOutput]:
        """One RequestOutput a prompt, in order.

        prompts: one or a list of "text" | {"prompt", "multi_modal_data", "mm_processor_kwargs"} | {"prompt_token_ids", ...} |
        {"messages"}, or one conversation, a list of messages. sampling_params: one for all, or one a prompt; None is greedy to EOS or
        min(512, rest of the context).
        on_text(number, text) is called with new text of each prompt as it comes. taps: names of the values on the way that each
        output is to carry in its `taps`, on the CPU: "vision", "projected", "merged", "layer.0", "layer.1", ..., "hidden", "logits", see
        `vlmfx.engine.taps.tap`; they cost another pass of each prompt.
        A single prompt that is wrong raises InvalidRequest. In a list its place holds a result with `error` set and the others finish;
        with on_error="raise" a BatchError follows that carries all outputs."""
        self._check_task("generate", "generate")
        _check_on_error(on_error)
        names = checked(self.model, taps)
        prompts = as_prompt(prompts)
        is_single = not isinstance(prompts, (list, tuple))
        items = [prompts] if is_single else list(prompts)
        params = _params_for(items, sampling_params)
        arrival = time.perf_counter()

        def request(number: int, made: Plan) -> Request:
            return self._request(number, made, params[number], arrival, taps=names)

        done = self._run(items, request, RequestOutput, "generate", use_tqdm, on_text or _ignore)
        failure_of_one = done[0].error if is_single else None
        if failure_of_one is not None:
            raise failure_of_one from failure_of_one.__cause__
        return _reported(done, on_error)

    def chat(
        self,
        messages: Any,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        chat_template: str | Path | None = None,
        chat_template_content_format: Literal["auto", "string", "openai"] = "auto",
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: list[dict[str, Any]] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        mm_processor_kwargs: dict[str, Any] | None = None,
        media_io_kwargs: dict[str, Any] | None = None,
        on_error: OnError = "return",
        on_text: Callable[[int, str], None] | None = None,
        taps: Sequence[str] | None = None,
    ) -> list[RequestOutput]:
        """One RequestOutput a conversation: of a list of messages, or of a list of such lists.

        A message is {"role", "content"}, its content a text or a list of parts: {"type": "text", "text"}, {"type": "image_url",
        "image_url": {"url"}} (data:, http, https, file), {"type": "image", "image"}, {"type": "image_embeds", "image_embeds"},
        {"type": "video", "video"}, {"type": "video_url", "video_url": {"url"}}. chat_template (a Jinja text, a file or a shipped
        one's name) stands in for the checkpoint's. continue_final_message ends the prompt inside the last message; set
        add_generation_prompt=False with it. chat_template_kwargs and tools reach the template. The rest is as in `generate`."""
        options: dict[str, Any] = {
            "chat_template": chat_template,
            "chat_template_content_format": chat_template_content_format,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
            "chat_template_kwargs": {"tools": tools, **(chat_template_kwargs or {})} if tools else chat_template_kwargs,
            "mm_processor_kwargs": mm_processor_kwargs,
            "media_io_kwargs": media_io_kwargs,
        }
        is_list = isinstance(messages, (list, tuple)) and any(isinstance(item, (list, tuple)) for item in messages)
        conversations = messages if is_list else [messages]
        # [] for None: a key that holds None counts as absent.
        prompts = [{"messages": [] if c is None else c, **options} for c in conversations]
        return self.generate(
            prompts if is_list else prompts[0], sampling_params, use_tqdm=use_tqdm, on_error=on_error, on_text=on_text,
            taps=taps,
        )  # fmt: skip

    def embed(
        self, prompts: Any, *, dimensions: int | None = None, use_tqdm: bool = True, on_error: OnError = "return"
    ) -> list[EmbeddingRequestOutput]:
        """One EmbeddingRequestOutput a prompt, in order: a vector of unit length, from the hidden states after the final norm.

        prompts, on_error and what a wrong prompt does are as in `generate`. dimensions: only so many of a vector's first numbers are
        kept, before it is brought to unit length (matryoshka embeddings). Needs task="embed"."""
        _check_on_error(on_error)
        prompts = as_prompt(prompts)
        is_single = not isinstance(prompts, (list, tuple))
        items = [prompts] if is_single else list(prompts)
        return _reported(self._embed(items, is_single, dimensions, use_tqdm), on_error)

    def score(
        self, text_1: Any, text_2: Any, *, use_tqdm: bool = True, on_error: OnError = "return"
    ) -> list[ScoringRequestOutput]:
        """The cosine of two prompts' embeddings: of one with each of several, or of two equally long lists pair by pair.

        Prompts are as in `generate`. Where one of a pair is wrong its score is not a number and its `error` set. Needs task="embed"."""
        _check_on_error(on_error)
        text_1, text_2 = as_prompt(text_1), as_prompt(text_2)
        sides = [list(side) if isinstance(side, (list, tuple)) else [side] for side in (text_1, text_2)]
        num_first, num_second = map(len, sides)
        if num_first not in (1, num_second):
            raise InvalidRequest(
                "text_1",
                f"{num_first} were given for {num_second} of text_2; give one for all, or as many.",
                found=num_first,
                expected=num_second,
            )
        is_single = not isinstance(text_1, (list, tuple)) and not isinstance(text_2, (list, tuple))
        outputs = self._embed([*sides[0], *sides[1]], is_single, None, use_tqdm)
        first = outputs[:num_first] if num_first == num_second else outputs[:1] * num_second
        pairs = zip(first, outputs[num_first:], strict=True)
        return _reported([score_of(a, b) for a, b in pairs], on_error)

    def _embed(
        self, items: list[Any], is_single: bool, dimensions: int | None, use_tqdm: bool
    ) -> list[EmbeddingRequestOutput]:
        """The embedding of each item, or the error it failed by, which is raised where is_single."""
        self._check_task("embed", "embed and score")
        check_dimensions(self.model, dimensions)

        def request(number: int, made: Plan) -> Request:
            return self._request(
                number, made, SamplingParams.greedy(), time.perf_counter(), pools=True, dimensions=dimensions
            )

        outputs = self._run(items, request, EmbeddingRequestOutput, "embed", use_tqdm, _ignore)
        failure = next((o.error for o in outputs if o.error is not None), None)
        if is_single and failure is not None:
            raise failure from failure.__cause__
        return outputs

    def _request(self, number: int, made: Plan, params: SamplingParams, arrival: float, **more: Any) -> Request:
        return Request(
            number=number, num_tokens=len(made.expanded.token_ids), load=partial(_load, self.model, made), params=params,
            arrival=arrival, prompt=made.prompt, is_ready=_takes_no_time(made, params), **more,
        )  # fmt: skip

    def request(self, number: int, prompt: Any, params: SamplingParams | None = None, **more: Any) -> Request:
        """A prompt as `generate` takes one, as a request of the engine; more: its other fields. Raises InvalidRequest."""
        pools = more.get("pools", False)
        self._check_task("embed" if pools else "generate", "embed and score" if pools else "generate")
        check_dimensions(self.model, more.get("dimensions"))
        (params,) = _params_for([prompt], params)
        more["taps"] = checked(self.model, more.get("taps"))
        made = plan(self.model.processor, as_prompt(prompt))
        return self._request(number, made, params, time.perf_counter(), **more)

    def _run(
        self,
        items: list[Any],
        request: Callable[[int, Plan], Request],
        kind: type[Result],
        what: str,
        use_tqdm: bool,
        on_text: Callable[[int, str], None],
    ) -> list[Result]:
        """The output of each item, by the request that is made of its number and plan; of one that has no plan the error."""

        def made(number: int, item: Any) -> Made:
            try:
                return request(number, plan(self.model.processor, item))
            except Exception as error:
                failed = kind.failed(str(number), as_vlmfx_error(error, NOT_PREPARED))
                if isinstance(failed, RequestOutput):
                    failed.prompt = _text_of(item)
                return failed

        results: list[Any] = [None] * len(items)
        threads = ThreadPoolExecutor(NUM_MAKERS, thread_name_prefix="vlmfx-prepare") if len(items) > 1 else None
        try:
            with self._alone():
                requests = [threads.submit(made, *item) if threads else made(*item) for item in enumerate(items)]
                outputs = drain(self.engine, requests, on_text)
                hidden = not use_tqdm or len(items) < 2
                for output in tqdm(outputs, total=len(items), desc=what, unit="prompt", disable=hidden):
                    results[int(output.request_id)] = output
        finally:
            if threads:
                threads.shutdown(wait=False, cancel_futures=True)
        return results

    def count_tokens(self, prompt: Any) -> int:
        """The length of a prompt, in any form that `generate` takes, in tokens; of images headers are read. Raises InvalidRequest."""
        return count_tokens(self.model.processor, as_prompt(prompt))

    def reset_prefix_cache(self) -> bool:
        """Forget the prompts and images that are kept for others; False, and nothing is done, while requests run."""
        return self.engine.reset_prefix_cache()

    def warm_up(self, *, use_tqdm: bool = True) -> None:
        """Make all programs of the plan now, which otherwise are made when a request first needs them: compiled, captured or loaded."""
        warm_up(self.model, self.executor, use_tqdm=use_tqdm)

    def get_metrics(self) -> dict[str, float]:
        """What was done so far and what is held now, by name: counts, tokens, bytes and seconds."""
        return self.engine.metrics()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """One caller at a time. Raises InvalidRequest."""
        if not self._in_use.acquire(blocking=False):
            raise InvalidRequest(
                "prompts", "the LLM is answering another call; pass all prompts in one call, or wait for that one."
            )
        try:
            yield
        finally:
            self._in_use.release()

    def _check_task(self, needed: str, verbs: str) -> None:
        if self.task != needed:
            message = f'the LLM was made for "{self.task}"; make one with task="{needed}" to {verbs}.'
            raise InvalidRequest("task", message, found=self.task, expected=needed)


def as_prompt(given: Any) -> Any:
    """A bare list of messages as the one prompt that it is; all else as it came."""
    is_conversation = isinstance(given, list) and given and isinstance(given[0], dict) and "role" in given[0]
    return {"messages": given} if is_conversation else given


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


def _check_on_error(on_error: str) -> None:
    if on_error not in ("return", "raise"):
        raise InvalidRequest("on_error", f'it is {shown(on_error)}; use "return" or "raise".', found=on_error)


def _reported(outputs: list[Output], on_error: OnError) -> list[Output]:
    """The outputs, after one warning where some failed; or the BatchError that carries them."""
    failed = [output for output in outputs if output.error is not None]
    if failed:
        message = f"{len(failed)} of {len(outputs)} prompts failed; the first: {failed[0].error}"
        if on_error == "raise":
            raise BatchError(message, outputs)
        warnings.warn(message, stacklevel=3)
    return outputs


def _load(model: Model, made: Plan) -> ModelInputs:
    """The inputs of a plan. Raises InvalidRequest also for ready embeddings that the model's dtype cannot hold."""
    inputs = complete(model.processor, made)
    if inputs.embeds is not None and not bool(inputs.embeds.to(model.dtype).isfinite().all()):
        dtype = str(model.dtype).removeprefix("torch.")
        raise InvalidRequest(
            "multi_modal_data.image",
            f"embeddings hold values beyond {dtype}, which the model computes in; check what made them.",
            expected=dtype,
        )
    return inputs


def _takes_no_time(made: Plan, params: SamplingParams) -> bool:
    """Whether a request can be made ready where others wait for it."""
    has_media = made.images or made.videos or made.embeds is not None
    return not has_media and not params.has_rules and len(made.expanded.token_ids) <= QUICK_TOKENS


def _text_of(item: Any) -> str | None:
    text = item.get("prompt") if isinstance(item, dict) else item
    return text if isinstance(text, str) else None


def _ignore(number: int, text: str) -> None:
    """No streaming."""
