"""A trace becomes steps; a bad line is named."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmfx.compile.trace import TraceRequest, num_requests, read_trace, steps
from vlmfx.errors import InvalidRequest, PlanError

REQUESTS = st.lists(
    st.builds(
        TraceRequest,
        num_tokens=st.integers(1, 99),
        num_patches=st.integers(0, 3),
        max_tokens=st.sampled_from([None, 0, 16]),
    ),
    min_size=1,
)


@given(requests=REQUESTS)
def test_a_file_gives_its_requests(requests, tmp_path_factory):
    path = tmp_path_factory.mktemp("trace") / "requests.jsonl"
    lines = [json.dumps({name: v for name, v in vars(request).items() if v is not None}) for request in requests]
    path.write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    assert read_trace(path) == requests


@given(requests=REQUESTS, limit=st.integers(1, 120))
def test_every_token_is_in_a_step(requests, limit):
    found = steps(requests, limit)
    generating = [r for r in requests if not r.is_embedding]
    assert found.get("encode", []) == [r.num_patches for r in requests if r.num_patches]
    assert found.get("pool", []) == [r.num_tokens for r in requests if r.is_embedding]
    assert sum(found.get("prefill", [])) == sum(r.num_tokens for r in generating)
    assert all(1 <= size <= limit for size in found.get("prefill", []))
    assert ("decode" in found) == ("prefill" in found) == (num_requests(requests, "decode") > 0) == bool(generating)
    assert num_requests(requests, "prefill") + num_requests(requests, "pool") == len(requests)


def test_a_long_prompt_is_prefilled_in_chunks():
    requests = [TraceRequest(num_tokens=20, num_patches=7), TraceRequest(num_tokens=16)]
    assert steps(requests, 8) == {"encode": [7], "prefill": [8, 8, 4, 8, 8], "decode": []}
    assert num_requests(requests, "encode") == 1
    with pytest.raises(PlanError, match="max_num_batched_tokens is 0"):
        steps(requests, 0)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "it is not JSON"),
        ("[" * 10**5, "it is not JSON"),
        ("[7]", "it is [7], expected an object"),
        ("{}", "num_tokens is missing"),
        ('{"num_tokens": 0}', "num_tokens is 0, expected a whole number from 1"),
        ('{"num_tokens": 7.0}', "num_tokens is 7.0, expected"),
        ('{"num_tokens": true}', "num_tokens is True, expected"),
        ('{"num_tokens": 4000000000}', "num_tokens is 4000000000, expected"),
        ('{"num_tokens": 7, "num_patches": -4}', "num_patches is -4, expected a whole number from 0"),
        ('{"num_tokens": 7, "max_tokens": null}', "max_tokens is None, expected"),
        ('{"num_tokens": 7, "num_patch": 4}', "no field 'num_patch'"),
    ],
)
def test_a_bad_line_is_named(line, says, tmp_path):
    path = tmp_path / "requests.jsonl"
    path.write_text(f'{{"num_tokens": 7}}\n\n{line}\n', encoding="utf-8")
    with pytest.raises(InvalidRequest) as caught:
        read_trace(path)
    assert str(caught.value).startswith("trace, line 3: ")
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("content", "says"), [(None, "cannot be read"), (b"\xff", "cannot be read"), (b"\n", "no req")]
)
def test_a_file_without_requests_is_told(content, says, tmp_path):
    path = tmp_path / "requests.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InvalidRequest, match=says):
        read_trace(path)
