"""What an adapted linear should give: the plain formula under autograd, and the best that a given precision can do."""

import torch
from torch import Tensor

from .inputs import LinearInputs


def reference_norm(weight: Tensor, lora_a: Tensor, lora_b: Tensor, *, scale: float) -> Tensor:
    """|| W + s B A || by row, with B A built. Any dtype; differentiable."""
    return (weight + scale * lora_b @ lora_a).norm(dim=1)


def reference_linear(given: LinearInputs, *, norm_grad: bool = False) -> Tensor:
    """The formula of `hybrid_linear`, operation by operation under autograd. Any dtype; fp64 is the tests' truth."""
    update = given.scale * (given.x @ given.lora_a.T) @ given.lora_b.T
    z = given.x @ given.weight.T
    p = None if given.token_scale is None else given.token_scale[..., None]
    if p is not None and given.token_scale_target == "delta":
        update = p * update
    z = z + update
    if given.magnitude is not None:
        norm = reference_norm(given.weight, given.lora_a, given.lora_b, scale=given.scale)
        gain = given.magnitude / (norm if norm_grad else norm.detach())
        if given.blend is not None:
            beta = given.blend.sigmoid()
            gain = (1 - beta) * gain + beta
        z = gain * z
    if p is not None and given.token_scale_target == "output":
        z = p * z
    return z if given.bias is None else z + given.bias


def ideal_linear(given: LinearInputs, dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and gradients in exact arithmetic, rounded to `dtype` only where any implementation must round.

    That is: A, B, h = x A^T, the gradients dz and dh where they enter a matrix product, z as it is kept for the
    backward, and the results. The fp64 `given` must hold values of `dtype`. An implementation is judged by its error
    over the error of this one.
    """

    def rounded(tensor: Tensor) -> Tensor:
        return tensor.to(dtype).to(tensor.dtype)

    x, weight, dy = (t.reshape(-1, t.shape[-1]) for t in (given.x, given.weight, given.dy))
    a, b, s = rounded(given.lora_a), rounded(given.lora_b), given.scale
    p = x.new_ones(x.shape[0], 1) if given.token_scale is None else given.token_scale.reshape(-1, 1)
    whole, part = (p, torch.ones_like(p)) if given.token_scale_target == "output" else (torch.ones_like(p), p)
    h = rounded(x @ a.T)
    z = x @ weight.T + s * part * h @ b.T
    norm = reference_norm(given.weight, given.lora_a, given.lora_b, scale=s)
    ratio = torch.ones_like(norm) if given.magnitude is None else given.magnitude / norm
    beta = ratio.new_ones(1) if given.magnitude is None else ratio.new_zeros(1)
    if given.blend is not None:
        beta = given.blend.sigmoid()
    gain = (1 - beta) * ratio + beta
    y = whole * gain * z + (0 if given.bias is None else given.bias)

    dz = rounded(whole * gain * dy)
    dh = s * dz @ b
    weighted_dh = rounded(part * dh)
    dg = (whole * dy * rounded(z)).sum(0)
    dp = (dy * gain * rounded(z)).sum(1) if given.token_scale_target == "output" else (dh * h).sum(1)
    gradients = {
        "x": rounded(dz @ weight + weighted_dh @ a),
        "lora_a": weighted_dh.T @ x,
        "lora_b": s * dz.T @ (part * h),
        "magnitude": dg * (1 - beta) / norm,
        "blend": (dg * (1 - ratio)).sum() * beta * (1 - beta),
        "bias": rounded(dy.sum(0)),
        "token_scale": dp,
    }
    shaped = {
        name: g.reshape(getattr(given, name).shape) for name, g in gradients.items() if getattr(given, name) is not None
    }
    return rounded(y).reshape(given.dy.shape), shaped


def linear_amplitudes(given: LinearInputs, dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
    """The root of the summed squares of the terms of every output and gradient.

    Independent rounding errors of the terms add up to a share of this, however much of the sum itself cancels: it is
    the yardstick of errors. In dblend, 1 - m / n is made in fp32 (fp64): next to `dtype`'s error of dg it adds fp32's
    own, relative to its two terms.
    """
    squared = given.map(torch.Tensor.square)
    x, weight, a, b, dy = squared.x, squared.weight, squared.lora_a, squared.lora_b, squared.dy
    x, dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    s = given.scale**2
    p = x.new_ones(x.shape[0], 1) if given.token_scale is None else squared.token_scale.reshape(-1, 1)
    whole, part = (p, torch.ones_like(p)) if given.token_scale_target == "output" else (torch.ones_like(p), p)
    norm = reference_norm(given.weight, given.lora_a, given.lora_b, scale=given.scale)
    ratio = torch.ones_like(norm) if given.magnitude is None else given.magnitude / norm
    beta = ratio.new_ones(1) if given.magnitude is None else ratio.new_zeros(1)
    if given.blend is not None:
        beta = given.blend.sigmoid()
    gain = ((1 - beta) * ratio + beta).square()
    h = x @ a.T
    z = x @ weight.T + s * part * h @ b.T
    y = whole * gain * z + (0 if given.bias is None else squared.bias)
    dz = whole * gain * dy
    dh = s * dz @ b
    dg = (whole * dy * z).sum(0)
    own = torch.finfo(torch.promote_types(dtype, torch.float32)).eps / torch.finfo(dtype).eps
    difference = (1 - ratio).square() + own**2 * (1 + ratio.square())
    gradients = {
        "x": dz @ weight + part * dh @ a,
        "lora_a": (part * dh).T @ x,
        "lora_b": s * dz.T @ (part * h),
        "magnitude": dg * ((1 - beta) / norm).square(),
        "blend": (dg * difference).sum() * (beta * (1 - beta)).square(),
        "bias": dy.sum(0),
        "token_scale": (dy * gain * z).sum(1) if given.token_scale_target == "output" else (dh * h).sum(1),
    }
    shaped = {
        name: g.sqrt().reshape(getattr(given, name).shape)
        for name, g in gradients.items()
        if getattr(given, name) is not None
    }
    return y.sqrt().reshape(given.dy.shape), shaped
