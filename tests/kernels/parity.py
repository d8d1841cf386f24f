"""Parity of hybrid_linear with the fp64 truth: what the tests of the op and of its mutants assert."""

from contextlib import nullcontext

import pytest
import torch

from hylorada_kernels import hybrid_linear, using
from hylorada_kernels.testing import (
    allowed_error,
    assert_within,
    ideal_linear,
    linear_amplitudes,
    reference_linear,
    reference_norm,
    relative_error,
)

# for a test of the `backend` fixture that is about Triton alone
in_triton = pytest.mark.parametrize(
    "backend",
    ["triton", *([pytest.param("triton-cuda", marks=pytest.mark.gpu)] if torch.cuda.is_available() else [])],
    indirect=True,
)
# a kernel rounds where the ideal result rounds; the eager path and the library's product round a 16-bit product once
# or, beside a position scale, twice more (sqrt 3), and their gradients too
FACTOR = {"eager": 2.0, "library": 2.0, "fused": 1.2, "one_pass": 1.2}


def run(given, backend, route="fused", **options):
    """Output and gradients of one forward and backward pass; in Triton along one route of the forward."""
    leaves = given.requiring_grad()
    with using(backend), taking(route) if backend == "triton" else nullcontext():
        y = hybrid_linear(**leaves.arguments(), **options)
        y.backward(leaves.dy)
    return y.detach(), leaves.gradients()


def taking(route):
    # only where Triton is
    from hylorada_kernels.ops.hybrid_linear import dispatch

    return dispatch.taking(route)


def assert_parity(given, backend, *, route="fused", norm_grad=False, drawn=False, **options):
    """Forward and every gradient within the floor-relative budget of the fp64 truth.

    drawn: a random case, which may have few values or a gain of terms that cancel: it is granted what those cost
    """
    dtype = given.x.dtype
    wide = given.map(torch.Tensor.double)
    leaves = wide.requiring_grad()
    truth = reference_linear(leaves, norm_grad=norm_grad)
    truth.backward(leaves.dy)
    true_gradients = leaves.gradients()
    ideal, ideal_gradients = ideal_linear(wide, dtype)
    amplitude, amplitudes = linear_amplitudes(wide, dtype)
    y, gradients = run(given, backend, route, norm_grad=norm_grad, **options)
    assert y.dtype == dtype and gradients.keys() == true_gradients.keys()

    results = {"y": (y, truth.detach(), ideal, amplitude)}
    for name, true in true_gradients.items():
        assert gradients[name].dtype == getattr(given, name).dtype
        results[name] = gradients[name], true, true if norm_grad else ideal_gradients[name], amplitudes[name]
    floors = {name: relative_error(ideal, true, size) for name, (_, true, ideal, size) in results.items()}
    # one result of few values may be lucky: all of them share the same kinds of roundings
    pooled = sum(floor**2 / len(floors) for floor in floors.values()) ** 0.5
    (tokens, columns), (rows, rank) = given.x.reshape(-1, given.x.shape[-1]).shape, given.lora_b.shape
    for name, (result, true, _, size) in results.items():
        independent, floor = min(result.numel(), rank * min(tokens, rows, columns)), max(floors[name], pooled)
        if drawn:
            independent, floor = _drawn_floor(given, independent, floor)
        allowed = allowed_error(
            floor, dtype, factor=FACTOR[route if backend == "triton" else backend],
            independent=independent, length=tokens + rows + columns,
        )  # fmt: skip
        if drawn:
            allowed += _gain_error(wide, name, dtype)
        if drawn and backend == "triton" and options.get("save_output") and name in ("magnitude", "blend"):
            allowed += _hidden_error(wide, name, dtype) / max(float(size.norm()), torch.finfo(dtype).tiny)
        assert_within(name, result, true, allowed, size)


def _drawn_floor(given, independent, floor):
    """The count of independent roundings, and the floor, where both may be small."""
    if given.token_scale is not None:
        # a token of scale 0 has no rounding
        independent = independent * int(given.token_scale.count_nonzero()) // max(given.token_scale.numel(), 1)
    # the size of n normal terms is that of a third of them
    independent //= 3
    # the ideal result is rounded about three times, but of few values it may be lucky, and ours not
    return independent, max(floor, torch.finfo(given.x.dtype).eps / 5 * (1 + 2 / max(independent, 1)) ** 0.5)


def _gain_error(wide, name, dtype):
    """What the gain's own rounding adds, relative to the gain, which may be far smaller than its terms."""
    if wide.magnitude is None:
        return 0.0
    norm, ratio, beta = _gain_parts(wide)
    # beta errs by half a unit, however small 1 - beta is
    terms = norm_error(wide) / norm
    errors = (1 - beta) * ratio.abs() * terms + beta * (1 + ratio.abs())
    gain = (1 - beta) * ratio + beta
    if name in ("magnitude", "blend"):
        # row by row: z is y / g down to a gain of 2^-6, and the gradient of g is multiplied by (1 - beta) / norm
        condition = (errors / gain.abs().clamp_min(2.0**-6) + terms + beta / (1 - beta)).max()
    else:
        condition = errors.norm() / gain.norm().clamp_min(torch.finfo(gain.dtype).tiny)
    return torch.finfo(torch.promote_types(dtype, torch.float32)).eps * float(condition)


def _hidden_error(wide, name, dtype):
    """What the gradients of magnitude and blend lose to a kept y = g z + bias, whose digits a large bias takes."""
    if wide.bias is None:
        return 0.0
    norm, ratio, beta = _gain_parts(wide)
    gain = (1 - beta) * ratio + beta
    rate = (1 - beta) / norm if name == "magnitude" else (1 - ratio) * beta * (1 - beta)
    hidden = wide.dy.flatten(0, -2).norm(dim=0) * (wide.bias / gain).nan_to_num(posinf=0.0, neginf=0.0)
    return torch.finfo(dtype).eps / 2 * float((rate * hidden).norm())


def norm_error(wide):
    """How far every row's norm may lie from the truth, in units of rounding: W + s B A may cancel.

    Its square, as the eager path expands it, keeps the rounding of the terms' squares, which the root divides by 2 n;
    below a sixteenth of the terms it is made anew of the summed rows.
    """
    norm = reference_norm(wide.weight, wide.lora_a, wide.lora_b, scale=wide.scale)
    terms = wide.weight.norm(dim=1) + wide.scale * wide.lora_b.norm(dim=1) * wide.lora_a.norm()
    return terms * (terms / (2 * norm)).nan_to_num(nan=1.0).clamp(1, 9)


def _gain_parts(wide):
    """The norm, magnitude / norm, and beta, 0 without a blend."""
    norm = reference_norm(wide.weight, wide.lora_a, wide.lora_b, scale=wide.scale)
    beta = wide.blend.sigmoid() if wide.blend is not None else torch.zeros_like(norm[:1])
    return norm, wide.magnitude / norm, beta
