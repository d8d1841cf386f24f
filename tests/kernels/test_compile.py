"""Every kernel compiles ahead of time for real GPUs, without spills, within shared memory, without atomics."""

import functools

import pytest
import torch

from hylorada_kernels import backend as dispatch
from hylorada_kernels import hybrid_linear, testing, using

if not dispatch.HAS_TRITON:
    pytest.skip("needs Triton", allow_module_level=True)

from hylorada_kernels.testing import interpreter

if not interpreter.supported():
    pytest.skip(interpreter.requires_interpreter, allow_module_level=True)

from hylorada_kernels.testing.aot import TARGETS, aot, inspect

DEFAULT_TARGETS = ("sm80", "sm90", "sm100")
TARGET_PARAMS = [pytest.param(name, marks=() if name in DEFAULT_TARGETS else pytest.mark.slow) for name in TARGETS]
CASES = {
    "bf16 rank 16": (torch.bfloat16, 16),
    "fp16 rank 16": (torch.float16, 16),
    "bf16 rank 128": (torch.bfloat16, 128),
    "fp32 rank 16": (torch.float32, 16),
}
# one matrix product each, and in 16 bits on the matrix units
WITH_PRODUCTS = {
    "lora_down_kernel", "blended_gemm_kernel", "backward_reduce_kernel", "backward_finish_kernel", "backward_dx_kernel",
    "backward_da_kernel",
}  # fmt: skip


def compile_layer(target, dtype, rank, tokens=512, columns=1024, rows=1024):
    """Forward and backward of one layer with every part, on tensors without data."""
    testing.interpret()

    def leaf(*shape, own=False, trained=True):
        return torch.empty(shape, dtype=torch.float32 if own else dtype, device="meta", requires_grad=trained)

    with aot(target) as compiled, using("triton"):
        y = hybrid_linear(
            leaf(tokens, columns), leaf(rows, columns, trained=False),
            leaf(rank, columns, own=True), leaf(rows, rank, own=True), leaf(rows, own=True), leaf(1, own=True),
            bias=leaf(rows), token_scale=leaf(tokens, own=True), scale=0.5, dropout_p=0.1,
        )  # fmt: skip
        y.backward(leaf(tokens, rows, trained=False))
    return compiled


@functools.cache
def reports(target, case):
    return [(kernel.name, inspect(kernel.kernel, target)) for kernel in compile_layer(target, *CASES[case])]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("target", TARGET_PARAMS)
def test_no_spills_and_no_atomics_within_shared_memory(target, case):
    found = reports(target, case)
    assert {name for name, _ in found} >= WITH_PRODUCTS | {"column_norm_kernel"}
    for name, report in found:
        assert (report.spill_stores, report.spill_loads, report.stack_bytes) == (0, 0, 0), name
        assert report.shared_bytes <= report.shared_limit, name
        assert not report.global_atomics, name


@pytest.mark.parametrize("case", [case for case, (dtype, _) in CASES.items() if dtype != torch.float32])
@pytest.mark.parametrize("target", TARGET_PARAMS)
def test_16_bit_products_run_on_matrix_units(target, case):
    for name, report in reports(target, case):
        # the norm is a product of fp32 factors: NVIDIA has no matrix units for that
        assert report.matrix_instructions or name == "column_norm_kernel", name
