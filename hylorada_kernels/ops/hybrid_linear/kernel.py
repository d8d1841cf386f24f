"""Hybrid linear in Triton. See op.py for the contract and dispatch.py for which kernels run.

Forward, "fused": h = s drop(x) A^T, then one product whose accumulator starts at h B^T, takes x W^T, and is scaled and
shifted on its way out. "library": the large product is cuBLAS's, and h B^T, scale and shift are put onto it in place.
"one_pass": all of it, and the norm if need be, in one kernel that streams W once.

Backward, with P = p s (g dy) B:
    reduce    dB, dg and dbias in one pass over dy and y, split over tokens into fp32 partial sums
    dx        p (g dy) W + P A, which leaves P behind (above rank 32 P is made first, by its own kernel)
    finish    the partial sums in order; columns whose z cannot be read off y get it computed again
    dA        P^T drop(x), and the last sums: dblend, dp

Partial sums are added in a fixed order: no atomics, the same bits in every run. dp is a sum that needs neither y nor a
division: dp_t = sum_i x_ti ((g dy) W)_ti + sum_r ((g dy) B)_tr h_tr.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .._tl import launch_options, tile_of
from ..column_norm import kernel as column_norm
from . import dispatch

# z = (y - bias) / g is not read off y where g is below SMALL_GAIN or the bias above LARGE_BIAS times the row's scale
SMALL_GAIN = tl.constexpr(2.0**-6)
LARGE_BIAS = tl.constexpr(8.0)


@triton.jit
def _kept(seed, o_t, o_i, dropout_p):
    """Whether dropout keeps x[t, i], [len(o_t), len(o_i)]: by seed and position, so the same in every kernel."""
    column = o_i.to(tl.uint32)[None, :] + tl.zeros((o_t.shape[0], 1), tl.uint32)
    row = o_t.to(tl.uint32)[:, None] + tl.zeros((1, o_i.shape[0]), tl.uint32)
    random, _, _, _ = tl.philox(seed, column, row, row * 0, row * 0)
    return tl.uint_to_uniform_float(random) >= dropout_p


@triton.jit
def _gain(norm, magnitude_ptr, blend_ptr, o_o, m_o, HAS_BLEND: tl.constexpr):
    """m / n (1 for a zero row), beta, 1 / n (0 for a zero row): g = ratio + beta (1 - ratio). norm: n or its place."""
    if norm.dtype.is_ptr():
        norm = tl.load(norm + o_o, mask=m_o, other=1.0)
    magnitude = tl.load(magnitude_ptr + o_o, mask=m_o, other=1.0).to(tl.float32)
    safe = tl.where(norm > 0.0, norm, 1.0)
    rate = tl.where(norm > 0.0, tl.div_rn(tl.full(norm.shape, 1.0, tl.float32), safe), 0.0)
    ratio = tl.where(norm > 0.0, tl.div_rn(magnitude, safe), 1.0)
    beta = 0.0
    if HAS_BLEND:
        beta = tl.sigmoid(tl.load(blend_ptr).to(tl.float32))
    return ratio, beta, rate


@triton.jit
def lora_down_kernel(
    x_ptr, lora_a_ptr, seed_ptr, h_ptr,
    T, I, R,
    stride_xt, stride_xi, stride_ar, stride_ai,
    scale, dropout_p,
    HAS_DROPOUT: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """h = s drop(x) A^T: scaled before it is rounded, so that the next product can go on adding to it"""
    o_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    o_r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_i = tl.arange(0, BLOCK_I)
    m_t, m_r = o_t < T, o_r < R
    x_rows = x_ptr + o_t[:, None].to(tl.int64) * stride_xt
    a_rows = lora_a_ptr + o_r[None, :].to(tl.int64) * stride_ar
    if HAS_DROPOUT:
        seed = tl.load(seed_ptr)
    h = tl.zeros((BLOCK_T, BLOCK_R), dtype=tl.float32)
    for i in range(0, I, BLOCK_I):
        columns = (i + o_i).to(tl.int64)
        m_i = columns < I
        # [BLOCK_T, BLOCK_I]
        b_x = tl.load(x_rows + columns[None, :] * stride_xi, mask=m_t[:, None] & m_i[None, :], other=0.0)
        # [BLOCK_I, BLOCK_R]
        b_a = tl.load(a_rows + columns[:, None] * stride_ai, mask=m_i[:, None] & m_r[None, :], other=0.0)
        if HAS_DROPOUT:
            b_x = tl.where(_kept(seed, o_t, columns, dropout_p), b_x, 0.0)
        h = tl.dot(b_x, b_a.to(b_x.dtype), h, input_precision="ieee")
    h *= scale
    if HAS_DROPOUT:
        h = h / (1.0 - dropout_p)
    tl.store(h_ptr + o_t[:, None].to(tl.int64) * R + o_r[None, :], h, mask=m_t[:, None] & m_r[None, :])


@triton.jit
def _low_rank_product(
    h_ptr, lora_b_ptr, o_t, o_o, m_t, m_o, R, stride_bo, stride_br,
    BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """h B^T for one tile, [BLOCK_T, BLOCK_O] fp32."""
    o_r = tl.arange(0, BLOCK_R)
    update = tl.zeros((BLOCK_T, BLOCK_O), dtype=tl.float32)
    for r in range(0, R, BLOCK_R):
        m_r = r + o_r < R
        b_h = tl.load(
            h_ptr + o_t[:, None].to(tl.int64) * R + (r + o_r)[None, :], mask=m_t[:, None] & m_r[None, :], other=0.0
        )
        b_b = tl.load(
            lora_b_ptr + o_o[None, :].to(tl.int64) * stride_bo + (r + o_r)[:, None] * stride_br,
            mask=m_r[:, None] & m_o[None, :], other=0.0,
        )  # fmt: skip
        update = tl.dot(b_h, b_b.to(b_h.dtype), update, input_precision="ieee")
    return update


@triton.jit
def _base_product(
    product, x_ptr, weight_ptr, o_t, o_o, T, O, I, stride_xt, stride_xi, stride_wo, stride_wi,
    BLOCK_I: tl.constexpr, EVEN_I: tl.constexpr,
):  # fmt: skip
    """product + x W^T for one tile, [BLOCK_T, BLOCK_O] fp32; rows past the end wrap around and are never stored."""
    o_i = tl.arange(0, BLOCK_I)
    x_ptrs = x_ptr + (o_t % T)[:, None].to(tl.int64) * stride_xt + o_i[None, :] * stride_xi
    weight_ptrs = weight_ptr + (o_o % O)[None, :].to(tl.int64) * stride_wo + o_i[:, None] * stride_wi
    for i in range(0, I, BLOCK_I):
        if EVEN_I:
            b_x = tl.load(x_ptrs)
            b_w = tl.load(weight_ptrs)
        else:
            m_i = o_i < I - i
            b_x = tl.load(x_ptrs, mask=m_i[None, :], other=0.0)
            b_w = tl.load(weight_ptrs, mask=m_i[:, None], other=0.0)
        product = tl.dot(b_x, b_w, product, input_precision="ieee")
        x_ptrs += BLOCK_I * stride_xi
        weight_ptrs += BLOCK_I * stride_wi
    return product


@triton.jit
def _base_product_of_descriptors(product, x_descriptor, weight_descriptor, first_t, first_o, I, BLOCK_I: tl.constexpr):
    """product + x W^T for the tile that begins at first_t, first_o; what lies outside is read as 0."""
    for i in range(0, I, BLOCK_I):
        b_x = x_descriptor.load([first_t, i])
        b_w = weight_descriptor.load([first_o, i])
        product = tl.dot(b_x, tl.trans(b_w), product, input_precision="ieee")
    return product


@triton.jit
def _store_blended(
    product, norm, magnitude_ptr, blend_ptr, bias_ptr, token_scale_ptr, y_ptr, gain_ptr, o_t, o_o, m_t, m_o, O, pid_t,
    HAS_MAGNITUDE: tl.constexpr, HAS_BLEND: tl.constexpr, HAS_BIAS: tl.constexpr, SCALES_OUTPUT: tl.constexpr,
):  # fmt: skip
    """y = p g product + bias; the first row of tiles stores g too."""
    if HAS_MAGNITUDE:
        ratio, beta, _ = _gain(norm, magnitude_ptr, blend_ptr, o_o, m_o, HAS_BLEND)
        gain = ratio + beta * (1.0 - ratio)
        product *= gain[None, :]
        if pid_t == 0:
            tl.store(gain_ptr + o_o, gain, mask=m_o)
    if SCALES_OUTPUT:
        product *= tl.load(token_scale_ptr + o_t, mask=m_t, other=0.0).to(tl.float32)[:, None]
    if HAS_BIAS:
        product += tl.load(bias_ptr + o_o, mask=m_o, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + o_t[:, None].to(tl.int64) * O + o_o[None, :], product, mask=m_t[:, None] & m_o[None, :])


@triton.jit
def blended_gemm_kernel(
    x_ptr, weight_ptr, h_ptr, lora_b_ptr, magnitude_ptr, blend_ptr, norm_ptr, bias_ptr, token_scale_ptr,
    y_ptr, gain_ptr,
    T, I, O, R,
    stride_xt, stride_xi, stride_wo, stride_wi, stride_bo, stride_br,
    HAS_MAGNITUDE: tl.constexpr, HAS_BLEND: tl.constexpr, HAS_BIAS: tl.constexpr,
    SCALES_OUTPUT: tl.constexpr, SCALES_DELTA: tl.constexpr, EVEN_I: tl.constexpr, HAS_DESCRIPTORS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_R: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """y = p g (x W^T + h B^T) + bias, written straight from the fp32 accumulator"""
    pid_t, pid_o = tile_of(tl.program_id(0), T, O, BLOCK_T, BLOCK_O, GROUP)
    o_t = pid_t * BLOCK_T + tl.arange(0, BLOCK_T)
    o_o = pid_o * BLOCK_O + tl.arange(0, BLOCK_O)
    m_t, m_o = o_t < T, o_o < O
    product = _low_rank_product(
        h_ptr, lora_b_ptr, o_t, o_o, m_t, m_o, R, stride_bo, stride_br, BLOCK_T, BLOCK_O, BLOCK_R
    )
    if SCALES_DELTA:
        product *= tl.load(token_scale_ptr + o_t, mask=m_t, other=0.0).to(tl.float32)[:, None]
    if HAS_DESCRIPTORS:
        product = _base_product_of_descriptors(product, x_ptr, weight_ptr, pid_t * BLOCK_T, pid_o * BLOCK_O, I, BLOCK_I)
    else:
        product = _base_product(
            product, x_ptr, weight_ptr, o_t, o_o, T, O, I, stride_xt, stride_xi, stride_wo, stride_wi, BLOCK_I, EVEN_I
        )
    _store_blended(
        product, norm_ptr, magnitude_ptr, blend_ptr, bias_ptr, token_scale_ptr, y_ptr, gain_ptr,
        o_t, o_o, m_t, m_o, O, pid_t, HAS_MAGNITUDE, HAS_BLEND, HAS_BIAS, SCALES_OUTPUT,
    )  # fmt: skip


@triton.jit
def blend_epilogue_kernel(
    h_ptr, lora_b_ptr, magnitude_ptr, blend_ptr, norm_ptr, bias_ptr, token_scale_ptr, y_ptr, gain_ptr,
    T, O, R,
    stride_bo, stride_br,
    HAS_MAGNITUDE: tl.constexpr, HAS_BLEND: tl.constexpr, HAS_BIAS: tl.constexpr,
    SCALES_OUTPUT: tl.constexpr, SCALES_DELTA: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """y = p g (y + h B^T) + bias in place, on the product x W^T of a library"""
    pid_t = tl.program_id(0)
    o_t = pid_t * BLOCK_T + tl.arange(0, BLOCK_T)
    o_o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    m_t, m_o = o_t < T, o_o < O
    product = _low_rank_product(
        h_ptr, lora_b_ptr, o_t, o_o, m_t, m_o, R, stride_bo, stride_br, BLOCK_T, BLOCK_O, BLOCK_R
    )
    if SCALES_DELTA:
        product *= tl.load(token_scale_ptr + o_t, mask=m_t, other=0.0).to(tl.float32)[:, None]
    # [BLOCK_T, BLOCK_O]
    b_y = tl.load(y_ptr + o_t[:, None].to(tl.int64) * O + o_o[None, :], mask=m_t[:, None] & m_o[None, :], other=0.0)
    product += b_y.to(tl.float32)
    _store_blended(
        product, norm_ptr, magnitude_ptr, blend_ptr, bias_ptr, token_scale_ptr, y_ptr, gain_ptr,
        o_t, o_o, m_t, m_o, O, pid_t, HAS_MAGNITUDE, HAS_BLEND, HAS_BIAS, SCALES_OUTPUT,
    )  # fmt: skip


@triton.jit
def one_pass_kernel(
    x_ptr, weight_ptr, lora_a_ptr, lora_b_ptr, magnitude_ptr, blend_ptr, norm_ptr, bias_ptr, token_scale_ptr,
    y_ptr, h_ptr, gain_ptr, own_norm_ptr,
    T, I, O, R,
    stride_xt, stride_xi, stride_wo, stride_wi, stride_ar, stride_ai, stride_bo, stride_br,
    scale,
    HAS_MAGNITUDE: tl.constexpr, HAS_BLEND: tl.constexpr, HAS_BIAS: tl.constexpr,
    SCALES_OUTPUT: tl.constexpr, SCALES_DELTA: tl.constexpr, MAKES_NORM: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """y = p g (x W^T + s x A^T B^T) + bias in one reading of W, with h, g and, where it is not given, n"""
    pid_o, pid_t = tl.program_id(0), tl.program_id(1)
    o_t = pid_t * BLOCK_T + tl.arange(0, BLOCK_T)
    o_o = pid_o * BLOCK_O + tl.arange(0, BLOCK_O)
    o_i = tl.arange(0, BLOCK_I)
    o_r = tl.arange(0, BLOCK_R)
    m_t, m_o, m_r = o_t < T, o_o < O, o_r < R
    # [BLOCK_O, BLOCK_R]
    b_b = tl.load(
        lora_b_ptr + o_o[:, None].to(tl.int64) * stride_bo + o_r[None, :] * stride_br,
        mask=m_o[:, None] & m_r[None, :], other=0.0,
    )  # fmt: skip
    product = tl.zeros((BLOCK_T, BLOCK_O), dtype=tl.float32)
    h = tl.zeros((BLOCK_T, BLOCK_R), dtype=tl.float32)
    squares = tl.zeros((BLOCK_O,), dtype=tl.float32)
    for i in range(0, I, BLOCK_I):
        columns = (i + o_i).to(tl.int64)
        m_i = columns < I
        # [BLOCK_T, BLOCK_I]
        b_x = tl.load(
            x_ptr + o_t[:, None].to(tl.int64) * stride_xt + columns[None, :] * stride_xi,
            mask=m_t[:, None] & m_i[None, :], other=0.0,
        )  # fmt: skip
        # [BLOCK_O, BLOCK_I]
        b_w = tl.load(
            weight_ptr + o_o[:, None].to(tl.int64) * stride_wo + columns[None, :] * stride_wi,
            mask=m_o[:, None] & m_i[None, :], other=0.0,
        )  # fmt: skip
        # [BLOCK_R, BLOCK_I]
        b_a = tl.load(
            lora_a_ptr + o_r[:, None].to(tl.int64) * stride_ar + columns[None, :] * stride_ai,
            mask=m_r[:, None] & m_i[None, :], other=0.0,
        )  # fmt: skip
        product = tl.dot(b_x, tl.trans(b_w), product, input_precision="ieee")
        h = tl.dot(b_x, tl.trans(b_a.to(b_x.dtype)), h, input_precision="ieee")
        if MAKES_NORM:
            update = tl.dot(b_b.to(tl.float32), b_a.to(tl.float32), input_precision="ieee")
            adapted = b_w.to(tl.float32) + scale * update
            squares += tl.sum(adapted * adapted, axis=1)
    b_h = (h * scale).to(x_ptr.dtype.element_ty)
    if pid_o == 0:
        tl.store(h_ptr + o_t[:, None].to(tl.int64) * R + o_r[None, :], b_h, mask=m_t[:, None] & m_r[None, :])
    update = tl.dot(b_h, tl.trans(b_b.to(b_h.dtype)), input_precision="ieee")
    if SCALES_DELTA:
        update *= tl.load(token_scale_ptr + o_t, mask=m_t, other=0.0).to(tl.float32)[:, None]
    norm = norm_ptr
    if MAKES_NORM:
        norm = tl.sqrt_rn(squares)
        if pid_t == 0:
            tl.store(own_norm_ptr + o_o, norm, mask=m_o)
    _store_blended(
        product + update, norm, magnitude_ptr, blend_ptr, bias_ptr, token_scale_ptr, y_ptr, gain_ptr,
        o_t, o_o, m_t, m_o, O, pid_t, HAS_MAGNITUDE, HAS_BLEND, HAS_BIAS, SCALES_OUTPUT,
    )  # fmt: skip


@triton.jit
def merge_kernel(
    weight_ptr, lora_a_ptr, lora_b_ptr, magnitude_ptr, blend_ptr, norm_ptr, merged_ptr,
    O, I, R,
    stride_wo, stride_wi, stride_ar, stride_ai, stride_bo, stride_br,
    scale,
    HAS_MAGNITUDE: tl.constexpr, HAS_BLEND: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """W' = g (W + s B A), rounded once"""
    o_o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    o_i = (tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)).to(tl.int64)
    o_r = tl.arange(0, BLOCK_R)
    m_o, m_i = o_o < O, o_i < I
    m_oi = m_o[:, None] & m_i[None, :]
    # [BLOCK_O, BLOCK_I]
    update = tl.zeros((BLOCK_O, BLOCK_I), dtype=tl.float32)
    for r in range(0, R, BLOCK_R):
        m_r = r + o_r < R
        b_b = tl.load(
            lora_b_ptr + o_o[:, None].to(tl.int64) * stride_bo + (r + o_r)[None, :] * stride_br,
            mask=m_o[:, None] & m_r[None, :], other=0.0,
        )  # fmt: skip
        b_a = _lora_a_block(lora_a_ptr, r + o_r, o_i, R, m_i, stride_ar, stride_ai, tl.float32)
        update = tl.dot(b_b.to(tl.float32), b_a, update, input_precision="ieee")
    b_w = tl.load(weight_ptr + o_o[:, None].to(tl.int64) * stride_wo + o_i[None, :] * stride_wi, mask=m_oi, other=0.0)
    adapted = b_w.to(tl.float32) + scale * update
    if HAS_MAGNITUDE:
        ratio, beta, _ = _gain(norm_ptr, magnitude_ptr, blend_ptr, o_o, m_o, HAS_BLEND)
        adapted *= (ratio + beta * (1.0 - ratio))[:, None]
    tl.store(merged_ptr + o_o[:, None].to(tl.int64) * I + o_i[None, :], adapted, mask=m_oi)


@triton.jit
def backward_reduce_kernel(
    dy_ptr, y_ptr, h_ptr, bias_ptr, token_scale_ptr, partial_db_ptr, partial_dg_ptr, partial_dbias_ptr,
    T, O, R, tokens_per_split,
    stride_dyt, stride_dyo,
    HAS_BIAS: tl.constexpr, HAS_TOKEN_SCALE: tl.constexpr,
    NEEDS_B: tl.constexpr, NEEDS_GAIN: tl.constexpr, NEEDS_BIAS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Of one split of the tokens: sum_t p dy h (for dB), sum_t dy (y - bias) (for dg), sum_t dy (for dbias)"""
    split = tl.program_id(1)
    pid_r = tl.program_id(2)
    o_o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    o_r = pid_r * BLOCK_R + tl.arange(0, BLOCK_R)
    m_o, m_r = o_o < O, o_r < R
    if HAS_BIAS:
        bias = tl.load(bias_ptr + o_o, mask=m_o, other=0.0).to(tl.float32)
    db = tl.zeros((BLOCK_O, BLOCK_R), dtype=tl.float32)
    dg = tl.zeros((BLOCK_O,), dtype=tl.float32)
    dbias = tl.zeros((BLOCK_O,), dtype=tl.float32)
    end = tl.minimum(split * tokens_per_split + tokens_per_split, T)
    for t in range(split * tokens_per_split, end, BLOCK_T):
        o_t = t + tl.arange(0, BLOCK_T)
        m_t = o_t < end
        m_to = m_t[:, None] & m_o[None, :]
        # [BLOCK_T, BLOCK_O]
        b_dy = tl.load(
            dy_ptr + o_t[:, None].to(tl.int64) * stride_dyt + o_o[None, :].to(tl.int64) * stride_dyo,
            mask=m_to,
            other=0.0,
        )
        if NEEDS_B:
            b_h = tl.load(
                h_ptr + o_t[:, None].to(tl.int64) * R + o_r[None, :], mask=m_t[:, None] & m_r[None, :], other=0.0
            )
            weighted = b_dy
            if HAS_TOKEN_SCALE:
                p = tl.load(token_scale_ptr + o_t, mask=m_t, other=0.0).to(tl.float32)
                weighted = (b_dy.to(tl.float32) * p[:, None]).to(b_dy.dtype)
            db = tl.dot(tl.trans(weighted), b_h, db, input_precision="ieee")
        if NEEDS_GAIN:
            b_y = tl.load(y_ptr + o_t[:, None].to(tl.int64) * O + o_o[None, :], mask=m_to, other=0.0).to(tl.float32)
            if HAS_BIAS:
                b_y -= bias[None, :]
            dg += tl.sum(b_dy.to(tl.float32) * b_y, axis=0)
        if NEEDS_BIAS:
            dbias += tl.sum(b_dy.to(tl.float32), axis=0)
    row = split * O + o_o
    if NEEDS_B:
        tl.store(partial_db_ptr + row[:, None].to(tl.int64) * R + o_r[None, :], db, mask=m_o[:, None] & m_r[None, :])
    if pid_r == 0:
        if NEEDS_GAIN:
            tl.store(partial_dg_ptr + row, dg, mask=m_o)
        if NEEDS_BIAS:
            tl.store(partial_dbias_ptr + row, dbias, mask=m_o)


@triton.jit
def _recomputed_gain_gradient(
    dy_ptr, x_ptr, weight_ptr, h_ptr, lora_b_ptr, token_scale_ptr, o_o, m_o,
    T, O, I, R, stride_dyt, stride_dyo, stride_xt, stride_xi, stride_wo, stride_wi, stride_bo, stride_br,
    SCALES_OUTPUT: tl.constexpr, SCALES_DELTA: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """dg = sum_t p dy z with z = x W^T + h B^T made anew, [BLOCK_O]"""
    dg = tl.zeros((BLOCK_O,), dtype=tl.float32)
    for t in range(0, T, BLOCK_T):
        o_t = t + tl.arange(0, BLOCK_T)
        m_t = o_t < T
        z = _low_rank_product(h_ptr, lora_b_ptr, o_t, o_o, m_t, m_o, R, stride_bo, stride_br, BLOCK_T, BLOCK_O, BLOCK_R)
        if SCALES_DELTA:
            z *= tl.load(token_scale_ptr + o_t, mask=m_t, other=0.0).to(tl.float32)[:, None]
        z = _base_product(
            z, x_ptr, weight_ptr, o_t, o_o, T, O, I, stride_xt, stride_xi, stride_wo, stride_wi, BLOCK_I, False
        )
        if SCALES_OUTPUT:
            z *= tl.load(token_scale_ptr + o_t, mask=m_t, other=0.0).to(tl.float32)[:, None]
        b_dy = tl.load(
            dy_ptr + o_t[:, None].to(tl.int64) * stride_dyt + o_o[None, :].to(tl.int64) * stride_dyo,
            mask=m_t[:, None] & m_o[None, :], other=0.0,
        )  # fmt: skip
        dg += tl.sum(b_dy.to(tl.float32) * z, axis=0)
    return dg


@triton.jit
def backward_finish_kernel(
    dy_ptr, x_ptr, weight_ptr, h_ptr, lora_b_ptr, magnitude_ptr, blend_ptr, norm_ptr, bias_ptr, token_scale_ptr,
    gain_ptr, partial_db_ptr, partial_dg_ptr, partial_dbias_ptr,
    db_ptr, dmagnitude_ptr, dnorm_ptr, dbias_ptr, partial_dblend_ptr,
    T, I, O, R, splits,
    stride_dyt, stride_dyo, stride_xt, stride_xi, stride_wo, stride_wi, stride_bo, stride_br,
    HAS_MAGNITUDE: tl.constexpr, HAS_BLEND: tl.constexpr, HAS_BIAS: tl.constexpr,
    SCALES_OUTPUT: tl.constexpr, SCALES_DELTA: tl.constexpr,
    NEEDS_B: tl.constexpr, NEEDS_GAIN: tl.constexpr, NEEDS_BIAS: tl.constexpr, HAS_OUTPUT: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """dB = g sum; dm = dg (1 - beta) / n; dn = -dm m / n; dblend's share of these rows"""
    pid_o = tl.program_id(0)
    o_o = pid_o * BLOCK_O + tl.arange(0, BLOCK_O)
    o_r = tl.arange(0, BLOCK_R)
    m_o = o_o < O
    gain = tl.full((BLOCK_O,), 1.0, tl.float32)
    if HAS_MAGNITUDE:
        gain = tl.load(gain_ptr + o_o, mask=m_o, other=1.0)
    if NEEDS_B:
        for r in range(0, R, BLOCK_R):
            m_or = m_o[:, None] & (r + o_r < R)[None, :]
            offsets = o_o[:, None].to(tl.int64) * R + (r + o_r)[None, :]
            db = tl.zeros((BLOCK_O, BLOCK_R), dtype=tl.float32)
            for split in range(0, splits):
                db += tl.load(partial_db_ptr + tl.cast(split, tl.int64) * O * R + offsets, mask=m_or, other=0.0)
            tl.store(db_ptr + offsets, db * gain[:, None], mask=m_or)
    if NEEDS_BIAS:
        dbias = tl.zeros((BLOCK_O,), dtype=tl.float32)
        for split in range(0, splits):
            dbias += tl.load(partial_dbias_ptr + split * O + o_o, mask=m_o, other=0.0)
        tl.store(dbias_ptr + o_o, dbias, mask=m_o)
    if NEEDS_GAIN:
        ratio, beta, rate = _gain(norm_ptr, magnitude_ptr, blend_ptr, o_o, m_o, HAS_BLEND)
        dg = tl.zeros((BLOCK_O,), dtype=tl.float32)
        lost = m_o
        if HAS_OUTPUT:
            lost = m_o & (tl.abs(gain) < SMALL_GAIN)
            if HAS_BIAS:
                norm = tl.load(norm_ptr + o_o, mask=m_o, other=1.0)
                bias = tl.load(bias_ptr + o_o, mask=m_o, other=0.0).to(tl.float32)
                lost |= m_o & (tl.abs(bias) > LARGE_BIAS * tl.abs(gain) * norm)
            for split in range(0, splits):
                dg += tl.load(partial_dg_ptr + split * O + o_o, mask=m_o, other=0.0)
            dg = dg / tl.where(lost, 1.0, gain)
        if tl.max(lost.to(tl.int32), axis=0) > 0:
            again = _recomputed_gain_gradient(
                dy_ptr, x_ptr, weight_ptr, h_ptr, lora_b_ptr, token_scale_ptr, o_o, m_o,
                T, O, I, R, stride_dyt, stride_dyo, stride_xt, stride_xi, stride_wo, stride_wi, stride_bo, stride_br,
                SCALES_OUTPUT, SCALES_DELTA, BLOCK_T, BLOCK_O, BLOCK_I, BLOCK_R,
            )  # fmt: skip
            dg = tl.where(lost, again, dg)
        dmagnitude = dg * (1.0 - beta) * rate
        tl.store(dmagnitude_ptr + o_o, dmagnitude, mask=m_o)
        tl.store(dnorm_ptr + o_o, -dmagnitude * ratio, mask=m_o)
        if HAS_BLEND:
            share = tl.where(m_o & (rate > 0.0), dg * (1.0 - ratio), 0.0)
            tl.store(partial_dblend_ptr + pid_o, tl.sum(share, axis=0) * beta * (1.0 - beta))


@triton.jit
def low_rank_gradient_kernel(
    dy_ptr, lora_b_ptr, h_ptr, gain_ptr, token_scale_ptr, dh_ptr, partial_dp_ptr,
    T, O, R,
    stride_dyt, stride_dyo, stride_bo, stride_br,
    scale,
    HAS_MAGNITUDE: tl.constexpr, HAS_TOKEN_SCALE: tl.constexpr, NEEDS_P: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """P = p s low, low = (g dy) B, and this rank block's part of dp, sum_r low h"""
    pid_r = tl.program_id(1)
    o_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    o_r = pid_r * BLOCK_R + tl.arange(0, BLOCK_R)
    m_t, m_r = o_t < T, o_r < R
    m_tr = m_t[:, None] & m_r[None, :]
    low = tl.zeros((BLOCK_T, BLOCK_R), dtype=tl.float32)
    for o in range(0, O, BLOCK_O):
        o_o = o + tl.arange(0, BLOCK_O)
        m_o = o_o < O
        b_dz = _scaled_gradient(dy_ptr, gain_ptr, o_t, o_o, m_t, m_o, stride_dyt, stride_dyo, HAS_MAGNITUDE)
        b_b = tl.load(
            lora_b_ptr + o_o[:, None].to(tl.int64) * stride_bo + o_r[None, :] * stride_br,
            mask=m_o[:, None] & m_r[None, :], other=0.0,
        )  # fmt: skip
        low = tl.dot(b_dz, b_b.to(b_dz.dtype), low, input_precision="ieee")
    offsets = o_t[:, None].to(tl.int64) * R + o_r[None, :]
    if NEEDS_P:
        b_h = tl.load(h_ptr + offsets, mask=m_tr, other=0.0).to(tl.float32)
        tl.store(partial_dp_ptr + pid_r * T + o_t, tl.sum(low * b_h, axis=1), mask=m_t)
    low *= scale
    if HAS_TOKEN_SCALE:
        low *= tl.load(token_scale_ptr + o_t, mask=m_t, other=0.0).to(tl.float32)[:, None]
    tl.store(dh_ptr + offsets, low, mask=m_tr)


@triton.jit
def _scaled_gradient(dy_ptr, gain_ptr, o_t, o_o, m_t, m_o, stride_dyt, stride_dyo, HAS_MAGNITUDE: tl.constexpr):
    """g dy for one tile, in dy's dtype (it enters a matrix product)."""
    b_dy = tl.load(
        dy_ptr + o_t[:, None].to(tl.int64) * stride_dyt + o_o[None, :].to(tl.int64) * stride_dyo,
        mask=m_t[:, None] & m_o[None, :], other=0.0,
    )  # fmt: skip
    if HAS_MAGNITUDE:
        gain = tl.load(gain_ptr + o_o, mask=m_o, other=0.0)
        b_dy = (b_dy.to(tl.float32) * gain[None, :]).to(b_dy.dtype)
    return b_dy


@triton.jit
def backward_dx_kernel(
    dy_ptr, x_ptr, weight_ptr, lora_a_ptr, lora_b_ptr, h_ptr, gain_ptr, token_scale_ptr, seed_ptr,
    dx_ptr, dh_ptr, partial_dp_ptr, low_dp_ptr,
    T, I, O, R,
    stride_dyt, stride_dyo, stride_xt, stride_xi, stride_wo, stride_wi, stride_ar, stride_ai, stride_bo, stride_br,
    scale, dropout_p,
    HAS_MAGNITUDE: tl.constexpr, SCALES_OUTPUT: tl.constexpr, SCALES_DELTA: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    NEEDS_P: tl.constexpr, FUSES_LOW_RANK: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_R: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """dx = p (g dy) W + P A, P = p s (g dy) B; the first column of tiles writes P where FUSES_LOW_RANK"""
    pid_t, pid_i = tile_of(tl.program_id(0), T, I, BLOCK_T, BLOCK_I, GROUP)
    o_t = pid_t * BLOCK_T + tl.arange(0, BLOCK_T)
    o_i = (pid_i * BLOCK_I + tl.arange(0, BLOCK_I)).to(tl.int64)
    o_r = tl.arange(0, BLOCK_R)
    m_t, m_i = o_t < T, o_i < I
    m_ti = m_t[:, None] & m_i[None, :]
    dx = tl.zeros((BLOCK_T, BLOCK_I), dtype=tl.float32)
    low = tl.zeros((BLOCK_T, BLOCK_R), dtype=tl.float32)
    for o in range(0, O, BLOCK_O):
        o_o = o + tl.arange(0, BLOCK_O)
        m_o = o_o < O
        b_dz = _scaled_gradient(dy_ptr, gain_ptr, o_t, o_o, m_t, m_o, stride_dyt, stride_dyo, HAS_MAGNITUDE)
        b_w = tl.load(
            weight_ptr + o_o[:, None].to(tl.int64) * stride_wo + o_i[None, :] * stride_wi,
            mask=m_o[:, None] & m_i[None, :], other=0.0,
        )  # fmt: skip
        dx = tl.dot(b_dz, b_w, dx, input_precision="ieee")
        if FUSES_LOW_RANK:
            b_b = tl.load(
                lora_b_ptr + o_o[:, None].to(tl.int64) * stride_bo + o_r[None, :] * stride_br,
                mask=m_o[:, None] & (o_r < R)[None, :], other=0.0,
            )  # fmt: skip
            low = tl.dot(b_dz, b_b.to(b_dz.dtype), low, input_precision="ieee")
    if SCALES_OUTPUT or SCALES_DELTA:
        p = tl.load(token_scale_ptr + o_t, mask=m_t, other=0.0).to(tl.float32)[:, None]
    if NEEDS_P and SCALES_OUTPUT:
        b_x = tl.load(x_ptr + o_t[:, None].to(tl.int64) * stride_xt + o_i[None, :] * stride_xi, mask=m_ti, other=0.0)
        tl.store(partial_dp_ptr + pid_i * T + o_t, tl.sum(dx * b_x.to(tl.float32), axis=1), mask=m_t)
    if SCALES_OUTPUT:
        dx *= p
    if FUSES_LOW_RANK:
        m_tr = m_t[:, None] & (o_r < R)[None, :]
        offsets = o_t[:, None].to(tl.int64) * R + o_r[None, :]
        if NEEDS_P and pid_i == 0:
            b_h = tl.load(h_ptr + offsets, mask=m_tr, other=0.0).to(tl.float32)
            tl.store(low_dp_ptr + o_t, tl.sum(low * b_h, axis=1), mask=m_t)
        low *= scale
        if SCALES_OUTPUT or SCALES_DELTA:
            low *= p
        if pid_i == 0:
            tl.store(dh_ptr + offsets, low, mask=m_tr)
        b_dh = low.to(dy_ptr.dtype.element_ty)
        b_a = _lora_a_block(lora_a_ptr, o_r, o_i, R, m_i, stride_ar, stride_ai, b_dh.dtype)
        if HAS_DROPOUT:
            update = tl.dot(b_dh, b_a, input_precision="ieee")
        else:
            dx = tl.dot(b_dh, b_a, dx, input_precision="ieee")
    else:
        update = dx
        if HAS_DROPOUT:
            update = tl.zeros((BLOCK_T, BLOCK_I), dtype=tl.float32)
        for r in range(0, R, BLOCK_R):
            rows = r + o_r
            b_dh = tl.load(
                dh_ptr + o_t[:, None].to(tl.int64) * R + rows[None, :],
                mask=m_t[:, None] & (rows < R)[None, :],
                other=0.0,
            )
            b_a = _lora_a_block(lora_a_ptr, rows, o_i, R, m_i, stride_ar, stride_ai, b_dh.dtype)
            update = tl.dot(b_dh, b_a, update, input_precision="ieee")
        if not HAS_DROPOUT:
            dx = update
    if HAS_DROPOUT:
        keep = _kept(tl.load(seed_ptr), o_t, o_i, dropout_p)
        dx += tl.where(keep, update / (1.0 - dropout_p), 0.0)
    tl.store(dx_ptr + o_t[:, None].to(tl.int64) * I + o_i[None, :], dx, mask=m_ti)


@triton.jit
def _lora_a_block(lora_a_ptr, o_r, o_i, R, m_i, stride_ar, stride_ai, dtype: tl.constexpr):
    """Rows o_r and columns o_i of A, in the dtype of the product they enter."""
    b_a = tl.load(
        lora_a_ptr + o_r[:, None].to(tl.int64) * stride_ar + o_i[None, :] * stride_ai,
        mask=(o_r < R)[:, None] & m_i[None, :],
        other=0.0,
    )
    return b_a.to(dtype)


@triton.jit
def _column_sum(partial_ptr, rows, columns, o_c, m_c, BLOCK: tl.constexpr):
    """Sum of the rows of partial (rows, columns), in order, for the columns o_c."""
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for row in range(0, rows):
        total += tl.load(partial_ptr + tl.cast(row, tl.int64) * columns + o_c, mask=m_c, other=0.0)
    return total


@triton.jit
def backward_da_kernel(
    x_ptr, dh_ptr, seed_ptr, da_ptr, partial_dp_ptr, dp_ptr, partial_dblend_ptr, dblend_ptr,
    T, I, R, dp_parts, dblend_parts, da_programs,
    stride_xt, stride_xi,
    dropout_p,
    HAS_DROPOUT: tl.constexpr, NEEDS_P: tl.constexpr, NEEDS_BLEND: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_SUM: tl.constexpr,
):  # fmt: skip
    """dA = P^T drop(x) in the first da_programs; the next one sums dblend where asked for, the rest dp"""
    pid = tl.program_id(0)
    if pid < da_programs:
        rank_tiles = tl.cdiv(R, BLOCK_R)
        o_r = pid % rank_tiles * BLOCK_R + tl.arange(0, BLOCK_R)
        o_i = (pid // rank_tiles * BLOCK_I + tl.arange(0, BLOCK_I)).to(tl.int64)
        m_r, m_i = o_r < R, o_i < I
        if HAS_DROPOUT:
            seed = tl.load(seed_ptr)
        da = tl.zeros((BLOCK_R, BLOCK_I), dtype=tl.float32)
        for t in range(0, T, BLOCK_T):
            o_t = t + tl.arange(0, BLOCK_T)
            m_t = o_t < T
            b_dh = tl.load(
                dh_ptr + o_t[None, :].to(tl.int64) * R + o_r[:, None], mask=m_r[:, None] & m_t[None, :], other=0.0
            )
            b_x = tl.load(
                x_ptr + o_t[:, None].to(tl.int64) * stride_xt + o_i[None, :] * stride_xi,
                mask=m_t[:, None] & m_i[None, :], other=0.0,
            )  # fmt: skip
            if HAS_DROPOUT:
                b_x = tl.where(_kept(seed, o_t, o_i, dropout_p), b_x, 0.0)
            da = tl.dot(b_dh, b_x, da, input_precision="ieee")
        if HAS_DROPOUT:
            da = da / (1.0 - dropout_p)
        tl.store(da_ptr + o_r[:, None].to(tl.int64) * I + o_i[None, :], da, mask=m_r[:, None] & m_i[None, :])
    else:
        first = pid - da_programs
        if NEEDS_BLEND:
            if first == 0:
                dblend = tl.zeros((BLOCK_SUM,), dtype=tl.float32)
                for start in range(0, dblend_parts, BLOCK_SUM):
                    o_c = start + tl.arange(0, BLOCK_SUM)
                    dblend += tl.load(partial_dblend_ptr + o_c, mask=o_c < dblend_parts, other=0.0)
                tl.store(dblend_ptr, tl.sum(dblend, axis=0))
            first -= 1
        if NEEDS_P:
            o_t = first * BLOCK_SUM + tl.arange(0, BLOCK_SUM)
            m_t = (o_t >= 0) & (o_t < T)
            tl.store(dp_ptr + o_t, _column_sum(partial_dp_ptr, dp_parts, T, o_t, m_t, BLOCK_SUM), mask=m_t)


def forward(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    magnitude: Tensor | None,
    blend: Tensor | None,
    norm: Tensor | None,
    bias: Tensor | None,
    token_scale: Tensor | None,
    seed: Tensor | None,
    *,
    scale: float,
    token_scale_target: str,
    dropout_p: float,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> y (T, O), h (T, R), gain (O,), norm (O,), nothing. seed: of the dropout, (1,) int64, or None.

    What is not needed, or was given, is empty.
    """
    (tokens, columns), rows, rank = x.shape, weight.shape[0], lora_a.shape[0]
    route = dispatch.forward_route(
        tokens, columns, rank, x.dtype,
        knows_norm=magnitude is None or norm is not None, has_dropout=dropout_p > 0,
    )  # fmt: skip
    h, nothing = x.new_empty(tokens, rank), x.new_empty(0)
    gain = nothing if magnitude is None else x.new_empty(rows, dtype=torch.float32)
    own_norm = nothing
    if magnitude is not None and norm is None:
        if route == "one_pass" and tokens:
            own_norm = x.new_empty(rows, dtype=torch.float32)
        else:
            norm = own_norm = column_norm.forward(weight, lora_a, lora_b, scale=scale)
    if not tokens or not rows:
        return x.new_empty(tokens, rows), h, gain, own_norm, nothing
    y = x @ weight.T if route == "library" else x.new_empty(tokens, rows)
    flags = {
        "HAS_MAGNITUDE": magnitude is not None, "HAS_BLEND": blend is not None, "HAS_BIAS": bias is not None,
        **_token_scale_flags(token_scale, token_scale_target),
    }  # fmt: skip
    if route == "one_pass":
        tile = dispatch.one_pass_tile(tokens, rank, x.dtype, is_aligned=_are_aligned(x, weight))
        one_pass_kernel[(triton.cdiv(rows, tile.columns), triton.cdiv(tokens, tile.rows))](
            x, weight, lora_a, lora_b, magnitude, blend, norm, bias, token_scale, y, h, gain, own_norm,
            tokens, columns, rows, rank,
            *x.stride(), *weight.stride(), *lora_a.stride(), *lora_b.stride(),
            scale,
            **flags, MAKES_NORM=own_norm.numel() > 0,
            BLOCK_T=tile.rows, BLOCK_O=tile.columns, BLOCK_I=tile.depth,
            BLOCK_R=max(16, triton.next_power_of_2(rank)),
            **launch_options(tile),
        )  # fmt: skip
        return y, h, gain, own_norm, nothing
    machine = dispatch.machine(x.dtype, is_aligned=_are_aligned(x, weight))
    tile, thin = machine.gemm, machine.low_rank
    block_r = dispatch.rank_block(rank, thin)
    lora_down_kernel[(triton.cdiv(tokens, thin.rows), triton.cdiv(rank, block_r))](
        x, lora_a, seed, h,
        tokens, columns, rank,
        *x.stride(), *lora_a.stride(),
        scale, dropout_p,
        HAS_DROPOUT=dropout_p > 0,
        BLOCK_T=thin.rows, BLOCK_I=thin.depth, BLOCK_R=block_r,
        **launch_options(thin),
    )  # fmt: skip
    if route == "library":
        blend_epilogue_kernel[(triton.cdiv(tokens, thin.rows), triton.cdiv(rows, thin.depth))](
            h, lora_b, magnitude, blend, norm, bias, token_scale, y, gain,
            tokens, rows, rank,
            *lora_b.stride(),
            **flags,
            BLOCK_T=thin.rows, BLOCK_O=thin.depth, BLOCK_R=block_r,
            **launch_options(thin),
        )  # fmt: skip
        return y, h, gain, own_norm, nothing
    # the copy engine takes dense rows only
    has_descriptors = machine.has_descriptors and x.stride(1) == weight.stride(1) == 1 and columns > 0
    blended_gemm_kernel[(triton.cdiv(tokens, tile.rows) * triton.cdiv(rows, tile.columns),)](
        TensorDescriptor.from_tensor(x, [tile.rows, tile.depth]) if has_descriptors else x,
        TensorDescriptor.from_tensor(weight, [tile.columns, tile.depth]) if has_descriptors else weight,
        h, lora_b, magnitude, blend, norm, bias, token_scale, y, gain,
        tokens, columns, rows, rank,
        *x.stride(), *weight.stride(), *lora_b.stride(),
        **flags, EVEN_I=columns % tile.depth == 0, HAS_DESCRIPTORS=has_descriptors,
        BLOCK_T=tile.rows, BLOCK_O=tile.columns, BLOCK_I=tile.depth, BLOCK_R=block_r, GROUP=8,
        **launch_options(tile),
    )  # fmt: skip
    return y, h, gain, own_norm, nothing


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    magnitude: Tensor | None,
    blend: Tensor | None,
    norm: Tensor | None,
    bias: Tensor | None,
    token_scale: Tensor | None,
    h: Tensor,
    gain: Tensor,
    kept: Tensor,
    seed: Tensor | None,
    *,
    scale: float,
    token_scale_target: str,
    dropout_p: float,
    needs: list[bool],
) -> list[Tensor]:
    """See eager.backward; `kept` is the output y or empty, `seed` that of the dropout or None."""
    inputs = (x, lora_a, lora_b, magnitude, blend, norm, bias, token_scale)
    make = torch.empty if dy.numel() and x.numel() else torch.zeros
    gradients = [
        make(tensor.shape, dtype=tensor.dtype, device=x.device) if needed else x.new_empty(0)
        for tensor, needed in zip(inputs, needs, strict=True)
    ]
    dx, da, db, dm, dblend, dnorm, dbias, dp = gradients
    need_x, need_a, need_b, need_m, need_blend, need_norm, need_bias, need_p = needs
    need_gain = need_m or need_blend or need_norm
    if not dy.numel() or not x.numel():
        # without tokens or features only the bias can have a gradient
        return [*gradients[:6], dbias.add_(dy.sum(0)) if need_bias else dbias, dp]
    (tokens, columns), rows, rank = x.shape, weight.shape[0], lora_a.shape[0]
    machine = dispatch.machine(x.dtype, is_aligned=_are_aligned(x, weight, dy))
    tile, thin = machine.gemm, machine.low_rank
    block_r = dispatch.rank_block(rank, thin)
    flags = _token_scale_flags(token_scale, token_scale_target)
    scales_output, has_scale = flags["SCALES_OUTPUT"], token_scale is not None

    partial_dblend = x.new_empty(0)
    if need_b or need_gain or need_bias:
        partial_dblend = _column_gradients(
            dy, x, weight, lora_b, magnitude, blend, norm, bias, token_scale, h, gain, kept,
            db, dm, dnorm, dbias, flags, need_b, need_gain, need_bias, thin,
        )  # fmt: skip

    dh = x.new_empty(tokens, rank)
    fuses = rank <= min(dispatch.FUSED_RANK, block_r)
    runs_dx = need_x or (need_p and scales_output)
    dx_parts = triton.cdiv(columns, tile.columns) if scales_output else 0
    rank_parts = 1 if fuses and runs_dx else triton.cdiv(rank, block_r)
    partial_dp = x.new_empty(dx_parts + rank_parts if need_p else 0, tokens, dtype=torch.float32)
    if (not fuses or not runs_dx) and (need_x or need_a or need_p):
        low_rank_gradient_kernel[(triton.cdiv(tokens, thin.rows), triton.cdiv(rank, block_r))](
            dy, lora_b, h, gain, token_scale, dh, partial_dp[dx_parts:],
            tokens, rows, rank,
            *dy.stride(), *lora_b.stride(),
            scale,
            HAS_MAGNITUDE=magnitude is not None, HAS_TOKEN_SCALE=has_scale, NEEDS_P=need_p,
            BLOCK_T=thin.rows, BLOCK_O=thin.depth, BLOCK_R=block_r,
            **launch_options(thin._replace(num_warps=4)),
        )  # fmt: skip
    if runs_dx:
        # the dropout mask of a tile is made in registers: a smaller tile
        block_t = max(16, tile.rows // (4 if x.dtype == torch.float32 else 2)) if dropout_p else tile.rows
        backward_dx_kernel[(triton.cdiv(tokens, block_t) * triton.cdiv(columns, tile.columns),)](
            dy, x, weight, lora_a, lora_b, h, gain, token_scale, seed,
            dx if need_x else x.new_empty(tokens, columns), dh, partial_dp, partial_dp[dx_parts:],
            tokens, columns, rows, rank,
            *dy.stride(), *x.stride(), *weight.stride(), *lora_a.stride(), *lora_b.stride(),
            scale, dropout_p,
            HAS_MAGNITUDE=magnitude is not None, **flags, HAS_DROPOUT=dropout_p > 0,
            NEEDS_P=need_p, FUSES_LOW_RANK=fuses,
            BLOCK_T=block_t, BLOCK_I=tile.columns, BLOCK_O=tile.depth, BLOCK_R=block_r, GROUP=8,
            **launch_options(tile),
        )  # fmt: skip

    block_sum = 1024
    da_programs = triton.cdiv(columns, thin.rows) * triton.cdiv(rank, block_r) if need_a else 0
    sum_programs = int(need_blend) + (triton.cdiv(tokens, block_sum) if need_p else 0)
    if da_programs + sum_programs:
        backward_da_kernel[(da_programs + sum_programs,)](
            x, dh, seed, da, partial_dp, dp, partial_dblend, dblend,
            tokens, columns, rank, partial_dp.shape[0], partial_dblend.numel(), da_programs,
            *x.stride(),
            dropout_p,
            HAS_DROPOUT=dropout_p > 0, NEEDS_P=need_p, NEEDS_BLEND=need_blend,
            BLOCK_T=thin.depth, BLOCK_I=thin.rows, BLOCK_R=block_r, BLOCK_SUM=block_sum,
            **launch_options(thin),
        )  # fmt: skip
    return gradients


def adapted_weight(
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    magnitude: Tensor | None,
    blend: Tensor | None,
    norm: Tensor | None,
    *,
    scale: float,
) -> Tensor:
    """See eager.adapted_weight."""
    rows, columns = weight.shape
    merged = torch.empty(rows, columns, dtype=weight.dtype, device=weight.device)
    if not merged.numel():
        return merged
    block_o, block_i = 32, 64
    merge_kernel[(triton.cdiv(rows, block_o), triton.cdiv(columns, block_i))](
        weight, lora_a, lora_b, magnitude, blend, norm, merged,
        rows, columns, lora_a.shape[0],
        *weight.stride(), *lora_a.stride(), *lora_b.stride(),
        scale,
        HAS_MAGNITUDE=magnitude is not None, HAS_BLEND=blend is not None,
        BLOCK_O=block_o, BLOCK_I=block_i, BLOCK_R=16,
        num_warps=4, num_stages=3, enable_fp_fusion=True,
    )  # fmt: skip
    return merged


def _column_gradients(
    dy, x, weight, lora_b, magnitude, blend, norm, bias, token_scale, h, gain, kept,
    db, dm, dnorm, dbias, flags, need_b, need_gain, need_bias, thin: dispatch.Tile,
) -> Tensor:  # fmt: skip
    """Fill dB, dm, dnorm and dbias; return the parts of dblend."""
    (tokens, rows), columns, rank = dy.shape, x.shape[1], h.shape[1]
    block_o, block_r, depth = min(thin.rows // 2, 64), dispatch.rank_block(rank, thin), thin.depth
    row_tiles, rank_tiles = triton.cdiv(rows, block_o), triton.cdiv(rank, block_r) if need_b else 1
    splits = _token_splits(tokens, row_tiles * rank_tiles, depth)
    tokens_per_split = triton.cdiv(triton.cdiv(tokens, splits), depth) * depth
    splits = triton.cdiv(tokens, tokens_per_split)

    def partial(*shape):
        return x.new_empty(shape, dtype=torch.float32)

    partial_db = partial(splits, rows, rank) if need_b else None
    partial_dg = partial(splits, rows) if need_gain else None
    partial_dbias = partial(splits, rows) if need_bias else None
    partial_dblend = partial(row_tiles)
    has_output = kept.numel() > 0
    if need_b or need_bias or has_output:
        backward_reduce_kernel[(row_tiles, splits, rank_tiles)](
            dy, kept, h, bias, token_scale, partial_db, partial_dg, partial_dbias,
            tokens, rows, rank, tokens_per_split,
            *dy.stride(),
            HAS_BIAS=bias is not None, HAS_TOKEN_SCALE=token_scale is not None,
            NEEDS_B=need_b, NEEDS_GAIN=need_gain and has_output, NEEDS_BIAS=need_bias,
            BLOCK_T=depth, BLOCK_O=block_o, BLOCK_R=block_r,
            **launch_options(thin._replace(num_warps=4)),
        )  # fmt: skip
    if need_gain:
        # the kernel always writes both: one of them may not be wanted
        dm = dm if dm.numel() else partial(rows)
        dnorm = dnorm if dnorm.numel() else partial(rows)
    backward_finish_kernel[(row_tiles,)](
        dy, x, weight, h, lora_b, magnitude, blend, norm, bias, token_scale, gain,
        partial_db, partial_dg, partial_dbias, db, dm, dnorm, dbias, partial_dblend,
        tokens, columns, rows, rank, splits,
        *dy.stride(), *x.stride(), *weight.stride(), *lora_b.stride(),
        HAS_MAGNITUDE=magnitude is not None, HAS_BLEND=blend is not None, HAS_BIAS=bias is not None, **flags,
        NEEDS_B=need_b, NEEDS_GAIN=need_gain, NEEDS_BIAS=need_bias, HAS_OUTPUT=has_output,
        BLOCK_T=depth, BLOCK_O=block_o, BLOCK_I=32, BLOCK_R=block_r,
        **launch_options(thin._replace(num_stages=1)),
    )  # fmt: skip
    return partial_dblend


def _token_scale_flags(token_scale: Tensor | None, target: str) -> dict[str, bool]:
    given = token_scale is not None
    return {"SCALES_OUTPUT": given and target == "output", "SCALES_DELTA": given and target == "delta"}


def _are_aligned(*matrices: Tensor) -> bool:
    """Whether all rows (or columns, of a transposed one) begin at multiples of 16 bytes."""
    return all(
        matrix.data_ptr() % 16 == 0
        and min(matrix.stride()) == 1
        and max(matrix.stride()) * matrix.element_size() % 16 == 0
        for matrix in matrices
    )


def _token_splits(tokens: int, tiles: int, block_t: int) -> int:
    """Into how many parts a reduction over tokens is cut: some 256 programs, each with a few blocks of tokens."""
    return max(1, min(256 // max(tiles, 1), triton.cdiv(tokens, 4 * block_t)))
