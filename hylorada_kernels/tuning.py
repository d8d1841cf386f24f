"""Measures on the GPU at hand where cuBLAS with an epilogue overtakes the fused product, and keeps it in a file."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import triton

from .backend import has_matrix_units, using
from .ops.hybrid_linear import dispatch, hybrid_linear

IN_FEATURES = (1024, 2048, 3072, 4096, 6144, 8192, 12288, 16384)
NEVER = 2**31


@dataclass(frozen=True)
class Measurement:
    """`ratios`: time of "fused" over time of "library", by in-features; `fused_up_to`: where the first stops."""

    fused_up_to: int
    ratios: dict[int, float]


def tune(tokens: int = 4096, rows: int = 4096, rank: int = 16) -> Measurement:
    """Time both routes of a bf16 layer over IN_FEATURES. RuntimeError without a GPU that Triton can use."""
    if not torch.cuda.is_available():
        raise RuntimeError("tune needs a GPU: torch.cuda.is_available() is False on this machine")
    if not has_matrix_units(torch.device("cuda", torch.cuda.current_device())):
        raise RuntimeError(f"tune needs a GPU from sm_80 on, got {torch.cuda.get_device_name()}")
    ratios = {}
    for columns in IN_FEATURES:
        times = {route: _milliseconds(route, tokens, columns, rows, rank) for route in ("fused", "library")}
        ratios[columns] = times["fused"] / times["library"]
    return Measurement(switch_over(ratios), ratios)


def switch_over(ratios: dict[int, float]) -> int:
    """In-features up to which "fused" wins at every length measured: where the line to the first loss crosses 1."""
    won = 0
    for columns, ratio in sorted(ratios.items()):
        if ratio > 1:
            if not won:
                return 0
            share = (1 - ratios[won]) / (ratio - ratios[won])
            return int(won + share * (columns - won))
        won = columns
    return NEVER


def write(path: Path, measurement: Measurement, gpu: str) -> None:
    """Keep a measurement where `dispatch` looks for it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = {
        "gpu": gpu,
        "triton": triton.__version__,
        "torch": torch.__version__,
        "fused_up_to": measurement.fused_up_to,
        "fused_time_over_library_time": {str(columns): ratio for columns, ratio in measurement.ratios.items()},
    }
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(text, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)


def _milliseconds(route: str, tokens: int, columns: int, rows: int, rank: int) -> float:
    def tensor(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(shape, dtype=dtype, device="cuda")

    x, weight = tensor(tokens, columns), tensor(rows, columns)
    lora_a, lora_b = tensor(rank, columns, dtype=torch.float32), tensor(rows, rank, dtype=torch.float32)
    norm = weight.float().norm(dim=1)
    with torch.no_grad(), using("triton"), dispatch.taking(route):
        return triton.testing.do_bench(
            lambda: hybrid_linear(x, weight, lora_a, lora_b, norm, scale=1.0, norm=norm), return_mode="median"
        )
