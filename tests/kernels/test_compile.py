"""Every kernel compiles ahead of time for real GPUs, without spills, within shared memory, without atomics.

The cases are those of `hylorada_kernels.testing.aot_report`.
"""

import json
import re
from pathlib import Path

import pytest
import torch

from hylorada_kernels import backend as dispatch

if not dispatch.HAS_TRITON:
    pytest.skip("needs Triton", allow_module_level=True)

from hylorada_kernels.testing import interpreter

if not interpreter.supported():
    pytest.skip(interpreter.requires_interpreter, allow_module_level=True)

from hylorada_kernels.ops.hybrid_linear import op
from hylorada_kernels.testing import aot_report
from hylorada_kernels.testing._launch import bind, full_grid
from hylorada_kernels.testing.aot import TARGETS, aot
from hylorada_kernels.testing.aot_report import CASES, compiler, layer, measure, rows_of
from tests.kernels.offsets import overflowing_addresses
from tests.kernels.test_mutations import mutant_of

BASELINE = Path(__file__).with_name("registers.json")
EVERYDAY_TARGETS = ("sm80", "sm90", "sm100")
EVERY_CASE = [
    pytest.param(target, case, marks=[pytest.mark.slow] if slow or target not in EVERYDAY_TARGETS else [])
    for target in TARGETS
    for case, (_, slow) in CASES.items()
]


@pytest.mark.parametrize(("target", "case"), EVERY_CASE)
def test_no_spills_and_no_atomics_within_shared_memory(target, case):
    for row in rows_of(case, target):
        assert spilled(row.report) == (0, 0, 0), (row.kernel, row.report)
        assert row.report.shared_bytes <= row.report.shared_limit, row.report
        assert not row.report.global_atomics, row.report


def spilled(report):
    return report.spill_stores, report.spill_loads, report.stack_bytes


@pytest.mark.parametrize(("target", "case"), EVERY_CASE)
def test_16_bit_products_run_on_matrix_units(target, case):
    for row in rows_of(case, target):
        assert row.report.matrix_instructions or not has_16_bit_product(row), row.kernel


def has_16_bit_product(row):
    return re.search(r"tt\.dot .*: tensor<\w+(?:xbf16|xf16)> \*", row.ttir) is not None


def test_the_products_of_a_layer_are_those_of_16_bits():
    assert {row.kernel for row in rows_of("bf16 r16", "sm90") if has_16_bit_product(row)} == {
        "lora_down_kernel", "blended_gemm_kernel", "backward_reduce_kernel", "backward_finish_kernel",
        "backward_dx_kernel", "backward_da_kernel",
    }  # fmt: skip
    assert not any(has_16_bit_product(row) for row in rows_of("fp32 r16", "sm90"))


@pytest.mark.parametrize(("target", "case"), EVERY_CASE)
def test_registers_stay_within_the_baseline(target, case):
    baseline = aot_report.read_baseline(BASELINE)
    if compiler() not in baseline:
        pytest.skip(f"the baseline is for {', '.join(baseline)}, not for {compiler()}")
    problems = aot_report.against_baseline(rows_of(case, target), baseline)
    assert not problems, "\n".join(problems)


def test_the_baseline_notices_a_rise_a_new_kernel_and_a_lost_one(tmp_path):
    rows = rows_of("bf16 r16", "sm90")
    path = tmp_path / "registers.json"
    path.write_text(json.dumps({"Triton 0.0": {}, compiler(): {"sm90": {"no such case": {"a": 1}}}}))
    aot_report.update_baseline(path, {("sm90", "bf16 r16"): rows})
    baseline = aot_report.read_baseline(path)
    assert baseline.keys() == {"Triton 0.0", compiler()} and baseline[compiler()]["sm90"].keys() == {"bf16 r16"}
    kept = baseline[compiler()]["sm90"]["bf16 r16"]
    assert aot_report.against_baseline(rows, baseline) == []

    kept["lora_down_kernel"] -= aot_report.SLACK
    assert aot_report.against_baseline(rows, baseline) == []
    kept["lora_down_kernel"] -= 1
    kept["gone_kernel"] = kept.pop("backward_da_kernel")
    problems = aot_report.against_baseline(rows, baseline)
    new, lost, risen = problems
    assert new.startswith("backward_da_kernel, bf16 r16 on sm90: not in the baseline")
    assert lost.startswith("gone_kernel, bf16 r16 on sm90: in the baseline but not launched")
    assert risen.startswith(f"lora_down_kernel, bf16 r16 on sm90: {kept['lora_down_kernel'] + 9} registers, the base")
    assert all("make aot-report AOT_ARGS=--update" in problem for problem in problems)


def test_the_report_is_a_table_and_fails_on_a_rise(tmp_path, capsys):
    path = tmp_path / "registers.json"
    command = ["--targets", "sm90", "--cases", "bf16 r16", "--baseline", str(path)]
    assert aot_report.main(command) == 0
    shown = capsys.readouterr()
    assert "| lora_down | bf16 r16 | sm90 |" in shown.out and "HGMMA" in shown.out
    assert f"no baseline for {compiler()}" in shown.err
    assert aot_report.main([*command, "--update"]) == aot_report.main(command) == 0
    path.write_text(re.sub(r'("lora_down_kernel"): \d+', r"\1: 16", path.read_text()))
    assert aot_report.main(command) == 1
    assert "lora_down_kernel, bf16 r16 on sm90" in capsys.readouterr().err


@pytest.mark.parametrize("rank", [1, pytest.param(7, marks=pytest.mark.slow), 17, 33, 100, 384, 1024])
def test_any_rank_compiles_without_spills(rank):
    for launch in aot_report.compile_case(layer(torch.bfloat16, rank), "sm90"):
        report, _ = measure(launch.kernel, "sm90")
        assert spilled(report) == (0, 0, 0), launch.name
        assert report.shared_bytes <= report.shared_limit, launch.name


# of the first each of x, W and y has 2^32 elements, of the second x, y and h
HUGE = {"square": (2**16, 2**16, 2**16, 16), "long": (2**22, 2**10, 2**10, 2**10)}


def overflows(tokens, columns, rows, rank):
    """The addresses that a 32-bit integer may be too small for, by kernel, of one layer on tensors without data."""
    found = {}

    def compile_and_follow(compile_launch):
        def compiled(run, kernel, args, kwargs, grid):
            result = compile_launch(run, kernel, args, kwargs, grid)
            arguments = bind(kernel, args, kwargs)
            integers = {name: value for name, value in arguments.items() if isinstance(value, int)}
            ttir = str(launches[-1].kernel.asm["ttir"])
            if bad := overflowing_addresses(ttir, integers, full_grid(grid, arguments)):
                found.setdefault(launches[-1].name, []).extend(bad)
            return result

        return compiled

    case = layer(torch.bfloat16, rank, tokens=tokens, columns=columns, rows=rows)
    with aot("sm90") as launches, dispatch.using("triton"):
        session = interpreter.install().SESSION
        session.compile = compile_and_follow(session.compile)
        case.run()
    return found


@pytest.mark.parametrize("shape", HUGE)
def test_addresses_in_huge_tensors_do_not_overflow(shape):
    assert overflows(*HUGE[shape]) == {}


# name: (text of the kernels, what stands there in the mutant, a kernel where that overflows)
NARROW = {
    "rows of x": (".to(tl.int64) * stride_xt", " * stride_xt", "lora_down_kernel"),
    "rows of W": (".to(tl.int64) * stride_wo", " * stride_wo", "backward_dx_kernel"),
    "rows of y, widened too late": (
        "o_t[:, None].to(tl.int64) * O",
        "(o_t[:, None] * O).to(tl.int64)",
        "backward_reduce_kernel",
    ),
}


@pytest.mark.parametrize("mutation", NARROW)
def test_a_narrow_offset_is_noticed(mutation, monkeypatch, tmp_path):
    text, replacement, kernel = NARROW[mutation]
    monkeypatch.setattr(op, "kernel", mutant_of(op.kernel, text, replacement, tmp_path))
    assert kernel in overflows(*HUGE["square"])
