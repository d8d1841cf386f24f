"""The norm of every row of W + s B A, beside the dense way that builds B A, and beside torch.compile of that.

    pytest benchmarks/bench_column_norm.py -n 0 --results benchmarks/results

"dense" is what PEFT's DoRA computes. Norms are compared with those in fp64 before anything is timed. On a GPU "ours" is
the Triton kernel, and "ours, eager" stands beside it.
"""

import statistics

import pytest
import torch

from benchmarks.memory import MIB, peak_bytes
from benchmarks.paired import median_ratio, ratio_spread
from benchmarks.roofline import column_norm_work, measured_limits
from benchmarks.shapes import DEVICE, DTYPES, MODEL_LAYERS
from hylorada_kernels import column_norm, using
from hylorada_kernels.testing import relative_error

SECONDS_PER_CASE = 6.0


def dense(weight: torch.Tensor, lora_a: torch.Tensor, lora_b: torch.Tensor, scale: float) -> torch.Tensor:
    return torch.linalg.vector_norm(weight + scale * (lora_b @ lora_a).to(weight.dtype), dim=1)


@pytest.mark.parametrize("layer", MODEL_LAYERS)
@pytest.mark.parametrize("rank", [8, 64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_column_norm(benchmark, record, paired, dtype, rank, layer):
    _, columns, rows = MODEL_LAYERS[layer]
    torch.manual_seed(0)
    weight = (torch.randn(rows, columns) * columns**-0.5).to(DEVICE, DTYPES[dtype])
    lora_a, lora_b = (
        torch.randn(rank, columns, device=DEVICE) * columns**-0.5,
        0.1 * torch.randn(rows, rank, device=DEVICE),
    )
    compiled = torch.compile(dense, dynamic=False)

    def ours() -> torch.Tensor:
        return column_norm(weight, lora_a, lora_b, scale=0.5)

    def ours_eager() -> torch.Tensor:
        with using("eager"):
            return ours()

    runs = {
        "ours": ours,
        "dense": lambda: dense(weight, lora_a, lora_b, 0.5),
        "dense compiled": lambda: compiled(weight, lora_a, lora_b, 0.5),
    }
    if DEVICE == "cuda":
        runs["ours, eager"] = ours_eager
    with torch.no_grad():
        truth = dense(weight.double(), lora_a.double(), lora_b.double(), 0.5)
        assert relative_error(ours(), truth) <= 1e-5
        assert relative_error(runs["dense"](), truth) <= (1e-5 if dtype == "fp32" else 1e-2)
        processor: dict[str, list[float]] = {}
        times = paired(runs, SECONDS_PER_CASE, processor=processor)
        values = {"ours, ms": 1e3 * statistics.median(times["ours"])}
        values["ours, processor ms"] = 1e3 * statistics.fmean(processor["ours"])
        values |= {f"{name} / ours": median_ratio(times, name, "ours") for name in runs if name != "ours"}
        values["±"] = ratio_spread(times, "dense", "ours")
        if DEVICE == "cpu":
            values |= {f"{name}, peak MiB": peak_bytes(runs[name]) / MIB for name in ("ours", "dense")}
        else:
            work = column_norm_work(columns, rows, rank, weight.element_size())
            values["of the roofline"] = work.achieved(statistics.median(times["ours"]), measured_limits(DTYPES[dtype]))
    record("column norm", {"dtype": dtype, "rank": rank, "layer": layer}, values)
    benchmark.pedantic(ours, rounds=3)
