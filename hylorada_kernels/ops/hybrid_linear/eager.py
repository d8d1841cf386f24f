"""Hybrid linear in PyTorch, any device and dtype, with a hand-written backward. See op.py for the contract.

The low-rank product and the large one are added within a product, so that a 16-bit sum is rounded once. With
dz = g dy the backward is LoRA's. A position scale of the whole output is applied to x or to the product, in which y is
linear but for the bias, whichever is narrower; either way its gradient is a row sum of dx * x.

What follows from m, blend, norm and the factors alone is a `Gain`, which a caller may keep. One with diag(g) W and
diag(g) B in it spares the scaling of the product and of its gradient. Behind a large product, which empties the caches,
each further call costs as much on the CPU as the work of a small layer: calls are spared wherever it is exact.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .._products import add_linear, add_low_rank, outer_sum, project_down, project_up
from ..column_norm import eager as column_norm

# below this gain the product z = y / g has lost its digits: it is computed again for those columns
SMALL_GAIN = 2.0**-6
MOST_CONSTANTS = 64
_constants: dict[tuple[float, int, torch.dtype], Tensor] = {}


class Gain(NamedTuple):
    """g of every row and its derivatives, (O,) each, in the norm's dtype."""

    gain: Tensor
    # dg / dm = (1 - beta) / n, dg / dblend = (1 - m / n) beta (1 - beta)
    by_magnitude: Tensor
    by_blend: Tensor | None
    # whether some |g| is below SMALL_GAIN, None: nobody has looked
    has_small: bool | None = None
    # in W's dtype; `down` is None where A has it, and may be another tensor by now; None: made again in every pass
    factors: tuple[Tensor | None, Tensor, float] | None = None
    # with factors only: diag(g) W, (O, I), in W's layout, and up diag(g), both in W's dtype
    scaled: tuple[Tensor, Tensor] | None = None

    def to(self, dtype: torch.dtype) -> "Gain":
        """The same for an x of this dtype."""
        factors = self.factors
        if factors is not None:
            down, up, rest = factors
            factors = None if down is None else down.to(dtype), up.to(dtype), rest
        scaled = None if self.scaled is None else (self.scaled[0].to(dtype), self.scaled[1].to(dtype))
        return self._replace(factors=factors, scaled=scaled)

    def unbind(self) -> list["Gain"]:
        """Of one with factors, whose tensors are those of L layers in a first dimension: each layer's own."""
        down, up, rest = self.factors
        count = len(self.gain)
        by_blend = [None] * count if self.by_blend is None else map(column_norm.aligned, self.by_blend)
        parts = self.gain.unbind(), self.by_magnitude.unbind(), by_blend, [None] * count if down is None else down, up
        return [
            Gain(gain, by_magnitude, own_by_blend, self.has_small, (own_down, own_up, rest))
            for gain, by_magnitude, own_by_blend, own_down, own_up in zip(*parts, strict=True)
        ]


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
    nothing = _nothing(x)
    gain = own_norm = nothing
    if magnitude is not None:
        if norm is None:
            norm = own_norm = column_norm.forward(weight, lora_a, lora_b, scale=scale)
        gain = row_gain(magnitude, gate(blend, norm.dtype), norm) if kept_gain is None else kept_gain.gain
    down, up, rest = _factors(lora_a, lora_b, scale, x.dtype, kept_gain)
    is_scaled = kept_gain is not None and kept_gain.scaled is not None
    if is_scaled:
        weight, up = kept_gain.scaled
    p_input, p_delta = (None, None) if token_scale is None else _split_token_scale(token_scale, token_scale_target)
    scales_product = p_input is not None and _scales_product(weight, magnitude, bias)
    if p_input is not None and not scales_product:
        x = scale_rows(x, p_input)
    h = project_down(x if mask is None else _thinned(x, mask, dropout_p), down)
    product = _product(x, weight, h, up, rest, p_delta, bias if magnitude is None else None)
    if scales_product:
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
    nothing = _nothing(x)
    dx = da = db = dm = dblend = dnorm = dbias = dp = nothing
    p_input, p_delta = (None, None) if token_scale is None else _split_token_scale(token_scale, token_scale_target)
    if p_input is not None and _scales_product(weight, magnitude, bias):
        h = scale_rows(h, p_input)
    dy = dy.contiguous()
    down, up, rest = _factors(lora_a, lora_b, scale, x.dtype, kept_gain)
    is_scaled = kept_gain is not None and kept_gain.scaled is not None
    wide_weight, wide_up = kept_gain.scaled if is_scaled else (weight, up)
    scaling = None if magnitude is None or is_scaled else gain
    if need_m or need_blend or need_norm:
        terms = gain_of(gain, magnitude, gate(blend, norm.dtype), norm) if kept_gain is None else kept_gain
        dz, dg, column_sum = _gain_gradient(
            dy, scaling, kept, x, weight, h, up, rest, p_input, p_delta, terms, bias, need_bias
        )
        product = dg * terms.by_magnitude
        dm = _in_dtype(product, magnitude.dtype)
        if need_blend:
            dblend = _in_dtype(torch.dot(dg, terms.by_blend), blend.dtype).view(blend.shape)
        if need_norm:
            dnorm = (-product * magnitude / norm).masked_fill_(norm == 0, 0)
    else:
        dz, column_sum = dy if scaling is None else _scale_columns(dy, scaling), None
    if need_bias:
        dbias = (dy.sum(0) if column_sum is None else column_sum).to(bias.dtype)

    if need_x or need_a or need_p:
        # times s, but for the rest
        dh = project_down(dz, wide_up)
        if need_p and p_delta is not None:
            dp = rest * (dh * h).sum(1, dtype=token_scale.dtype)
        if p_delta is not None:
            dh = scale_rows(dh, p_delta)
        if need_a:
            scaled_dh = dh if p_input is None else scale_rows(dh, p_input)
            thinned = x if mask is None else _thinned(x, mask, dropout_p)
            da = _factor_gradient(scaled_dh, thinned, rest, lora_a.dtype)
        if need_x or (need_p and p_input is not None):
            if mask is None:
                dx = add_low_rank(dz, wide_weight.T, dh, down, rest)
            else:
                low = project_up(dh, down, rest).mul_(mask).mul_(1 / (1 - dropout_p))
                dx = add_linear(low, dz, wide_weight.T)
        if p_input is not None:
            if need_p:
                dp = (dx * x).sum(1, dtype=token_scale.dtype)
            dx = scale_rows(dx, p_input, in_place=True) if need_x else nothing
    if need_b:
        weighted_h = h if p_delta is None else scale_rows(h, p_delta)
        db = _factor_gradient(weighted_h, dz, scale, lora_b.dtype, is_transposed=True)
        if is_scaled:
            db *= gain[:, None]
    gradients = [dx, da, db, dm, dblend, dnorm, dbias, dp]
    return [gradient if needed else nothing for gradient, needed in zip(gradients, needs, strict=True)]


def gate(blend: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """beta = sigmoid(blend); None for DoRA, whose beta is 0."""
    return None if blend is None else blend.to(dtype).sigmoid()


def row_gain(magnitude: Tensor, beta: Tensor | None, norm: Tensor) -> Tensor:
    """g = m / n + beta (1 - m / n), in norm's dtype: exactly 1 where m = n. beta: of all rows, or (O,).

    A zero row takes the ratio 1: its output is 0 whatever the gain.
    """
    ratio = (magnitude.to(norm.dtype) / norm).masked_fill_(norm == 0, 1)
    return ratio if beta is None else torch.lerp(ratio, torch.ones_like(ratio), beta)


def gain_of(gain: Tensor, magnitude: Tensor, beta: Tensor | None, norm: Tensor) -> Gain:
    """`row_gain` of the same arguments with its derivatives."""
    # a zero row has no direction: the subgradient is 0
    by_magnitude = norm.reciprocal().nan_to_num_(nan=math.nan, posinf=0.0)
    by_blend = None
    if beta is not None:
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
        adapted *= row_gain(magnitude, gate(blend, norm.dtype), norm)[:, None]
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


def with_factors(gain: Gain, lora_a: Tensor, lora_b: Tensor, scale: float, dtype: torch.dtype) -> Gain:
    """The same with the factors in this dtype, W's; all of them of one layer, or of L in a first dimension."""
    down = None if lora_a.dtype == dtype else lora_a.to(dtype)
    return gain._replace(factors=(down, *_up(lora_b, scale, dtype)))


def with_scaled_weight(gain: Gain, weight: Tensor, lora_b: Tensor, scale: float) -> Gain:
    """The same with diag(g) W and its part of B, each rounded once."""
    scaled = torch.empty_like(weight)
    for rows in column_norm.row_chunks(weight, gain.gain.dtype):
        scaled[rows] = weight[rows] * gain.gain[rows, None]
    up, _ = _up(lora_b * gain.gain[:, None], scale, weight.dtype)
    return gain._replace(scaled=(scaled, up))


def _scales_product(weight: Tensor, magnitude: Tensor | None, bias: Tensor | None) -> bool:
    """Whether a position scale of the output is applied to the product rather than to x: where that is narrower.

    A bias that is already in the product forbids it.
    """
    return weight.shape[0] <= weight.shape[1] and (magnitude is not None or bias is None)


def _factors(
    lora_a: Tensor, lora_b: Tensor, scale: float, dtype: torch.dtype, kept_gain: Gain | None
) -> tuple[Tensor, Tensor, float]:
    """down: A (R, I); up: s B^T (R, O), contiguous; what is left of s: with it, s h B^T is (h up) rest.

    A product that scales on its way writes its result twice. In fp16, whose range ends soon under a loss scale, nothing
    of s is in `up`.
    """
    if kept_gain is None or kept_gain.factors is None:
        return _in_dtype(lora_a, dtype), *_up(lora_b, scale, dtype)
    down, up, rest = kept_gain.factors
    return _in_dtype(lora_a, dtype) if down is None else down, up, rest


def _up(lora_b: Tensor, scale: float, dtype: torch.dtype) -> tuple[Tensor, float]:
    if dtype == torch.float16:
        return lora_b.mT.to(dtype).contiguous(), scale
    wide = _in_dtype(lora_b, torch.promote_types(torch.promote_types(lora_b.dtype, dtype), torch.float32))
    return torch.mul(wide.mT, scale, out=wide.new_empty(wide.mT.shape, dtype=dtype)), 1.0


def _gain_gradient(
    dy: Tensor,
    scaling: Tensor | None,
    kept: Tensor,
    x: Tensor,
    weight: Tensor,
    h: Tensor,
    up: Tensor,
    rest: float,
    p_input: Tensor | None,
    p_delta: Tensor | None,
    terms: Gain,
    bias: Tensor | None,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """dz = scaling dy, dg_j = sum_t dy_tj z_tj, and sum_t dy_tj, None unless it was needed and came for free."""
    gain = terms.gain
    kept_is_scaled = kept.numel() > 0 and (bias is None or terms.scaled is not None)

    def product_of(rows: Tensor | slice) -> Tensor:
        scaled_x = x if p_input is None else scale_rows(x, p_input)
        return _product(scaled_x, weight[rows], h, up[:, rows], rest, p_delta)

    product = kept if kept.numel() else product_of(slice(None))
    dz, sums, column_sum = _scale_and_sum(dy, product, scaling, gain.dtype, need_bias)
    if not kept_is_scaled:
        return dz, sums, column_sum
    dg = sums / gain
    if terms.has_small is False:
        return dz, dg, column_sum
    small = gain.abs() < SMALL_GAIN
    if small.any():
        dg[small] = _scale_and_sum(dy[:, small].contiguous(), product_of(small), None, gain.dtype, False)[1]
    return dz, dg, column_sum


def _thinned(x: Tensor, mask: Tensor, dropout_p: float) -> Tensor:
    return torch.where(mask, x, 0).mul_(1 / (1 - dropout_p))


def _product(
    x: Tensor,
    weight: Tensor,
    h: Tensor,
    up: Tensor,
    rest: float,
    p_delta: Tensor | None,
    bias: Tensor | None = None,
) -> Tensor:
    """z = x W^T + s (p h) B^T (+ bias)."""
    if p_delta is not None:
        h = scale_rows(h, p_delta)
    return add_low_rank(x, weight, h, up, rest, bias)


def _factor_gradient(
    thin: Tensor, wide: Tensor, scale: float, dtype: torch.dtype, *, is_transposed: bool = False
) -> Tensor:
    """scale * thin.T @ wide, or its transpose, in the factor's dtype, contiguous."""
    product = outer_sum(thin, wide, is_transposed=is_transposed)
    # cast and laid out in one copy
    gradient = product.to(dtype, memory_format=torch.contiguous_format).contiguous()
    return gradient if scale == 1 else gradient.mul_(scale)


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
    zeros = _constant(0.0, scales.numel(), scales.dtype)
    return torch.native_batch_norm(z, scales, shift, zeros, zeros, False, 0.0, 1.0)[0]


def _scale_and_sum(
    dy: Tensor, z: Tensor, scaling: Tensor | None, dtype: torch.dtype, need_plain: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """dy * scaling rounded once, or dy; sum_t dy * z; sum_t dy if that is needed; the sums (O,) in `dtype`.

    No (T, O) temporary is made. The parameter gradients of a layer norm or batch norm with mean 0 and variance 1 are
    just these sums. The layer norm would add up 16-bit inputs in 16 bits (error 4e-2); the batch norm adds them in
    fp32, and its gradient of the input is the scaled dy, in the same call. In fp32 it is slow at many tokens.
    """
    if not dy.is_cpu or not dy.numel():
        dz = dy if scaling is None else _scale_columns(dy, scaling)
        return dz, (dy.to(dtype) * z).sum(0), dy.sum(0, dtype=dtype) if need_plain else None
    tokens, columns = dy.shape
    z, zeros = z.contiguous(), _constant(0.0, columns, dtype)
    if dy.dtype == dtype:
        mean, rstd, mask = _constant(0.0, tokens, dtype), _constant(1.0, tokens, dtype), [False, True, need_plain]
        sums = torch.ops.aten.native_layer_norm_backward(dy, z, [columns], mean, rstd, zeros, zeros, mask)
        return dy if scaling is None else dy * scaling, *sums[1:]
    mask = [scaling is not None, True, need_plain]
    weight = zeros if scaling is None else scaling
    dz, *sums = torch.ops.aten.native_batch_norm_backward(dy, z, weight, zeros, zeros, None, None, False, 1.0, mask)
    return dy if scaling is None else dz, *sums


def _in_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _nothing(x: Tensor) -> Tensor:
    return _constant(0.0, 0, x.dtype) if x.is_cpu else x.new_empty(0)


def _constant(value: float, length: int, dtype: torch.dtype) -> Tensor:
    """A vector on the CPU of one value, never to be written to. Making one costs more than reading it."""
    key = value, length, dtype
    constant = _constants.get(key)
    if constant is None:
        with torch.inference_mode(False):
            constant = torch.full((length,), value, dtype=dtype, device="cpu")
        # a mode, of fake tensors for one, makes tensors that are of no use after it
        if type(constant) is Tensor:
            if len(_constants) >= MOST_CONSTANTS:
                _constants.clear()
            _constants[key] = constant
    return constant
