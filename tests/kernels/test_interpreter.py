"""The checked interpreter itself: it computes what a GPU would, and refuses what a GPU would not forgive."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hylorada_kernels.testing import interpreter
from hylorada_kernels.testing.aot import aot
from hylorada_kernels.testing.interpreter import (
    Bytes,
    OutOfBounds,
    Race,
    interpret,
    launches,
    requires_interpreter,
    supported,
    traffic,
)
from hylorada_kernels.testing.poison import poisoned_empty

pytestmark = pytest.mark.skipif(not supported(), reason=requires_interpreter)

triton = pytest.importorskip("triton", reason=requires_interpreter)
tl = pytest.importorskip("triton.language", reason=requires_interpreter)
libdevice = pytest.importorskip("triton.language.extra.libdevice", reason=requires_interpreter)


@pytest.fixture(autouse=True)
def interpreted():
    interpret()


# bounds


@triton.jit
def _copy(x_ptr, out_ptr, size, shift, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < size
    tl.store(out_ptr + offsets, tl.load(x_ptr + offsets + shift, mask=mask, other=0.0), mask=mask)


@triton.jit
def _copy_rows(x_ptr, out_ptr, rows, columns, stride_x, stride_out, BLOCK: tl.constexpr):
    o_r = tl.program_id(0)
    o_c = tl.arange(0, BLOCK)
    mask = (o_c < columns) & (o_r < rows)
    block = tl.load(x_ptr + o_r * stride_x + o_c, mask=mask, other=0.0)
    tl.store(out_ptr + o_r * stride_out + o_c, block, mask=mask)


@triton.jit
def _copy_unmasked_store(x_ptr, out_ptr, size, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + offsets, tl.load(x_ptr + offsets, mask=offsets < size, other=0.0))


@triton.jit
def _count_atomically(out_ptr, shift):
    tl.atomic_add(out_ptr + shift, 1.0)


def test_a_correct_kernel_passes():
    x, out = torch.randn(100), torch.empty(100)
    _copy[(2,)](x, out, 100, 0, BLOCK=64)
    assert torch.equal(out, x)


@pytest.mark.parametrize("shift", [1, -1, 99, -100, 1 << 20, -(1 << 20), 1 << 40])
def test_a_load_outside_the_tensor_is_an_error_near_and_far(shift):
    with pytest.raises(OutOfBounds, match=r"load of \d+ element\(s\) outside argument 'x_ptr' \(shape \(100,\)"):
        _copy[(2,)](torch.randn(100), torch.empty(100), 100, shift, BLOCK=64)


def test_a_store_outside_the_tensor_is_an_error():
    with pytest.raises(OutOfBounds, match=r"store of 28 element\(s\) outside argument 'out_ptr'.*offset 100"):
        _copy_unmasked_store[(2,)](torch.randn(100), torch.empty(100), 100, BLOCK=64)


@pytest.mark.parametrize("shift", [1, -1, 1 << 40])
def test_an_atomic_outside_the_tensor_is_an_error(shift):
    with pytest.raises(OutOfBounds, match="atomic of 1"):
        _count_atomically[(1,)](torch.zeros(1), shift)


def test_the_gap_between_the_rows_of_a_view_is_outside():
    x, out = torch.randn(4, 32), torch.empty(4, 32)
    view = x[:, :20]
    _copy_rows[(4,)](view, out, 4, 20, view.stride(0), out.stride(0), BLOCK=32)
    assert torch.equal(out[:, :20], view)
    with pytest.raises(OutOfBounds, match=r"strides \(32, 1\).*offset 20"):
        _copy_rows[(4,)](view, out, 4, 21, view.stride(0), out.stride(0), BLOCK=32)


def test_the_gap_in_an_expanded_view_is_outside():
    view, out = torch.randn(1, 32)[:, ::8].expand(100, 4), torch.empty(4, 32)
    with pytest.raises(OutOfBounds, match=r"strides \(0, 8\)"):
        _copy_rows[(4,)](view, out, 4, 4, view.stride(0), out.stride(0), BLOCK=32)


def test_a_neighbour_in_the_same_buffer_is_outside():
    buffer = torch.randn(200)
    with pytest.raises(OutOfBounds, match="'x_ptr'"):
        _copy[(2,)](buffer[:100], buffer[100:], 100, 1, BLOCK=64)


def test_an_empty_tensor_has_no_inside():
    with pytest.raises(OutOfBounds, match=r"shape \(0,\)"):
        _copy[(1,)](torch.empty(0), torch.empty(8), 8, 0, BLOCK=8)


def test_masked_off_lanes_may_point_anywhere():
    x, out = torch.randn(4), torch.empty(4)
    _copy[(1,)](x, out, 4, 0, BLOCK=1024)
    assert torch.equal(out, x)


# races


@triton.jit
def _store_sum(x_ptr, out_ptr, size, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr, tl.sum(tl.load(x_ptr + offsets, mask=offsets < size, other=0.0)))


@triton.jit
def _accumulate(x_ptr, out_ptr, size, BLOCK: tl.constexpr, ATOMIC: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.sum(tl.load(x_ptr + offsets, mask=offsets < size, other=0.0))
    if ATOMIC:
        tl.atomic_add(out_ptr, total)
    else:
        tl.store(out_ptr, tl.load(out_ptr) + total)


@triton.jit
def _shift_in_place(x_ptr, out_ptr, step):
    """Program p stores element p and reads its neighbour's."""
    o_p = tl.program_id(0)
    neighbour = (o_p + step + tl.num_programs(0)) % tl.num_programs(0)
    value = tl.load(x_ptr + neighbour)
    tl.store(out_ptr + o_p, value + 1)


@triton.jit
def _count_then_store(out_ptr):
    tl.atomic_add(out_ptr, 1.0)
    if tl.program_id(0) == 1:
        tl.store(out_ptr, 0.0)


@triton.jit
def _fold_lanes(out_ptr, value_ptr, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    tl.store(out_ptr + lanes // 2, tl.load(value_ptr + lanes))


def test_two_programs_that_store_to_one_element_race():
    with pytest.raises(Race, match=r"store of 1 element\(s\) of argument 'out_ptr'.*by program \(1, 0, 0\)"):
        _store_sum[(2,)](torch.randn(100), torch.empty(1), 100, BLOCK=64)


def test_accumulating_without_atomics_races_and_with_them_does_not():
    x, out = torch.ones(100), torch.zeros(1)
    with pytest.raises(Race, match="'out_ptr'"):
        _accumulate[(2,)](x, out, 100, BLOCK=64, ATOMIC=False)
    out.zero_()
    _accumulate[(2,)](x, out, 100, BLOCK=64, ATOMIC=True)
    assert out.item() == 100


@pytest.mark.parametrize("step", [1, -1])
def test_reading_what_another_program_stores_races_in_either_order(step):
    x = torch.zeros(4)
    with pytest.raises(Race):
        _shift_in_place[(4,)](x, x, step)


def test_overlapping_views_are_one_memory_for_races():
    buffer = torch.zeros(5)
    _shift_in_place[(4,)](buffer[:4], torch.empty(4), 0)
    with pytest.raises(Race):
        _shift_in_place[(4,)](buffer[:4], buffer[1:], 0)


def test_a_program_may_read_and_store_its_own_element():
    x = torch.zeros(4)
    _shift_in_place[(4,)](x, x, 0)
    assert torch.equal(x, torch.ones(4))


def test_an_atomic_and_a_plain_store_race():
    with pytest.raises(Race):
        _count_then_store[(2,)](torch.zeros(1))


def test_two_lanes_of_one_store_race_unless_they_agree():
    with pytest.raises(Race, match="two lanes"):
        _fold_lanes[(1,)](torch.empty(4), torch.arange(8.0), BLOCK=8)
    out = torch.empty(4)
    _fold_lanes[(1,)](out, torch.ones(8), BLOCK=8)
    assert torch.equal(out, torch.ones(4))


def test_races_are_let_pass_when_they_are_not_looked_for():
    interpret(race=False)
    out = torch.zeros(1)
    _accumulate[(2,)](torch.ones(100), out, 100, BLOCK=64, ATOMIC=False)
    assert out.item() == 100


# lanes nobody loaded


@triton.jit
def _reduce_masked(x_ptr, out_ptr, size, BLOCK: tl.constexpr, OP: tl.constexpr, GUARD: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    mask = offsets < size
    x = tl.load(x_ptr + offsets, mask=mask)
    if GUARD:
        x = tl.where(mask, x, 0.0)
    if OP == "sum":
        tl.store(out_ptr, tl.sum(x))
    elif OP == "max":
        tl.store(out_ptr, tl.max(x))
    else:
        tl.store(out_ptr, tl.sum(tl.maximum(x, 0.0)))


@triton.jit
def _sum_masked_integers(x_ptr, out_ptr, size, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    tl.store(out_ptr, tl.sum(tl.load(x_ptr + offsets, mask=offsets < size)))


@triton.jit
def _relu(x_ptr, out_ptr, size, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets, mask=offsets < size)
    tl.store(out_ptr + offsets, tl.maximum(x, 0.0), mask=offsets < size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("operation", ["sum", "max", "relu"])
def test_a_masked_off_lane_without_other_spoils_what_uses_it(operation, dtype):
    out = torch.empty(1, dtype=dtype)
    _reduce_masked[(1,)](torch.ones(5, dtype=dtype), out, 5, BLOCK=8, OP=operation, GUARD=False)
    assert out.isnan().all()
    _reduce_masked[(1,)](torch.ones(5, dtype=dtype), out, 5, BLOCK=8, OP=operation, GUARD=True)
    assert out.item() == (1 if operation == "max" else 5)


def test_a_masked_off_integer_lane_without_other_shows():
    out = torch.empty(1, dtype=torch.int32)
    _sum_masked_integers[(1,)](torch.ones(5, dtype=torch.int16), out, 5, BLOCK=8)
    assert out.item() == 5 + 3 * (2**15 - 1)


def test_a_masked_off_lane_that_is_never_stored_does_no_harm():
    x, out = torch.randn(5), torch.empty(5)
    _relu[(1,)](x, out, 5, BLOCK=8)
    assert torch.equal(out, x.relu())


def test_maximum_ignores_a_true_nan_as_a_gpu_does():
    x, out = torch.tensor([float("nan"), 2.0, -1.0]), torch.empty(3)
    _relu[(1,)](x, out, 3, BLOCK=4)
    assert out.tolist() == [0.0, 2.0, 0.0]


# truth values


@triton.jit
def _both(out_ptr, low, high, BLOCK: tl.constexpr, HOW: tl.constexpr):
    o = tl.arange(0, BLOCK)
    if HOW == "and":
        mask = (o > low) and (o < high)
    elif HOW == "or":
        mask = (o > low) or (o < high)
    elif HOW == "not":
        mask = not (o > low)
    elif HOW == "if":
        mask = o > low
        if mask:
            mask = o < high
    else:
        mask = (o > low) & (o < high)
    tl.store(out_ptr + o, mask.to(tl.int32))


@triton.jit
def _scalar_conditions(out_ptr, low, high):
    if low < 3 and high > 3:
        tl.store(out_ptr, 1)
    if not low < 3 or high < 3:
        tl.store(out_ptr, 2)


@pytest.mark.parametrize("how", ["and", "or", "not", "if"])
def test_the_truth_value_of_a_block_is_an_error(how):
    with pytest.raises(ValueError, match=r"truth value of a block tensor of shape \(8,\)"):
        _both[(1,)](torch.empty(8, dtype=torch.int32), 2, 5, BLOCK=8, HOW=how)


def test_masks_combine_with_ampersand_and_scalars_with_and():
    out = torch.empty(8, dtype=torch.int32)
    _both[(1,)](out, 2, 5, BLOCK=8, HOW="&")
    assert out.tolist() == [0, 0, 0, 1, 1, 0, 0, 0]
    out = torch.zeros(1, dtype=torch.int32)
    _scalar_conditions[(1,)](out, 2, 5)
    assert out.item() == 1


# low precision


@triton.jit
def _cast(x_ptr, out_ptr, size, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < size
    x = tl.load(x_ptr + offsets, mask=mask, other=0)
    tl.store(out_ptr + offsets, x.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _arithmetic(x_ptr, y_ptr, out_ptr, size, BLOCK: tl.constexpr, OP: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    mask = offsets < size
    x = tl.load(x_ptr + offsets, mask=mask, other=1.0)
    y = tl.load(y_ptr + offsets, mask=mask, other=1.0)
    if OP == "add":
        out = x + y
    elif OP == "sub":
        out = x - y
    elif OP == "mul":
        out = x * y
    elif OP == "neg":
        out = -x
    elif OP == "abs":
        out = tl.abs(x)
    elif OP == "maximum":
        out = tl.maximum(x, y)
    elif OP == "where":
        out = tl.where(x > y, x, y * 0.1)
    else:
        out = x + 1.5
    # a store casts silently; this must already have the type (Triton before 3.9 takes the maximum in float32)
    tl.static_assert(out.dtype == x.dtype or OP == "maximum")
    tl.store(out_ptr + offsets, out, mask=mask)


@triton.jit
def _compare(x_ptr, y_ptr, out_ptr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    less = tl.load(x_ptr + offsets) < tl.load(y_ptr + offsets)
    tl.store(out_ptr + offsets, less.to(tl.float32) * 2.0)


@triton.jit
def _scale(x_ptr, out_ptr, scale, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    tl.store(out_ptr + offsets, tl.load(x_ptr + offsets) * scale)


@triton.jit
def _reduce_rows(x_ptr, sum_ptr, max_ptr, argmax_ptr, cumsum_ptr, M: tl.constexpr, N: tl.constexpr):
    o_m, o_n = tl.arange(0, M), tl.arange(0, N)
    x = tl.load(x_ptr + o_m[:, None] * N + o_n[None, :])
    tl.store(sum_ptr + o_m, tl.sum(x, axis=1))
    tl.store(max_ptr + o_m, tl.max(x, axis=1))
    tl.store(argmax_ptr + o_m, tl.argmax(x, axis=1))
    tl.store(cumsum_ptr + o_m[:, None] * N + o_n[None, :], tl.cumsum(x, axis=1))


@triton.jit
def _dot(a_ptr, b_ptr, out_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr):
    o_m, o_n, o_k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    a = tl.load(a_ptr + o_m[:, None] * K + o_k[None, :])
    b = tl.load(b_ptr + o_n[None, :] * K + o_k[:, None])
    out = tl.dot(a, b, input_precision=PRECISION)
    tl.store(out_ptr + o_m[:, None] * N + o_n[None, :], out)


def _bits(tensor):
    """Bit patterns, all NaNs alike: which payload a NaN carries is nobody's promise."""
    bits = tensor.view(torch.int16).clone()
    bits[tensor.isnan()] = 0x7FFF
    return bits


def _awkward_floats():
    """fp32 values around every rounding tie of bf16, subnormals, infinities and NaN."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31 - 1, (4000,), generator=generator).to(torch.int32)
    ties = (bits & ~0xFFFF) | 0x8000
    special = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1e-45, 3.4e38, 3.39e38, 1 + 2**-8, 1 + 3 * 2**-8])
    return torch.cat([t.view(torch.float32) for t in (bits, ties, ties - 1, ties + 1)] + [special])


def test_float32_rounds_to_bfloat16_bit_for_bit_as_torch():
    x = _awkward_floats()
    out = torch.empty(len(x), dtype=torch.bfloat16)
    _cast[(triton.cdiv(len(x), 4096),)](x, out, len(x), BLOCK=4096)
    assert torch.equal(_bits(out), _bits(x.bfloat16()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64, torch.int32])
def test_bfloat16_casts_to_and_from_other_types_as_torch(dtype):
    x = (torch.randn(500) * 100).to(torch.bfloat16)
    out = torch.empty(500, dtype=dtype)
    _cast[(1,)](x, out, 500, BLOCK=512)
    assert torch.equal(out, x.to(dtype))
    back = torch.empty(500, dtype=torch.bfloat16)
    _cast[(1,)](out, back, 500, BLOCK=512)
    assert torch.equal(back, out.to(torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("operation", "expected"),
    [
        ("add", lambda x, y: x + y),
        ("sub", lambda x, y: x - y),
        ("mul", lambda x, y: x * y),
        ("neg", lambda x, y: -x),
        ("abs", lambda x, y: x.abs()),
        ("maximum", torch.maximum),
        ("where", lambda x, y: torch.where(x > y, x, y * torch.tensor(0.1, dtype=y.dtype))),
        ("literal", lambda x, y: x + 1.5),
    ],
)
def test_arithmetic_is_torchs_bit_for_bit(operation, expected, dtype):
    x, y = (torch.randn(1000, generator=torch.Generator().manual_seed(seed)).to(dtype) for seed in (1, 2))
    out = torch.empty(1000, dtype=dtype)
    _arithmetic[(1,)](x, y, out, 1000, BLOCK=1024, OP=operation)
    assert torch.equal(out, expected(x, y))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_comparison_is_a_mask_that_casts_to_zero_and_one(dtype):
    x, y = torch.randn(64).to(dtype), torch.randn(64).to(dtype)
    out = torch.empty(64)
    _compare[(1,)](x, y, out, BLOCK=64)
    assert torch.equal(out, (x < y).float() * 2)


def test_a_float_argument_is_float32_and_promotes():
    x, out = torch.randn(64).bfloat16(), torch.empty(64)
    _scale[(1,)](x, out, 1 / 3, BLOCK=64)
    assert torch.equal(out, x.float() * torch.tensor(1 / 3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_reductions_and_scans_are_torchs_where_sums_are_exact(dtype):
    # small integers: every partial sum has an exact bfloat16
    x = torch.randint(-3, 4, (8, 16), generator=torch.Generator().manual_seed(0)).to(dtype)
    x[torch.arange(8), torch.arange(8)] = 5
    total, top, cumulative = torch.empty(8, dtype=dtype), torch.empty(8, dtype=dtype), torch.empty_like(x)
    where = torch.empty(8, dtype=torch.int32)
    _reduce_rows[(1,)](x, total, top, where, cumulative, M=8, N=16)
    assert torch.equal(total, x.sum(1)) and torch.equal(top, x.amax(1)) and torch.equal(cumulative, x.cumsum(1))
    assert where.tolist() == list(range(8))


def test_a_bfloat16_sum_rounds_once():
    x = torch.full((8, 16), 1.0 + 2**-7, dtype=torch.bfloat16)
    total, top, cumulative = (torch.empty(s, dtype=torch.bfloat16) for s in ((8,), (8,), (8, 16)))
    _reduce_rows[(1,)](x, total, top, torch.empty(8, dtype=torch.int32), cumulative, M=8, N=16)
    assert torch.equal(total, x.float().sum(1).bfloat16())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_dot_accumulates_in_float32(dtype):
    a, b = (torch.randn(32, 64, generator=torch.Generator().manual_seed(seed)).to(dtype) for seed in (1, 2))
    out = torch.empty(32, 32)
    _dot[(1,)](a, b, out, M=32, N=32, K=64, PRECISION="ieee")
    exact = a.double() @ b.double().T
    bound = 64 * 2**-24 * (a.double().abs() @ b.double().abs().T)
    assert ((out - exact).abs() <= bound).all()


def test_a_tf32_dot_drops_the_bits_that_a_tensor_core_does_not_read():
    a, b = torch.eye(32), torch.randn(32, 32)
    out = torch.empty(32, 32)
    _dot[(1,)](a, b, out, M=32, N=32, K=32, PRECISION="tf32")
    truncated = (b.view(torch.int32) & ~0x1FFF).view(torch.float32)
    assert torch.equal(out, truncated.T) and not torch.equal(out, b.T)
    _dot[(1,)](a, b, out, M=32, N=32, K=32, PRECISION="ieee")
    assert torch.equal(out, b.T)


def test_a_dot_too_small_for_the_compiler_is_an_error_here_too():
    a = torch.randn(16, 8).half()
    with pytest.raises(Exception, match="K >= 16"):
        _dot[(1,)](a, a, torch.empty(16, 16), M=16, N=16, K=8, PRECISION="ieee")


# the rest of the language


@triton.jit
def _elementwise(x_ptr, out_ptr, BLOCK: tl.constexpr, OP: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets)
    if OP == "tanh":
        x = libdevice.tanh(x)
    elif OP == "erf":
        x = libdevice.erf(x)
    elif OP == "rsqrt":
        x = libdevice.rsqrt(x)
    elif OP == "log1p":
        x = libdevice.log1p(x)
    elif OP == "pow":
        x = libdevice.pow(x, 0.5)
    elif OP == "isnan":
        x = libdevice.isnan(x).to(tl.float32)
    else:
        x = libdevice.j0(x)
    tl.store(out_ptr + offsets, x)


@triton.jit
def _twice(x):
    return x + x


@triton.jit
def _odds_and_ends(x_ptr, pair, flag, out_ptr, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + o)
    first_ptr, offset = pair
    if flag:
        x = _twice(x) + offset
    x = tl.flip(tl.sort(x), 0)
    x = tl.reshape(tl.trans(tl.reshape(x, (2, BLOCK // 2))), (BLOCK,))
    tl.store(first_ptr + o, x)
    for step in tl.range(0, 3, num_stages=2):
        x += step
    tl.store(out_ptr + o, tl.softmax(x))


@triton.jit
def _assert_positive(x_ptr):
    tl.device_assert(tl.load(x_ptr) > 0, "not positive")


@triton.jit
def _copy_described(source, target, BLOCK: tl.constexpr):
    o_m = tl.program_id(0) * BLOCK
    target.store([o_m, 0], source.load([o_m, 0]))


@pytest.mark.parametrize("operation", ["tanh", "erf", "rsqrt", "log1p"])
def test_libdevice_functions_are_torchs(operation):
    x = torch.rand(64) + 0.1
    out = torch.empty(64)
    _elementwise[(1,)](x, out, BLOCK=64, OP=operation)
    torch.testing.assert_close(out, getattr(torch, operation)(x))


def test_libdevice_takes_scalars_and_returns_integers():
    x, out = torch.tensor([4.0, math.nan]), torch.empty(2)
    _elementwise[(1,)](x, out, BLOCK=2, OP="pow")
    assert out[0] == 2.0
    _elementwise[(1,)](x, out, BLOCK=2, OP="isnan")
    assert out.tolist() == [0.0, 1.0]


def test_an_unknown_libdevice_function_is_named():
    with pytest.raises(NotImplementedError, match="__nv_j0f"):
        _elementwise[(1,)](torch.ones(2), torch.empty(2), BLOCK=2, OP="j0")


def test_helpers_tuples_sorting_and_loops_work():
    x, middle, out = torch.randn(16), torch.empty(16), torch.empty(16)
    _odds_and_ends[(1,)](x, (middle, 0.5), True, out, BLOCK=16)
    expected = (2 * x + 0.5).sort(descending=True).values.view(2, 8).T.reshape(16)
    assert torch.equal(middle, expected)
    torch.testing.assert_close(out, (expected + 3).softmax(0))


def test_device_assert_is_live():
    with pytest.raises(AssertionError, match="not positive"):
        _assert_positive[(1,)](torch.zeros(1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_descriptors_clamp_at_the_edges(dtype):
    from triton.tools.tensor_descriptor import TensorDescriptor

    x, out = torch.randn(20, 16).to(dtype), torch.empty(20, 16, dtype=dtype)
    blocks = [TensorDescriptor.from_tensor(t, [16, 16]) for t in (x, out)]
    with traffic() as log:
        _copy_described[(2,)](*blocks, BLOCK=16)
    assert torch.equal(out, x)
    assert log[0].arguments == {"source": Bytes(x.nbytes, 0), "target": Bytes(0, x.nbytes)}


# autotune and heuristics


@triton.autotune(
    configs=[triton.Config({"BLOCK": block}) for block in (1 << 21, 32, 64)],
    key=["size"],
    prune_configs_by={"early_config_prune": lambda configs, named, **kwargs: configs[1:]},
)
@triton.heuristics({"EVEN": lambda arguments: arguments["size"] % arguments["BLOCK"] == 0})
@triton.jit
def _tuned(x_ptr, out_ptr, size, BLOCK: tl.constexpr, EVEN: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + offsets, tl.load(x_ptr + offsets, mask=offsets < size, other=0.0) + BLOCK, mask=offsets < size)
    tl.static_assert(not EVEN)


def test_autotune_runs_the_first_config_that_pruning_leaves():
    x, out = torch.zeros(100), torch.empty(100)
    grids = []

    def grid(meta):
        grids.append(meta["BLOCK"])
        return (triton.cdiv(meta["size"], meta["BLOCK"]),)

    _tuned[grid](x, out, 100)
    assert grids == [32] and torch.equal(out, x + 32)


# records


@triton.jit
def _copy_pairs(x_ptr, out_ptr):
    offsets = tl.program_id(0) * 2 + tl.arange(0, 2)
    tl.store(out_ptr + offsets, tl.load(x_ptr.to(tl.pointer_type(tl.int64)) + offsets), mask=offsets >= 0)


def test_traffic_counts_distinct_bytes_by_argument():
    x, out = torch.randn(4, 32), torch.empty(4, 32, dtype=torch.float64)
    view = x[:, :20]
    with traffic() as log:
        _copy_rows[(4,)](view, out, 4, 20, 32, 32, BLOCK=32)
        _accumulate[(2,)](torch.ones(100), torch.zeros(1), 100, BLOCK=64, ATOMIC=True)
    rows, sums = log
    assert (rows.kernel, rows.grid) == ("_copy_rows", (4, 1, 1))
    assert rows.arguments == {"x_ptr": Bytes(4 * 20 * 4, 0), "out_ptr": Bytes(0, 4 * 20 * 8)}
    assert (rows.read, rows.written) == (320, 640)
    assert sums.arguments == {"x_ptr": Bytes(400, 0), "out_ptr": Bytes(4, 4)}


def test_traffic_of_overlapping_arguments_is_each_ones_own():
    buffer = torch.randn(2, 100)
    with traffic() as log:
        _copy[(2,)](buffer[0], buffer[1], 100, 0, BLOCK=64)
        _copy[(2,)](buffer.view(-1)[:150], buffer.view(-1)[100:], 100, 0, BLOCK=64)
    assert all(launch.arguments == {"x_ptr": Bytes(400, 0), "out_ptr": Bytes(0, 400)} for launch in log)


def test_traffic_and_races_see_through_a_pointer_cast():
    x, out = torch.arange(8, dtype=torch.int32), torch.empty(4, dtype=torch.int64)
    with traffic() as log:
        _copy_pairs[(2,)](x, out)
    assert torch.equal(out, x.view(torch.int64))
    assert log[0].arguments == {"x_ptr": Bytes(32, 0), "out_ptr": Bytes(0, 32)}
    with pytest.raises(OutOfBounds, match="load of 1"):
        _copy_pairs[(2,)](x[:7], out)
    with pytest.raises(Race):
        _copy_pairs[(2,)](x, x[2:6].view(torch.int64))


def test_traffic_counts_an_element_once_however_often_it_is_read():
    x, w, out = torch.randn(64, 32), torch.randn(64, 32), torch.empty(64, 64)
    with traffic() as log:
        _matmul[(4,)](x, w, out, 64, 64, 32, BLOCK=32)
    assert log[0].arguments == {"x_ptr": Bytes(8192, 0), "w_ptr": Bytes(8192, 0), "out_ptr": Bytes(0, 16384)}


def test_launches_are_listed_in_order_and_lists_nest():
    x, out = torch.randn(100), torch.empty(100)
    with launches() as outer:
        _copy[(2,)](x, out, 100, 0, BLOCK=64)
        with launches() as inner:
            _tuned[(4,)](x, out, 100)
        _copy[(2,)](x, out, 100, 0, BLOCK=64)
    assert inner == ["_tuned"] and outer == ["_copy", "_tuned", "_copy"]
    _copy[(2,)](x, out, 100, 0, BLOCK=64)
    assert len(outer) == 3
    with launches() as outer:
        with launches() as inner:
            pass
        _copy[(2,)](x, out, 100, 0, BLOCK=64)
    assert inner == [] and outer == ["_copy"]


# after an error, and beside the compiler


@triton.jit
def _matmul(x_ptr, w_ptr, out_ptr, T, N, K, BLOCK: tl.constexpr):
    pid = tl.program_id(0)
    blocks = tl.cdiv(N, BLOCK)
    o_t = (pid // blocks) * BLOCK + tl.arange(0, BLOCK)
    o_n = (pid % blocks) * BLOCK + tl.arange(0, BLOCK)
    o_k = tl.arange(0, BLOCK)
    accumulator = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, K, BLOCK):
        x = tl.load(x_ptr + o_t[:, None] * K + start + o_k[None, :], mask=start + o_k[None, :] < K, other=0.0)
        w = tl.load(w_ptr + o_n[None, :] * K + start + o_k[:, None], mask=start + o_k[:, None] < K, other=0.0)
        accumulator = tl.dot(x, w, accumulator)
    tl.store(out_ptr + o_t[:, None] * N + o_n[None, :], accumulator)


def _matmul_is_right():
    x, w, out = torch.randn(64, 40).bfloat16(), torch.randn(64, 40).bfloat16(), torch.empty(64, 64)
    _matmul[(4,)](x, w, out, 64, 64, 40, BLOCK=32)
    torch.testing.assert_close(out, x.float() @ w.float().T)


def test_an_error_inside_a_kernel_leaves_triton_usable():
    before = dict(vars(tl)), dict(vars(tl.tensor))
    for _ in range(2):
        with pytest.raises(OutOfBounds):
            _copy[(2,)](torch.randn(100), torch.empty(100), 100, 1, BLOCK=64)
        assert (dict(vars(tl)), dict(vars(tl.tensor))) == before
        _matmul_is_right()
        with aot("sm90") as compiled:
            meta = [torch.empty(64, 64, device="meta", dtype=torch.bfloat16) for _ in range(3)]
            _matmul[(4,)](*meta, 64, 64, 64, BLOCK=32)
        assert b"ELF" in compiled[0].kernel.asm["cubin"]
    _matmul_is_right()


def test_a_kernels_module_gains_no_names_that_could_hide_a_missing_import():
    _matmul_is_right()
    assert not {"np", "inspect", "TensorHandle", "Memory"} & set(globals())


def test_a_launch_on_meta_tensors_outside_aot_is_an_error():
    with pytest.raises(RuntimeError, match=r"_copy was launched on meta tensors.*aot\(target\)"):
        _copy[(1,)](torch.empty(8, device="meta"), torch.empty(8, device="meta"), 8, 0, BLOCK=8)


# versions


def test_an_unknown_triton_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(interpreter, "_triton_version", lambda: "4.2.0")
    assert not supported()
    for use in (interpret, lambda: launches().__enter__(), lambda: traffic().__enter__()):
        with pytest.raises(RuntimeError, match=r"needs Triton 3\.6, 3\.7, 3\.8 or 3\.9; Triton 4\.2\.0 is installed"):
            use()


def test_without_triton_it_is_refused_too(monkeypatch):
    monkeypatch.setattr(interpreter, "triton", None)
    assert not supported()
    with pytest.raises(RuntimeError, match="Triton is not installed"):
        interpret()


def test_tritons_own_interpreter_is_refused(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET is set"):
        interpret()


def test_tests_that_need_it_skip_visibly(tmp_path):
    (tmp_path / "test_sample.py").write_text(
        "import pytest, triton\n"
        "triton.__version__ = '4.2.0'\n"
        "from hylorada_kernels.testing.interpreter import requires_interpreter, supported\n"
        "@pytest.mark.skipif(not supported(), reason=requires_interpreter)\n"
        "def test_kernel():\n"
        "    raise AssertionError\n"
    )
    command = [sys.executable, "-m", "pytest", "-rs", "-p", "no:cacheprovider", "--rootdir", tmp_path, tmp_path]
    root = Path(interpreter.__file__).parents[2]
    outcome = subprocess.run(command, capture_output=True, text=True, cwd=root).stdout
    assert "1 skipped" in outcome and "Triton 4.2.0 is installed" in outcome


# uninitialised outputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32, torch.int64, torch.uint8, torch.bool])
def test_poisoned_empty_fills_every_kind_of_empty(dtype):
    like = torch.zeros(3, dtype=dtype)
    with poisoned_empty():
        made = [
            torch.empty(3, dtype=dtype),
            torch.empty_like(like),
            torch.empty_strided((3,), (2,), dtype=dtype),
            like.new_empty(3),
            like.new_empty_strided((3,), (2,)),
        ]
    for tensor in made:
        if dtype.is_floating_point:
            assert tensor.isnan().all()
        else:
            assert (tensor == (True if dtype == torch.bool else torch.iinfo(dtype).max)).all()


def test_poisoned_empty_shows_a_forgotten_store():
    with poisoned_empty():
        out = torch.empty(100)
    _copy[(1,)](torch.randn(100), out, 100, 0, BLOCK=64)
    assert not out[:64].isnan().any() and out[64:].isnan().all()


def test_poisoned_empty_keeps_device_contexts_meta_and_gradients_as_they_are():
    plain = torch.empty
    with poisoned_empty():
        assert torch.empty(2, requires_grad=True).requires_grad
        assert torch.empty(2, device="meta").is_meta
        with torch.device("meta"):
            assert torch.empty(2).is_meta
    assert torch.empty is plain
    with torch.device("meta"):
        assert torch.empty(2).is_meta


def test_poisoned_empty_is_traced_whole_by_the_compiler():
    function = torch.compile(lambda x: torch.empty_like(x) + x, fullgraph=True, backend="eager")
    with poisoned_empty():
        assert function(torch.ones(3)).isnan().all()
