"""Thin products: whatever way they are laid down, they are the product, to the rounding of their dtype."""

import pytest
import torch

from hylorada_kernels.ops import _thin
from hylorada_kernels.testing import allowed_error, assert_within, relative_error

SHAPES = {
    "small": (48, 40),
    "whole groups": (1024, 640),
    "rows left over": (1030, 640),
    "columns left over": (1024, 650),
    "none": (0, 640),
}
RANKS = [1, 8, _thin.THIN_RANK, 64]


def operands(shape: str, rank: int, dtype: torch.dtype, *, is_transposed: bool):
    torch.manual_seed(0)
    rows, columns = SHAPES[shape]
    wide = torch.randn(columns, rows, dtype=dtype).T if is_transposed else torch.randn(rows, columns, dtype=dtype)
    return wide, torch.randn(rows, rank, dtype=dtype), torch.randn(rank, columns, dtype=dtype)


@pytest.mark.parametrize("is_transposed", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_way_is_the_product(shape, rank, dtype, is_transposed):
    wide, thin, factor = operands(shape, rank, dtype, is_transposed=is_transposed)
    exact_wide, exact_thin, exact_factor = wide.double(), thin.double(), factor.double()
    found = {
        "down": (_thin.project_down(wide, factor), exact_wide @ exact_factor.T),
        "down, in groups": (_thin.project_down(wide, factor, batch_from=0), exact_wide @ exact_factor.T),
        "up": (_thin.project_up(thin, factor), exact_thin @ exact_factor),
        "up, scaled": (_thin.project_up(thin, factor, 0.3), 0.3 * exact_thin @ exact_factor),
        "outer": (_thin.outer_sum(thin, wide), exact_thin.T @ exact_wide),
        "outer, transposed": (_thin.outer_sum(thin, wide, is_transposed=True), exact_wide.T @ exact_thin),
    }
    lengths = {"up": rank, "up, scaled": rank, "outer": wide.shape[0], "outer, transposed": wide.shape[0]}
    for name, (result, truth) in found.items():
        assert result.dtype == dtype, name
        length = lengths.get(name, wide.shape[1])
        floor = relative_error(truth.to(dtype), truth)
        allowed = allowed_error(floor, dtype, factor=1.05, independent=result.numel(), length=length)
        assert_within(name, result, truth, allowed)


@pytest.mark.parametrize(
    ("call", "operation"),
    [
        (lambda wide, thin, factor: _thin.project_down(wide, factor), "aten::bmm"),
        (lambda wide, thin, factor: _thin.project_up(thin, factor), "aten::bmm"),
        (lambda wide, thin, factor: _thin.outer_sum(thin, wide), "aten::bmm"),
    ],
    ids=["down", "up", "outer"],
)
@pytest.mark.parametrize(
    ("shape", "rank", "is_batched"),
    [("whole groups", 8, True), ("small", 8, False), ("whole groups", _thin.THIN_RANK, False)],
    ids=["large and thin", "small", "not thin"],
)
def test_large_matrices_and_thin_factors_are_taken_in_groups(call, operation, shape, rank, is_batched):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call(*operands(shape, rank, torch.float32, is_transposed=False))
    assert (operation in {event.key for event in profile.key_averages()}) == is_batched
