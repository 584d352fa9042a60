"""merge: kernels equal the reference; each row is its own, whole, and what is not asked for is not looked at."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ops.device_asserts import device_asserts
from tests.ops.kernels import Kernel, Mutant, assert_equal, kernels_of
from tests.strategies import DTYPES, SEEDS, normal, strided
from vlmfx.errors import ShapeError
from vlmfx.ops.merge import INTEGERS, OP, merge, reference

MUTANTS = [
    Mutant("triton/merge.py", "if row >= 0:", "if row > 0:"),
    Mutant("triton/merge.py", "inside = col < HIDDEN", "inside = col < HIDDEN - 1"),
    Mutant("triton/merge.py", "row * FEATURE_STRIDE", "row * HIDDEN"),
    Mutant("triton/merge.py", "embedding + word * EMBEDDING_STRIDE", "embedding + word * HIDDEN"),
    Mutant("triton/merge.py", "tl.program_id(1) * COLS + tl.arange", "tl.arange"),
    Mutant("mlu/kernels/merge.mlu", "feature >= 0 ?", "feature > 0 ?"),
    Mutant("mlu/kernels/merge.mlu", "row + col, bytes", "row, bytes"),
    Mutant("mlu/kernels/merge.mlu", "bytes == 8 ?", "bytes == 4 ?"),
    Mutant("mlu/kernels/merge.mlu", "step < steps + 1; ++step", "step < steps; ++step"),
    Mutant("mlu/kernels/merge.mlu", "int share = (tokens + taskDim - 1) / taskDim", "int share = tokens / taskDim"),
    Mutant("mlu/kernels/merge.mlu", "      __sync();\n", ""),
]
WIDTHS = st.one_of(st.integers(1, 70), st.sampled_from([127, 128, 8191, 8192, 8193]))  # up to 8192 a program


@st.composite
def cases(draw: st.DrawFn) -> tuple[Any, ...]:
    """No token, no feature, only features; features of another dtype, and as columns of wider rows; ids out of range where a feature is."""
    tokens, hidden, seed, dtype = draw(st.integers(0, 9)), draw(WIDTHS), draw(SEEDS), draw(DTYPES)
    vocab, num_features = draw(st.integers(1, 7)), draw(st.integers(0, 5))
    g = torch.Generator().manual_seed(seed)
    index = torch.randint(-1, max(num_features, 0), (tokens,), generator=g, dtype=draw(st.sampled_from(INTEGERS)))
    ids = torch.randint(0, vocab, (tokens,), generator=g, dtype=draw(st.sampled_from(INTEGERS)))
    ids = torch.where(index < 0, ids, draw(st.sampled_from([-1, vocab, 2**31 - 1])))
    embedding = draw(strided(normal(seed, vocab, hidden), dtype))
    features = draw(strided(normal(seed + 1, num_features, hidden), draw(st.one_of(st.just(dtype), DTYPES))))
    return embedding, ids, features, index


def check(kernel: Kernel, case: tuple[Any, ...]) -> None:
    """The kernel gives what the reference gives."""
    with device_asserts():
        got = kernel(*case)
    assert_equal(OP, got, reference(*case))


def mlu_case() -> tuple[tuple[Any, ...], dict[str, int]]:
    """A prompt of Qwen2-VL-7B with 256 tokens of text around a picture of as many; of the vocabulary the first thousand."""
    embedding, features = normal(0, 1000, 3584, dtype=torch.float16), normal(1, 256, 3584, dtype=torch.float16)
    ids = torch.randint(0, 1000, (512,), generator=torch.Generator().manual_seed(2))
    text = torch.full((128,), -1)
    return (embedding, ids, features, torch.cat((text, torch.arange(256), text))), {}


@pytest.mark.parametrize("kernel", kernels_of(OP))
@given(case=cases())
def test_kernel_equals_reference(kernel, case):
    check(kernel, case)


@pytest.mark.parametrize("run", [pytest.param(merge, id="cpu"), *kernels_of(OP)])
@settings(max_examples=50)
@given(case=cases())
def test_each_row_is_the_one_asked_for(run, case):
    embedding, ids, features, index = case
    out = run(*case)
    for mine, word, row in zip(out, ids.tolist(), index.tolist(), strict=True):
        assert torch.equal(mine, embedding[word] if row < 0 else features[row].to(embedding.dtype))


@pytest.mark.parametrize("kernel", kernels_of(OP))
@settings(max_examples=50)
@given(case=cases(), pad=st.integers(1, 5))
def test_padding_never_shows(kernel, case, pad):
    embedding, ids, features, index = case
    padded = [torch.nn.functional.pad(t, (0, pad), value=value) for t, value in ((ids, 0), (index, -1))]
    together = kernel(embedding, padded[0], features, padded[1])
    assert torch.equal(together[: len(ids)], kernel(*case))


@pytest.mark.parametrize("kernel", kernels_of(OP))
def test_more_tokens_than_a_core_holds_numbers_of(kernel):
    if kernel.name != "mlu-emulated":
        pytest.skip("only the kernel for mlu holds numbers of many tokens")
    embedding, ids = normal(0, 7, 2), torch.arange(40_000, dtype=torch.int32) % 7
    index = torch.where(torch.arange(40_000) % 5 == 0, torch.arange(40_000) % 3, -1)
    check(kernel, (embedding, ids, normal(1, 3, 2), index))


@pytest.mark.parametrize("kernel", kernels_of(OP))
@pytest.mark.parametrize(("word", "row"), [(3, -1), (-1, -1), (0, 2)])
def test_a_number_out_of_range_is_an_error(kernel, word, row):
    if kernel.device != "cpu":
        pytest.skip("on a GPU only Triton's debug mode looks")
    with pytest.raises(Exception, match=r"beyond (the embedding|features)|out of bounds"), device_asserts():
        kernel(torch.ones(3, 4), torch.tensor([0, word]), torch.ones(2, 4), torch.tensor([1, row]))
    with pytest.raises(IndexError, match=r"out of range"):
        merge(torch.ones(3, 4), torch.tensor([0, word]), torch.ones(2, 4), torch.tensor([1, row]))


def test_without_features_it_is_the_embedding():
    embedding, ids = normal(0, 5, 3), torch.tensor([4, 0, 0])
    assert torch.equal(merge(embedding, ids, None, None), embedding[ids])
    assert torch.equal(merge(embedding, ids, embedding[:0], torch.full((3,), -1)), embedding[ids])


def test_wrong_inputs_are_named():
    embedding, ids, features, index = torch.ones(5, 8), torch.zeros(3).long(), torch.ones(2, 8), torch.zeros(3).long()
    with pytest.raises(ShapeError, match=r"embedding has shape \(8,\) but needs shape \(vocab, hidden\)"):
        merge(embedding[0], ids, features, index)
    with pytest.raises(ShapeError, match=r"ids has shape \(3, 1\) but needs shape \(tokens,\)"):
        merge(embedding, ids[:, None], features, index)
    with pytest.raises(ShapeError, match=r"features has shape \(2, 7\) but needs shape \(features, 8\)"):
        merge(embedding, ids, features[:, :7], index)
    with pytest.raises(ShapeError, match=r"feature_index has shape \(2,\) but needs shape \(3,\), as ids has"):
        merge(embedding, ids, features, index[:2])
    with pytest.raises(ShapeError, match=r"feature_index has torch.float32 but needs torch.int32 or torch.int64"):
        merge(embedding, ids, features, index.float())
