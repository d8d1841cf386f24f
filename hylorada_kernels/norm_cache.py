"""The column norm of one layer, kept as long as nothing that it is made of has changed.

The norm is a constant for autograd, and the factors stand still between two optimizer steps: one norm serves every
micro-batch and every recomputation of a checkpointed layer. Version counters cannot tell when to make it anew: fused
optimizers, writes through .data, numpy or a flat buffer leave them as they are. So contents are compared.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor

from . import backend
from .ops.column_norm import column_norm

# elements of the frozen weight that are looked at: whoever replaces it changes more than one in thousands
WEIGHT_SAMPLES = 4096

_verifying: ContextVar[bool] = ContextVar("hylorada_verify_norms", default=False)


@contextmanager
def verifying() -> Iterator[None]:
    """Compute every cached norm again before it is used, and raise RuntimeError where the cached one is stale."""
    token = _verifying.set(True)
    try:
        yield
    finally:
        _verifying.reset(token)


class _Entry(NamedTuple):
    norm: Tensor
    lora_a: Tensor
    lora_b: Tensor
    weight_key: tuple
    weight_sample: Tensor
    scale: float


class NormCache:
    """Holds one norm beside copies of the factors it was made of: R (I + O) numbers a layer.

    It works for plain tensors on the CPU. A GPU would have to wait for the comparison, a trace cannot branch on it, and
    what inference mode made cannot be saved for a backward: there `lookup` finds nothing and the op computes the norm.
    """

    def __init__(self) -> None:
        self._entry: _Entry | None = None

    def lookup(self, weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float) -> Tensor | None:
        """The norm that was stored for just these values, or None."""
        entry = self._entry
        if entry is None or not _comparable(weight, lora_a, lora_b):
            return None
        if entry.scale != scale or entry.weight_key != _key(weight):
            return None
        unchanged = _same(entry.lora_a, lora_a) and _same(entry.lora_b, lora_b)
        if not unchanged or not _same(entry.weight_sample, _sample(weight)):
            return None
        if _verifying.get():
            _verify(entry.norm, weight, lora_a, lora_b, scale)
        return entry.norm

    def store(self, norm: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float) -> None:
        """Keep a norm that was just made of these values."""
        if _comparable(norm, weight, lora_a, lora_b):
            copies = lora_a.detach().clone(), lora_b.detach().clone()
            self._entry = _Entry(norm.detach(), *copies, _key(weight), _sample(weight).clone(), scale)

    def invalidate(self) -> None:
        """Forget the norm: needed after a few elements of the frozen weight were edited behind autograd's back."""
        self._entry = None

    def __getstate__(self) -> dict:
        # a copy in another process or another module has a weight of its own to look at
        return {"_entry": None}


def _comparable(*tensors: Tensor) -> bool:
    return all(
        backend.runs_directly(tensor, "eager") and tensor.is_cpu and not tensor.is_inference() for tensor in tensors
    )


def _key(weight: Tensor) -> tuple:
    return weight.data_ptr(), weight._version, weight.dtype, weight.shape, weight.stride()


def _sample(weight: Tensor) -> Tensor:
    """Elements of the weight, spread evenly over its rows and columns; a view."""
    rows = weight.detach() if weight.is_contiguous() else weight.detach().T
    step = max(1, rows.numel() // WEIGHT_SAMPLES)
    # a step that shares a factor with the row length would visit some columns only
    while math.gcd(step, max(rows.shape[-1], 1)) > 1:
        step += 1
    return rows.reshape(-1)[::step]


def _same(kept: Tensor, now: Tensor) -> bool:
    # torch.equal calls two NaN different: a broken layer is then computed anew each time, which is harmless
    return kept.dtype == now.dtype and kept.shape == now.shape and torch.equal(kept, now)


def _verify(norm: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float) -> None:
    with torch.no_grad():
        fresh = column_norm(weight.detach(), lora_a, lora_b, scale=scale)
    if not torch.allclose(norm, fresh, rtol=1e-4, atol=0):
        worst = float((norm / fresh - 1).abs().max())
        raise RuntimeError(
            f"a cached column norm is stale by {worst:.1e}: the layer's weight was edited behind autograd's back; "
            "call invalidate_norm() on the layer after such an edit"
        )
