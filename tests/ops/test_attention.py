"""Attention equals a loop over tokens and heads in float64; padding is zero, and slot −1 writes nowhere."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.strategies import DTYPES, SEEDS, assert_near, normal
from vlmfx.ops.attention import (
    cache_write,
    paged_decode_attention,
    prefill_attention,
    resolve_slots,
    vision_attention,
)

LENGTHS = st.lists(st.integers(1, 7), min_size=1, max_size=5)


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """One query (heads, D) over keys (T, kv_heads, D), in float64; head h reads KV head h // group."""
    group = q.shape[0] // k.shape[1]
    out = torch.empty(q.shape, dtype=torch.float64)
    for h in range(q.shape[0]):
        scores = k[:, h // group].double() @ q[h].double() * scale
        out[h] = scores.softmax(0) @ v[:, h // group].double()
    return out


@settings(deadline=None, max_examples=60)
@given(
    lengths=LENGTHS,
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    padding=st.integers(0, 3),
    seed=SEEDS,
    dtype=DTYPES,
)
def test_prefill_is_causal_within_each_sequence(lengths, kv_heads, group, padding, seed, dtype):
    tokens = sum(lengths)
    q = normal(seed, tokens + padding, kv_heads * group, 8, dtype=dtype)
    k, v = (normal(seed + i, tokens + padding, kv_heads, 8, dtype=dtype) for i in (1, 2))
    q[tokens:], k[tokens:], v[tokens:] = torch.nan, torch.nan, torch.nan
    out = prefill_attention(q, k, v, tuple(lengths), 0.3)
    assert out.shape == q.shape
    assert (out[tokens:] == 0).all()
    start = 0
    for length in lengths:
        for t in range(start, start + length):
            assert_near(out[t], attend(q[t], k[start : t + 1], v[start : t + 1], 0.3))
        start += length


@settings(deadline=None, max_examples=60)
@given(lengths=LENGTHS, heads=st.integers(1, 3), padding=st.integers(0, 3), seed=SEEDS, dtype=DTYPES)
def test_vision_attends_within_each_segment(lengths, heads, padding, seed, dtype):
    tokens = sum(lengths)
    q, k, v = (normal(seed + i, tokens + padding, heads, 8, dtype=dtype) for i in range(3))
    q[tokens:], k[tokens:], v[tokens:] = torch.nan, torch.nan, torch.nan
    out = vision_attention(q, k, v, tuple(lengths), 0.3)
    assert (out[tokens:] == 0).all()
    start = 0
    for length in lengths:
        for t in range(start, start + length):
            assert_near(out[t], attend(q[t], k[start : start + length], v[start : start + length], 0.3))
        start += length


@settings(deadline=None, max_examples=60)
@given(lengths=LENGTHS, kv_heads=st.integers(1, 3), group=st.integers(1, 3), seed=SEEDS, dtype=DTYPES)
def test_decode_attends_to_each_context(lengths, kv_heads, group, seed, dtype):
    """What lies beyond a context, finite as the cache keeps it, does not count."""
    n, longest = len(lengths), max(lengths)
    q = normal(seed, n, kv_heads * group, 8, dtype=dtype)
    k_cache, v_cache = (normal(seed + i, n, kv_heads, longest, 8, dtype=dtype) for i in (1, 2))
    beyond = torch.arange(longest) >= torch.tensor(lengths)[:, None]
    mask = torch.zeros(beyond.shape, dtype=dtype).masked_fill(beyond, -torch.inf)[:, None, None]
    out = paged_decode_attention(q, k_cache, v_cache, mask, 0.3)
    for i, length in enumerate(lengths):
        k, v = (cache[i, :, :length].transpose(0, 1) for cache in (k_cache, v_cache))
        assert_near(out[i], attend(q[i], k, v, 0.3))
    if min(lengths) == longest:
        torch.testing.assert_close(paged_decode_attention(q, k_cache, v_cache, None, 0.3), out)


@settings(deadline=None, max_examples=60)
@given(blocks=st.integers(1, 4), block_size=st.integers(1, 5), kv_heads=st.integers(1, 3), seed=SEEDS, data=st.data())
def test_cache_write_puts_each_token_into_its_slot(blocks, block_size, kv_heads, seed, data):
    slots = data.draw(st.permutations(range(blocks * block_size)))[: data.draw(st.integers(1, blocks * block_size))]
    written = data.draw(st.lists(st.booleans(), min_size=len(slots), max_size=len(slots)))
    mapping = [slot if is_written else -1 for slot, is_written in zip(slots, written, strict=True)]
    k, v = (normal(seed + i, len(mapping), kv_heads, 4) for i in range(2))
    caches = [normal(seed + 2 + i, blocks, kv_heads, block_size, 4) for i in range(2)]
    expected = [cache.clone() for cache in caches]
    for values, cache in zip((k, v), expected, strict=True):
        for token, slot in enumerate(mapping):
            if slot >= 0:
                cache[slot // block_size, :, slot % block_size] = values[token]
    cache_write(k, v, caches[0], caches[1], resolve_slots(torch.tensor(mapping), block_size))
    assert torch.equal(caches[0], expected[0])
    assert torch.equal(caches[1], expected[1])


def test_slots_of_padding_alone_write_nothing():
    caches = [torch.zeros(2, 1, 3, 4), torch.zeros(2, 1, 3, 4)]
    cache_write(torch.ones(5, 1, 4), torch.ones(5, 1, 4), caches[0], caches[1], resolve_slots(torch.full((5,), -1), 3))
    assert not any(cache.any() for cache in caches)


def test_without_slots_the_last_place_of_each_block_is_written():
    caches = [torch.zeros(2, 1, 3, 4), torch.zeros(2, 1, 3, 4)]
    k, v = normal(0, 2, 1, 4), normal(1, 2, 1, 4)
    cache_write(k, v, caches[0], caches[1], None)
    assert torch.equal(caches[0][:, :, 2], k)
    assert torch.equal(caches[1][:, :, 2], v)
    assert not caches[0][:, :, :2].any()


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_a_mask_in_place_of_the_causal_rule(kv_heads):
    """prefill_attention with a mask of the causal rule is prefill_attention."""
    q, k, v = normal(0, 12, 4, 8), normal(1, 12, kv_heads, 8), normal(2, 12, kv_heads, 8)
    mask = torch.ones(6, 6).tril().bool().expand(2, 1, 6, 6)
    with_mask = prefill_attention(q, k, v, (6, 6), 0.3, mask)
    torch.testing.assert_close(with_mask, prefill_attention(q, k, v, (6, 6), 0.3), atol=1e-5, rtol=1e-5)
