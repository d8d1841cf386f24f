"""How far from the truth a result may be: a factor over the error of the best result that its precision allows."""

import torch
from torch import Tensor


def relative_error(result: Tensor, truth: Tensor, amplitude: Tensor | None = None) -> float:
    """|| result - truth || / || amplitude || in fp64; the amplitude of a sum is the root of its terms' squares.

    Without one the truth takes its place.
    """
    if result.shape != truth.shape:
        raise AssertionError(f"shape {tuple(result.shape)} instead of {tuple(truth.shape)}")
    if not truth.numel():
        return 0.0
    size = (truth if amplitude is None else amplitude).detach().double().norm()
    error = (result.detach().double() - truth.detach().double()).norm()
    return float(error / size) if size > 0 else float(error)


def allowed_error(floor: float, dtype: torch.dtype, *, factor: float, independent: int, length: int) -> float:
    """factor x the floor, plus the rounding of a sum of `length` terms: in fp32, or in fp64 for fp64.

    `floor` is the error of the ideal result, at least the rounding of `dtype`. The norm of n independent roundings
    scatters by 1 / sqrt(2 n): three such deviations are granted, which matters for few values only.
    """
    # a rounding error is spread evenly over half a unit either way: its root mean square is about a fifth of the unit
    floor = max(floor, torch.finfo(dtype).eps / 5)
    # sums of n terms err by about sqrt(n) half units; an fp64 truth does so no less than an fp64 result
    unit = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    return factor * floor * (1 + 3 / (2 * max(independent, 1)) ** 0.5) + unit * max(length, 1) ** 0.5


def assert_within(name: str, result: Tensor, truth: Tensor, allowed: float, amplitude: Tensor | None = None) -> None:
    """Raise AssertionError with the numbers if `result` is further from `truth` than allowed, or not finite."""
    if not torch.isfinite(result).all():
        raise AssertionError(
            f"{name}: {int((~torch.isfinite(result)).sum())} of {result.numel()} values are not finite"
        )
    error = relative_error(result, truth, amplitude)
    if not error <= allowed:
        raise AssertionError(f"{name}: error {error:.3e} exceeds the budget {allowed:.3e}")
