"""token_logprobs: kernels equal the reference, the reference a sort; ranks are those of a total order."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ops.kernels import Kernel, Mutant, assert_equal, kernels_of
from tests.strategies import SEEDS, normal, strided
from vlmfx.errors import ShapeError
from vlmfx.ops.token_logprobs import OP, reference, token_logprobs

# None of these takes a token from the row's best: where there are too few, an id is read that is none.
MUTANTS = [
    Mutant("triton/token_logprobs.py", "tl.where(mosts == -float", "tl.where(mosts != -float"),
    Mutant("triton/token_logprobs.py", "x = tl.where(x != x, -float", "x = tl.where(x != x, float"),
    Mutant("triton/token_logprobs.py", "chunk = row * 2 * CHUNKS + tl", "chunk = row * CHUNKS + tl"),
    Mutant("triton/token_logprobs.py", "parts * tl.exp(mosts - base)", "parts"),
    Mutant("triton/token_logprobs.py", "tl.sum((place > own)", "tl.sum((place >= own)"),
    Mutant("mlu/kernels/token_logprobs.mlu", "above += x[i] == own", "above += x[i] > own"),
    Mutant("mlu/kernels/token_logprobs.mlu", "list.values[at - 1] < value; --at", "list.values[at - 1] <= value; --at"),
    Mutant("mlu/kernels/token_logprobs.mlu", "seen.sum *= small[0];", ""),
    Mutant("mlu/kernels/token_logprobs.mlu", "add_to(list, value, first + i);", "add_to(list, value, i);"),
    Mutant("mlu/kernels/token_logprobs.mlu", "        has_nan = true;", ""),
    Mutant("mlu/kernels/token_logprobs.mlu", "first + i > after);", "first + i >= after);"),
    Mutant("mlu/kernels/logits.h", "x[i] = -INFINITE;", "x[i] = 0.f;"),
    Mutant("mlu/kernels/logits.h", "return sum != sum;", "return false;"),
    Mutant("mlu/kernels/logits.h", "__bang_add(buf, x, x + n / 2, n / 2)", "__bang_add(buf, x, x, n / 2)"),
]

FLOATS = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])


@st.composite
def cases(
    draw: st.DrawFn, vocabs: tuple[int, ...] = (1, 2, 7, 63, 64, 65, 130, 200), floats: st.SearchStrategy[Any] = FLOATS
) -> tuple[Any, ...]:
    """No rows, one token, a chunk of 64 and a token more, several; ties, NaN, infinities, nothing; all tokens, and no others."""
    rows, vocab = draw(st.integers(0, 3)), draw(st.sampled_from(vocabs))
    x = normal(draw(SEEDS), rows, vocab) * draw(st.sampled_from([1.0, 10.0]))
    if draw(st.booleans()):
        x = (x * 2).round() / 2
    for row in range(rows):
        spoilt = draw(st.sampled_from([None] * 4 + [math.nan, math.inf, -math.inf]))
        if spoilt is not None:
            x[row, draw(st.integers(0, vocab - 1))] = spoilt
        if draw(st.integers(0, 9)) == 0:
            x[row] = -math.inf
    ids = torch.tensor([draw(st.integers(0, vocab - 1)) for _ in range(rows)], dtype=torch.int64)
    num = min(vocab, draw(st.sampled_from([0, 1, 2, 5, 20, 64, 65, 1000])))
    return draw(strided(x, draw(floats))), ids, num


def telling_cases() -> st.SearchStrategy[tuple[Any, ...]]:
    """Of dtypes that all kernels take, and more often of several chunks."""
    floats = st.sampled_from([torch.float32, torch.float16])
    return st.booleans().flatmap(lambda is_large: cases((130, 200), floats) if is_large else cases(floats=floats))


def mlu_case() -> tuple[tuple[Any, ...], dict[str, int]]:
    """32 rows of Qwen2-VL-7B's vocabulary and the 20 most likely; taken: how many of a row are at some time among them, to expect."""
    vocab, num = 152_064, 20
    taken = int(num * (1 + math.log(vocab / 512)))
    args = (normal(0, 32, vocab, dtype=torch.float16), torch.arange(32) * 4001, num)
    return args, {"rows": 32, "vocab": vocab, "taken": taken}


def check(kernel: Kernel, case: tuple[Any, ...]) -> None:
    """The kernel gives what the reference gives."""
    assert_equal(OP, kernel(*case), reference(*case))


@pytest.mark.parametrize("kernel", kernels_of(OP))
@settings(max_examples=50)
@given(case=cases())
def test_kernel_equals_reference(kernel, case):
    check(kernel, case)


@given(case=cases())
def test_the_reference_by_definition(case):
    logits, sampled, num = case
    ids, logprobs, rank = reference(*case)
    for row, x in enumerate(logits):
        values = [-math.inf if math.isnan(v) else v for v in x.tolist()]
        order = sorted(range(len(values)), key=lambda i: (-values[i], i))
        assert ids[row].tolist() == [sampled[row].item(), *order[:num]]
        assert rank[row] == 1 + order.index(sampled[row].item())
        torch.testing.assert_close(logprobs[row], x.float().log_softmax(0)[ids[row]], equal_nan=True)


@pytest.mark.parametrize("kernel", kernels_of(OP))
@settings(max_examples=15)
@given(case=cases(), data=st.data())
def test_batch_mates_and_row_order_never_show(kernel, case, data):
    logits, ids, num = case
    order = torch.tensor(data.draw(st.permutations(range(len(ids)))), dtype=torch.int64)
    padding = data.draw(st.integers(0, 2))
    padded = torch.cat([logits[order], logits.new_full((padding, logits.shape[1]), math.nan)])
    got = kernel(padded, torch.cat([ids[order], ids.new_zeros(padding)]), num)
    for mine, right in zip(got, kernel(*case), strict=True):
        torch.testing.assert_close(mine[: len(ids)], right[order], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kernel", kernels_of(OP))
@settings(max_examples=15)
@given(case=cases())
def test_fewer_are_the_first_of_more(kernel, case):
    logits, ids, num = case
    few, more = kernel(logits, ids, num // 2), kernel(*case)
    for mine, right in zip(few[:2], more[:2], strict=True):
        torch.testing.assert_close(mine, right[:, : num // 2 + 1], rtol=1e-5, atol=1e-5, equal_nan=True)
    assert torch.equal(few[2], more[2])


@pytest.mark.parametrize("kernel", kernels_of(OP))
def test_probabilities_of_all_tokens_sum_to_one(kernel):
    logits, ids = normal(3, 2, 60), torch.tensor([4, 59])
    _, logprobs, _ = kernel(logits, ids, 60)
    torch.testing.assert_close(logprobs[:, 1:].exp().sum(1), torch.ones(2))


def test_the_result_is_no_view_of_the_ids():
    ids = torch.tensor([2])
    chosen, _, _ = token_logprobs(torch.zeros(1, 3), ids, 0)
    chosen[0, 0] = 1
    assert ids.item() == 2


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ((torch.zeros(3), torch.zeros(3), 0), r"logits has shape \(3,\) but needs shape \(rows, vocab\)"),
        ((torch.zeros(3, 2).int(), torch.zeros(3), 0), r"logits has torch.int32 but needs a float dtype"),
        ((torch.zeros(3, 2), torch.zeros(2).long(), 0), r"ids has shape \(2,\) but needs shape \(3,\)"),
        ((torch.zeros(3, 2), torch.zeros(3), 0), r"ids has torch.float32 but needs torch.int64"),
        ((torch.zeros(3, 2), torch.zeros(3).long(), 3), r"num has 3 but needs 0 to 2, as many as"),
    ],
)
def test_wrong_inputs_are_named(args, said):
    with pytest.raises(ShapeError, match=said):
        token_logprobs(*args)
