"""Arguments of every op at the sizes of real models: what the lowering compiles and what the benchmark times.

A case is a recipe for a device: on "meta" it costs nothing, which is all that compiling needs; on "cuda" it draws random numbers.
Sizes are those of Qwen2-VL 7B and 2B, of the vision towers of Qwen2-VL, CLIP-L and SigLIP-so400m, and of Phi-3.5."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlmfx.ops.pack_patches import patch_offsets
from vlmfx.ops.paged_decode_attention import TILE, decode_work, num_items_for
from vlmfx.ops.registry import Op
from vlmfx.ops.rotary import RotaryTable, rotary_table

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
BLOCK_SIZE = 16
NUM_SMS = 132  # of an H100 or H200, for the cut of decode work


@dataclass(frozen=True)
class Make:
    """Tensors on one device; the same numbers each time."""

    device: str

    def normal(self, *shape: int, dtype: torch.dtype = BF16) -> Tensor:
        return torch.randn(*shape, device=self.device, dtype=dtype)

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(*shape, device=self.device) * (high - low) + low

    def integers(self, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.randint(low, high, shape, device=self.device, dtype=dtype)

    def list(self, values: Sequence[Any], dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.tensor(values, device=self.device, dtype=dtype)

    def cumulative(self, lengths: Sequence[int]) -> Tensor:
        """cu_seqlens of segments of these lengths."""
        return self.list([sum(lengths[:i]) for i in range(len(lengths) + 1)])

    def shuffled(self, num: int) -> Tensor:
        return torch.randperm(num, device=self.device, dtype=torch.int32)

    def angles(self, tokens: int, head_dim: int, dtype: torch.dtype = FP32) -> RotaryTable:
        """cos and sin of `rotary`."""
        return rotary_table(self.uniform(0.0, 6.28, tokens, head_dim // 2), dtype)

    def qkv(
        self, tokens: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v, (tokens, heads, head_dim) each, as slices of one fused projection."""
        fused = self.normal(tokens, (heads + 2 * kv_heads) * head_dim, dtype=dtype)
        parts = fused.split([heads * head_dim, kv_heads * head_dim, kv_heads * head_dim], -1)
        q, k, v = (part.unflatten(-1, (-1, head_dim)) for part in parts)
        return q, k, v

    def cache(self, num_blocks: int, kv_heads: int, head_dim: int, dtype: torch.dtype = BF16) -> tuple[Tensor, Tensor]:
        """K and V of a layer."""
        shape = (num_blocks, kv_heads, BLOCK_SIZE, head_dim)
        return self.normal(*shape, dtype=dtype), self.normal(*shape, dtype=dtype)

    def block_table(self, num_seqs: int, longest: int) -> Tensor:
        """Blocks for num_seqs sequences of `longest` tokens, scattered over a cache that holds just these."""
        blocks = -(-longest // BLOCK_SIZE)
        return self.shuffled(num_seqs * blocks).view(num_seqs, blocks)


Args = tuple[Any, ...]


@dataclass(frozen=True)
class Case:
    """One call of an op; is_timed says that the benchmark has it, too."""

    name: str
    build: Callable[[Make], Args]
    is_timed: bool = False

    def make(self, device: str) -> Args:
        """The op's arguments, in the order of its schema."""
        torch.manual_seed(0)
        return self.build(Make(device))


def load_op(name: str) -> Op:
    """The contract of that name; ImportError where there is none yet."""
    found = getattr(importlib.import_module(f"vlmfx.ops.{name}"), "OP", None)
    if not isinstance(found, Op):
        raise ImportError(f"vlmfx/ops/{name}.py registers no op")
    return found


def short(dtype: torch.dtype) -> str:
    return {BF16: "bf16", FP16: "fp16", FP32: "fp32"}[dtype]


def _rows(
    args: Callable[[Make, int, int, torch.dtype], Args],
    *sizes: tuple[int, int],
    timed: Sequence[tuple[int, int]],
    dtypes: Sequence[torch.dtype] = (FP16, FP32),
) -> list[Case]:
    """Cases of an op over rows × width: in bf16 the timed sizes and the others, and the first timed one in other dtypes."""

    def case(rows: int, width: int, dtype: torch.dtype, is_timed: bool) -> Case:
        return Case(f"{rows}×{width} {short(dtype)}", lambda on: args(on, rows, width, dtype), is_timed)

    return [
        *(case(*size, BF16, True) for size in timed),
        *(case(*size, BF16, False) for size in sizes),
        *(case(*timed[0], dtype, False) for dtype in dtypes),
    ]


def _rms_norm() -> list[Case]:
    def args(on: Make, rows: int, width: int, dtype: torch.dtype) -> Args:
        return on.normal(rows, width, dtype=dtype), on.normal(width, dtype=dtype), 1e-6

    def head_norm(on: Make) -> Args:
        return on.qkv(16384, 28, 4, 128, BF16)[0], on.normal(128), 1e-6

    many = _rows(args, (1024, 1536), (1024, 3072), (4096, 1280), timed=[(16384, 3584), (32, 3584)])
    return [*many, Case("q of qkv, 16384×28 heads of 128 bf16", head_norm, True)]


def _add_rms_norm() -> list[Case]:
    def args(on: Make, rows: int, width: int, dtype: torch.dtype) -> Args:
        return (
            on.normal(rows, width, dtype=dtype),
            on.normal(rows, width, dtype=dtype),
            on.normal(width, dtype=dtype),
            1e-6,
        )

    return _rows(args, (1024, 1536), (1024, 3072), timed=[(16384, 3584), (32, 3584)])


def _layer_norm() -> list[Case]:
    def args(on: Make, rows: int, width: int, dtype: torch.dtype) -> Args:
        return on.normal(rows, width, dtype=dtype), on.normal(width, dtype=dtype), on.normal(width, dtype=dtype), 1e-5

    return _rows(args, (5770, 1024), (4096, 4096), timed=[(32768, 1280), (65536, 1152)])


def _activation() -> list[Case]:
    def case(kind: str, rows: int, width: int, dtype: torch.dtype, is_timed: bool) -> Case:
        return Case(
            f"{kind} {rows}×{width} {short(dtype)}", lambda on: (on.normal(rows, width, dtype=dtype), kind), is_timed
        )

    return [
        case("quick_gelu", 16384, 5120, BF16, True),
        case("gelu_pytorch_tanh", 16384, 4304, BF16, True),
        case("gelu", 16384, 4096, BF16, True),
        case("silu", 16384, 4096, BF16, False),
        case("gelu", 16384, 4096, FP16, False),
        case("gelu", 16384, 4096, FP32, False),
    ]


def _gated_activation() -> list[Case]:
    def args(on: Make, rows: int, width: int, dtype: torch.dtype) -> Args:
        return on.normal(rows, 2 * width, dtype=dtype), "silu"

    many = _rows(args, (1024, 8960), (1024, 8192), timed=[(4096, 18944), (32, 18944), (16384, 3420)])
    return [*many, Case("gelu_pytorch_tanh 1024×8960 bf16", lambda on: (on.normal(1024, 17920), "gelu_pytorch_tanh"))]


def _rotary() -> list[Case]:
    def case(name: str, tokens: int, heads: int, head_dim: int, dtype: torch.dtype, is_timed: bool) -> Case:
        def args(on: Make) -> Args:
            return on.qkv(tokens, heads, heads, head_dim, dtype)[0], *on.angles(tokens, head_dim)

        return Case(f"{name}, {tokens}×{heads} heads of {head_dim} {short(dtype)}", args, is_timed)

    return [
        case("q of qkv", 16384, 28, 128, BF16, True),
        case("vision q of qkv", 32768, 16, 80, BF16, True),
        case("vision q of qkv", 32768, 16, 72, BF16, False),
        case("q of qkv", 4096, 32, 96, BF16, False),
        case("q of qkv", 16384, 28, 128, FP16, False),
        case("q of qkv", 16384, 28, 128, FP32, False),
    ]


def _rotary_cache_write() -> list[Case]:
    def case(tokens: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, is_timed: bool) -> Case:
        def args(on: Make) -> Args:
            caches = on.cache(-(-tokens // BLOCK_SIZE), kv_heads, head_dim, dtype)
            qkv = on.normal(tokens, heads + 2 * kv_heads, head_dim, dtype=dtype)
            slots = (
                on.shuffled(-(-tokens // BLOCK_SIZE) * BLOCK_SIZE)[:tokens] if tokens < 64 else on.list(range(tokens))
            )
            return qkv, *on.angles(tokens, head_dim), *caches, slots

        return Case(f"{tokens}×{heads}/{kv_heads} heads of {head_dim} {short(dtype)}", args, is_timed)

    return [
        case(16384, 28, 4, 128, BF16, True),
        case(32, 28, 4, 128, BF16, True),
        case(4096, 12, 2, 128, BF16, False),
        case(4096, 32, 32, 96, BF16, False),
        case(16384, 28, 4, 128, FP16, False),
        case(16384, 28, 4, 128, FP32, False),
    ]


def _cache_write() -> list[Case]:
    def case(tokens: int, kv_heads: int, head_dim: int, dtype: torch.dtype, is_timed: bool) -> Case:
        def args(on: Make) -> Args:
            _, k, v = on.qkv(tokens, 7 * kv_heads, kv_heads, head_dim, dtype)
            caches = on.cache(-(-tokens // BLOCK_SIZE), kv_heads, head_dim, dtype)
            return k, v, *caches, on.list(range(tokens))

        return Case(f"{tokens}×{kv_heads} heads of {head_dim} {short(dtype)}", args, is_timed)

    return [
        case(65536, 4, 128, BF16, True),
        case(16384, 32, 96, BF16, True),
        case(4096, 2, 128, BF16, False),
        case(65536, 4, 128, FP16, False),
        case(65536, 4, 128, FP32, False),
    ]


def _cache_gather() -> list[Case]:
    def case(lengths: list[int], kv_heads: int, head_dim: int, dtype: torch.dtype, is_timed: bool) -> Case:
        def args(on: Make) -> Args:
            table = on.block_table(len(lengths), max(lengths))
            caches = on.cache(table.numel(), kv_heads, head_dim, dtype)
            return *caches, table, on.cumulative(lengths), sum(lengths)

        return Case(f"{_lengths(lengths)}, {kv_heads} heads of {head_dim} {short(dtype)}", args, is_timed)

    return [
        case([16384] * 4, 4, 128, BF16, True),
        case([1000, 16384, 3, 4096], 32, 96, BF16, True),
        case([4096] * 4, 2, 128, BF16, False),
        case([16384] * 4, 4, 128, FP16, False),
        case([16384] * 4, 4, 128, FP32, False),
    ]


def _merge() -> list[Case]:
    def case(tokens: int, vocab: int, hidden: int, dtype: torch.dtype, is_timed: bool) -> Case:
        def args(on: Make) -> Args:
            index = torch.arange(tokens, device=on.device, dtype=torch.int32)
            features = on.normal(tokens // 2, hidden, dtype=dtype)
            ids = on.integers(0, vocab, tokens, dtype=torch.int64)
            return on.normal(vocab, hidden, dtype=dtype), ids, features, torch.where(index < tokens // 2, index, -1)

        return Case(f"{tokens} tokens, half of them features, {vocab}×{hidden} {short(dtype)}", args, is_timed)

    return [
        case(16384, 152064, 3584, BF16, True),
        case(32, 152064, 3584, BF16, False),
        case(4096, 151936, 1536, BF16, False),
        case(4096, 32064, 3072, FP16, False),
        case(4096, 32064, 3072, FP32, False),
    ]


def _vision_attention() -> list[Case]:
    def case(
        name: str, lengths: list[int], heads: int, head_dim: int, dtype: torch.dtype = BF16, *, is_timed: bool = True
    ) -> Case:
        def args(on: Make) -> Args:
            q, k, v = on.qkv(sum(lengths), heads, heads, head_dim, dtype)
            return q, k, v, on.cumulative(lengths), on.cumulative(lengths), head_dim**-0.5

        return Case(f"{name}, {_lengths(lengths)}, {heads} heads of {head_dim} {short(dtype)}", args, is_timed)

    def resampler(on: Make) -> Args:
        q, k, v = on.normal(8 * 64, 28, 128), on.normal(8 * 1024, 28, 128), on.normal(8 * 1024, 28, 128)
        return q, k, v, on.cumulative([64] * 8), on.cumulative([1024] * 8), 128**-0.5

    ragged = [4096, 256, 1024, 777, 2304, 64, 1600, 3001]
    return [
        case("images", [1024] * 8, 16, 80),
        case("images", ragged, 16, 80),
        case("image", [16384], 16, 80),
        case("windows", [64] * 256, 16, 80),
        case("images", [729] * 8, 16, 72),
        case("images", [1024] * 8, 16, 72),
        case("images", [577] * 16, 16, 64),
        case("images", [1024] * 8, 16, 64),
        Case("resampler, 8 × 64 queries of 1024 keys, 28 heads of 128 bf16", resampler, True),
        case("images", [1024] * 8, 16, 80, FP16, is_timed=False),
        case("images", [1024] * 8, 16, 80, FP32, is_timed=False),
        case("images", [577] * 16, 16, 64, FP32, is_timed=False),
    ]


def _prefill_attention() -> list[Case]:
    def case(
        name: str, lengths: list[int], heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype = BF16, *,
        window: int = 0, is_timed: bool = True,
    ) -> Case:  # fmt: skip
        def args(on: Make) -> Args:
            qkv = on.qkv(sum(lengths), heads, kv_heads, head_dim, dtype)
            return *qkv, on.cumulative(lengths), None, None, None, None, head_dim**-0.5, window

        kind = f"{heads}/{kv_heads} heads of {head_dim} {short(dtype)}"
        return Case(f"{name}, {_lengths(lengths)}, {kind}", args, is_timed)

    def chunk(
        lengths: list[int], prefixes: list[int], heads: int, kv_heads: int, head_dim: int,
        dtype: torch.dtype = BF16, *, is_timed: bool = True,
    ) -> Case:  # fmt: skip
        def args(on: Make) -> Args:
            qkv = on.qkv(sum(lengths), heads, kv_heads, head_dim, dtype)
            table = on.block_table(len(lengths), max(prefixes))
            caches = on.cache(table.numel(), kv_heads, head_dim, dtype)
            return *qkv, on.cumulative(lengths), *caches, table, on.list(prefixes), head_dim**-0.5, 0

        kind = f"{heads}/{kv_heads} heads of {head_dim} {short(dtype)}"
        return Case(f"chunk, {_lengths(lengths)} after {_lengths(prefixes)}, {kind}", args, is_timed)

    ragged = [4096, 17, 1000, 2048, 333, 3000, 64, 5000]
    return [
        case("causal", [4096], 28, 4, 128),
        case("causal", [4096] * 4, 28, 4, 128),
        case("causal", ragged, 28, 4, 128),
        case("causal", [4096], 32, 32, 96),
        case("causal", [4096], 12, 2, 128),
        chunk([2048], [16384], 28, 4, 128),
        chunk([512] * 4, [16384, 0, 1000, 4096], 28, 4, 128),
        chunk([512] * 4, [4096] * 4, 32, 32, 96, is_timed=False),
        case("window 2047", [8192], 32, 32, 96, window=2047),
        case("causal", [4096], 28, 4, 128, FP16, is_timed=False),
        case("causal", [4096], 28, 4, 128, FP32, is_timed=False),
        chunk([512] * 4, [4096] * 4, 28, 4, 128, FP32, is_timed=False),
        *(case("causal", [300], heads, 4, width, is_timed=False) for heads, width in ((28, 128), (16, 80), (16, 64))),
        *(case("causal", [4096], 16, 4, width, is_timed=False) for width in (64, 80)),
        *(chunk([512] * 4, [4096] * 4, 16, 4, width, is_timed=False) for width in (64, 80)),
        chunk([100], [4096], 28, 4, 128, is_timed=False),
    ]


def _paged_decode_attention() -> list[Case]:
    def case(
        lengths: list[int], heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype = BF16, *,
        window: int = 0, is_split: bool = True, is_timed: bool = True,
    ) -> Case:  # fmt: skip
        def args(on: Make) -> Args:
            table = on.block_table(len(lengths), max(lengths))
            caches = on.cache(table.numel(), kv_heads, head_dim, dtype)
            q = on.normal(len(lengths), heads, head_dim, dtype=dtype)
            num_items = num_items_for(len(lengths), kv_heads, NUM_SMS)
            work = decode_work(lengths, num_items, tile=TILE, window=window)
            items = [part.to(on.device) for part in work] if is_split else [None, None]
            return q, *caches, table, on.list(lengths), *items, head_dim**-0.5, window

        kind = f"{heads}/{kv_heads} heads of {head_dim} {short(dtype)}{'' if is_split else ', not split'}"
        name = f"window {window}, " if window else ""
        return Case(f"{name}{_lengths(lengths)}, {kind}", args, is_timed)

    def owned(on: Make) -> Args:
        """No table: each sequence owns a block as long as its context."""
        k_cache, v_cache = on.normal(8, 4, 4096, 128), on.normal(8, 4, 4096, 128)
        return on.normal(8, 28, 128), k_cache, v_cache, None, on.list([4096] * 8), None, None, 128**-0.5, 0

    return [
        case([4096] * 32, 28, 4, 128),
        case([32768], 28, 4, 128),
        case([4096], 28, 4, 128),
        case([1024 + 197 * i for i in range(32)], 28, 4, 128),
        case([4096] * 32, 12, 2, 128),
        case([4096] * 32, 32, 32, 96),
        case([8192] * 8, 32, 32, 96, window=2047),
        case([1024] * 256, 28, 4, 128),
        case([1024] * 256, 28, 4, 128, is_split=False),
        Case("8 × 4096 in a block each, 28/4 heads of 128 bf16", owned),
        case([4096] * 32, 28, 4, 128, FP16, is_timed=False),
        case([4096] * 32, 28, 4, 128, FP32, is_timed=False),
        *(case([4096] * 32, 16, 4, width, is_timed=False) for width in (64, 80, 256)),
    ]


def _pack_patches() -> list[Case]:
    mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]

    def case(
        pictures: int, height: int, width: int, dtype: torch.dtype = BF16, *, times: int = 1, merge_size: int = 1,
        is_timed: bool = True,
    ) -> Case:  # fmt: skip
        def args(on: Make) -> Args:
            offsets, strides = patch_offsets([(1, height, width)] * pictures, 14, times, merge_size)
            pixels = on.integers(0, 256, pictures * height * width * 3, dtype=torch.uint8)
            return (
                pixels,
                offsets.to(on.device),
                strides.to(on.device),
                14,
                mean,
                std,
                str(dtype).removeprefix("torch."),
            )

        return Case(f"{pictures} of {height}×{width}, {times} times, {short(dtype)}", args, is_timed)

    return [
        case(16, 1008, 1344, times=2, merge_size=2),
        case(256, 336, 336),
        case(256, 378, 378, is_timed=False),
        case(16, 1008, 1344, FP16, times=2, merge_size=2, is_timed=False),
        case(16, 1008, 1344, FP32, times=2, merge_size=2, is_timed=False),
    ]


def _sample() -> list[Case]:
    def case(rows: int, vocab: int, dtype: torch.dtype, is_timed: bool) -> Case:
        def args(on: Make) -> Args:
            top_k = on.list(([0, 50, 1, 20] * rows)[:rows])
            top_p = on.list(([0.9, 1.0, 0.95, 0.8] * rows)[:rows], FP32)
            min_p = on.list(([0.0, 0.05] * rows)[:rows], FP32)
            temperature = on.list(([0.7, 0.0, 1.0, 1.3] * rows)[:rows], FP32)
            seed = on.integers(0, 2**31, rows, dtype=torch.int64)
            position = on.integers(0, 4096, rows, 2, dtype=torch.int64)
            return on.normal(rows, vocab, dtype=dtype) * 3, temperature, top_k, top_p, min_p, seed, position

        return Case(f"{rows}×{vocab} {short(dtype)}", args, is_timed)

    return [
        case(256, 152064, FP32, True),
        case(32, 152064, FP32, True),
        case(1, 152064, FP32, True),
        case(32, 32064, FP32, False),
        case(32, 152064, BF16, False),
    ]


def _adjust_logits() -> list[Case]:
    def case(rows: int, vocab: int, length: int, dtype: torch.dtype, is_timed: bool) -> Case:
        def args(on: Make) -> Args:
            mask = on.integers(-(2**31), 2**31 - 1, rows, -(-vocab // 32))
            bias = on.list([list(range(16))] * rows), on.uniform(-1.0, 1.0, rows, 16)
            history = on.integers(0, vocab, rows, length), on.list([length // 2] * rows)
            newest = on.integers(0, vocab, rows, dtype=torch.int64)
            factors = [on.uniform(*bounds, rows) for bounds in ((0.0, 0.5), (0.0, 0.5), (1.0, 1.3))]
            return on.normal(rows, vocab, dtype=dtype), mask, *bias, *history, newest, *factors

        return Case(f"{rows}×{vocab}, {length} tokens so far, {short(dtype)}", args, is_timed)

    def masked(on: Make) -> Args:
        mask = on.integers(-(2**31), 2**31 - 1, 256, 4752)
        return on.normal(256, 152064, dtype=FP32), mask, *[None] * 8

    return [
        case(256, 152064, 4096, FP32, True),
        case(1, 152064, 32768, BF16, True),
        Case("256×152064, a mask alone, fp32", masked, True),
        case(32, 32064, 1024, BF16, False),
    ]


def _token_logprobs() -> list[Case]:
    def case(rows: int, vocab: int, num: int, dtype: torch.dtype, is_timed: bool) -> Case:
        def args(on: Make) -> Args:
            return on.normal(rows, vocab, dtype=dtype) * 3, on.integers(0, vocab, rows, dtype=torch.int64), num

        return Case(f"{rows}×{vocab}, top {num} {short(dtype)}", args, is_timed)

    return [
        case(256, 152064, 5, FP32, True),
        case(32, 152064, 20, FP32, True),
        case(32, 152064, 0, FP32, False),
        case(32, 32064, 5, BF16, False),
    ]


def _lengths(lengths: list[int]) -> str:
    """4 × 512, or the numbers where they differ: 17, 333, … (8)."""
    if len(set(lengths)) == 1:
        return f"{len(lengths)} × {lengths[0]}"
    return f"{len(lengths)} of {min(lengths)} to {max(lengths)}"


CASES: dict[str, list[Case]] = {
    "rms_norm": _rms_norm(),
    "add_rms_norm": _add_rms_norm(),
    "layer_norm": _layer_norm(),
    "activation": _activation(),
    "gated_activation": _gated_activation(),
    "rotary": _rotary(),
    "rotary_cache_write": _rotary_cache_write(),
    "cache_write": _cache_write(),
    "cache_gather": _cache_gather(),
    "merge": _merge(),
    "pack_patches": _pack_patches(),
    "vision_attention": _vision_attention(),
    "prefill_attention": _prefill_attention(),
    "paged_decode_attention": _paged_decode_attention(),
    "sample": _sample(),
    "adjust_logits": _adjust_logits(),
    "token_logprobs": _token_logprobs(),
}
