"""What else computes an op on a GPU, on the same tensors: the reference eager and compiled, and torch's attentions.

A rival gets its operands in the form it likes best (a paged cache gathered, heads repeated) outside its time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from op_cases import Args
from torch import Tensor

from vlmfx.ops.registry import Cost, Op, nbytes

SDPA: Any = F.scaled_dot_product_attention  # its stub knows no keywords by dictionary


class Run(NamedTuple):
    """A call that is timed, and what makes the op's output of the call's."""

    call: Callable[[], Any]
    read: Callable[[Any], Any] = lambda out: out


@dataclass(frozen=True)
class Rival:
    """prepare raises where the rival cannot serve these arguments."""

    name: str
    prepare: Callable[[Args], Run]
    is_compiled: bool = False  # costs seconds before it runs
    is_weak: bool = False  # not expected to be the best of them


def rivals_of(op: Op) -> list[Rival]:
    """All rivals of an op, the eager reference first."""
    eager = Rival("eager", lambda args: Run(partial(op.reference, *args)))
    compiled = Rival("compiled", partial(_compiled, op), is_compiled=True)
    return [eager, compiled, *RIVALS.get(op.name, [])]


def cost_of(op: Op, args: Args) -> Cost:
    """The op's cost, and for attention that of the lengths at hand."""
    return PACK[op.name](args).cost if op.name in PACK else op.cost(*args)


def _compiled(op: Op, args: Args) -> Run:
    return Run(partial(_once_compiled(op.reference), *args))


@cache
def _once_compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """One wrapper for all sets of operands of a call."""
    return torch.compile(function, dynamic=False)


def _torch_rms_norm(args: Args) -> Run:
    x, weight, eps = args
    return Run(lambda: F.rms_norm(x, weight.shape, weight, eps))


@dataclass(frozen=True)
class Packed:
    """An attention of any of our ops as segments of dense keys: q (tokens, heads, D), k and v (keys, kv_heads, D), lengths of both.

    Queries are the last of their segment's positions; window 0 is none."""

    q: Tensor
    k: Tensor
    v: Tensor
    q_lens: list[int]
    k_lens: list[int]
    scale: float
    is_causal: bool
    window: int

    @property
    def groups(self) -> int:
        return self.q.shape[1] // self.k.shape[1]

    @property
    def cost(self) -> Cost:
        """What these lengths take; an op's own cost, which knows shapes only, is that of the longest that fit."""
        pairs = keys = 0
        for queries, length in zip(self.q_lens, self.k_lens, strict=True):
            seen = [min(i, self.window or i) for i in range(length - queries + 1, length + 1)]
            pairs += sum(seen) if self.is_causal else queries * length
            keys += min(length, queries + self.window - 1) if self.window else length
        _, heads, head_dim = self.q.shape
        return Cost(
            flops=4 * pairs * heads * head_dim,
            bytes=2 * nbytes(self.q) + 2 * keys * self.k.shape[1] * head_dim * self.k.element_size(),
        )

    @property
    def is_equal(self) -> bool:
        return len(set(self.q_lens)) == 1 and len(set(self.k_lens)) == 1

    @property
    def is_offset(self) -> bool:
        """Whether torch's causal mask, which starts both at 0, is not ours."""
        return self.is_causal and self.q_lens != self.k_lens and set(self.q_lens) != {1}


def _vision(args: Args) -> Packed:
    q, k, v, cu_q, cu_k, scale = args
    return Packed(q, k, v, cu_q.diff().tolist(), cu_k.diff().tolist(), scale, False, 0)


def _prefill(args: Args) -> Packed:
    q, k, v, cu_seqlens, k_cache, v_cache, block_table, prefix_lens, scale, window = args
    lengths = cu_seqlens.diff().tolist()
    if prefix_lens is None:
        return Packed(q, k, v, lengths, lengths, scale, True, window)
    prefixes = prefix_lens.tolist()
    keys, values = (
        torch.cat([
            part for i, own in enumerate(new.split(lengths)) for part in (_dense(cache, block_table, i, prefixes[i]), own)
        ])
        for cache, new in ((k_cache, k), (v_cache, v))
    )  # fmt: skip
    totals = [a + b for a, b in zip(lengths, prefixes, strict=True)]
    return Packed(q, keys, values, lengths, totals, scale, True, window)


def _decode(args: Args) -> Packed:
    q, k_cache, v_cache, block_table, context_lens, _, _, scale, window = args
    lengths = context_lens.tolist()
    keys, values = (
        torch.cat([_dense(cache, block_table, i, n) for i, n in enumerate(lengths)]) for cache in (k_cache, v_cache)
    )
    return Packed(q, keys, values, [1] * len(q), lengths, scale, True, window)


def _dense(cache: Tensor, block_table: Tensor | None, sequence: int, length: int) -> Tensor:
    """The first rows of a sequence, (length, kv_heads, D)."""
    blocks = cache[sequence : sequence + 1] if block_table is None else cache[block_table[sequence].long()]
    return blocks.transpose(1, 2).flatten(0, 1)[:length]


def _sdpa(backend: str, is_repeated: bool, packed: Packed) -> Run:
    """One call for all segments, which must be equally long."""
    if not packed.is_equal or packed.is_offset or packed.window:
        raise ValueError("segments differ")
    num = len(packed.q_lens)
    q, k, v = (t.unflatten(0, (num, -1)).transpose(1, 2) for t in _heads(packed, is_repeated))
    is_causal = packed.is_causal and packed.q_lens[0] > 1
    call = partial(
        _with_backend, backend, q, k, v, scale=packed.scale, is_causal=is_causal, enable_gqa=packed.groups > 1
    )
    return Run(call, lambda out: out.transpose(1, 2).flatten(0, 1))


def _sdpa_by_segment(is_repeated: bool, packed: Packed) -> Run:
    """A call a segment, torch choosing the backend."""
    if len(packed.q_lens) == 1 or packed.is_offset or packed.window:
        raise ValueError("a segment alone")
    q, k, v = _heads(packed, is_repeated)
    parts = [
        t.transpose(0, 1)[None].split(n, 2) for t, n in ((q, packed.q_lens), (k, packed.k_lens), (v, packed.k_lens))
    ]
    is_causal = packed.is_causal and max(packed.q_lens) > 1

    def call() -> list[Tensor]:
        return [
            SDPA(*qkv, scale=packed.scale, is_causal=is_causal, enable_gqa=packed.groups > 1)
            for qkv in zip(*parts, strict=True)
        ]

    return Run(call, lambda outs: torch.cat(outs, 2)[0].transpose(0, 1))


def _heads(packed: Packed, is_repeated: bool) -> tuple[Tensor, Tensor, Tensor]:
    if not is_repeated:
        return packed.q, packed.k, packed.v
    if packed.groups == 1:
        raise ValueError("nothing to repeat")
    return packed.q, packed.k.repeat_interleave(packed.groups, 1), packed.v.repeat_interleave(packed.groups, 1)


def _with_backend(backend: str, *args: Tensor, **options: Any) -> Tensor:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel([getattr(SDPBackend, backend)]):
        return SDPA(*args, **options)


def _cumulative(lengths: Sequence[int], like: Tensor, dtype: torch.dtype = torch.int32) -> Tensor:
    return F.pad(torch.tensor(lengths, device=like.device, dtype=dtype).cumsum(0, dtype=dtype), (1, 0))


def _flash_varlen(packed: Packed) -> Run:
    """Flash attention 2 over packed segments, the op below torch.nn.attention.varlen; its causal mask ends where ours does."""
    cu_q, cu_k = _cumulative(packed.q_lens, packed.q), _cumulative(packed.k_lens, packed.q)
    window = {"window_size_left": packed.window - 1, "window_size_right": 0} if packed.window else {}
    lengths = max(packed.q_lens), max(packed.k_lens)
    call = partial(
        torch.ops.aten._flash_attention_forward,
        packed.q, packed.k, packed.v, cu_q, cu_k, *lengths, 0.0, packed.is_causal, False, scale=packed.scale, **window,
    )  # fmt: skip
    return Run(call, lambda outs: outs[0])


def _jagged(backend: str, packed: Packed) -> Run:
    """SDPA of nested tensors; heads repeated, as it knows no groups."""
    if packed.is_offset or packed.window or packed.q_lens != packed.k_lens:
        raise ValueError("nested tensors know no offset")
    parts = _heads(packed, packed.groups > 1)
    offsets, bounds = _cumulative(packed.q_lens, packed.q, torch.int64), (min(packed.q_lens), max(packed.q_lens))
    q, k, v = (
        torch.nested.nested_tensor_from_jagged(
            t.contiguous(), offsets, min_seqlen=bounds[0], max_seqlen=bounds[1]
        ).transpose(1, 2)
        for t in parts
    )
    call = partial(_with_backend, backend, q, k, v, scale=packed.scale, is_causal=packed.is_causal)
    return Run(call, lambda out: out.transpose(1, 2).values())


def _flex(packed: Packed) -> Run:
    """FlexAttention, compiled: over packed tokens with a mask of documents; decoding, over a batch of equally long ones."""
    from torch.nn.attention.flex_attention import flex_attention

    run = _once_compiled(flex_attention)
    options: dict[str, Any] = {"scale": packed.scale, "enable_gqa": packed.groups > 1}
    if max(packed.q_lens) == 1 and packed.is_equal and not packed.window:
        num = len(packed.q_lens)
        q, k, v = (t.unflatten(0, (num, -1)).transpose(1, 2) for t in (packed.q, packed.k, packed.v))
        return Run(lambda: run(q, k, v, **options), lambda out: out.transpose(1, 2).flatten(0, 1))
    device = str(packed.q.device)
    mask = _document_mask(tuple(packed.q_lens), tuple(packed.k_lens), packed.is_causal, packed.window or 2**30, device)
    q, k, v = (t.transpose(0, 1)[None] for t in (packed.q, packed.k, packed.v))
    return Run(lambda: run(q, k, v, block_mask=mask, **options), lambda out: out[0].transpose(0, 1))


@cache
def _document_mask(q_lens: tuple[int, ...], k_lens: tuple[int, ...], is_causal: bool, window: int, device: str) -> Any:
    """The block mask of packed segments, one for all sets of operands of a call."""
    from torch.nn.attention.flex_attention import create_block_mask

    (q_doc, q_at), (k_doc, k_at) = _places(q_lens, device), _places(k_lens, device)
    q_at = q_at + torch.tensor([k - q for q, k in zip(q_lens, k_lens, strict=True)], device=device)[q_doc]

    def sees(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        same = q_doc[i] == k_doc[j]
        return same & (q_at[i] >= k_at[j]) & (q_at[i] - k_at[j] < window) if is_causal else same

    return create_block_mask(sees, None, None, sum(q_lens), sum(k_lens), device=device)


def _places(lengths: Sequence[int], device: str) -> tuple[Tensor, Tensor]:
    """Of each packed token its segment and its place in it."""
    counts = torch.tensor(lengths, device=device)
    segment = torch.repeat_interleave(torch.arange(len(lengths), device=device), counts)
    return segment, torch.arange(len(segment), device=device) - (counts.cumsum(0) - counts)[segment]


def _attentions(pack: Callable[[Args], Packed]) -> list[Rival]:
    """torch's attentions; those that know no groups of heads get repeated ones."""

    def rival(name: str, run: Callable[[Packed], Run], **traits: bool) -> Rival:
        return Rival(name, lambda args: run(pack(args)), **traits)

    return [
        rival("SDPA flash", partial(_sdpa, "FLASH_ATTENTION", False)),
        rival("SDPA cuDNN", partial(_sdpa, "CUDNN_ATTENTION", False)),
        rival("SDPA cuDNN, heads repeated", partial(_sdpa, "CUDNN_ATTENTION", True), is_weak=True),
        rival("SDPA efficient", partial(_sdpa, "EFFICIENT_ATTENTION", False), is_weak=True),
        rival("SDPA efficient, heads repeated", partial(_sdpa, "EFFICIENT_ATTENTION", True), is_weak=True),
        rival("SDPA math", partial(_sdpa, "MATH", False), is_weak=True),
        rival("SDPA by segment", partial(_sdpa_by_segment, False)),
        rival("flash varlen", _flash_varlen),
        rival("jagged SDPA flash", partial(_jagged, "FLASH_ATTENTION"), is_weak=True),
        rival("FlexAttention", _flex, is_compiled=True),
    ]


PACK: dict[str, Callable[[Args], Packed]] = {
    "vision_attention": _vision,
    "prefill_attention": _prefill,
    "paged_decode_attention": _decode,
}
RIVALS: dict[str, list[Rival]] = {
    "rms_norm": [Rival("F.rms_norm", _torch_rms_norm)],
    **{name: _attentions(pack) for name, pack in PACK.items()},
}
