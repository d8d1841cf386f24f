"""Column norm in Triton: W is read once, B A lives in registers a tile at a time. See op.py for the contract."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._tl import next_power_of_two

# rows that one program makes the norms of, and the elements that one program of the fingerprint takes at a time
BLOCK_O = 32
FINGERPRINT_BLOCK = 1024
# most programs of a fingerprint: each of the norm's programs adds up all of their sums
FINGERPRINT_PARTS = 128
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_ELEMENTS = {
    torch.float64: tl.float64, torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16
}  # fmt: skip


@triton.jit
def _squared_norms(
    weight_ptr, lora_a_ptr, lora_b_ptr, o_o, O, I, R,
    stride_wo, stride_wi, stride_ar, stride_ai, stride_bo, stride_br, scale,
    BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """sum_i (W[o, i] + s sum_r B[o, r] A[r, i])^2, [BLOCK_O]: squares of the sum itself cannot cancel below zero."""
    o_i = tl.arange(0, BLOCK_I)
    o_r = tl.arange(0, BLOCK_R)
    m_o = o_o < O
    weight_rows = weight_ptr + o_o[:, None].to(tl.int64) * stride_wo
    b_rows = lora_b_ptr + o_o[:, None].to(tl.int64) * stride_bo
    squares = tl.zeros((BLOCK_O,), dtype=tl.float32)
    for i in range(0, I, BLOCK_I):
        m_i = i + o_i < I
        columns = (i + o_i).to(tl.int64)
        # [BLOCK_O, BLOCK_I]
        update = tl.zeros((BLOCK_O, BLOCK_I), dtype=tl.float32)
        for r in range(0, R, BLOCK_R):
            m_r = r + o_r < R
            b_b = tl.load(b_rows + (r + o_r)[None, :] * stride_br, mask=m_o[:, None] & m_r[None, :], other=0.0)
            b_a = tl.load(
                lora_a_ptr + (r + o_r)[:, None].to(tl.int64) * stride_ar + columns[None, :] * stride_ai,
                mask=m_r[:, None] & m_i[None, :], other=0.0,
            )  # fmt: skip
            update = tl.dot(b_b.to(tl.float32), b_a.to(tl.float32), update, input_precision="ieee")
        b_w = tl.load(weight_rows + columns[None, :] * stride_wi, mask=m_o[:, None] & m_i[None, :], other=0.0)
        adapted = b_w.to(tl.float32) + scale * update
        squares += tl.sum(adapted * adapted, axis=1)
    return squares


@triton.jit
def column_norm_kernel(
    weight_ptr, lora_a_ptr, lora_b_ptr, norm_ptr, kept_norm_ptr, kept_fingerprint_ptr, partial_ptr,
    O, I, R, parts,
    stride_wo, stride_wi, stride_ar, stride_ai, stride_bo, stride_br,
    scale,
    GUARDED: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_R: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """n[o] = || W[o, :] + s (B A)[o, :] ||; GUARDED: or the kept one, where the fingerprint is the kept one"""
    pid = tl.program_id(0)
    o_o = pid * BLOCK_O + tl.arange(0, BLOCK_O)
    m_o = o_o < O
    if GUARDED:
        o_p = tl.arange(0, PARTS)
        # odd, so that a kept 0 fits nothing
        fingerprint = tl.sum(tl.load(partial_ptr + o_p, mask=o_p < parts, other=0), axis=0) | 1
        # every program has a copy of its own: no one else's norms hang on it
        if fingerprint == tl.load(kept_fingerprint_ptr + pid):
            tl.store(norm_ptr + o_o, tl.load(kept_norm_ptr + o_o, mask=m_o, other=0.0), mask=m_o)
        else:
            squares = _squared_norms(
                weight_ptr, lora_a_ptr, lora_b_ptr, o_o, O, I, R,
                stride_wo, stride_wi, stride_ar, stride_ai, stride_bo, stride_br, scale, BLOCK_O, BLOCK_I, BLOCK_R,
            )  # fmt: skip
            norm = tl.sqrt_rn(squares)
            tl.store(norm_ptr + o_o, norm, mask=m_o)
            tl.store(kept_norm_ptr + o_o, norm, mask=m_o)
            tl.store(kept_fingerprint_ptr + pid, fingerprint)
    else:
        squares = _squared_norms(
            weight_ptr, lora_a_ptr, lora_b_ptr, o_o, O, I, R,
            stride_wo, stride_wi, stride_ar, stride_ai, stride_bo, stride_br, scale, BLOCK_O, BLOCK_I, BLOCK_R,
        )  # fmt: skip
        tl.store(norm_ptr + o_o, tl.sqrt_rn(squares), mask=m_o)


@triton.jit
def column_norms_kernel(
    table_ptr, scale_ptr, norm_ptr, layers,
    WEIGHT_DTYPE: tl.constexpr, FACTOR_DTYPE: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """The norms of several layers of contiguous, aligned tensors; see `forward_several` for the table"""
    pid = tl.program_id(0)
    # the last layer whose first program is not after this one
    layer = tl.cast(0, tl.int32)
    end = layers
    while layer + 1 < end:
        middle = (layer + end) // 2
        is_before = tl.load(table_ptr + middle * 8) <= pid
        layer = tl.where(is_before, middle, layer)
        end = tl.where(is_before, end, middle)
    row = table_ptr + layer * 8
    O, I, R = tl.load(row + 5), tl.multiple_of(tl.load(row + 6), 8), tl.load(row + 7)
    o_o = (pid - tl.load(row)) * BLOCK_O + tl.arange(0, BLOCK_O)
    squares = _squared_norms(
        tl.multiple_of(tl.load(row + 1).to(tl.pointer_type(WEIGHT_DTYPE)), 16),
        tl.multiple_of(tl.load(row + 2).to(tl.pointer_type(FACTOR_DTYPE)), 16),
        tl.load(row + 3).to(tl.pointer_type(FACTOR_DTYPE)),
        o_o, O, I, R, I, 1, I, 1, R, 1, tl.load(scale_ptr + layer), BLOCK_O, BLOCK_I, BLOCK_R,
    )  # fmt: skip
    tl.store(norm_ptr + tl.load(row + 4) + o_o, tl.sqrt_rn(squares), mask=o_o < O)


@triton.jit
def _scrambled(bits, position):
    """A 64-bit number for a value at a position (the finisher of splitmix64): sums of them hide no change."""
    z = bits.to(tl.uint64) ^ (position.to(tl.uint64) * 0x9E3779B97F4A7C15)
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return (z ^ (z >> 31)).to(tl.int64, bitcast=True)


@triton.jit
def _scrambled_block(matrix_ptr, offsets, count, columns, stride_row, stride_column, first):
    """The scrambled bits of the elements `offsets` of a matrix, in reading order; 0 past its end."""
    m = offsets < count
    pointers = matrix_ptr + (offsets // columns) * stride_row + (offsets % columns) * stride_column
    return tl.where(m, _scrambled(tl.load(pointers, mask=m, other=0).to(tl.int64), offsets + first), 0)


@triton.jit
def fingerprint_kernel(
    weight_ptr, lora_a_ptr, lora_b_ptr, partial_ptr,
    O, I, R, samples, sample_step,
    stride_wo, stride_wi, stride_ar, stride_ai, stride_bo, stride_br,
    scale,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program's share of a sum over the raw bits of A, B, a sample of W, and s; the order does not matter"""
    pid, programs = tl.program_id(0), tl.num_programs(0)
    lanes = tl.arange(0, BLOCK).to(tl.int64)
    total = tl.zeros((BLOCK,), dtype=tl.int64)
    a_count, b_count = tl.cast(R, tl.int64) * I, tl.cast(O, tl.int64) * R
    for start in range(pid * BLOCK, a_count, programs * BLOCK):
        total += _scrambled_block(lora_a_ptr, start + lanes, a_count, I, stride_ar, stride_ai, 0)
    for start in range(pid * BLOCK, b_count, programs * BLOCK):
        total += _scrambled_block(lora_b_ptr, start + lanes, b_count, R, stride_bo, stride_br, a_count)
    for start in range(pid * BLOCK, samples, programs * BLOCK):
        o_s = start + lanes
        m_s = o_s < samples
        offsets = o_s * sample_step
        pointers = weight_ptr + (offsets // I) * stride_wo + (offsets % I) * stride_wi
        bits = tl.load(pointers, mask=m_s, other=0).to(tl.int64)
        total += tl.where(m_s, _scrambled(bits, a_count + b_count + o_s), 0)
    share = tl.sum(total, axis=0)
    if pid == 0:
        share += _scrambled(scale.to(tl.int32, bitcast=True).to(tl.int64), a_count + b_count + samples)
    tl.store(partial_ptr + pid, share)


def forward(weight: Tensor, lora_a: Tensor, lora_b: Tensor, *, scale: float) -> Tensor:
    """See eager.forward."""
    norm = torch.empty(weight.shape[0], dtype=torch.float32, device=weight.device)
    _launch(weight, lora_a, lora_b, norm, None, None, None, scale)
    return norm


def forward_several(
    weights: list[Tensor], lora_as: list[Tensor], lora_bs: list[Tensor], *, scales: list[float]
) -> list[Tensor]:
    """The norms of several layers in one launch for each pair of dtypes; tensors with gaps are launched one by one.

    A row of the table: the layer's first program, the addresses of W, A and B, where its norms begin, O, I, R.
    """
    sizes = [weight.shape[0] for weight in weights]
    every_norm = torch.empty(sum(sizes), dtype=torch.float32, device=weights[0].device)
    norms = list(every_norm.split(sizes))
    tables: dict[tuple[torch.dtype, torch.dtype], list[list[int]]] = {}
    table_scales: dict[tuple[torch.dtype, torch.dtype], list[float]] = {}
    for weight, lora_a, lora_b, norm, scale in zip(weights, lora_as, lora_bs, norms, scales, strict=True):
        if not _fits_table(weight, lora_a, lora_b):
            _launch(weight, lora_a, lora_b, norm, None, None, None, scale)
            continue
        key = weight.dtype, lora_a.dtype
        table = tables.setdefault(key, [])
        first = table[-1][0] + programs(table[-1][5]) if table else 0
        addresses = [tensor.data_ptr() for tensor in (weight, lora_a, lora_b)]
        table.append([first, *addresses, norm.storage_offset(), *weight.shape, lora_a.shape[0]])
        table_scales.setdefault(key, []).append(scale)
    for (weight_dtype, factor_dtype), table in tables.items():
        column_norms_kernel[(table[-1][0] + programs(table[-1][5]),)](
            torch.tensor(table, dtype=torch.int64, device=every_norm.device),
            torch.tensor(table_scales[weight_dtype, factor_dtype], dtype=torch.float32, device=every_norm.device),
            every_norm, len(table),
            WEIGHT_DTYPE=_ELEMENTS[weight_dtype], FACTOR_DTYPE=_ELEMENTS[factor_dtype],
            **_tile(32),
        )  # fmt: skip
    return norms


def guarded(
    kept: list[Tensor], weight: Tensor, lora_a: Tensor, lora_b: Tensor, *, scale: float, samples: int, sample_step: int
) -> Tensor:
    """The norm, made anew only where the bits of A, B, s or of the sampled weight have changed: two launches, no wait.

    Args:
        kept: the norm and the fingerprint of what it was made of, (O,) fp32 and (programs(O),) int64; both are updated.
        samples, sample_step: the sample is so many elements of the weight, this far apart in reading order.
    """
    kept_norm, kept_fingerprint = kept
    norm = torch.empty_like(kept_norm)
    rows, columns, rank = *weight.shape, lora_a.shape[0]
    parts = min(FINGERPRINT_PARTS, triton.cdiv(max(rank * (rows + columns), samples), FINGERPRINT_BLOCK))
    partial = torch.empty(max(parts, 1), dtype=torch.int64, device=weight.device)
    fingerprint_kernel[(partial.numel(),)](
        *(tensor.view(_BITS[tensor.element_size()]) for tensor in (weight, lora_a, lora_b)), partial,
        rows, columns, rank, samples, sample_step,
        *weight.stride(), *lora_a.stride(), *lora_b.stride(),
        scale,
        BLOCK=FINGERPRINT_BLOCK,
        num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    _launch(weight, lora_a, lora_b, norm, kept_norm, kept_fingerprint, partial, scale)
    return norm


def programs(rows: int) -> int:
    """Programs of a norm's launch."""
    return triton.cdiv(rows, BLOCK_O)


def _launch(
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    norm: Tensor,
    kept_norm: Tensor | None,
    kept_fingerprint: Tensor | None,
    partial: Tensor | None,
    scale: float,
) -> None:
    rows, columns = weight.shape
    if not rows:
        return
    parts = 0 if partial is None else partial.numel()
    column_norm_kernel[(programs(rows),)](
        weight, lora_a, lora_b, norm, kept_norm, kept_fingerprint, partial,
        rows, columns, lora_a.shape[0], parts,
        *weight.stride(), *lora_a.stride(), *lora_b.stride(),
        scale,
        GUARDED=partial is not None, PARTS=next_power_of_two(parts, at_least=1, at_most=FINGERPRINT_PARTS),
        # an address for each element takes registers
        **_tile(64 if max(weight.stride()) * weight.element_size() % 16 == 0 else 32),
    )  # fmt: skip


def _tile(block_i: int) -> dict[str, int | bool]:
    return {
        "BLOCK_O": BLOCK_O, "BLOCK_I": block_i, "BLOCK_R": 16, "num_warps": 4, "num_stages": 3, "enable_fp_fusion": True
    }  # fmt: skip


def _fits_table(weight: Tensor, lora_a: Tensor, lora_b: Tensor) -> bool:
    dense = all(tensor.is_contiguous() and tensor.data_ptr() % 16 == 0 for tensor in (weight, lora_a, lora_b))
    return dense and lora_a.dtype == lora_b.dtype and weight.shape[1] % 8 == 0 and weight.shape[0] > 0
