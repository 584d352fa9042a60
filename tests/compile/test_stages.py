"""Stages: what lowering tells of a function, and what it refuses, before anything is compiled."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

import vlmfx
from tests.compile.functions import mlp, mlp_args, needs_compiler, step, step_args
from vlmfx.compile.abstract import ShapeDtype
from vlmfx.compile.stages import jit
from vlmfx.errors import CompileError, ShapeError
from vlmfx.models import decoder
from vlmfx.models.layers import Batch
from vlmfx.models.vision_inputs import cumulative
from vlmfx.tree import tree_map
from vlmfx.weights import abstract

pytestmark = needs_compiler
X = torch.ones(3)


def test_the_text_names_inputs_and_ops():
    text = jit(step, static=0, donate="cache").lower(*step_args()).as_text()
    assert "# tensors_0: qkv\n" in text
    assert "# tensors_3: cache[0][0]\n" in text
    assert "# tensors_5: batch.context_lens\n" in text
    assert "torch.ops.vlmfx.rotary_cache_write.default(" in text
    assert "torch.ops.vlmfx.paged_decode_attention.default(" in text


def test_a_decoder_lowers_from_shapes_alone():
    cfg = decoder.DecoderConfig(
        vocab_size=1 << 30, hidden_size=4096, intermediate_size=11008, num_layers=2, num_heads=32, num_kv_heads=32, head_dim=128,
        rms_norm_eps=1e-6, rope_theta=1e4, max_position_embeddings=4096,
    )  # fmt: skip
    params = abstract(decoder.param_specs(cfg, "model", "head"), dtype=torch.bfloat16)
    kv = ShapeDtype((1 << 20, 32, 16, 128), torch.bfloat16)
    batch = Batch(cu_seqlens=cumulative([5, 2]), slot_mapping=torch.zeros(7, dtype=torch.int32))
    x, positions = ShapeDtype((7, 4096), torch.bfloat16), torch.arange(7)
    lowered = jit(decoder.forward, static="cfg", donate="cache").lower(params, cfg, x, positions, [(kv, kv)] * 2, batch)
    matmuls = 2 * 7 * 4096 * (4 * 4096 + 3 * 11008) * 2
    assert matmuls < lowered.cost_analysis().flops < 1.01 * matmuls
    memory = lowered.compile("eager").memory_analysis()
    assert memory.argument > 2 * (1 << 30) * 4096 * 2
    assert memory.output == 7 * 4096 * 2


def test_a_function_runs_eagerly_whatever_its_result():
    def fn(x: Tensor, flag: bool, more: Any = None) -> Any:
        return x if flag else (x + 1, x, None)

    for flag in (True, False):
        out = jit(fn).lower(X, flag).compile("eager")(X, flag)
        expected = fn(X, flag)
        assert out is X if flag else (torch.equal(out[0], expected[0]) and out[1] is X and out[2] is None)
    with pytest.raises(CompileError, match=r"^fn: flag is True but was lowered as False"):
        jit(fn).lower(X, False).compile("eager")(X, True)


def test_static_arguments_are_fixed_and_not_passed():
    params, cfg, x = mlp_args()
    for static in ("cfg", 1, ["cfg"], -3):
        assert jit(mlp, static=static).static == {"cfg"}
    program = jit(mlp, static="cfg").lower(params, cfg, x).compile("eager")
    torch.testing.assert_close(program(params, x), mlp(params, cfg, x))
    bound = functools.partial(mlp, params)
    assert jit(bound, static=0).lower(cfg, x).signature.paths == ["x"]


def test_names_that_the_function_does_not_have_are_refused():
    for option in ({"static": "config"}, {"static": 4}, {"donate": ["x", "cache"]}):
        with pytest.raises(
            CompileError,
            match=r"^mlp: (static|donate) names ('config'|4|'cache'), .* use one of params, cfg, x, scale\.$",
        ):
            jit(mlp, **option)


def test_a_call_that_does_not_fit_the_function_is_refused():
    params, cfg, x = mlp_args()
    with pytest.raises(
        CompileError,
        match=r"^mlp: missing a required argument: 'x'; pass .*\(params, cfg, x, scale\) in order\.$",
    ):
        jit(mlp).lower(params, cfg)
    with pytest.raises(CompileError, match=r"^mlp: too many positional arguments; pass"):
        jit(mlp).lower(params, cfg, x, x, x)
    with pytest.raises(ShapeError, match=r"^rms_norm: weight has shape \(8,\) but needs shape \(5,\)"):
        jit(mlp, static="cfg").lower(params, cfg, x[:, :5])


def test_a_write_to_what_is_not_donated_is_refused():
    with pytest.raises(CompileError) as caught:
        jit(step, static="cfg").lower(*step_args())
    assert str(caught.value) == (
        'step: it writes cache[0][0] in place but cache is not donated; pass donate="cache" to jit, or do not write it.'
    )


def by_view(a: Tensor, b: Tensor) -> Tensor:
    b.view(-1)[1:].mul_(2)
    return a + 1


def by_part(a: Tensor, b: Tensor) -> Tensor:
    b.chunk(2)[1].unsqueeze(0).copy_(a[:1])
    return a + 1


def by_index(a: Tensor, b: Tensor) -> Tensor:
    b[a > 0] = 1
    return a + 1


def by_list(a: Tensor, b: Tensor) -> Tensor:
    torch._foreach_add_([b.detach()], 1.0)
    return a + 1


def by_out(a: Tensor, b: Tensor) -> Tensor:
    return torch.add(a, 1, out=b)


def after_a_copy(a: Tensor, b: Tensor) -> Tensor:
    return a.clone().add_(1) + b.contiguous().clone().mul_(2)


@pytest.mark.parametrize("fn", [by_view, by_part, by_index, by_list, by_out])
def test_every_way_of_writing_is_seen(fn):
    jit(fn, donate="b").lower(X, X)
    with pytest.raises(CompileError, match=rf"^{fn.__name__}: it writes b in place"):
        jit(fn, donate="a").lower(X, X)


def test_what_is_written_may_be_the_functions_own():
    jit(after_a_copy).lower(X, X)


@pytest.mark.parametrize(
    ("fn", "op"),
    [
        (lambda x: x * x.sum().item(), "aten.item"),
        (lambda x: x.nonzero(), "aten.nonzero"),
        (lambda x: x[x > 0], "aten"),
        (lambda x: x.tolist(), "the result"),
        (lambda x: x if x.sum() > 0 else -x, "a condition or a loop"),
        (lambda x: sum(x for _ in range(int(x[0]))), "a condition or a loop"),
    ],
)
def test_what_depends_on_values_is_refused(fn, op):
    with pytest.raises(
        CompileError, match=rf"^<lambda>: {op}.* depends on the values of tensors; work it out on the host"
    ):
        jit(fn).lower(X)


def test_constants_are_held_and_counted():
    table = torch.arange(3.0)
    lowered = vlmfx.jit(lambda x: x + table).lower(X)
    program = lowered.compile("eager")
    assert torch.equal(program(X), X + table)
    assert program.memory_analysis() == (12, 12, 12, None)


def test_an_old_torch_is_refused(monkeypatch):
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.10.1"))
    with pytest.raises(CompileError, match=r"^mlp: torch is 2\.10\.1 but programs need 2\.11"):
        jit(mlp).lower(*mlp_args())


def test_lowering_leaves_the_arguments_alone():
    args = step_args()
    before = tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, args[3])
    jit(step, static="cfg", donate="cache").lower(*args)
    torch.testing.assert_close(args[3], before)
