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


def assert_parity(given, backend, *, route="fused", norm_grad=False, **options):
    """Forward and every gradient within the floor-relative budget of the fp64 truth."""
    dtype = given.x.dtype
    wide = given.map(torch.Tensor.double)
    leaves = wide.requiring_grad()
    truth = reference_linear(leaves, norm_grad=norm_grad)
    truth.backward(leaves.dy)
    true_gradients = leaves.gradients()
    ideal, ideal_gradients = ideal_linear(wide, dtype)
    amplitude, amplitudes = linear_amplitudes(wide, dtype)
    y, gradients = run(given, backend, route, norm_grad=norm_grad, **options)
    assert gradients.keys() == true_gradients.keys()

    results = {"y": (y, truth.detach(), ideal, amplitude)}
    for name, true in true_gradients.items():
        assert gradients[name].dtype == getattr(given, name).dtype
        results[name] = gradients[name], true, true if norm_grad else ideal_gradients[name], amplitudes[name]
    floors = {name: relative_error(ideal, true, size) for name, (_, true, ideal, size) in results.items()}
    # one result of few values may be lucky: all of them share the same kinds of roundings
    pooled = sum(floor**2 / len(floors) for floor in floors.values()) ** 0.5
    (tokens, columns), (rows, rank) = given.x.reshape(-1, given.x.shape[-1]).shape, given.lora_b.shape
    for name, (result, true, _, size) in results.items():
        allowed = allowed_error(
            max(floors[name], pooled), dtype, factor=FACTOR[route if backend == "triton" else backend],
            independent=min(result.numel(), rank * min(tokens, rows, columns)), length=tokens + rows + columns,
        )  # fmt: skip
        assert_within(name, result, true, allowed, size)
