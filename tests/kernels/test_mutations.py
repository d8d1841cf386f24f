"""The parity tests see every kind of mistake: each mutant of the implementations fails them."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from hylorada_kernels import backend as dispatch
from hylorada_kernels import testing
from hylorada_kernels.ops.hybrid_linear import eager, op
from hylorada_kernels.testing import interpreter, linear_inputs
from tests.kernels.parity import assert_parity

# name: (text of the implementation, what stands there in the mutant)
EAGER = {
    "s is dropped": ("torch.mul(wide.mT, scale, out", "torch.mul(wide.mT, 1, out"),
    "s is dropped in dB": (
        "_factor_gradient(weighted_h, dz, scale, lora_b",
        "_factor_gradient(weighted_h, dz, 1, lora_b",
    ),
    "g is dropped in dx": ("add_low_rank(dz, wide_weight.T", "add_low_rank(dy, wide_weight.T"),
    "g is dropped in dB": ("_factor_gradient(weighted_h, dz, scale", "_factor_gradient(weighted_h, dy, scale"),
    "the bias is scaled": ("else scaled.add_(bias)", "else scaled.add_(bias * gain)"),
    "the blend is upside down": (
        "torch.lerp(ratio, torch.ones_like(ratio)",
        "torch.lerp(torch.ones_like(ratio), ratio",
    ),
    "the position scale is dropped in dA": (
        "scaled_dh = dh if p_input is None else scale_rows(dh, p_input)",
        "scaled_dh = dh",
    ),
    "the position scale is dropped from x": ("        x = scale_rows(x, p_input)\n", "        x = x * 1\n"),
    "the position scale is dropped from the product": (
        "        product = scale_rows(product, p_input, in_place=True)\n",
        "        product *= 1\n",
    ),
    "the position scale is dropped from the saved h": ("        h = scale_rows(h, p_input)\n", "        h = h * 1\n"),
    "the position scale meets the bias": ("(magnitude is not None or bias is None)", "True"),
    "the norm is stale": ("lora_b, scale=scale)\n        gain", "0 * lora_b, scale=scale)\n        gain"),
    "dm misses the blend": ("        by_magnitude *= 1 - beta\n", ""),
}
KERNEL = {
    "s is dropped": ("    h *= scale\n", ""),
    "s is dropped in the backward": ("low *= scale", "low *= 1.0"),
    "g is dropped in dx": ("(b_dy.to(tl.float32) * gain[None, :]).to(b_dy.dtype)", "b_dy"),
    "g is dropped in dB": ("db * gain[:, None]", "db"),
    "the bias is scaled": (
        ".to(tl.float32)[None, :]\n    tl.store(y_ptr",
        ".to(tl.float32)[None, :] * 1.5\n    tl.store(y_ptr",
    ),
    "the blend is upside down": ("gain = ratio + beta * (1.0 - ratio)", "gain = 1.0 + beta * (ratio - 1.0)"),
    "the norm is stale": (
        "column_norm.forward(weight, lora_a, lora_b,",
        "column_norm.forward(weight, lora_a, 0 * lora_b,",
    ),
    "the inner mask is missing": ("m_i = o_i < I - i\n", "m_i = o_i < I\n"),
    "the last column is written by two programs": (
        "m_t, m_o = o_t < T, o_o < O\n    product",
        "m_t, m_o = o_t < T, o_o <= O\n    product",
    ),
    "the one pass drops s": ("b_h = (h * scale)", "b_h = (h * 1.0)"),
    "the one pass drops s in its norm": (
        "b_w.to(tl.float32) + scale * update\n            squares",
        "b_w.to(tl.float32) + update\n            squares",
    ),
    "the one pass loses its last features": (
        "m_i = columns < I\n        # [BLOCK_T, BLOCK_I]",
        "m_i = columns < I - 1\n        # [BLOCK_T, BLOCK_I]",
    ),
    "the epilogue drops the library's product": ("product += b_y.to(tl.float32)", "product += 0 * b_y.to(tl.float32)"),
    "only the first split counts": ("range(0, splits):\n                db", "range(0, 1):\n                db"),
}


def mutant_of(module, text, replacement, folder: Path):
    """The module with one text replaced, loaded from a file of its own, which Triton reads its kernels from."""
    source = Path(module.__file__).read_text(encoding="utf-8")
    assert text in source, f"{text!r} is no longer in {module.__file__}: adapt the mutation"
    path = folder / "mutant.py"
    path.write_text(source.replace(text, replacement), encoding="utf-8")
    spec = importlib.util.spec_from_file_location(f"{module.__package__}.mutant", path)
    mutant = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = mutant
    try:
        spec.loader.exec_module(mutant)
    finally:
        del sys.modules[spec.name]
    return mutant


def assert_all_parity(backend):
    for bias in (False, True):
        assert_parity(linear_inputs(150, 50, 37, 6, dtype=torch.float32, bias=bias), backend)
    # the narrower side takes the position scale, where no bias forbids it
    assert_parity(linear_inputs(150, 37, 50, 6, dtype=torch.float32), backend)
    assert_parity(linear_inputs(150, 50, 37, 6, dtype=torch.float32, magnitude=False, blend=False), backend)
    if backend == "triton":
        for route in ("one_pass", "library"):
            assert_parity(linear_inputs(20, 50, 37, 6, dtype=torch.float32), backend, route=route)


@pytest.mark.parametrize("mutation", EAGER)
def test_a_mutant_of_the_eager_path_fails(mutation, monkeypatch, tmp_path):
    monkeypatch.setattr(op, "eager", mutant_of(eager, *EAGER[mutation], tmp_path))
    with pytest.raises(AssertionError, match="exceeds the budget"):
        assert_all_parity("eager")


@pytest.mark.parametrize("mutation", KERNEL)
def test_a_mutant_of_the_kernels_fails(mutation, monkeypatch, tmp_path):
    if not dispatch.HAS_TRITON or not interpreter.supported():
        pytest.skip(interpreter.requires_interpreter)
    testing.interpret()
    monkeypatch.setattr(op, "kernel", mutant_of(op.kernel, *KERNEL[mutation], tmp_path))
    with pytest.raises((AssertionError, interpreter.OutOfBounds, interpreter.Race)):
        assert_all_parity("triton")


def test_the_originals_pass(backend):
    assert_all_parity(backend)
