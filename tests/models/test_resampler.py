"""resampler: torch's own MultiheadAttention and a table of sines written out, slice by slice, give the same rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.strategies import SEEDS, normal
from vlmfx import weights
from vlmfx.errors import CheckpointError
from vlmfx.models import resampler
from vlmfx.models.resampler import ResamplerConfig
from vlmfx.models.vision_inputs import cumulative
from vlmfx.weights import source_names

SIZES = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=5)


def config(hidden_size: int = 256, input_size: int = 24, num_queries: int = 5) -> ResamplerConfig:
    return ResamplerConfig(num_queries=num_queries, hidden_size=hidden_size, input_size=input_size)


def random_params(cfg: ResamplerConfig, seed: int = 3) -> tuple[Any, dict[str, Tensor]]:
    """Parameters with biases and norms random too, and the same by their stored names."""
    specs = resampler.param_specs(cfg, "r")
    stored = {
        name: normal(seed + i, *shape) * shape[-1] ** -0.5
        for i, (name, shape) in enumerate(sorted({s for spec in _leaves(specs) for s in spec.sources}))
    }
    return weights.load(specs, lambda name: stored[name], dtype=torch.float32), stored


def _leaves(specs: Any) -> list[Any]:
    return [leaf for value in specs.values() for leaf in (_leaves(value) if isinstance(value, dict) else [value])]


def positions_of(sizes: Sequence[tuple[int, int]]) -> Tensor:
    return torch.tensor([(row, column) for height, width in sizes for row in range(height) for column in range(width)])


def sines(place: int, width: int) -> list[float]:
    """width / 2 sines, then as many cosines."""
    angles = [place / 10000 ** (2 * i / width) for i in range(width // 2)]
    return [*map(math.sin, angles), *map(math.cos, angles)]


def reference(stored: dict[str, Tensor], cfg: ResamplerConfig, x: Tensor, size: tuple[int, int]) -> Tensor:
    """The rows of one slice, by torch's modules."""
    d = cfg.hidden_size
    attention = nn.MultiheadAttention(d, d // 128, batch_first=True)
    attention.load_state_dict({k.removeprefix("r.attn."): v for k, v in stored.items() if k.startswith("r.attn.")})
    norm = {
        n: (lambda t, n=n: F.layer_norm(t, (d,), stored[f"r.{n}.weight"], stored[f"r.{n}.bias"], 1e-6))
        for n in ("ln_q", "ln_kv", "ln_post")
    }
    kv = norm["ln_kv"](x @ stored["r.kv_proj.weight"].T if "r.kv_proj.weight" in stored else x)
    where = torch.tensor([sines(c, d // 2) + sines(r, d // 2) for r in range(size[0]) for c in range(size[1])])
    out, _ = attention(norm["ln_q"](stored["r.query"])[None], (kv + where)[None], kv[None])
    return norm["ln_post"](out[0]) @ stored["r.proj"]


@settings(deadline=None, max_examples=30)
@given(sizes=SIZES, seed=SEEDS, input_size=st.sampled_from([24, 256]))
@torch.no_grad()
def test_equals_torch_for_slices_of_any_sizes(sizes, seed, input_size):
    cfg = config(input_size=input_size)
    params, stored = random_params(cfg)
    lens = tuple(height * width for height, width in sizes)
    x = normal(seed, sum(lens), input_size)
    mine = resampler.resample(params, cfg, x, positions_of(sizes), cumulative(lens))
    assert mine.shape == (len(sizes) * cfg.num_queries, cfg.hidden_size)
    parts = [reference(stored, cfg, part, size) for part, size in zip(x.split(lens), sizes, strict=True)]
    torch.testing.assert_close(mine, torch.cat(parts), atol=2e-5, rtol=2e-5)


def test_sines_of_a_far_place_keep_their_digits():
    """float32 places up to the 1,024 patches of the thinnest image; the error of an angle grows with it."""
    cfg = config()
    found = resampler.sincos(cfg, torch.tensor([[3, 1023], [1023, 0]]), torch.float32)
    wanted = torch.tensor([sines(1023, 128) + sines(3, 128), sines(0, 128) + sines(1023, 128)])
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)
    assert (
        resampler.sincos(cfg, torch.tensor([[0, 257]]), torch.bfloat16)[0, 0] == torch.tensor(math.sin(257)).bfloat16()
    )


def test_equal_widths_need_no_input_projection():
    names = {kind: source_names(resampler.param_specs(config(input_size=kind), "r")) for kind in (24, 256)}
    assert names[24] - names[256] == {"r.kv_proj.weight"}
    assert names[256] < names[24]


@pytest.mark.parametrize(("change", "key"), [({"hidden_size": 192}, "hidden_size"), ({"num_queries": 0}, "query_num")])
def test_config_names_the_wrong_key(change, key):
    with pytest.raises(CheckpointError, match=key):
        config(**change)
