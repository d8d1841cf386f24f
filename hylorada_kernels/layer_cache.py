"""What an adapted layer keeps between optimizer steps: its norm, and the gain with what follows from it.

On the CPU a small layer's many products of O values cost as much as a pass over its output, and so do the 16-bit copies
of its factors, which stand still as long as the norm that is made of them. A layer may also keep diag(g) W: memory of
the size of its weight, for two passes over the output. In 16 bits that weight is rounded once more: an output's error
grows by up to sqrt 2, and a change of the gain below half a unit in the last place moves some elements of a row and not
the others.

Behind a large product, which empties the caches, every call costs more than its work: `refresh` makes what several
layers keep in one go, before the first of them runs. Each layer still looks for itself whether what it keeps holds.
"""

import threading
from collections.abc import Hashable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import backend, norm_cache
from .norm_cache import Layer, NormCache
from .ops.column_norm.eager import stacked
from .ops.hybrid_linear import eager
from .ops.hybrid_linear.op import check_operands

_lock = threading.Lock()


class Operands(NamedTuple):
    """What norm and gain of a layer are made of; see `hybrid_linear`. Without a magnitude it has neither."""

    weight: Tensor
    lora_a: Tensor
    lora_b: Tensor
    magnitude: Tensor | None
    blend: Tensor | None
    scale: float
    # whether diag(g) W is kept too
    scale_weight: bool = False


class _Kept(NamedTuple):
    gain: eager.Gain
    # what it was made from: the norm itself, which is never written to, and copies of the magnitude and the blend
    norm: Tensor
    copies: list[Tensor | None]


class LayerCache:
    """Keeps one norm and one gain, and copies of what they were made from, to be compared.

    Nothing that was given is written to.
    """

    def __init__(self) -> None:
        self.norms = NormCache()
        self._kept: _Kept | None = None

    def norm_and_gain(self, operands: Operands) -> tuple[Tensor | None, eager.Gain | None]:
        """What `hybrid_linear` takes: the norm, and the gain, with a scaled weight where asked for.

        The gain is None where it would not be used: wherever the eager path does not run at once on a CPU. That is in
        Triton, where a kernel does all of this on its way, and while tracing; on a GPU, where the host would have to
        wait for the comparison; and in inference mode, whose tensors are of no use outside.
        """
        weight, lora_a, lora_b, magnitude, blend, scale, scale_weight = operands
        if magnitude is None:
            return None, None
        if not norm_cache.is_at_hand(weight, lora_a, lora_b):
            return self.norms.norm(weight, lora_a, lora_b, scale), None
        norm = self.norms.norm_at_hand(weight, lora_a, lora_b, scale)
        with _lock:
            kept = self._kept
            # the norm is the same tensor until the weight, a factor or the scale changes
            is_same = kept is not None and kept.norm is norm and (kept.gain.scaled is not None) == scale_weight
            if kept is None or not is_same or not all(map(_is_equal, kept.copies, (magnitude, blend))):
                check_operands(weight, lora_a, lora_b, magnitude, blend)
                # freed first, unless a graph still needs it
                self._kept = kept = None
                (kept,) = _gains([operands], [norm], lora_a[None], lora_b[None])
                self._kept = kept
            return norm, kept.gain

    def invalidate(self) -> None:
        """Forget all of it: needed after a few elements of the frozen weight were edited behind autograd's back."""
        self.norms.invalidate()
        self._kept = None

    def __getstate__(self) -> dict:
        return {"norms": self.norms, "_kept": None}


class Keeper:
    """A module that keeps norms and gains: `refresh` looks for such."""

    def kept(self) -> Iterator[tuple[LayerCache, Operands]]:
        """What is kept for the next forward, and what it is made of."""
        raise NotImplementedError


def refresh(model: nn.Module) -> None:
    """Make anew in one go what a model's layers keep, where the first one's norm has become stale.

    Worth a call before the forward that follows an optimizer step on a CPU, where small layers make it in less time
    together than one by one between their products; `HyLoRADAModel` and models of PEFT with HyLoRADA's layers call it
    by themselves. It changes no bit of a result: each layer looks at its own tensors in its forward, as always, and
    makes there what is not up to date. Layers that have not run on a CPU before are left alone, and all if the first is
    one of them.
    """
    if torch.compiler.is_compiling():
        return
    for fresh in norm_cache.refresh(_in_use(model)):
        caches, operands = zip(*fresh.owners, strict=True)
        with _lock:
            for cache in caches:
                # freed first, unless a graph still needs it
                cache._kept = None
            for cache, kept in zip(caches, _gains(operands, *fresh[1:]), strict=True):
                cache._kept = kept


def _in_use(model: nn.Module) -> Iterator[tuple[tuple[LayerCache, Operands], Hashable, NormCache, Layer]]:
    """The layers that have kept a gain, as `norm_cache.refresh` takes them; none if the first has not."""
    none_yet = True
    for keeper in filter(lambda module: isinstance(module, Keeper), model.modules()):
        for cache, operands in keeper.kept():
            if cache._kept is not None and _is_whole(operands):
                none_yet = False
                weight, lora_a, lora_b, magnitude, blend, scale, _ = operands
                kind = magnitude.dtype, None if blend is None else blend.dtype
                yield (cache, operands), kind, cache.norms, Layer(weight, lora_a, lora_b, scale)
        if none_yet:
            return


def _is_whole(operands: Operands) -> bool:
    """Between its forwards a sharded layer's parameters may be flat, or without their storage."""
    weight, _, _, magnitude, blend, *_ = operands
    return (
        magnitude is not None
        and magnitude.shape == weight.shape[:1]
        and (blend is None or blend.numel() == 1)
        and all(each is None or each.untyped_storage().nbytes() >= each.nbytes for each in operands[:5])
    )


@torch.no_grad()
def _gains(layers: Sequence[Operands], norms: Sequence[Tensor], lora_a: Tensor, lora_b: Tensor) -> list[_Kept]:
    """Of L layers of one kind, shape, dtype and scale; lora_a (L, R, I), lora_b (L, O, R): what the norms are made of.

    What does not read W is made for all of them in one call, with the bits that it would have alone.
    """
    dtype, scale, kept = layers[0].weight.dtype, layers[0].scale, []
    norm = stacked(norms)
    with backend.no_autocast(norm):
        # copies, even of one alone: what is made is made of them
        magnitudes = torch.stack([operands.magnitude for operands in layers])
        blends = [None if operands.blend is None else operands.blend.clone() for operands in layers]
        # each by itself: in a vector of them an exponential may have other bits
        betas = [eager.gate(blend, norm.dtype) for blend in blends]
        beta = None if betas[0] is None else torch.stack([each.view(1) for each in betas])
        gains = eager.gain_of(eager.row_gain(magnitudes, beta, norm), magnitudes, beta, norm)
        gains = eager.with_factors(gains, lora_a, lora_b, scale, dtype)._replace(has_small=_has_small(gains.gain))
        parts = norms, magnitudes, blends, lora_b, gains.unbind()
        for operands, own_norm, magnitude, blend, own_b, gain in zip(layers, *parts, strict=True):
            if len(layers) > 1 and gain.has_small:
                gain = gain._replace(has_small=_has_small(gain.gain))
            if operands.scale_weight:
                gain = eager.with_scaled_weight(gain, operands.weight, own_b, scale)
            kept.append(_Kept(gain, own_norm, [magnitude, blend]))
    return kept


def _has_small(gain: Tensor) -> bool:
    """Also where one is NaN, which hides the others."""
    return gain.numel() > 0 and not torch.linalg.vector_norm(gain, -torch.inf).item() >= eager.SMALL_GAIN


def _is_equal(kept: Tensor | None, given: Tensor | None) -> bool:
    if kept is None or given is None:
        return kept is given
    # torch.equal calls two NaN different: what is made of them is made anew each time, which is harmless
    return kept.dtype == given.dtype and torch.equal(kept, given)
