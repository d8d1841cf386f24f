"""Uninitialised tensors that show: NaN instead of whatever memory held."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

_EMPTY = ((torch, ("empty", "empty_like", "empty_strided")), (torch.Tensor, ("new_empty", "new_empty_strided")))


@contextmanager
def poisoned_empty() -> Iterator[None]:
    """Inside, torch.empty and its kin return NaN (integers: the largest value; bool: True): a forgotten store shows."""
    # torch looks its factories up once, at the first use of a device context, and must find its own
    with torch.device("meta"):
        torch.empty(0)
    originals = [(owner, name, getattr(owner, name)) for owner, names in _EMPTY for name in names]
    for owner, name, original in originals:
        setattr(owner, name, _poisoned(original))
    try:
        yield
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)


def _poisoned(empty: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(empty)
    def filled(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        with torch.no_grad():
            return tensor if tensor.is_meta else tensor.fill_(_poison_of(tensor.dtype))

    return filled


def _poison_of(dtype: torch.dtype) -> float | int | bool:
    if dtype.is_floating_point or dtype.is_complex:
        return float("nan")
    if dtype == torch.bool:
        return True
    # fill_ takes its value as an int64
    return min(torch.iinfo(dtype).max, torch.iinfo(torch.int64).max)
