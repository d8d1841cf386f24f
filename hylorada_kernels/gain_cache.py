"""The gain of one layer and what follows from it, kept as long as the magnitude, the blend and the norm stand still.

On the CPU a small layer's many products of O values cost as much as a pass over its output. A layer may also keep
diag(g) W: memory of the size of its weight, for two such passes. In 16 bits that weight is rounded once more: an
output's error grows by up to sqrt 2, and a change of the gain below half a unit in the last place moves some elements
of a row and not the others.
"""

import threading
from typing import NamedTuple

import torch
from torch import Tensor

from . import backend
from .norm_cache import sample_of, sample_step, weight_key
from .ops.hybrid_linear import eager

_lock = threading.Lock()


class _Kept(NamedTuple):
    gain: eager.Gain
    # the norm itself, which is never written to, and copies
    norm: Tensor
    magnitude: Tensor
    blend: Tensor | None
    # where a weight was scaled: its key, and copies of a sample and of B
    key: list[int]
    scaled: tuple[Tensor, ...]

    def holds(self, magnitude: Tensor, blend: Tensor | None, norm: Tensor) -> bool:
        return self.norm is norm and _is_equal(self.magnitude, magnitude) and _is_equal(self.blend, blend)


class GainCache:
    """Keeps one gain, and copies of what it was made from, to be compared. Nothing that was given is written to."""

    def __init__(self) -> None:
        self._kept: _Kept | None = None

    def gain(
        self,
        weight: Tensor,
        lora_b: Tensor,
        magnitude: Tensor,
        blend: Tensor | None,
        norm: Tensor,
        *,
        scale_weight: bool = False,
    ) -> eager.Gain | None:
        """The gain for `hybrid_linear`, with a scaled weight where asked for; None where it would not be used.

        That is wherever the eager path does not run at once on a CPU: in Triton, where a kernel does all of this on its
        way, and while tracing; on a GPU, where the host would have to wait for the comparison; and in inference mode,
        whose tensors are of no use outside. `norm` is what `NormCache.norm` gives, the same tensor until it changes.
        """
        runs_directly = backend.choose(weight) == "eager" and backend.runs_directly(weight, "eager")
        if not runs_directly or not weight.is_cpu or torch.is_inference_mode_enabled():
            return None
        with torch.no_grad():
            key: list[int] = []
            scaled: tuple[Tensor, ...] = ()
            if scale_weight:
                key, scaled = weight_key(weight), (sample_of(weight, sample_step(weight)), lora_b)
            with _lock:
                kept = self._kept
                if kept is not None and kept.holds(magnitude, blend, norm) and _is_same(kept, key, scaled):
                    return kept.gain
                # freed first, unless a graph still needs it
                self._kept = kept = None
                with backend.no_autocast(weight):
                    gain = eager.gain_of(eager.row_gain(magnitude, blend, norm), magnitude, blend, norm)
                    gain = gain._replace(has_small=bool((gain.gain.abs() < eager.SMALL_GAIN).any()))
                    if scale_weight:
                        gain = eager.with_scaled_weight(gain, weight, lora_b)
                blend = None if blend is None else blend.clone()
                self._kept = _Kept(
                    gain, norm, magnitude.clone(), blend, key, tuple(tensor.clone() for tensor in scaled)
                )
                return gain

    def invalidate(self) -> None:
        """Forget it: needed where `NormCache.invalidate` is."""
        self._kept = None

    def __getstate__(self) -> dict:
        return {"_kept": None}


def _is_same(kept: _Kept, key: list[int], scaled: tuple[Tensor, ...]) -> bool:
    is_same = kept.key == key and len(kept.scaled) == len(scaled)
    return is_same and all(_is_equal(*pair) for pair in zip(kept.scaled, scaled, strict=True))


def _is_equal(kept: Tensor | None, given: Tensor | None) -> bool:
    if kept is None or given is None:
        return kept is given
    # torch.equal calls two NaN different: what is made of them is made anew each time, which is harmless
    return kept.dtype == given.dtype and torch.equal(kept, given)
