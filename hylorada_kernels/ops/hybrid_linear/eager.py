"""Hybrid linear in PyTorch, any device and dtype, with a hand-written backward. See op.py for the contract.

The low-rank product is laid down first and the large GEMM adds onto it, so that a 16-bit sum is rounded once. With
dz = g dy the backward is LoRA's. A position scale of the whole output is applied to x or to the product, in which y is
linear but for the bias, whichever is narrower; either way its gradient is a row sum of dx * x.

What follows from m, blend and norm alone is a `Gain`, which a caller may keep. One with diag(g) W and diag(g) B in it
spares the scaling of the product and of its gradient.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .._thin import outer_sum, project_down, project_up
from ..column_norm import eager as column_norm

# below this gain the product z = y / g has lost its digits: it is computed again for those columns
SMALL_GAIN = 2.0**-6


class Gain(NamedTuple):
    """g of every row and its derivatives, (O,) each, in the norm's dtype."""

    gain: Tensor
    # dg / dm = (1 - beta) / n, dg / dblend = (1 - m / n) beta (1 - beta)
    by_magnitude: Tensor
    by_blend: Tensor | None
    # whether some |g| is below SMALL_GAIN, None: nobody has looked
    has_small: bool | None = None
    # diag(g) W, (O, I), in W's layout, and diag(g) B, (O, R), both in W's dtype; or None
    scaled: tuple[Tensor, Tensor] | None = None


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
    mask: Tensor | None,
    kept_gain: Gain | None = None,
    *,
    scale: float,
    token_scale_target: str,
    dropout_p: float,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> y (T, O), h (T, R), gain (O,), norm (O,), kept product (T, O).

    What is not needed, or was given, is empty. The kept product is z, or g z where a scaled weight made it, and is kept
    where the output is to be saved but has a bias. mask: what dropout keeps, (T, I) bool; None: all.
    """
    nothing = x.new_empty(0)
    gain = own_norm = nothing
    if magnitude is not None:
        if norm is None:
            norm = own_norm = column_norm.forward(weight, lora_a, lora_b, scale=scale)
        gain = row_gain(magnitude, blend, norm) if kept_gain is None else kept_gain.gain
    is_scaled = kept_gain is not None and kept_gain.scaled is not None
    if is_scaled:
        weight, lora_b = kept_gain.scaled
    p_input, p_delta = _split_token_scale(token_scale, token_scale_target)
    scales_product = _scales_product(weight, magnitude, bias)
    if p_input is not None and not scales_product:
        x = scale_rows(x, p_input)
    h = project_down(_thinned(x, mask, dropout_p), lora_a.to(x.dtype))
    product = _product(x, weight, h, lora_b, scale, p_delta, bias if magnitude is None else None)
    if p_input is not None and scales_product:
        # h is narrow, where a broadcast product is slow: the backward scales it
        product = scale_rows(product, p_input, in_place=True)
    if magnitude is None:
        return product, h, gain, own_norm, nothing
    keep = save and bias is not None
    if not is_scaled:
        y = _scale_columns(product, gain, bias, in_place=not keep)
    else:
        y = product if bias is None else product + bias if keep else product.add_(bias)
    return y, h, gain, own_norm, product if keep else nothing


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
    mask: Tensor | None,
    kept_gain: Gain | None = None,
    *,
    scale: float,
    token_scale_target: str,
    dropout_p: float,
    needs: list[bool],
) -> list[Tensor]:
    """Gradients of x, lora_a, lora_b, magnitude, blend, norm, bias and token_scale, empty where `needs` is False.

    `kept` is what the forward kept where there is a bias (which would hide it in y), else the output y; empty: z is
    computed again.
    """
    need_x, need_a, need_b, need_m, need_blend, need_norm, need_bias, need_p = needs
    nothing = x.new_empty(0)
    dx = da = db = dm = dblend = dnorm = dbias = dp = nothing
    p_input, p_delta = _split_token_scale(token_scale, token_scale_target)
    if p_input is not None and _scales_product(weight, magnitude, bias):
        h = scale_rows(h, p_input)
    dy = dy.contiguous()
    is_scaled = kept_gain is not None and kept_gain.scaled is not None
    if is_scaled:
        dz, (wide_weight, factor) = dy, kept_gain.scaled
    else:
        dz, wide_weight, factor = dy if magnitude is None else _scale_columns(dy, gain), weight, lora_b

    if need_x or need_a or need_p:
        dh = project_down(dz, factor.to(x.dtype).T)
        if need_p and p_delta is not None:
            dp = scale * (dh * h).sum(1, dtype=token_scale.dtype)
        if p_delta is not None:
            dh = scale_rows(dh, p_delta)
        if need_a:
            scaled_dh = dh if p_input is None else scale_rows(dh, p_input)
            da = _factor_gradient(scaled_dh, _thinned(x, mask, dropout_p), scale, lora_a.dtype).contiguous()
        if need_x or (need_p and p_input is not None):
            dx = project_up(dh, lora_a.to(x.dtype), scale)
            if mask is not None:
                dx.mul_(mask).mul_(1 / (1 - dropout_p))
            dx.addmm_(dz, wide_weight)
        if p_input is not None:
            if need_p:
                dp = (dx * x).sum(1, dtype=token_scale.dtype)
            dx = scale_rows(dx, p_input, in_place=True) if need_x else nothing
    if need_b:
        weighted_h = h if p_delta is None else scale_rows(h, p_delta)
        db = _factor_gradient(weighted_h, dz, scale, lora_b.dtype).T.contiguous()
        if is_scaled:
            db *= gain[:, None]
    if need_m or need_blend or need_norm:
        terms = gain_of(gain, magnitude, blend, norm) if kept_gain is None else kept_gain
        dg, dbias = _gain_gradient(dy, kept, x, weight, h, lora_b, scale, p_input, p_delta, terms, bias, need_bias)
        product = dg * terms.by_magnitude
        dm = product.to(magnitude.dtype)
        if need_blend:
            dblend = torch.dot(dg, terms.by_blend).to(blend.dtype).view(blend.shape)
        if need_norm:
            dnorm = (-product * magnitude / norm).masked_fill_(norm == 0, 0)
    if need_bias:
        dbias = (dbias if dbias.numel() else dy.sum(0)).to(bias.dtype)
    gradients = [dx, da, db, dm, dblend, dnorm, dbias, dp]
    return [gradient if needed else nothing for gradient, needed in zip(gradients, needs, strict=True)]


def row_gain(magnitude: Tensor, blend: Tensor | None, norm: Tensor) -> Tensor:
    """g = m / n + beta (1 - m / n), beta = sigmoid(blend), in norm's dtype: exactly 1 where m = n.

    A zero row takes the ratio 1: its output is 0 whatever the gain.
    """
    ratio = (magnitude.to(norm.dtype) / norm).masked_fill_(norm == 0, 1)
    if blend is None:
        return ratio
    return torch.lerp(ratio, torch.ones_like(ratio), blend.to(norm.dtype).sigmoid())


def gain_of(gain: Tensor, magnitude: Tensor, blend: Tensor | None, norm: Tensor) -> Gain:
    """`row_gain` of the same arguments with its derivatives."""
    # a zero row has no direction: the subgradient is 0
    by_magnitude = norm.reciprocal().nan_to_num_(nan=math.nan, posinf=0.0)
    by_blend = None
    if blend is not None:
        beta = blend.to(norm.dtype).sigmoid()
        by_blend = (norm - magnitude.to(norm.dtype)) * by_magnitude * (beta * (1 - beta))
        by_magnitude *= 1 - beta
    return Gain(gain, by_magnitude, by_blend)


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
    """diag(g) (W + s B A), (O, I) in weight's dtype, rounded once."""
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    adapted = torch.addmm(weight.to(dtype), lora_b.to(dtype), lora_a.to(dtype), alpha=scale)
    if magnitude is not None:
        adapted *= row_gain(magnitude, blend, norm)[:, None]
    return adapted.to(weight.dtype)


def scale_rows(z: Tensor, scales: Tensor, *, in_place: bool = False) -> Tensor:
    """z (..., K) * scales (...)[..., None] in z's dtype, rounded once. `in_place` allows (not forces) overwriting z."""
    if z.element_size() > 2:
        column = scales.unsqueeze(-1).to(z.dtype)
        return z.mul_(column) if in_place else z * column
    if not z.is_cpu or not z.numel():
        return (z * scales.unsqueeze(-1)).to(z.dtype)
    flat = scales.reshape(-1)
    # rows as the channels of a batch of one
    return _scale_channels(z.reshape(1, len(flat), z.shape[-1]), flat, None).view(z.shape)


def with_scaled_weight(gain: Gain, weight: Tensor, lora_b: Tensor) -> Gain:
    """The same with diag(g) W and diag(g) B, each rounded once."""
    scaled = torch.empty_like(weight)
    for rows in column_norm.row_chunks(weight, gain.gain.dtype):
        scaled[rows] = weight[rows] * gain.gain[rows, None]
    return gain._replace(scaled=(scaled, (lora_b * gain.gain[:, None]).to(weight.dtype)))


def _scales_product(weight: Tensor, magnitude: Tensor | None, bias: Tensor | None) -> bool:
    """Whether a position scale of the output is applied to the product rather than to x: where that is narrower.

    A bias that is already in the product forbids it.
    """
    return weight.shape[0] <= weight.shape[1] and (magnitude is not None or bias is None)


def _gain_gradient(
    dy: Tensor,
    kept: Tensor,
    x: Tensor,
    weight: Tensor,
    h: Tensor,
    lora_b: Tensor,
    scale: float,
    p_input: Tensor | None,
    p_delta: Tensor | None,
    terms: Gain,
    bias: Tensor | None,
    need_bias: bool,
) -> tuple[Tensor, Tensor]:
    """dg_j = sum_t dy_tj z_tj, and sum_t dy_tj, empty unless it was needed and came for free."""
    gain = terms.gain
    kept_is_scaled = kept.numel() > 0 and (bias is None or terms.scaled is not None)

    def product_of(rows: Tensor | slice) -> Tensor:
        scaled_x = x if p_input is None else scale_rows(x, p_input)
        return _product(scaled_x, weight[rows], h, lora_b[rows], scale, p_delta)

    product = kept if kept.numel() else product_of(slice(None))
    sums, dbias = _column_sums(dy, product, gain.dtype, need_bias)
    if not kept_is_scaled:
        return sums, dbias
    dg = sums / gain
    if terms.has_small is False:
        return dg, dbias
    small = gain.abs() < SMALL_GAIN
    if small.any():
        dg[small] = _column_sums(dy[:, small], product_of(small), gain.dtype, False)[0]
    return dg, dbias


def _thinned(x: Tensor, mask: Tensor | None, dropout_p: float) -> Tensor:
    return x if mask is None else torch.where(mask, x, 0).mul_(1 / (1 - dropout_p))


def _product(
    x: Tensor,
    weight: Tensor,
    h: Tensor,
    lora_b: Tensor,
    scale: float,
    p_delta: Tensor | None,
    bias: Tensor | None = None,
) -> Tensor:
    """z = x W^T + s (p h) B^T (+ bias)."""
    if p_delta is not None:
        h = scale_rows(h, p_delta)
    factor = lora_b.to(x.dtype).T
    low = project_up(h, factor, scale) if bias is None else torch.addmm(bias, h, factor, alpha=scale)
    return low.addmm_(x, weight.T)


def _factor_gradient(thin: Tensor, wide: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """scale * thin.T @ wide in the factor's dtype. fp16 is scaled there: under a loss scale its range ends soon."""
    if thin.dtype == torch.float16:
        return outer_sum(thin, wide, 1.0).to(dtype).mul_(scale)
    return outer_sum(thin, wide, scale).to(dtype)


def _split_token_scale(token_scale: Tensor | None, target: str) -> tuple[Tensor | None, Tensor | None]:
    """The position scale (T,) as a factor of x (target "output") and of h (target "delta")."""
    return (token_scale, None) if target == "output" else (None, token_scale)


def _scale_columns(z: Tensor, gain: Tensor, bias: Tensor | None = None, *, in_place: bool = False) -> Tensor:
    """z * gain (+ bias), rounded once. `in_place` allows (it does not force) overwriting z."""
    if z.dtype == gain.dtype:
        scaled = z.mul_(gain) if in_place else z * gain
        return scaled if bias is None else scaled.add_(bias)
    shift = None if bias is None else bias.to(gain.dtype)
    if not z.is_cpu or not z.numel():
        scaled = z * gain if shift is None else torch.addcmul(shift, z, gain)
        return scaled.to(z.dtype)
    return _scale_channels(z, gain, shift)


def _scale_channels(z: Tensor, scales: Tensor, shift: Tensor | None) -> Tensor:
    """A 16-bit z (N, C, ...) times fp32 scales (C,), plus shift (C,), on the CPU, rounded once.

    PyTorch multiplies bf16 by fp32 through fp32 copies (20x slower); an inference batch norm takes fp32 parameters in
    one pass.
    """
    zeros = torch.zeros_like(scales)
    return torch.native_batch_norm(z, scales, shift, zeros, zeros, False, 0.0, 1.0)[0]


def _column_sums(dy: Tensor, z: Tensor, dtype: torch.dtype, need_plain: bool) -> tuple[Tensor, Tensor]:
    """sum_t dy * z, and sum_t dy if that is needed, both (O,) in `dtype`, without a (T, O) temporary.

    The parameter gradients of a layer norm or batch norm with mean 0 and variance 1 are just these sums. The layer
    norm would add up 16-bit inputs in 16 bits (error 4e-2); the batch norm adds them in fp32.
    """
    if not dy.is_cpu or not dy.numel():
        return (dy.to(dtype) * z).sum(0), dy.sum(0, dtype=dtype)
    tokens, columns = dy.shape
    dy, z = dy.contiguous(), z.contiguous()
    zeros, mask = dy.new_zeros(columns, dtype=dtype), [False, True, need_plain]
    if dy.dtype == dtype:
        mean, rstd = dy.new_zeros(tokens, 1), dy.new_ones(tokens, 1)
        sums = torch.ops.aten.native_layer_norm_backward(dy, z, [columns], mean, rstd, zeros, zeros, mask)
    else:
        sums = torch.ops.aten.native_batch_norm_backward(dy, z, zeros, zeros, zeros, None, None, False, 1.0, mask)
    return sums[1], sums[2] if need_plain else dy.new_empty(0)
