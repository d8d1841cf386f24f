"""The column norm of one layer, kept as long as nothing that it is made of has changed.

The norm is a constant for autograd, and the factors stand still between two optimizer steps: one norm serves every
micro-batch and every recomputation of a checkpointed layer. Version counters cannot tell when to make it anew: fused
optimizers, writes through .data, numpy or a flat buffer leave them as they are. So contents are compared: on the CPU
with kept copies of A and B, on a GPU by a fingerprint of their bits, without the host waiting for it. Of the frozen
weight a sample is looked at.
"""

import itertools
import math
import struct
import threading
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import backend
from .ops.column_norm import column_norm, eager
from .ops.column_norm.op import check_shapes

if backend.HAS_TRITON:
    from .ops.column_norm import kernel

# elements of the frozen weight that are looked at: whoever replaces it changes more than one in a hundred. Each lies in
# a page of its own, so that many of them would cost as much as a small layer
WEIGHT_SAMPLES = 512
# of an eager layer; the last is the number of the norm, by which a copy of it is known
KEY_LENGTH = 8

_verifying: ContextVar[bool] = ContextVar("hylorada_verify_norms", default=False)
_lock = threading.Lock()
_numbers = itertools.count(1)


@contextmanager
def verifying() -> Iterator[None]:
    """Compute every cached norm again before it is used, and raise RuntimeError where the cached one is stale."""
    token = _verifying.set(True)
    try:
        yield
    finally:
        _verifying.reset(token)


class NormCache:
    """Keeps one norm and what shows whether it still holds: copies of A and B on the CPU, a fingerprint on a GPU.

    The norm is made anew each time where nothing can be kept: for tensor subclasses, in an exported program, and for an
    eager layer on a GPU, where the host would have to wait for the comparison.
    """

    def __init__(self) -> None:
        # what is kept, the layout that it is for, and the distance between two samples of the weight
        self._state: tuple[list[Tensor], tuple, int] = [], (), 1
        # the last norm that was given and its number
        self._given: tuple[int, Tensor] | None = None

    def norm(self, weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float) -> Tensor:
        """The norm, (O,) fp32 (fp64 for an fp64 weight), not to be written to. See `column_norm`.

        The eager path gives the same tensor until the weight, a factor or the scale changes.
        """
        if is_at_hand(weight, lora_a, lora_b):
            return self.norm_at_hand(weight, lora_a, lora_b, scale)
        choice = backend.choose(weight)
        if not _can_keep(weight, lora_a, lora_b, choice):
            with torch.no_grad():
                return column_norm(weight, lora_a, lora_b, scale=scale)
        kept, step = self._kept(weight, lora_a, lora_b, choice)
        if backend.runs_directly(weight, choice):
            return _norm(kept, weight, lora_a, lora_b, scale, choice, step)
        with torch.no_grad():
            return _norm_op(kept, weight, lora_a, lora_b, scale, choice, step)

    def norm_at_hand(self, weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float) -> Tensor:
        """`norm` of tensors of which `is_at_hand` is known."""
        kept, step = self._kept(weight, lora_a, lora_b, "eager")
        self._given = _, norm = _compared(kept, weight, lora_a, lora_b, scale, step, self._given)
        return norm

    def invalidate(self) -> None:
        """Forget the norm: needed after a few elements of the frozen weight were edited behind autograd's back."""
        kept = self._state[0]
        if kept:
            kept[-1].zero_()

    def _kept(self, weight: Tensor, lora_a: Tensor, lora_b: Tensor, choice: str) -> tuple[list[Tensor], int]:
        """What is kept for tensors of this layout, and the distance between two samples."""
        layout = _layout(weight, lora_a, lora_b, choice)
        # one assignment: another thread sees the old state or the new one
        kept, kept_layout, step = self._state
        if not kept or kept_layout != layout:
            check_shapes(weight, lora_a, lora_b)
            step = sample_step(weight)
            kept = _new_state(weight, lora_a, lora_b, choice, step)
            self._state = kept, layout, step
        return kept, step

    def __getstate__(self) -> dict:
        # another process must not write into what is kept here
        return {"_state": ([], (), 1), "_given": None}


class Layer(NamedTuple):
    """What a norm is made of."""

    weight: Tensor
    lora_a: Tensor
    lora_b: Tensor
    scale: float


class Fresh(NamedTuple):
    """L norms that were made together, whose they are, and copies of what they were made of."""

    owners: list[Any]
    # (O,) each
    norms: Sequence[Tensor]
    # (L, R, I) and (L, O, R)
    lora_a: Tensor
    lora_b: Tensor


class _Stale(NamedTuple):
    owner: Any
    cache: NormCache
    layer: Layer
    kept: list[Tensor]
    found: "_Found"


def refresh(layers: Iterable[tuple[Any, Hashable, NormCache, Layer]]) -> list[Fresh]:
    """Make the stale norms of several layers anew, on the CPU, those of one kind, shape, dtype and scale together.

    Given are each layer's owner and kind, its cache and what its norm is made of. Nothing is done where the first
    layer's norm still holds, or is not one that the eager path has given for such tensors before; then no other is
    looked at. A norm has the bits that `NormCache.norm` would have made, and is what that gives from now on.
    """
    groups: dict[tuple, list[_Stale]] = {}
    with torch.no_grad(), _lock:
        for owner, kind, cache, layer in layers:
            if _has_given(cache, layer):
                kept, layout, step = cache._state
                found = _look(kept, *layer, step)
                if not found.is_current:
                    stale = _Stale(owner, cache, layer, kept, found)
                    groups.setdefault((layout, layer.scale, kind), []).append(stale)
            if not groups:
                break
        return [_made_together(group) for group in groups.values()]


def _made_together(group: list[_Stale]) -> Fresh:
    owners, caches, layers, kept, found = zip(*group, strict=True)
    copies = [_begin(own_kept, layer.lora_a, layer.lora_b) for own_kept, layer in zip(kept, layers, strict=True)]
    lora_a, lora_b = (torch.cat(factors) for factors in zip(*copies, strict=True))
    weights, bases = [layer.weight for layer in layers], [each.base for each in found]
    with backend.no_autocast(lora_a):
        norms, bases = eager.norms_and_bases(weights, lora_a, lora_b, bases, scale=layers[0].scale)
    own_norms = norms.unbind()
    for cache, own_kept, each, norm, base in zip(caches, kept, found, own_norms, bases, strict=True):
        cache._given = _end(own_kept, each, norm, base), norm
    return Fresh(list(owners), own_norms, lora_a, lora_b)


def _has_given(cache: NormCache, layer: Layer) -> bool:
    weight, lora_a, lora_b, _ = layer
    return (
        cache._given is not None
        and is_at_hand(weight, lora_a, lora_b)
        and cache._state[1] == _layout(weight, lora_a, lora_b, "eager")
    )


def is_at_hand(weight: Tensor, lora_a: Tensor, lora_b: Tensor) -> bool:
    """Whether the eager path makes their norm on the CPU, directly, and what it makes is of use later."""
    return (
        backend.is_at_hand(weight)
        and backend.is_plain(lora_a)
        and backend.is_plain(lora_b)
        # what is made in inference mode could not be saved for a backward
        and not torch.is_inference_mode_enabled()
    )


def _layout(weight: Tensor, lora_a: Tensor, lora_b: Tensor, choice: str) -> tuple:
    return (
        choice, weight.device, weight.dtype, weight.shape, lora_a.dtype, lora_a.shape, lora_b.dtype, lora_b.shape,
    )  # fmt: skip


def _can_keep(weight: Tensor, lora_a: Tensor, lora_b: Tensor, choice: str) -> bool:
    is_plain = backend.is_plain(weight) and backend.is_plain(lora_a) and backend.is_plain(lora_b)
    return is_plain and not torch.compiler.is_exporting() and (choice == "triton" or weight.is_cpu)


def _new_state(weight: Tensor, lora_a: Tensor, lora_b: Tensor, choice: str, step: int) -> list[Tensor]:
    """What is kept: the norm first; last the fingerprint or a key, to which nothing fits while they are 0."""
    rows = weight.shape[0]
    # tensors made in inference mode could never be written to outside of it
    with nullcontext() if torch.compiler.is_compiling() else torch.inference_mode(False):
        norm = weight.new_zeros(rows, dtype=torch.promote_types(weight.dtype, torch.float32))
        if choice == "triton":
            # on the host, so that nobody waits for it
            key = torch.zeros(KEY_LENGTH - 3, dtype=torch.int64, device="cpu")
            return [norm, key, weight.new_zeros(kernel.programs(rows), dtype=torch.int64)]
        copies = [torch.zeros_like(factor, memory_format=torch.contiguous_format) for factor in (lora_a, lora_b)]
        samples = weight.new_zeros(-(-weight.numel() // step))
        key = weight.new_zeros(KEY_LENGTH, dtype=torch.int64)
        return [norm, torch.zeros_like(norm), *copies, samples, key]


def _norm(
    kept: list[Tensor], weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float, choice: str, step: int
) -> Tensor:
    if choice == "triton":
        return _guarded(kept, weight, lora_a, lora_b, scale, step)
    return _compared(kept, weight, lora_a, lora_b, scale, step)[1]


@torch.no_grad()
def _guarded(kept: list[Tensor], weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float, step: int) -> Tensor:
    kept_norm, key, fingerprint = kept
    samples = -(-weight.numel() // step)
    with backend.on_device_of(weight):
        _forget_other_weight(key, fingerprint, weight)
        norm = kernel.guarded(
            [kept_norm, fingerprint], weight, lora_a, lora_b, scale=scale, samples=samples, sample_step=step
        )
    if _verifying.get():
        _verify(norm, weight, lora_a, lora_b, scale)
    return norm


@torch.library.custom_op("hylorada::kept_column_norm", mutates_args=("kept",))
def _norm_op(
    kept: list[Tensor], weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float, choice: str, step: int
) -> Tensor:
    return _norm(kept, weight, lora_a, lora_b, scale, choice, step)


@_norm_op.register_fake
def _(kept, weight, lora_a, lora_b, scale, choice, step):
    return torch.empty_like(kept[0])


def _forget_other_weight(kept_key: Tensor, fingerprint: Tensor, weight: Tensor) -> None:
    """An edit in the open may miss the sample. The address is left out: a gathered shard's is another each time."""
    mark, _, *others = weight_key(weight)
    key = [mark, *others]
    if kept_key.tolist() != key:
        fingerprint.zero_()
        kept_key.copy_(torch.tensor(key))


def _compared(
    kept: list[Tensor],
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
    step: int,
    given: tuple[int, Tensor] | None = None,
) -> tuple[int, Tensor]:
    """The kept norm and its number where A, B, s and the sampled weight are what they were; else a new one, kept.

    The norms of the weight alone are kept too: of most new norms they are the half that has not changed.
    `given`: what was given the last time, to be given again where it still holds.
    """
    with _lock:
        found = _look(kept, weight, lora_a, lora_b, scale, step)
        if not found.is_current:
            with torch.no_grad(), backend.no_autocast(weight):
                copies = _begin(kept, lora_a, lora_b)
                (norm,), (base,) = eager.norms_and_bases([weight], *copies, [found.base], scale=scale)
                given = _end(kept, found, norm, base), norm
        elif given is None or given[0] != found.number:
            given = found.number, kept[0].clone()
    if _verifying.get():
        _verify(given[1], weight, lora_a, lora_b, scale)
    return given


class _Found(NamedTuple):
    """What a look at a layer's tensors showed."""

    is_current: bool
    # of the kept norm
    number: int
    # the norms of the weight alone, squared, None if they are those of another one
    base: Tensor | None
    sample: Tensor
    key: list[int]


def _look(kept: list[Tensor], weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float, step: int) -> _Found:
    _, base, kept_a, kept_b, kept_sample, kept_key = kept
    sample, key = sample_of(weight, step), [*weight_key(weight), _bits(scale)]
    *known, number = kept_key.tolist()
    is_same_weight = known == key and torch.equal(kept_sample, sample)
    # torch.equal calls two NaN different: a broken layer is computed anew each time, which is harmless
    is_current = is_same_weight and torch.equal(kept_a, lora_a) and torch.equal(kept_b, lora_b)
    return _Found(is_current, number, base if is_same_weight else None, sample, key)


def _begin(kept: list[Tensor], lora_a: Tensor, lora_b: Tensor) -> tuple[Tensor, Tensor]:
    """-> what the new norm is to be made of, a stack of one: copies of the factors, which nobody changes meanwhile."""
    _, _, kept_a, kept_b, _, kept_key = kept
    # an interrupt on the way leaves a key that fits nothing
    kept_key.zero_()
    kept_a.copy_(lora_a)
    kept_b.copy_(lora_b)
    return kept_a[None], kept_b[None]


def _end(kept: list[Tensor], found: _Found, norm: Tensor, base: Tensor) -> int:
    """-> the number of the norm."""
    kept_norm, kept_base, _, _, kept_sample, kept_key = kept
    kept_norm.copy_(norm)
    if found.base is None:
        kept_base.copy_(base)
        kept_sample.copy_(found.sample)
    number = next(_numbers)
    kept_key.copy_(torch.tensor([*found.key, number]))
    return number


def weight_key(weight: Tensor) -> list[int]:
    """What tells one weight from another without reading it; never all zeros."""
    version = -1 if weight.is_inference() else weight._version
    return [1, weight.data_ptr(), version, weight.shape[1], *weight.stride()]


def _bits(number: float) -> int:
    return struct.unpack("q", struct.pack("d", number))[0]


def sample_step(weight: Tensor) -> int:
    """The distance between two elements of the sample, in reading order."""
    step = max(1, weight.numel() // WEIGHT_SAMPLES)
    # a step that shares a factor with a row's length would visit some columns only
    while math.gcd(step, max(weight.numel(), 1)) > 1:
        step += 1
    return step


def sample_of(weight: Tensor, step: int) -> Tensor:
    """Elements of the weight, spread evenly over its rows and columns; a view of one without gaps."""
    if weight.is_contiguous() or weight.T.is_contiguous():
        return weight.as_strided((-(-weight.numel() // step),), (step,))
    return weight.T.reshape(-1)[::step]


@torch.no_grad()
def _verify(norm: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float) -> None:
    fresh = column_norm(weight.detach(), lora_a, lora_b, scale=scale)
    if not torch.allclose(norm, fresh, rtol=1e-4, atol=0, equal_nan=True):
        worst = float((norm / fresh - 1).abs().max())
        raise RuntimeError(
            f"a cached column norm is stale by {worst:.1e}: the layer's weight was edited behind autograd's back; "
            "call invalidate_norm() on the layer after such an edit"
        )
