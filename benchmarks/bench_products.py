"""The products of an fp32 layer on the CPU: MKL's beside oneDNN's; which one is quicker depends on the processor.

    pytest benchmarks/bench_products.py -n 0 --results benchmarks/results

"sum" is x W^T + h up, the forward; "sum back" is its gradient of x; "down" is h, "up" the low-rank term alone, "outer"
the gradient of A. Above 1 oneDNN is quicker. Each product is compared with the one in fp64 before anything is timed;
"error" is the sum's by oneDNN over that by MKL.
"""

import pytest
import torch

from benchmarks.paired import median_ratio
from benchmarks.shapes import LAYERS
from hylorada_kernels.ops import _products as products
from hylorada_kernels.testing import relative_error

SECONDS_PER_CASE = 2.0


@pytest.mark.parametrize("layer", LAYERS, ids=str)
@pytest.mark.parametrize("rank", [8, 64])
def test_products(benchmark, record, paired, monkeypatch, rank, layer):
    tokens, columns, rows = layer
    torch.manual_seed(0)
    x, dz, weight = torch.randn(tokens, columns), torch.randn(tokens, rows), torch.randn(rows, columns)
    h, up, down = torch.randn(tokens, rank), torch.randn(rank, rows), torch.randn(rank, columns)
    calls = {
        "sum": lambda: products.add_low_rank(x, weight, h, up),
        "sum back": lambda: products.add_low_rank(dz, weight.T, h, down),
        "down": lambda: products.project_down(x, down),
        "up": lambda: products.project_up(h, up),
        "outer": lambda: products.outer_sum(h, x),
    }
    exact = [tensor.double() for tensor in (x, dz, weight, h, up, down)]
    truths = _truths(*exact)
    chosen = {"library": "mkl"}
    monkeypatch.setattr(products, "has_quicker_onednn", lambda: chosen["library"] == "onednn")

    def by(library, call):
        def run() -> torch.Tensor:
            chosen["library"] = library
            return call()

        return run

    values, errors = {}, {}
    for name, call in calls.items():
        runs = {library: by(library, call) for library in ("mkl", "onednn")}
        for library, run in runs.items():
            errors[name, library] = relative_error(run(), truths[name])
            assert errors[name, library] <= 1e-5
        values[name] = median_ratio(paired(runs, SECONDS_PER_CASE), "mkl", "onednn")
    values["error"] = errors["sum", "onednn"] / errors["sum", "mkl"]
    record("products", {"rank": rank, "tokens, in, out": layer}, values)
    benchmark.pedantic(calls["sum"], rounds=3)


def _truths(x, dz, weight, h, up, down):
    return {
        "sum": x @ weight.T + h @ up,
        "sum back": dz @ weight + h @ down,
        "down": x @ down.T,
        "up": h @ up,
        "outer": h.T @ x,
    }
