"""Metrics for Prometheus, under vLLM's names with a prefix of our own."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from vlmfx.engine.engine import Engine
from vlmfx.engine.events import Output
from vlmfx.engine.request import RequestOutput
from vlmfx.server.image_store import ImageStore
from vlmfx.server.steps import StepCounter

SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)


class Metrics:
    """What a server has done, in a registry of its own. compiles: programs that were compiled since the start, which should stay 0."""

    def __init__(
        self, engine: Engine, steps: StepCounter, model_name: str, *, prefix: str, compiles: Callable[[], int]
    ) -> None:
        self.registry = CollectorRegistry()
        labels = {"model_name": model_name}

        def counter(name: str, says: str, *more: str) -> Any:
            made = Counter(f"{prefix}:{name}", says, ["model_name", *more], registry=self.registry)
            return made if more else made.labels(**labels)

        def histogram(name: str, says: str, buckets: Iterable[float], *more: str) -> Any:
            made = Histogram(
                f"{prefix}:{name}", says, ["model_name", *more], buckets=tuple(buckets), registry=self.registry
            )
            return made if more else made.labels(**labels)

        self._labels, self._prefix = labels, prefix
        self._first = histogram("time_to_first_token_seconds", "From a request's arrival to its first token.", SECONDS)
        self._per_token = histogram(
            "time_per_output_token_seconds", "Of the tokens after a request's first, the mean.", SECONDS
        )
        self._whole = histogram("e2e_request_latency_seconds", "From a request's arrival to its end.", SECONDS)
        self._decode = histogram("request_decode_time_seconds", "From a request's first token to its last.", SECONDS)
        self._prompt = histogram("request_prompt_tokens", "Tokens of a request's prompt.", TOKENS)
        self._answer = histogram("request_generation_tokens", "Tokens of a request's answers.", TOKENS)
        self._prompts = counter("prompt_tokens", "Tokens of prompts of finished requests.")
        self._answers = counter("generation_tokens", "Tokens of answers of finished requests.")
        self._success = counter("request_success", "Answers by how they ended.", "finished_reason")
        self._errors = counter("request_errors", "Requests that failed, by kind.", "kind", "status")
        self._http = counter("http_requests", "HTTP requests.", "path", "status")
        self._prepare = histogram(
            "request_prepare_seconds", "To render, tokenize and, where fetches is true, to fetch.", SECONDS, "fetches"
        )
        self._fetch = histogram("media_fetch_seconds", "To read what a URL names.", SECONDS, "scheme")
        self._refused = counter("media_refusals", "URLs that were refused, or could not be read.", "scheme")
        self.registry.register(_Live(engine, steps, prefix, labels, compiles))

    def watch(self, images: ImageStore) -> None:
        """Show what a store holds."""
        self.registry.register(_Stored(images, self._prefix, self._labels))

    def finished(self, output: Output, seconds: float) -> None:
        """A request that is done, after so many seconds."""
        self._whole.observe(seconds)
        self._prompt.observe(len(output.prompt_token_ids))
        self._prompts.inc(len(output.prompt_token_ids))
        if not isinstance(output, RequestOutput):
            self._success.labels(**self._labels, finished_reason="stop").inc()
            return
        num_tokens = sum(len(one.token_ids) for one in output.outputs)
        self._answer.observe(num_tokens)
        self._answers.inc(num_tokens)
        for one in output.outputs:
            self._success.labels(**self._labels, finished_reason=one.finish_reason or "stop").inc()
        found = output.metrics
        if found is not None and found.time_to_first_token_s is not None:
            self._first.observe(found.time_to_first_token_s)
            if found.decode_s is not None:
                self._decode.observe(found.decode_s)
                if num_tokens > len(output.outputs):
                    longest = max(len(one.token_ids) for one in output.outputs)
                    self._per_token.observe(found.decode_s / max(longest - 1, 1))

    def prepared(self, seconds: float, *, fetches: bool) -> None:
        """A prompt that was rendered and tokenized."""
        self._prepare.labels(**self._labels, fetches=str(fetches).lower()).observe(seconds)

    def fetched(self, scheme: str, seconds: float, is_refused: bool) -> None:
        """A URL of a medium."""
        self._fetch.labels(**self._labels, scheme=scheme).observe(seconds)
        if is_refused:
            self._refused.labels(**self._labels, scheme=scheme).inc()

    def failed(self, kind: str, status: int) -> None:
        """A request that failed."""
        self._errors.labels(**self._labels, kind=kind, status=status).inc()

    def answered(self, path: str, status: int) -> None:
        """An HTTP request, by the path of its route."""
        self._http.labels(**self._labels, path=path, status=status).inc()

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self.registry)


class _Live:
    """What the engine counts and holds, read when it is asked for."""

    def __init__(
        self, engine: Engine, steps: StepCounter, prefix: str, labels: dict[str, str], compiles: Callable[[], int]
    ) -> None:
        self.engine, self.steps, self.prefix, self.labels, self.compiles = engine, steps, prefix, labels, compiles

    def collect(self) -> Iterable[Metric]:
        found = self.engine.metrics()
        num_blocks = found["num_blocks"]
        usage = 1 - found["num_free_blocks"] / num_blocks if num_blocks else 0.0
        gauges = {
            "num_requests_running": ("Texts that are generated now.", found["num_running"]),
            "num_requests_waiting": ("Requests that have not begun.", found["num_waiting"]),
            "kv_cache_usage_perc": ("Share of the KV cache's blocks that are in use, 0 to 1.", usage),
            "encoder_cache_items": ("Encoded images that are kept.", found["num_kept_images"]),
            "encoder_cache_bytes": ("Bytes of encoded images that are kept.", found["feature_bytes"]),
            "programs": ("Programs that are made.", found["num_programs"]),
        }
        counters = {
            "num_preemptions": ("Texts that gave up their blocks to others.", found["num_preempted"]),
            "prefix_cache_hits": ("Tokens of prompts that were found in the cache.", found["num_cached"]),
            "prefix_cache_queries": (
                "Tokens of prompts that were looked for in the cache.",
                found["num_cached"] + found["num_prompt_tokens"],
            ),
            "engine_steps": ("Steps of the engine.", found["num_steps"]),
            "encoder_seconds": ("Seconds that encoding them took, on a GPU the device's.", found["encoder_seconds"]),
            "encoder_items": ("Images and videos that were encoded.", found["num_encoded"]),
            "encoder_cache_queries": ("Images and videos of prompts that began.", self.steps.num_media),
            "encoder_cache_hits": (
                "Of these, those that need not be encoded.",
                max(0, self.steps.num_media - found["num_encoded"]),
            ),
            "compiles": ("Programs that were compiled while serving; it should stay 0.", self.compiles()),
        }
        for name, (says, value) in gauges.items():
            gauge = GaugeMetricFamily(f"{self.prefix}:{name}", says, labels=[*self.labels])
            gauge.add_metric([*self.labels.values()], value)
            yield gauge
        for name, (says, value) in counters.items():
            counter = CounterMetricFamily(f"{self.prefix}:{name}", says, labels=[*self.labels])
            counter.add_metric([*self.labels.values()], value)
            yield counter

        by_program = {
            "program_runs": ("Runs of a program.", self.steps.runs),
            "program_size": ("Patches, tokens or sequences that it was given.", self.steps.sizes),
            "bucket_padding": ("Patches, tokens or sequences that buckets added to these.", self.steps.padding),
            "bucket_hits": ("Runs in a bucket of the plan.", self.steps.hits),
            "bucket_misses": ("Runs that the plan has no bucket for.", self.steps.misses),
        }
        for name, (says, counts) in by_program.items():
            counter = CounterMetricFamily(f"{self.prefix}:{name}", says, labels=[*self.labels, "program"])
            for program, value in sorted(counts.copy().items()):
                counter.add_metric([*self.labels.values(), program], value)
            yield counter

    def describe(self) -> Iterable[Metric]:
        return ()


class _Stored:
    """What clients have stored, and how often it was there when it was asked for."""

    def __init__(self, images: ImageStore, prefix: str, labels: dict[str, str]) -> None:
        self.images, self.prefix, self.labels = images, prefix, labels

    def collect(self) -> Iterable[Metric]:
        images = self.images
        for kind, name, says, value in (
            (GaugeMetricFamily, "stored_images", "Images that clients have sent to ask about later.", len(images)),
            (GaugeMetricFamily, "stored_image_bytes", "Bytes of these.", images.num_bytes),
            (CounterMetricFamily, "stored_image_queries", "Parts of requests that named one.", images.num_queries),
            (CounterMetricFamily, "stored_image_hits", "Of these, those that were there.", images.num_hits),
        ):
            family = kind(f"{self.prefix}:{name}", says, labels=[*self.labels])
            family.add_metric([*self.labels.values()], value)
            yield family

    def describe(self) -> Iterable[Metric]:
        return ()
