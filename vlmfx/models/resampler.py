"""MiniCPM-V's resampler: learned queries read an image of any size, so that each fills the same number of rows.

Source: openbmb/MiniCPM-V-2_6: resampler.py; the queries are those of BLIP-2 and Qwen-VL, arXiv:2308.12966."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmfx.models.layers import layer_norm_specs, linear, linear_specs
from vlmfx.models.validate import multiple_of, positive_int
from vlmfx.ops.layer_norm import layer_norm
from vlmfx.ops.rotary import inverse_frequencies
from vlmfx.ops.vision_attention import vision_attention
from vlmfx.tree import Tree
from vlmfx.weights import spec

HEAD_DIM, EPS = 128, 1e-6  # which no config.json says


@dataclass(frozen=True, kw_only=True)
class ResamplerConfig:
    """num_queries: rows an image fills; hidden_size: their width, the language model's; input_size: the tower's."""

    num_queries: int
    hidden_size: int
    input_size: int

    def __post_init__(self) -> None:
        positive_int("query_num", self.num_queries)
        multiple_of("hidden_size", self.hidden_size, "the resampler's head size", HEAD_DIM)

    @property
    def num_heads(self) -> int:
        return self.hidden_size // HEAD_DIM


def param_specs(cfg: ResamplerConfig, at: str) -> Tree:
    """Specs of the resampler whose checkpoint names begin with `at`; it has no input projection where the widths are equal."""
    d = cfg.hidden_size
    specs = {
        "query": spec(f"{at}.query", (cfg.num_queries, d), (None, "embed")),
        "query_norm": layer_norm_specs(f"{at}.ln_q", d),
        "input_norm": layer_norm_specs(f"{at}.ln_kv", d),
        "qkv": {
            "weight": spec(f"{at}.attn.in_proj_weight", (3 * d, d), ("heads", "embed")),
            "bias": spec(f"{at}.attn.in_proj_bias", (3 * d,), ("heads",), init="zeros"),
        },
        "out": linear_specs(f"{at}.attn.out_proj", d, d, ("embed", "heads")),
        "post_norm": layer_norm_specs(f"{at}.ln_post", d),
        "proj": spec(f"{at}.proj", (d, d), (None, "embed")),
    }
    if cfg.input_size != d:
        specs["input"] = spec(f"{at}.kv_proj.weight", (d, cfg.input_size), ("embed", None))
    return specs


def sincos(cfg: ResamplerConfig, positions: Tensor, dtype: torch.dtype) -> Tensor:
    """positions (P, 2), row and column → (P, hidden), computed in float32: sines then cosines of the column, then of the row."""
    inv = inverse_frequencies(cfg.hidden_size // 2, 10000.0, positions.device)
    angles = positions.flip(1)[..., None].float() * inv
    return torch.cat((angles.sin(), angles.cos()), -1).flatten(1).to(dtype)


def resample(params: Tree, cfg: ResamplerConfig, x: Tensor, positions: Tensor, cu_seqlens: Tensor) -> Tensor:
    """x (P, input_size), positions (P, 2) row and column → (segments·num_queries, hidden), segment after segment of cu_seqlens.

    Keys know where their patch lies, values do not."""
    d, shape = cfg.hidden_size, (-1, cfg.num_heads, HEAD_DIM)
    if "input" in params:
        x = F.linear(x, params["input"])
    x, query = _norm(params["input_norm"], x), _norm(params["query_norm"], params["query"])
    weights, biases = params["qkv"]["weight"].split(d), params["qkv"]["bias"].split(d)
    inputs = (query, x + sincos(cfg, positions, x.dtype), x)
    q, k, v = (F.linear(t, w, b).view(shape) for t, w, b in zip(inputs, weights, biases, strict=True))
    segments = len(cu_seqlens) - 1
    cu_queries = torch.arange(segments + 1, dtype=torch.int32, device=x.device) * len(q)
    out = vision_attention(q.repeat(segments, 1, 1), k, v, cu_queries, cu_seqlens, HEAD_DIM**-0.5).view(-1, d)
    return _norm(params["post_norm"], linear(params["out"], out)) @ params["proj"]


def _norm(p: Tree, x: Tensor) -> Tensor:
    return layer_norm(x, p["weight"], p["bias"], EPS)
