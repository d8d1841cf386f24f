"""Parity of hybrid_linear with the fp64 truth: what the tests of the op and of its mutants assert."""

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

# a kernel rounds where the ideal result rounds; the eager path rounds a 16-bit product once more (sqrt 2), and its
# gradients too
FACTOR = {"eager": 2.0, "triton": 1.2}


def run(given, backend, **options):
    """Output and gradients of one forward and backward pass."""
    leaves = given.requiring_grad()
    with using(backend):
        y = hybrid_linear(**leaves.arguments(), **options)
        y.backward(leaves.dy)
    return y.detach(), leaves.gradients()


def assert_parity(given, backend, *, norm_grad=False, **options):
    """Forward and every gradient within the floor-relative budget of the fp64 truth."""
    dtype = given.x.dtype
    wide = given.map(torch.Tensor.double)
    leaves = wide.requiring_grad()
    truth = reference_linear(leaves, norm_grad=norm_grad)
    truth.backward(leaves.dy)
    true_gradients = leaves.gradients()
    ideal, ideal_gradients = ideal_linear(wide, dtype)
    amplitude, amplitudes = linear_amplitudes(wide, dtype)
    y, gradients = run(given, backend, norm_grad=norm_grad, **options)
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
            max(floors[name], pooled), dtype, factor=FACTOR[backend],
            independent=min(result.numel(), rank * min(tokens, rows, columns)), length=tokens + rows + columns,
        )  # fmt: skip
        assert_within(name, result, true, allowed, size)
