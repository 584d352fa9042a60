"""Activations, merge and the patch ops equal their definitions, written as loops."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.strategies import DTYPES, SEEDS, assert_near, normal
from vlmfx.ops.activation import ACTIVATIONS, gated_activation
from vlmfx.ops.merge import merge
from vlmfx.ops.patches import normalize_patches, pack_patches

EXACT = {
    "gelu": lambda x: 0.5 * x * (1 + math.erf(x / math.sqrt(2))),
    "gelu_pytorch_tanh": lambda x: 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "quick_gelu": lambda x: x / (1 + math.exp(-1.702 * x)),
    "silu": lambda x: x / (1 + math.exp(-x)),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name):
    x = torch.linspace(-8, 8, 201)
    assert_near(ACTIVATIONS[name](x), torch.tensor([EXACT[name](float(v)) for v in x.double()], dtype=torch.float64))


@settings(deadline=None)
@given(rows=st.integers(0, 5), width=st.integers(1, 200), seed=SEEDS, dtype=DTYPES)
def test_gated_activation(rows, width, seed, dtype):
    x = normal(seed, rows, 2 * width, dtype=dtype)
    gate, up = x.double().split(width, 1)
    out = gated_activation(x)
    assert out.shape == (rows, width)
    assert_near(out, gate * torch.sigmoid(gate) * up)


@settings(deadline=None)
@given(tokens=st.integers(1, 20), features=st.integers(1, 6), seed=SEEDS, dtype=DTYPES)
def test_merge(tokens, features, seed, dtype):
    g = torch.Generator().manual_seed(seed)
    embedding, rows = normal(seed, 11, 8, dtype=dtype), normal(seed + 1, features, 8)
    ids = torch.randint(0, 11, (tokens,), generator=g)
    index = torch.randint(-1, features, (tokens,), generator=g)
    out = merge(embedding, ids, rows, index)
    for t in range(tokens):
        expected = embedding[ids[t]] if index[t] < 0 else rows[index[t]].to(dtype)
        assert torch.equal(out[t], expected)
    assert torch.equal(merge(embedding, ids, None, None), embedding[ids])


SIZES = st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 2), st.integers(1, 2), st.integers(1, 4))


@settings(deadline=None)
@given(rows=st.integers(1, 3), cols=st.integers(1, 3), sizes=SIZES, seed=SEEDS)
def test_pack_patches_is_a_loop_over_blocks(rows, cols, sizes, seed):
    n, channels, t, m, p = sizes
    height, width = rows * m * p, cols * m * p
    frames = torch.randint(0, 256, (n, t, height, width, channels), generator=torch.Generator().manual_seed(seed))
    out = pack_patches(frames, p, m)
    expected = []
    for i in range(n):
        for block_row in range(rows):
            for block_col in range(cols):
                for row in range(block_row * m, (block_row + 1) * m):
                    for col in range(block_col * m, (block_col + 1) * m):
                        patch = frames[i, :, row * p : (row + 1) * p, col * p : (col + 1) * p]
                        expected.append(patch.permute(3, 0, 1, 2).flatten())
    assert torch.equal(out, torch.stack(expected))
    blocks = out.view(n, rows, cols, m, m, channels, t, p, p)
    back = blocks.permute(0, 6, 1, 3, 7, 2, 4, 8, 5).reshape(frames.shape)
    assert torch.equal(back, frames)


@settings(deadline=None)
@given(patches=st.integers(1, 5), width=st.integers(1, 20), seed=SEEDS)
def test_normalize_patches(patches, width, seed):
    x = torch.randint(0, 256, (patches, 3 * width), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    mean, std = (0.48, 0.45, 0.40), (0.26, 0.27, 0.28)
    out = normalize_patches(x, mean, std, torch.float32)
    channel = torch.arange(3).repeat_interleave(width)
    exact = (x.double() / 255 - torch.tensor(mean).double()[channel]) / torch.tensor(std).double()[channel]
    torch.testing.assert_close(out.double(), exact, atol=1e-6, rtol=0)
    assert torch.equal(normalize_patches(x, mean, std, torch.bfloat16), out.to(torch.bfloat16))
