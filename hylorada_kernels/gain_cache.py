"""The gain of one layer and what follows from it, kept as long as the magnitude, the blend and the norm stand still.

On the CPU a small layer's many products of O values cost as much as a pass over its output, and so do the 16-bit copies
of its factors, which stand still as long as the norm that is made of them. A layer may also keep diag(g) W: memory of
the size of its weight, for two passes over the output. In 16 bits that weight is rounded once more: an output's error
grows by up to sqrt 2, and a change of the gain below half a unit in the last place moves some elements of a row and not
the others.
"""

import threading
from typing import NamedTuple

import torch
from torch import Tensor

from . import backend
from .ops.hybrid_linear import eager

_lock = threading.Lock()


class _Kept(NamedTuple):
    gain: eager.Gain
    # what it was made from: the norm itself, which is never written to, and copies of the magnitude and the blend
    norm: Tensor
    copies: list[Tensor | None]


class GainCache:
    """Keeps one gain, and copies of what it was made from, to be compared. Nothing that was given is written to."""

    def __init__(self) -> None:
        self._kept: _Kept | None = None

    def gain(
        self,
        weight: Tensor,
        lora_a: Tensor,
        lora_b: Tensor,
        magnitude: Tensor,
        blend: Tensor | None,
        norm: Tensor,
        *,
        scale: float,
        scale_weight: bool = False,
    ) -> eager.Gain | None:
        """The gain for `hybrid_linear`, with a scaled weight where asked for; None where it would not be used.

        That is wherever the eager path does not run at once on a CPU: in Triton, where a kernel does all of this on its
        way, and while tracing; on a GPU, where the host would have to wait for the comparison; and in inference mode,
        whose tensors are of no use outside. `norm` is what `NormCache.norm` gives for this weight, these factors and
        this scale: the same tensor until one of them changes.
        """
        runs_directly = backend.choose(weight) == "eager" and backend.runs_directly(weight, "eager")
        if not runs_directly or not weight.is_cpu or torch.is_inference_mode_enabled():
            return None
        with torch.no_grad(), _lock:
            kept = self._kept
            is_same = kept is not None and kept.norm is norm and (kept.gain.scaled is not None) == scale_weight
            if is_same and all(map(_is_equal, kept.copies, (magnitude, blend))):
                return kept.gain
            # freed first, unless a graph still needs it
            self._kept = kept = None
            with backend.no_autocast(weight):
                gain = eager.gain_of(eager.row_gain(magnitude, blend, norm), magnitude, blend, norm)
                gain = gain._replace(has_small=_has_small(gain.gain))
                if scale_weight:
                    gain = eager.with_scaled_weight(gain, weight, lora_a, lora_b, scale)
                else:
                    gain = eager.with_factors(gain, lora_a, lora_b, scale, weight.dtype)
            copies = [None if tensor is None else tensor.clone() for tensor in (magnitude, blend)]
            self._kept = _Kept(gain, norm, copies)
            return gain

    def invalidate(self) -> None:
        """Forget it: needed where `NormCache.invalidate` is."""
        self._kept = None

    def __getstate__(self) -> dict:
        return {"_kept": None}


def _has_small(gain: Tensor) -> bool:
    """Also where one is NaN, which hides the others."""
    return gain.numel() > 0 and not torch.linalg.vector_norm(gain, -torch.inf).item() >= eager.SMALL_GAIN


def _is_equal(kept: Tensor | None, given: Tensor | None) -> bool:
    if kept is None or given is None:
        return kept is given
    # torch.equal calls two NaN different: what is made of them is made anew each time, which is harmless
    return kept.dtype == given.dtype and torch.equal(kept, given)
