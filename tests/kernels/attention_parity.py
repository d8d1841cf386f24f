"""Parity of shifted_attention with the fp64 truth: what the tests of the op and of random cases assert."""

import torch

from hylorada_kernels import using
from hylorada_kernels.ops.shifted_attention import shifted_attention
from hylorada_kernels.testing import allowed_error, assert_within, relative_error
from hylorada_kernels.testing.attention import attention_amplitudes, reference_attention, sdpa_attention


def run(given, backend, **options):
    """Output and gradients of one forward and backward pass."""
    leaves = given.to(given.q.dtype)
    with using(backend):
        y = shifted_attention(**leaves.arguments(), **options)
        y.backward(leaves.do)
    return y.detach(), leaves.gradients()


def assert_parity(given, backend, *, drawn=False):
    """Within 2e-6 (output) and 1e-5 (gradients) in fp32; within twice the error of PyTorch's attention in 16 bits.

    drawn: a random case, which may have few values: it is granted what they share
    """
    dtype = given.q.dtype
    wide = given.to(torch.float64)
    truth = reference_attention(wide)
    truth.backward(wide.do)
    amplitude, amplitudes = attention_amplitudes(wide)
    y, gradients = run(given, backend)
    low = given.to(dtype)
    theirs = sdpa_attention(low)
    theirs.backward(low.do)
    results = {"out": (y, truth, theirs, amplitude)}
    for name, true in wide.gradients().items():
        results[name] = gradients[name], true, low.gradients()[name], amplitudes[name]
    tokens, head_dim = given.q.shape[-2:]
    for name, (result, true, own, size) in results.items():
        assert result.dtype == dtype
        independent, length = result.numel(), head_dim
        if drawn:
            # a weight that is rounded once shows in a whole head; sums run over the tokens too
            independent, length = _carrying(size) // head_dim, head_dim + tokens
        allowed = allowed_error(
            relative_error(own, true, size), dtype, factor=2.0, independent=independent, length=length
        )
        if dtype == torch.float32:
            allowed = min(allowed, 2e-6 if name == "out" else 1e-5)
        assert_within(name, result, true, allowed, size)


def _carrying(size):
    """How many of the values carry the norm: of the gradients of v, the sinks' are far larger than the others'."""
    squares = size.square()
    return int(squares.sum() ** 2 / squares.square().sum().clamp_min(torch.finfo(squares.dtype).tiny))
