"""What every shipped kernel costs on every GPU that it is compiled for, as a table and against a baseline.

    python -m hylorada_kernels.testing.aot_report [--targets sm90 ...] [--cases "bf16 r16" ...] [--update]

prints a Markdown table and ends with status 1 where a kernel takes more registers than the baseline allows. `--update`
writes what was found into the baseline instead. Nothing runs and no GPU is needed.

A new kernel is measured as soon as a case in CASES makes its op launch it.
"""

import argparse
import functools
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from .. import hybrid_linear, using
from ..norm_cache import NormCache
from ..ops.column_norm import column_norms
from ..ops.hybrid_linear.op import adapted_weight
from . import interpret
from .aot import TARGETS, Compiled, Report, aot, inspect

BASELINE = Path("tests/kernels/registers.json")
# registers are handed out to a thread in groups of this many: a rise within one costs nothing
SLACK = 8
# an SM has four such files, each of which serves a quarter of its warps
REGISTER_FILE = 16384
TENSOR_MEMORY_COLUMNS = 512
# what a thread block occupies beside its own shared memory, and what an SM has beside the limit of one block
RESERVED_SHARED = 1024


class Case(NamedTuple):
    """One use of the public ops: `run` launches their kernels on tensors without data.

    `slow` cases are left out of the everyday tests.
    """

    run: Callable[[], Any]
    slow: bool = False


def layer(
    dtype: torch.dtype,
    rank: int,
    *,
    tokens: int = 512,
    columns: int = 1024,
    rows: int = 1024,
    parts: bool = True,
    target: str = "output",
    dropout_p: float = 0.1,
    slow: bool = False,
) -> Case:
    """Forward and backward of one layer; with `parts` it has a magnitude, a blend, a bias and a position scale."""

    def run() -> None:
        weight, *factors = _adapter(dtype, rank, columns, rows)
        options: dict[str, Any] = {"scale": 0.5, "dropout_p": dropout_p}
        if parts:
            options |= {"magnitude": _trained(rows), "blend": _trained(1), "bias": _trained(rows, dtype=dtype)}
            options |= {"token_scale": _trained(tokens), "token_scale_target": target}
        y = hybrid_linear(_trained(tokens, columns, dtype=dtype), weight, *factors, **options)
        y.backward(torch.empty_like(y))

    return Case(run, slow)


def merging(dtype: torch.dtype, rank: int, *, columns: int = 1024, rows: int = 1024) -> Case:
    """The adapted weight of one layer."""

    def run() -> None:
        adapted_weight(*_adapter(dtype, rank, columns, rows), _trained(rows), _trained(1), scale=0.5)

    return Case(run)


def kept_norm(dtype: torch.dtype, rank: int, *, columns: int = 1024, rows: int = 1024) -> Case:
    """The norm that a layer keeps, with its guard."""
    return Case(lambda: NormCache().norm(*_adapter(dtype, rank, columns, rows), 0.5))


def several_norms(dtype: torch.dtype, rank: int, *, columns: int = 1024, rows: int = 1024) -> Case:
    """The norms of two layers in one launch."""

    def run() -> None:
        layers = [_adapter(dtype, rank, columns, rows) for _ in range(2)]
        column_norms(*zip(*layers, strict=True), scales=[0.5, 0.5])

    return Case(run)


def _trained(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=True)


def _adapter(dtype: torch.dtype, rank: int, columns: int, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Weight, lora_a and lora_b."""
    return _trained(rows, columns, dtype=dtype).detach(), _trained(rank, columns), _trained(rows, rank)


# what they launch is up to the rule in ops/hybrid_linear/dispatch.py
CASES = {
    "bf16 r16": layer(torch.bfloat16, 16),
    "bf16 r128": layer(torch.bfloat16, 128, slow=True),
    "fp32 r16": layer(torch.float32, 16),
    "bf16 r16, 16 tokens": layer(torch.bfloat16, 16, tokens=16, dropout_p=0.0),
    "bf16 r16, 256 tokens": layer(torch.bfloat16, 16, tokens=256, dropout_p=0.0),
    "bf16 r16, 8192 features": layer(torch.bfloat16, 16, columns=8192),
    "bf16 r16, merging": merging(torch.bfloat16, 16),
    "bf16 r16, kept norm": kept_norm(torch.bfloat16, 16),
    "bf16 r16, several norms": several_norms(torch.bfloat16, 16),
    "fp16 r16": layer(torch.float16, 16, slow=True),
    "fp32 r128": layer(torch.float32, 128, slow=True),
    "fp32 r16, 8 tokens": layer(torch.float32, 16, tokens=8, dropout_p=0.0, slow=True),
    "bf16 r16, plain LoRA": layer(torch.bfloat16, 16, parts=False, dropout_p=0.0, slow=True),
    "bf16 r16, no dropout": layer(torch.bfloat16, 16, dropout_p=0.0, slow=True),
    "bf16 r16, scaled delta": layer(torch.bfloat16, 16, target="delta", slow=True),
    "bf16 r17, odd sizes": layer(torch.bfloat16, 17, tokens=509, columns=1021, rows=1019, slow=True),
    "bf16 r17, 7 tokens": layer(torch.bfloat16, 17, tokens=7, columns=1021, rows=1019, dropout_p=0.0, slow=True),
}


class Row(NamedTuple):
    """One kernel of one case on one target."""

    case: str
    kernel: str
    report: Report
    blocks: int | None
    ttir: str


def compile_case(case: Case, target: str) -> list[Compiled]:
    """Every launch of the case, compiled for the target named."""
    interpret()
    with aot(target) as compiled, using("triton"):
        case.run()
    return compiled


@functools.cache
def rows_of(name: str, target: str) -> list[Row]:
    """What the kernels of the case named cost on a target, in the order of their launches."""
    return [
        Row(name, launch.name, *measure(launch.kernel, target), str(launch.kernel.asm["ttir"]))
        for launch in compile_case(CASES[name], target)
    ]


@functools.cache
def measure(kernel: Any, target: str) -> tuple[Report, int | None]:
    report = inspect(kernel, target)
    return report, resident_blocks(report, kernel.metadata)


def resident_blocks(report: Report, metadata: Any) -> int | None:
    """Blocks that fit on one SM of an NVIDIA GPU by registers, shared memory, tensor memory and warps."""
    if TARGETS[report.target].backend != "cuda":
        return None
    registers_of_a_warp = -(-report.registers // SLACK) * SLACK * 32
    blocks = [
        REGISTER_FILE // registers_of_a_warp * 4 // metadata.num_warps,
        (report.shared_limit + RESERVED_SHARED) // (report.shared_bytes + RESERVED_SHARED),
        (48 if report.target in ("sm86", "sm89", "sm120") else 64) // metadata.num_warps,
    ]
    columns = getattr(metadata, "tmem_size", None)
    return min([*blocks, TENSOR_MEMORY_COLUMNS // columns] if columns else blocks)


def table(rows: Iterable[Row]) -> str:
    """The rows in Markdown."""
    lines = [
        "| kernel | case | target | registers | spills, B | shared, KiB | blocks/SM | matrix | async copy |",
        "|---|---|---|--:|--:|--:|--:|---|---|",
    ]
    for case, kernel, report, blocks, _ in rows:
        spills = max(report.spill_stores + report.spill_loads, report.stack_bytes)
        cells = [
            kernel.removesuffix("_kernel"), case, report.target, report.registers, spills,
            f"{report.shared_bytes / 1024:.1f}", "-" if blocks is None else blocks,
            " ".join(report.matrix_instructions) or "-", " ".join(report.async_copies) or "-",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def compiler() -> str:
    """The version that a baseline holds for: other releases of Triton allot registers differently."""
    return "Triton " + ".".join(triton.__version__.split(".")[:2])


def read_baseline(path: Path) -> dict:
    """{compiler: {target: {case: {kernel: registers}}}}; empty where there is no file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def registers(rows: Iterable[Row]) -> dict[str, int]:
    """Registers by kernel, the most where a kernel is launched in several ways."""
    found: dict[str, int] = {}
    for row in rows:
        found[row.kernel] = max(row.report.registers, found.get(row.kernel, 0))
    return found


def against_baseline(rows: list[Row], baseline: dict) -> list[str]:
    """What is wrong with the rows of one case and target: registers risen by more than SLACK, kernels not known."""
    where = f"{rows[0].case} on {rows[0].report.target}"
    kept = baseline.get(compiler(), {}).get(rows[0].report.target, {}).get(rows[0].case, {})
    found = registers(rows)
    wrong = [
        f"{kernel}, {where}: {found[kernel]} registers, the baseline is {kept[kernel]} (+{SLACK} allowed)"
        for kernel in kept.keys() & found.keys()
        if found[kernel] > kept[kernel] + SLACK
    ]
    wrong += [f"{kernel}, {where}: not in the baseline" for kernel in found.keys() - kept.keys()]
    wrong += [f"{kernel}, {where}: in the baseline but not launched" for kernel in kept.keys() - found.keys()]
    hint = "if that is meant: make aot-report AOT_ARGS=--update, and say why in the commit"
    return [f"{problem}; {hint}" for problem in sorted(wrong)]


def update_baseline(path: Path, cases: dict[tuple[str, str], list[Row]]) -> None:
    """Write the registers of (target, case) pairs; others, and other compilers', stay as long as their case exists."""
    baseline = read_baseline(path)
    own = baseline.setdefault(compiler(), {})
    for (target, case), rows in cases.items():
        own.setdefault(target, {})[case] = registers(rows)
    for kept in own.values():
        for case in kept.keys() - CASES.keys():
            del kept[case]
    path.write_text(json.dumps(baseline, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--baseline", type=Path, default=BASELINE, help="JSON file (default: %(default)s)")
    parser.add_argument("--update", action="store_true", help="write the baseline instead of comparing with it")
    options = parser.parse_args(arguments)
    cases = {(target, case): rows_of(case, target) for case in options.cases for target in options.targets}
    sys.stdout.write(table(row for rows in cases.values() for row in rows) + "\n")
    if options.update:
        update_baseline(options.baseline, cases)
        return 0
    baseline = read_baseline(options.baseline)
    if compiler() not in baseline:
        sys.stderr.write(f"no baseline for {compiler()} in {options.baseline}: nothing was compared\n")
        return 0
    wrong = [problem for rows in cases.values() for problem in against_baseline(rows, baseline)]
    sys.stderr.write("".join(f"{problem}\n" for problem in wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
