"""The kernels of shifted attention compile ahead of time for real GPUs: no spills, within shared memory, no atomics."""

import functools

import pytest
import torch

from hylorada_kernels import backend as dispatch
from hylorada_kernels import testing, using

if not dispatch.HAS_TRITON:
    pytest.skip("needs Triton", allow_module_level=True)

from hylorada_kernels.testing import interpreter

if not interpreter.supported():
    pytest.skip(interpreter.requires_interpreter, allow_module_level=True)

from hylorada_kernels.ops.shifted_attention import shifted_attention
from hylorada_kernels.testing.aot import TARGETS, aot, inspect

DEFAULT_TARGETS = ("sm80", "sm90", "sm100")
KERNELS = {
    "forward_kernel", "backward_dq_kernel", "backward_dkdv_kernel", "sink_partial_kernel", "sink_finish_kernel",
}  # fmt: skip
WITHOUT_PRODUCTS = {"sink_finish_kernel"}
# with everything on: documents, sinks, dropout, a key head that serves heads with and without a shift
EVERYTHING = {"shift": 1024, "shifted_heads": "half", "sink_tokens": 4, "documents": 9, "dropout_p": 0.1}
# dtype, head dim, options
CASES = {
    "bf16 64 everything": (torch.bfloat16, 64, EVERYTHING),
    "bf16 64 plain": (torch.bfloat16, 64, {}),
    "bf16 128 everything": (torch.bfloat16, 128, EVERYTHING),
    "bf16 128 plain": (torch.bfloat16, 128, {"shift": 1024, "shifted_heads": "all"}),
    "bf16 128 bidirectional": (torch.bfloat16, 128, {**EVERYTHING, "causal": False}),
    "fp16 80 everything": (torch.float16, 80, EVERYTHING),
    "bf16 256 everything": (torch.bfloat16, 256, EVERYTHING),
    "bf16 256 plain": (torch.bfloat16, 256, {}),
    "bf16 128 everything, small groups": (torch.bfloat16, 128, {**EVERYTHING, "group_size": 16, "shift": 8}),
    "fp32 64 everything": (torch.float32, 64, EVERYTHING),
    "fp32 128 everything": (torch.float32, 128, EVERYTHING),
}
EVERYDAY = {"bf16 64 everything", "bf16 64 plain", "bf16 128 everything", "bf16 128 plain", "fp32 64 everything"}
EVERY_CASE = [
    pytest.param(
        target, case, marks=[] if case in EVERYDAY and target in DEFAULT_TARGETS else [pytest.mark.slow],
    )
    for target in TARGETS
    for case in CASES
]  # fmt: skip


@functools.cache
def reports(target, case):
    """Forward and backward on tensors without data, laid out as a model's (B, L, H, D) projections are."""
    testing.interpret()
    dtype, head_dim, options = CASES[case]
    options = dict(options)
    documents = options.pop("documents", None)

    def leaf(heads):
        return torch.empty(1, 4096, heads, head_dim, dtype=dtype, device="meta").transpose(1, 2).requires_grad_()

    boundaries = None if documents is None else torch.empty(documents + 1, dtype=torch.int32, device="meta")
    with aot(target) as compiled, using("triton"):
        y = shifted_attention(leaf(6), leaf(3), leaf(3), cu_seqlens=boundaries, **{"group_size": 2048, **options})
        y.backward(torch.empty_like(y))
    return [(kernel.name, inspect(kernel.kernel, target)) for kernel in compiled]


@pytest.mark.parametrize(("target", "case"), EVERY_CASE)
def test_no_spills_and_no_atomics_within_shared_memory(target, case):
    found = reports(target, case)
    assert {name for name, _ in found} == KERNELS if "everything" in case else {name for name, _ in found} <= KERNELS
    for name, report in found:
        assert (report.spill_stores, report.spill_loads, report.stack_bytes) == (0, 0, 0), name
        assert report.shared_bytes <= report.shared_limit, name
        assert not report.global_atomics, name


@pytest.mark.parametrize(("target", "case"), EVERY_CASE)
def test_16_bit_products_run_on_matrix_units(target, case):
    for name, report in reports(target, case):
        fp32 = CASES[case][0] == torch.float32
        assert report.matrix_instructions or fp32 or name in WITHOUT_PRODUCTS, name
