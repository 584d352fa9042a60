"""pack_patches: kernels equal the reference, which is the cut and the normalisation of whole pictures; and offsets in both orders."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.ops.device_asserts import device_asserts
from tests.ops.kernels import Kernel, Mutant, assert_equal, kernels_of
from tests.strategies import SEEDS
from vlmfx.errors import ShapeError
from vlmfx.ops.pack_patches import OP, by_block, pack_patches, patch_offsets, reference

MUTANTS = [
    Mutant("triton/pack_patches.py", "+ time * (P * P)", "+ (TIMES - 1 - time) * (P * P)"),
    Mutant("triton/pack_patches.py", "row // P, row % P", "row // COLS, row % COLS"),
    Mutant("triton/pack_patches.py", "to(tl.int64) * within", "to(tl.int64) * time"),
    Mutant("triton/pack_patches.py", "tl.store(to + TIMES * P * P,", "tl.store(to + P * P,"),
    Mutant("triton/pack_patches.py", "tl.where(inside, tl.fma", "tl.where(inside | True, tl.fma"),
    Mutant("triton/pack_patches.py", "inside, scale_2, shift_2)", "inside, scale_2, shift_1)"),
    Mutant("triton/pack_patches.py", "normalized(at + 2,", "normalized(at + 1,"),
    Mutant("mlu/kernels/pack_patches.mlu", "for (int i = c; i < PERIOD", "for (int i = 0; i < PERIOD"),
    Mutant("mlu/kernels/pack_patches.mlu", "stride[first + part / times]", "stride[first]"),
    Mutant("mlu/kernels/pack_patches.mlu", "to + c * per_channel, output", "to + c * area, output"),
    Mutant("mlu/kernels/pack_patches.mlu", "part < parts; ++part)\n          for", "part < 0; ++part)\n          for"),
    Mutant("mlu/kernels/pack_patches.mlu", "affine.scale[c], affine.shift[c]", "affine.scale[c], affine.shift[0]"),
    Mutant("mlu/kernels/pack_patches.mlu", "result + c * third + part * area, zeros", "result + part * area, zeros"),
    Mutant("mlu/kernels/pack_patches.mlu", "X(T, zeros, PAD_UP(area, HALVES))", "X(T, zeros, area)"),
]
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CONSTANTS = st.sampled_from([CLIP, HALF, IMAGENET])
DTYPES = st.sampled_from(["float32", "float16", "bfloat16"])


@st.composite
def pictures(draw: st.DrawFn) -> tuple[list[Tensor], int, int, int]:
    """Frames (n, height, width, 3) of no picture to three, patch, temporal patch and merge size."""
    p, t, m = draw(st.sampled_from([1, 2, 3, 7, 14, 16])), draw(st.integers(1, 3)), draw(st.integers(1, 2))
    most = 3 if p < 14 else 2
    sizes = draw(st.lists(st.tuples(st.integers(1, 4), st.integers(1, most), st.integers(1, most)), max_size=3))
    g = torch.Generator().manual_seed(draw(SEEDS))
    frames = [torch.randint(0, 256, (n, h * m * p, w * m * p, 3), generator=g, dtype=torch.uint8) for n, h, w in sizes]
    return frames, p, t, m


def laid_end_to_end(frames: list[Tensor]) -> tuple[Tensor, list[tuple[int, int, int]]]:
    """pixels and sizes."""
    flat = [f.flatten() for f in frames]
    return torch.cat(flat) if flat else torch.empty(0, dtype=torch.uint8), [
        (f.shape[0], f.shape[1], f.shape[2]) for f in frames
    ]


@st.composite
def cases(draw: st.DrawFn) -> tuple[Any, ...]:
    """Patches of pictures of several sizes, in any order, some of them padding, at one time or at all; bytes beside the pictures."""
    frames, p, t, m = draw(pictures())
    pixels, sizes = laid_end_to_end(frames)
    offsets, row_stride = patch_offsets(sizes, p, t, m)
    g = torch.Generator().manual_seed(draw(SEEDS))
    pad = draw(st.integers(0, 3))
    offsets = torch.cat((offsets, torch.full((pad, t), -1)))
    row_stride = torch.cat((row_stride, torch.zeros(pad, dtype=torch.int32)))
    order = torch.randperm(len(offsets), generator=g)[:20]
    skipped = torch.rand(len(order), t, generator=g) < draw(st.sampled_from([0.0, 0.2]))
    before, after = draw(st.integers(0, 5)), draw(st.integers(0, 5))
    offsets = torch.where(skipped | (offsets[order] < 0), -1, offsets[order] + before)
    pixels = torch.nn.functional.pad(pixels, (before, after), value=77)
    mean, std = draw(CONSTANTS)
    return pixels, offsets, row_stride[order], p, list(mean), list(std), draw(DTYPES)


def check(kernel: Kernel, case: tuple[Any, ...]) -> None:
    """The kernel gives what the reference gives."""
    with device_asserts():
        got = kernel(*case)
    assert_equal(OP, got, reference(*case))


def mlu_case() -> tuple[tuple[Any, ...], dict[str, int]]:
    """A picture of 448 x 672 pixels as Qwen2-VL takes it, and what the kernel's count by hand names."""
    pixels = torch.randint(0, 256, (448 * 672 * 3,), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    offsets, row_stride = patch_offsets([(1, 448, 672)], 14, 2, 2)
    mean, std = CLIP
    args = (pixels, offsets, row_stride, 14, list(mean), list(std), "float16")
    return args, {"patches": len(offsets), "values": 3 * 2 * 14 * 14}


@pytest.mark.parametrize("kernel", kernels_of(OP))
@settings(max_examples=60)
@given(case=cases())
def test_kernel_equals_reference(kernel, case):
    check(kernel, case)


@pytest.mark.parametrize("kernel", kernels_of(OP))
def test_more_patches_than_a_core_holds_offsets_of(kernel):
    pixels = torch.randint(0, 256, (200 * 200 * 3,), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    offsets, row_stride = patch_offsets([(1, 200, 200)], 1, 1, 2)
    check(kernel, (pixels, offsets, row_stride, 1, [0.4, 0.5, 0.6], [0.2, 0.3, 0.1], "float32"))


def cut(frames: Tensor, patch_size: int, times: int, merge_size: int) -> Tensor:
    """frames (n, height, width, 3), the last repeated → rows of channel, time, row and column, block after block."""
    whole = torch.cat((frames, frames[-1:].expand(-len(frames) % times, -1, -1, -1))).unflatten(0, (-1, times))
    n, t, height, width, c = whole.shape
    p, m = patch_size, merge_size
    blocks = whole.reshape(n, t, height // p // m, m, p, width // p // m, m, p, c)
    return blocks.permute(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(-1, c * t * p * p)


def normalized(rows: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """(x/255 − mean)/std by channel, float32."""
    x = rows.reshape(len(rows), 3, -1).float() / 255
    return ((x - torch.tensor(mean)[:, None]) / torch.tensor(std)[:, None]).reshape(rows.shape)


@pytest.mark.parametrize("run", [pytest.param(pack_patches, id="cpu"), *kernels_of(OP)])
@settings(max_examples=40)
@given(pictures=pictures(), constants=CONSTANTS, dtype=DTYPES)
def test_it_is_the_cut_and_the_normalisation(run, pictures, constants, dtype):
    """Whole pictures in both orders: merge_size 1 is raster order. On a CPU it is so to the bit."""
    frames, p, t, m = pictures
    pixels, sizes = laid_end_to_end(frames)
    right = getattr(torch, dtype)
    out = run(
        pixels,
        *patch_offsets(sizes, p, t, m),
        p,
        [*constants[0]],
        [*constants[1]],
        dtype,
    )
    rows = [torch.empty(0, 3 * t * p * p, dtype=right)]
    for f in frames:
        rows.append(normalized(cut(f, p, t, m), *constants).to(right))
    tolerance = 0.0 if run is pack_patches else OP.tolerance[right]
    torch.testing.assert_close(out, torch.cat(rows), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("kernel", kernels_of(OP))
@settings(max_examples=30)
@given(case=cases(), pad=st.integers(1, 5), seed=SEEDS)
def test_rows_are_their_own(kernel, case, pad, seed):
    """Padding is zero and does not show; patches in another order are the rows in that order."""
    pixels, offsets, row_stride, *rest = case
    alone = kernel(*case)
    padded = kernel(
        pixels,
        torch.cat((offsets, torch.full((pad, offsets.shape[1]), -1))),
        torch.cat((row_stride, torch.full((pad,), 2**31 - 1, dtype=torch.int32))),
        *rest,
    )
    assert torch.equal(padded[: len(alone)], alone)
    assert not padded[len(alone) :].any()
    order = torch.randperm(len(offsets), generator=torch.Generator().manual_seed(seed))
    assert torch.equal(kernel(pixels, offsets[order], row_stride[order], *rest), alone[order])


@pytest.mark.parametrize("kernel", kernels_of(OP))
def test_a_patch_beyond_the_pixels_is_an_error(kernel):
    if kernel.device != "cpu":
        pytest.skip("on a GPU only Triton's debug mode looks")
    pixels, stride = torch.zeros(48, dtype=torch.uint8), torch.full((1,), 12, dtype=torch.int32)
    args = (2, [0.5] * 3, [0.5] * 3, "float32")
    assert kernel(pixels, torch.tensor([[48 - 12 - 6]]), stride, *args).shape == (1, 12)
    with pytest.raises(Exception, match=r"a patch that ends beyond pixels|out of bounds"), device_asserts():
        kernel(pixels, torch.tensor([[48 - 12 - 5]]), stride, *args)
    with pytest.raises(IndexError, match=r"out of range"):
        pack_patches(pixels, torch.tensor([[48 - 12 - 5]]), stride, *args)


def test_offsets_worked():
    """Two pictures of 4 × 4 and 2 × 4 pixels in patches of 2: by rows, then by blocks of one and two times."""
    offsets, row_stride = patch_offsets([(1, 4, 4), (1, 2, 4)], 2)
    assert offsets.flatten().tolist() == [0, 6, 24, 30, 48, 54]
    assert row_stride.tolist() == [12] * 6
    offsets, row_stride = patch_offsets([(3, 4, 8)], 2, temporal_patch_size=2, merge_size=2)
    assert offsets[:8].tolist() == [[at, at + 96] for at in (0, 6, 48, 54, 12, 18, 60, 66)]
    assert offsets[8:].tolist() == [[at + 192, at + 192] for at in (0, 6, 48, 54, 12, 18, 60, 66)]
    assert row_stride.tolist() == [24] * 16


def test_by_block_worked():
    grid = torch.arange(8).view(2, 4)
    assert by_block(grid, 2).tolist() == [0, 1, 4, 5, 2, 3, 6, 7]
    assert by_block(grid, 1).tolist() == [*range(8)]
    assert torch.equal(by_block(torch.stack((grid, -grid), -1), 2)[:, 1], -by_block(grid, 2))


def test_no_picture_has_no_patch():
    offsets, row_stride = patch_offsets([], 14, 2, 2)
    assert offsets.shape == (0, 2)
    assert pack_patches(torch.empty(0, dtype=torch.uint8), offsets, row_stride, 14, *CLIP, torch.bfloat16).shape == (
        0,
        1176,
    )


def test_wrong_inputs_are_named():
    pixels, (offsets, stride) = torch.zeros(48, dtype=torch.uint8), patch_offsets([(1, 4, 4)], 2)

    def run(**changed: Any) -> None:
        args: dict[str, Any] = {
            "pixels": pixels, "offsets": offsets, "row_stride": stride, "patch_size": 2, "mean": [0.5] * 3, "std": [0.5] * 3,
            "dtype": torch.float32,
        }  # fmt: skip
        pack_patches(**{**args, **changed})

    run()
    with pytest.raises(ShapeError, match=r"pixels has torch.float32 but needs torch.uint8"):
        run(pixels=pixels.float())
    with pytest.raises(ShapeError, match=r"pixels has shape \(4, 12\) but needs shape \(bytes,\)"):
        run(pixels=pixels.view(4, 12))
    with pytest.raises(ShapeError, match=r"offsets has shape \(4,\) but needs shape \(patches, times\)"):
        run(offsets=offsets[:, 0])
    with pytest.raises(ShapeError, match=r"offsets has torch.int32 but needs torch.int64"):
        run(offsets=offsets.int())
    with pytest.raises(ShapeError, match=r"row_stride has shape \(3,\) but needs shape \(4,\), the first of offsets"):
        run(row_stride=stride[:3])
    with pytest.raises(ShapeError, match=r"std has 1 numbers but needs 3, one a channel"):
        run(std=[0.5])
    with pytest.raises(ShapeError, match=r"dtype has float64 but needs one of"):
        run(dtype=torch.float64)
    with pytest.raises(ShapeError, match=r"patch_size has 0 but needs 1 or more"):
        run(patch_size=0)
    with pytest.raises(ShapeError, match=r"sizes has a height and width of \(4, 6\) but needs multiples of 4"):
        patch_offsets([(1, 4, 6)], 2, merge_size=2)
