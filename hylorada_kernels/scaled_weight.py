"""diag(g) W of one layer, kept as long as W and g stand still: memory for two passes over the layer's output.

In 16 bits the kept weight is rounded once more: an output's error grows by up to sqrt 2, and a change of the gain below
half a unit in the last place moves some elements of a row and not the others.
"""

import threading

import torch
from torch import Tensor

from . import backend
from .norm_cache import sample_of, sample_step, weight_key
from .ops.hybrid_linear import eager

_lock = threading.Lock()


class ScaledWeightCache:
    """Keeps one scaled weight, with what shows whether it still holds: the gain, and a key and a sample of W."""

    def __init__(self) -> None:
        self._kept: tuple[Tensor, Tensor, Tensor, list[int]] | None = None

    def scaled_weight(self, weight: Tensor, magnitude: Tensor, blend: Tensor | None, norm: Tensor) -> Tensor | None:
        """diag(g) W, (O, I) in weight's dtype and layout, not to be written to; None where it would not be used.

        That is wherever the eager path does not run at once: in Triton, which scales on the way out at no cost, and
        while tracing.
        """
        if backend.choose(weight) != "eager" or not backend.runs_directly(weight, "eager"):
            return None
        with torch.no_grad(), backend.no_autocast(weight):
            gain = eager.row_gain(magnitude, blend, norm)
            sample, key = sample_of(weight, sample_step(weight)), weight_key(weight)
            with _lock:
                if self._kept is not None:
                    kept_gain, scaled, kept_sample, kept_key = self._kept
                    if kept_key == key and torch.equal(kept_gain, gain) and torch.equal(kept_sample, sample):
                        return scaled
                # freed first, unless a graph still needs it: a graph's own is never written to
                self._kept = scaled = None
                scaled = eager.scaled_rows(weight, gain)
                self._kept = gain, scaled, sample.clone(), key
                return scaled

    def invalidate(self) -> None:
        """Forget it: needed where `NormCache.invalidate` is."""
        self._kept = None

    def __getstate__(self) -> dict:
        return {"_kept": None}
