"""Paths, keys, origins, ids and what a server says of itself."""

from __future__ import annotations

import json
import logging
import re

import pytest

from tests.server.harness import CHAT, EMBEDDINGS, answer, asks, noise_url, post, refused, request, serving, tiny
from vlmfx import __version__
from vlmfx.compile.buckets import Plan
from vlmfx.engine.observer import Observer
from vlmfx.errors import EngineFull
from vlmfx.server.app import GET, POST
from vlmfx.server.auth import OPEN_PATHS, Keys
from vlmfx.server.steps import StepCounter

JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def service():
    with serving(tiny(), names=("tiny", "org/other")) as made:
        yield made


@pytest.fixture(scope="module")
def closed():
    with serving(tiny(), api_keys=("one", "two"), allowed_origins=("https://example.com",)) as made:
        yield made


def test_a_server_says_what_it_is(service):
    assert request(service, "GET", "/health").json() == {"status": "ok"}
    assert request(service, "GET", "/ready").status_code == 200
    assert request(service, "GET", "/version").json() == {"version": __version__}
    models = request(service, "GET", "/v1/models").json()
    assert [model["id"] for model in models["data"]] == ["tiny", "org/other"]
    assert models["data"][0]["max_model_len"] == service.max_model_len
    assert request(service, "GET", "/v1/models/org/other").json()["id"] == "org/other"
    missing = request(service, "GET", "/v1/models/gpt")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "model_not_found")
    assert answer(service, CHAT, asks("x", model="org/other"))["model"] == "tiny"


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [("GET", "/nope", 404, "not_found"), ("GET", CHAT, 405, "method_not_allowed"), ("GET", "/docs", 404, "not_found"),
     ("GET", "/openapi.json", 404, "not_found"), ("POST", f"{CHAT}/", 404, "not_found"), ("GET", "/health/", 404, "not_found"),
     ("GET", "/v1/models/", 404, "model_not_found"), ("GET", "/v1/images/", 404, "image_not_found"),
     ("GET", "/v1/images", 405, "method_not_allowed"), ("DELETE", "/v1/images", 405, "method_not_allowed"),
     ("DELETE", "/v1/models", 405, "method_not_allowed")],
)  # fmt: skip
def test_what_is_not_there_has_openais_form(service, method, path, status, code):
    response = request(service, method, path)
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_every_path_needs_a_key_but_those_of_probers(closed):
    for method, paths in (("GET", GET), ("POST", POST)):
        for path in (*paths, "/nope", "/page/nope.js"):
            for headers in ({}, {"authorization": "Bearer three"}, {"authorization": "Basic one"}):
                response = request(closed, method, path.replace("{name:path}", "tiny"), headers=headers)
                is_open = path in OPEN_PATHS
                assert (response.status_code == 401) == (not is_open), path
                if not is_open:
                    assert response.json()["error"]["code"] == "invalid_api_key"
                    assert response.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(
    "path", ["/health/../v1/models", "//health/v1/models", "/v1/models/", "/health/", "/v1/models?x=/health"]
)
def test_a_key_cannot_be_left_out_by_another_spelling(closed, path):
    assert request(closed, "GET", path).status_code == 401


@pytest.mark.parametrize("header", ["Bearer one", "bearer two", "Bearer  one "])
def test_any_of_the_keys_opens(closed, header):
    assert post(closed, CHAT, asks("x"), headers={"authorization": header}).status_code == 200


def test_two_keys_in_a_request_are_none(closed):
    response = request(
        closed, "GET", "/v1/models", headers=[("authorization", "Bearer x"), ("authorization", "Bearer one")]
    )
    assert response.status_code == 401


def test_all_keys_are_compared_whichever_fits(monkeypatch):
    compared = []

    def compare(a, b):
        compared.append(len(a) == len(b) == 32)
        return a == b

    monkeypatch.setattr("hmac.compare_digest", compare)
    keys = Keys(["a", "bb", "c" * 1000])
    assert [keys.has(key) for key in (b"a", b"bb", b"c" * 1000, b"", b"\xff")] == [True, True, True, False, False]
    assert compared == [True] * 15


def test_pages_of_allowed_origins_alone_may_ask(closed, service):
    ask = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    allowed = request(closed, "OPTIONS", CHAT, headers={"origin": "https://example.com", **ask})
    assert (allowed.status_code, allowed.headers["access-control-allow-origin"]) == (200, "https://example.com")
    other = request(closed, "OPTIONS", CHAT, headers={"origin": "https://evil.example", **ask})
    assert "access-control-allow-origin" not in other.headers
    refused_ = request(closed, "GET", "/v1/models", headers={"origin": "https://example.com"})
    assert (refused_.status_code, refused_.headers["access-control-allow-origin"]) == (401, "https://example.com")
    plain = request(service, "GET", "/v1/models", headers={"origin": "https://example.com"})
    assert "access-control-allow-origin" not in plain.headers


def test_ids_go_there_and_back_and_into_the_log(service, caplog):
    with caplog.at_level(logging.INFO, "vlmfx.access"):
        response = post(service, CHAT, asks("x"), headers={"x-request-id": "abc-1"})
        assert response.headers["x-request-id"] == "abc-1"
        assert response.json()["id"] == "chatcmpl-abc-1"
        for bad in ("a b", "x" * 200, 'a"b', ""):
            given = post(service, CHAT, asks("x"), headers={"x-request-id": bad}).headers["x-request-id"]
            assert len(given) == 32
            assert given != bad
    line = caplog.messages[0]
    usage = response.json()["usage"]
    for part in (" abc-1 ", "POST", "200", f"in={usage['prompt_tokens']}", f"out={usage['completion_tokens']}"):
        assert part in line
    assert len(caplog.messages) == 5


def test_lines_of_the_log_in_json(caplog):
    with serving(tiny(), log_format="json") as service, caplog.at_level(logging.INFO, "vlmfx.access"):
        request(service, "GET", "/a%0Ab%22")
        refused(service, CHAT, asks("the secret question", temprature=1))
    first, second = map(json.loads, caplog.messages)
    assert (first["path"], first["status"]) == ('/a\nb"', 404)
    assert (second["status"], second["error"]) == (400, "InvalidRequest")
    assert second["body_bytes"] > 0
    assert "secret" not in caplog.text


def test_behind_a_proxy_that_adds_a_prefix():
    with serving(tiny(), root_path="/llm", api_keys=("one",)) as service:
        assert request(service, "GET", "/health").status_code == 200
        assert request(service, "GET", "/llm/health").status_code == 200
        assert request(service, "GET", "/llm/v1/models").status_code == 401
        headers = {"authorization": "Bearer one"}
        assert request(service, "GET", "/llm/v1/models", headers=headers).status_code == 200


def test_a_fault_of_ours_is_told_by_its_id_alone(service, monkeypatch, caplog):
    def fail(*args, **options):
        raise RuntimeError("secret /path/to/weights")

    monkeypatch.setattr(service.engine, "make", fail)
    for streams in (False, True):
        response = post(service, CHAT, asks("x", stream=streams), headers={"x-request-id": "fault-1"})
        error = response.json()["error"]
        assert (response.status_code, error["type"], error["code"]) == (500, "server_error", "internal_error")
        assert "fault-1" in error["message"]
        assert "secret" not in response.text
    assert "secret /path/to/weights" in caplog.text


def test_a_full_engine_says_when_to_come_again(service, monkeypatch):
    def full(*args, **options):
        raise EngineFull("full; send it again in a while.")

    monkeypatch.setattr(service.engine, "events", full)
    response = post(service, CHAT, asks("x"))
    assert (response.status_code, response.headers["retry-after"]) == (503, "1")
    assert response.json()["error"]["type"] == "server_error"


def test_a_server_that_drains_or_has_no_engine_is_not_ready():
    with serving(tiny()) as service:
        service.engine._is_draining = True
        assert request(service, "GET", "/ready").status_code == 503
        assert request(service, "GET", "/health").status_code == 200
        assert post(service, CHAT, asks("x")).status_code == 503
        service.engine.close()
        assert request(service, "GET", "/health").status_code == 503
        assert request(service, "GET", "/ready").status_code == 503


def test_metrics_count_what_was_done():
    with serving(tiny()) as service:
        usage = answer(service, CHAT, asks("Hello"))["usage"]
        refused(service, CHAT, asks("x", temprature=1))
        refused(service, EMBEDDINGS, {"input": "x"}, 404)
        for i in range(3):
            request(service, "GET", f"/nope/{i}")
        text = request(service, "GET", "/metrics").text
        found = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
        name = 'model_name="tiny"'
        assert float(found[f"vlmfx:prompt_tokens_total{{{name}}}"]) == usage["prompt_tokens"]
        assert float(found[f"vlmfx:generation_tokens_total{{{name}}}"]) == usage["completion_tokens"]
        assert float(found[f"vlmfx:time_to_first_token_seconds_count{{{name}}}"]) == 1
        assert float(found[f"vlmfx:compiles_total{{{name}}}"]) == 0
        assert float(found[f"vlmfx:num_requests_running{{{name}}}"]) == 0
        assert float(found[f'vlmfx:request_errors_total{{kind="InvalidRequest",{name},status="400"}}']) == 1
        assert float(found[f'vlmfx:http_requests_total{{{name},path="{CHAT}",status="200"}}']) == 1
        assert float(found[f'vlmfx:http_requests_total{{{name},path="other",status="404"}}']) == 3
        assert not any("nope" in key for key in found)
    with serving(tiny(), metrics_prefix="vllm") as service:
        assert "vllm:num_requests_waiting" in request(service, "GET", "/metrics").text


def metrics_of(service):
    text = request(service, "GET", "/metrics").text
    return {
        re.sub(r',?model_name="[^"]*"', "", key).replace("{,", "{"): float(value)
        for key, value in (line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    }


def test_metrics_tell_of_pictures_fetches_and_programs():
    with serving(tiny()) as service:
        body = asks("What is it?", noise_url())
        for _ in range(3):
            answer(service, CHAT, body)
        refused(service, CHAT, asks("x", "http://127.0.0.1/x.png"))
        refused(service, CHAT, asks("x", "gopher://127.0.0.1/x.png"))
        found = metrics_of(service)
        assert found["vlmfx:encoder_items_total{}"] == 1
        assert 0 < found["vlmfx:encoder_seconds_total{}"] < 10
        assert found["vlmfx:encoder_cache_queries_total{}"] == 3
        assert found["vlmfx:encoder_cache_hits_total{}"] == 2
        assert found['vlmfx:media_fetch_seconds_count{scheme="data"}'] == 3
        assert found['vlmfx:media_refusals_total{scheme="http"}'] == 1
        assert found['vlmfx:media_refusals_total{scheme="other"}'] == 1
        assert 'vlmfx:media_refusals_total{scheme="data"}' not in found
        assert found['vlmfx:program_runs_total{program="encode"}'] == 1
        assert found['vlmfx:program_size_total{program="decode"}'] == 3 * 11
        assert found['vlmfx:request_prepare_seconds_count{fetches="false"}'] == 3


def test_metrics_tell_what_buckets_add():
    plan = Plan(encode=(64,), prefill=(256,), decode=(4,), max_segments=4, max_seqs=4)
    with serving(tiny(), {"plan": plan, "backend": "inductor"}) as service:
        executor = service.engine.engine.executor
        steps = StepCounter(Observer(), executor)
        steps._count("decode", 3)
        steps._count("prefill", 300, 1)
        steps._count("prefill", 200, 1)
        assert (steps.hits, steps.misses) == ({"decode": 1, "prefill": 1}, {"prefill": 1})
        assert steps.padding == {"decode": 1, "prefill": 56}


def test_the_holders_of_several_keys_share_no_cache_and_pass_nobody():
    ask = asks("A question that is long enough to fill blocks of the cache, and more than one. " * 2, noise_url())
    with serving(tiny(), api_keys=("one", "two")) as service:
        counters = service.engine.engine.counters
        found = []
        for key in ("one", "one", "two", "two"):
            before = counters.num_cached, counters.num_encoded
            response = post(service, CHAT, ask, headers={"Authorization": f"Bearer {key}"})
            assert response.status_code == 200
            found.append((counters.num_cached > before[0], counters.num_encoded - before[1]))
        assert found == [(False, 1), (True, 0)] * 2
        headers = {"Authorization": "Bearer one"}
        response = post(service, CHAT, {**ask, "priority": -1}, headers=headers)
        assert (response.status_code, response.json()["error"]["param"]) == (400, "priority")
        assert post(service, CHAT, {**ask, "priority": 1}, headers=headers).status_code == 200
    with serving(tiny(), api_keys=("one",)) as service:
        assert post(service, CHAT, {**ask, "priority": -1}, headers=headers).status_code == 200
