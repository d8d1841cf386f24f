"""Shifted attention in PyTorch, any device and dtype, with a hand-written backward. See op.py for the contract.

Groups are views of q, k and v; neighbouring groups of one size become the batch of one call. Sinks outside of a group
are laid before its keys, and as many zero queries before its queries, so that the causal triangle still fits; the rows
of those queries are dropped.

On the CPU a call is PyTorch's own fused attention, by the two ATen operators behind `scaled_dot_product_attention`:
they hand out the log-sum-exp that the backward needs. With dropout, and on other devices, a call is plain matrix
products for a few query rows at a time, so that its scores are never larger than its keys.
"""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .layout import tokens_first

_fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_fused_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default

# the groups of a row take about this many calls: what one call makes is that much smaller than the whole
CALLS = 4


class Run(NamedTuple):
    """`count` neighbouring groups of `length` tokens from the token `start`, of some rows and heads.

    `early` and `late` are the tokens of the sinks before and behind the groups (behind: without a causal mask only).
    """

    rows: slice
    heads: slice
    kv_heads: slice
    start: int
    count: int
    length: int
    early: slice
    late: slice

    def own(self, x: Tensor, heads: slice) -> Tensor:
        """View of the groups in a (B, H, L, ...) tensor: (rows, count, heads, length, ...)."""
        x = x[self.rows, heads, self.start : self.start + self.count * self.length]
        return x.unflatten(2, (self.count, self.length)).transpose(1, 2)

    def queries(self, x: Tensor) -> Tensor:
        """What a call takes of q, or of what is shaped like it: (rows * count, heads, length, ...)."""
        return self.own(x, self.heads).flatten(0, 1)

    def keys(self, x: Tensor) -> Tensor:
        """What a call takes of k or v: early sinks, the group, late sinks."""
        own = self.own(x, self.kv_heads).flatten(0, 1)
        if not self.sinks():
            return own
        early, late = (
            x[self.rows, self.kv_heads, tokens].expand(own.shape[0], -1, -1, -1) for tokens in (self.early, self.late)
        )
        return torch.cat((early, own, late), dim=2)

    def sinks(self) -> int:
        return _size(self.early) + _size(self.late)

    def put_queries(self, target: Tensor, values: Tensor) -> None:
        self.own(target, self.heads).copy_(values.unflatten(0, (-1, self.count)))

    def put_keys(self, target: Tensor, values: Tensor, add: bool) -> None:
        """Write a gradient of `keys` where they came from; a sink takes what all groups give it."""
        values = values.unflatten(0, (-1, self.count))
        early, own, late = values.split((_size(self.early), self.length, _size(self.late)), dim=3)
        if not add:
            self.own(target, self.kv_heads).copy_(own)
            return
        self.own(target, self.kv_heads).add_(own)
        for tokens, part in ((self.early, early), (self.late, late)):
            if part.numel():
                target[self.rows, self.kv_heads, tokens].add_(part.sum(1, dtype=target.dtype))


def _size(tokens: slice) -> int:
    return tokens.stop - tokens.start


class Dropout:
    """The masks of one forward, which its backward makes again by the same calls in the same order."""

    def __init__(self, p: float, seed: Tensor):
        self.keep = 1 - p
        self.generator = torch.Generator(seed.device).manual_seed(int(seed))

    def factors(self, scores: Tensor) -> Tensor:
        """0 where a probability is dropped, else 1 / (1 - p)."""
        return torch.empty_like(scores).bernoulli_(self.keep, generator=self.generator).div_(self.keep)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    seed: Tensor | None,
    *,
    group_size: int,
    shift: int,
    shifted_heads: str,
    causal: bool,
    sink_tokens: int,
    scale: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """-> out (B, Hq, L, D), log-sum-exp of the scores (B, Hq, L). seed: of the dropout, (1,) int64, or None.

    A row without keys has the log-sum-exp 0.
    """
    q, k, v = _unit_step(q, k, v)
    dropout = None if seed is None else Dropout(dropout_p, seed)
    runs = _runs(q, k, v, lengths, cu_seqlens, group_size, shift, shifted_heads, causal, sink_tokens, not dropout_p)
    if _is_whole(runs, q):
        out, lse = _attend(runs[0].queries(q), runs[0].keys(k), runs[0].keys(v), 0, causal, scale, dropout)
        lse = lse.unflatten(0, (-1, runs[0].count)).transpose(1, 2).reshape(q.shape[:3])
        return _unfolded(out, q), lse.contiguous()
    out = tokens_first(q).zero_()
    lse = q.new_zeros(q.shape[:3], dtype=_accumulation_dtype(q))
    for run in runs:
        early = _size(run.early)
        own_out, own_lse = _attend(run.queries(q), run.keys(k), run.keys(v), early, causal, scale, dropout)
        run.put_queries(out, own_out)
        run.put_queries(lse, own_lse)
    return out, lse


def backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    out: Tensor,
    lse: Tensor,
    seed: Tensor | None,
    *,
    group_size: int,
    shift: int,
    shifted_heads: str,
    causal: bool,
    sink_tokens: int,
    scale: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    do, q, k, v = _unit_step(do, q, k, v)
    dropout = None if seed is None else Dropout(dropout_p, seed)
    runs = _runs(q, k, v, lengths, cu_seqlens, group_size, shift, shifted_heads, causal, sink_tokens, not dropout_p)
    whole = _is_whole(runs, q)
    # what several calls add to is summed in fp32
    add = k.shape[1] < q.shape[1] or sink_tokens > 0
    if not whole:
        dq = tokens_first(q).zero_()
        dk, dv = (tokens_first(k, _accumulation_dtype(k) if add else k.dtype).zero_() for _ in range(2))
    for run in runs:
        own_dq, own_dk, own_dv = _attend_backward(
            run.queries(do), run.queries(q), run.keys(k), run.keys(v), run.queries(out), run.queries(lse),
            _size(run.early), causal, scale, dropout,
        )  # fmt: skip
        if whole:
            return _unfolded(own_dq, q), _unfolded(own_dk, k), _unfolded(own_dv, v)
        run.put_queries(dq, own_dq)
        run.put_keys(dk, own_dk, add)
        run.put_keys(dv, own_dv, add)
    return dq, dk.to(k.dtype), dv.to(v.dtype)


def _runs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    group_size: int,
    shift: int,
    shifted_heads: str,
    causal: bool,
    sink_tokens: int,
    may_fold_rows: bool,
) -> list[Run]:
    """All groups of all sequences and heads, in an order that follows from shapes and boundaries alone.

    With `may_fold_rows` the rows of a batch share a call where that takes no copy, which depends on strides.
    """
    (batch, heads, length, _), kv_heads = q.shape, k.shape[1]
    fold = may_fold_rows and all(batch == 1 or x.stride(0) == length * x.stride(2) for x in (q, k, v))
    half = heads // 2
    offsets = {
        "none": [(0, heads, 0)],
        "half": [(0, half, 0), (half, heads, shift)],
        "all": [(0, heads, shift)],
    }[shifted_heads if shift else "none"]
    runs = []
    for rows, first, tokens in _sequences(batch, length, lengths, cu_seqlens):
        for begin, end, offset in offsets:
            one_call = fold and tokens == length and not offset and not sink_tokens and not tokens % group_size
            for start, count, size in _groups(tokens, group_size, offset, sink_tokens, 1 if one_call else CALLS):
                stop = start + count * size
                early = slice(first, first + min(sink_tokens, start))
                late = slice(first + stop, first + (stop if causal else max(stop, min(sink_tokens, tokens))))
                together = one_call or count == 1
                for row in [rows] if together else [slice(b, b + 1) for b in range(rows.start, rows.stop)]:
                    for own, shared in _head_pairs(begin, end, heads // kv_heads):
                        runs.append(Run(row, own, shared, first + start, count, size, early, late))
    return runs


def _sequences(batch: int, length: int, lengths: Tensor | None, cu_seqlens: Tensor | None):
    """(rows, first token, number of tokens) of every sequence that has tokens."""
    if cu_seqlens is not None:
        found = [(slice(0, 1), first, end - first) for first, end in itertools.pairwise(cu_seqlens.tolist())]
    elif lengths is not None:
        found = [(slice(b, b + 1), 0, tokens) for b, tokens in enumerate(lengths.tolist())]
    else:
        found = [(slice(0, batch), 0, length)]
    return ((rows, first, tokens) for rows, first, tokens in found if tokens)


def _groups(tokens: int, group_size: int, offset: int, sink_tokens: int, calls: int) -> Iterator[tuple[int, int, int]]:
    """(start, count, length): runs of groups that see the same sinks besides their own tokens."""
    start = min(offset, tokens)
    if start:
        yield 0, 1, start
    full = (tokens - start) // group_size
    # a group that begins among the sinks sees others than the next one
    alone = min(full, max(0, -(-(sink_tokens - start) // group_size)))
    step = max(1, -(-(full - alone) // calls))
    for group in [*range(alone), *range(alone, full, step)]:
        count = 1 if group < alone else min(step, full - group)
        yield start + group * group_size, count, group_size
    rest = (tokens - start) % group_size
    if rest:
        yield tokens - rest, 1, rest


def _head_pairs(begin: int, end: int, ratio: int) -> Iterator[tuple[slice, slice]]:
    """Query heads begin to end, in strided slices that pair one to one with the key heads they share."""
    for j in range(ratio):
        first, last = -(-(begin - j) // ratio), -(-(end - j) // ratio)
        if first < last:
            yield slice(first * ratio + j, (last - 1) * ratio + j + 1, ratio), slice(first, last)


def _is_whole(runs: list[Run], q: Tensor) -> bool:
    """Whether one call does everything, and its results need no place in a larger tensor."""
    return len(runs) == 1 and runs[0].queries(q).numel() == q.numel()


def _attend(q, k, v, early: int, causal: bool, scale: float, dropout: Dropout | None) -> tuple[Tensor, Tensor]:
    """-> out, log-sum-exp of groups (groups, heads, length, D) that see `early` keys before their own."""
    if q.device.type != "cpu" or dropout:
        return _attend_in_blocks(q, k, v, early, causal, scale, dropout)
    dummies = early if causal else 0
    out, lse = _fused(_after_zeros(q, dummies), k, v, 0.0, causal, scale=scale)
    return out[:, :, dummies:], lse[:, :, dummies:]


def _attend_backward(do, q, k, v, out, lse, early: int, causal: bool, scale: float, dropout: Dropout | None):
    """-> gradients of q, k and v."""
    if q.device.type != "cpu" or dropout:
        return _attend_in_blocks_backward(do, q, k, v, out, lse, early, causal, scale, dropout)
    dummies = early if causal else 0
    # a dummy row has no gradient, whatever its output and sum are said to be
    do, q, out = (_after_zeros(x, dummies) for x in (do, q, out))
    lse = F.pad(lse, (dummies, 0)) if dummies else lse
    dq, dk, dv = _fused_backward(do, q, k, v, out, lse, 0.0, causal, scale=scale)
    return dq[:, :, dummies:], dk, dv


def _after_zeros(x: Tensor, rows: int) -> Tensor:
    return F.pad(x, (0, 0, rows, 0)) if rows else x


def _attend_in_blocks(q, k, v, early, causal, scale, dropout):
    own = _accumulation_dtype(q)
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=own)
    k, v = k.to(own), v.to(own)
    for rows, keys in _blocks(q, k, early, causal):
        scores = _scores(q[:, :, rows].to(own), k[:, :, keys], rows, early, causal, scale)
        lse[:, :, rows] = scores.logsumexp(-1)
        probabilities = scores.softmax(-1)
        if dropout:
            probabilities *= dropout.factors(probabilities)
        out[:, :, rows] = (probabilities @ v[:, :, keys]).to(q.dtype)
    return out, lse


def _attend_in_blocks_backward(do, q, k, v, out, lse, early, causal, scale, dropout):
    own = _accumulation_dtype(q)
    dq = torch.empty_like(q)
    k, v = k.to(own), v.to(own)
    dk, dv = torch.zeros_like(k), torch.zeros_like(v)
    for rows, keys in _blocks(q, k, early, causal):
        b_q, b_do = q[:, :, rows].to(own), do[:, :, rows].to(own)
        probabilities = (_scores(b_q, k[:, :, keys], rows, early, causal, scale) - lse[:, :, rows, None]).exp_()
        dp = b_do @ v[:, :, keys].mT
        dropped = probabilities
        if dropout:
            factors = dropout.factors(probabilities)
            dropped = probabilities * factors
            dp *= factors
        dv[:, :, keys] += dropped.mT @ b_do
        ds = (dp - (b_do * out[:, :, rows]).sum(-1, keepdim=True)).mul_(probabilities).mul_(scale)
        dq[:, :, rows] = (ds @ k[:, :, keys]).to(q.dtype)
        dk[:, :, keys] += ds.mT @ b_q
    return dq, dk, dv


def _blocks(q: Tensor, k: Tensor, early: int, causal: bool) -> Iterator[tuple[slice, slice]]:
    """Query rows and the keys that they may see, so few that their scores have at most as many elements as the keys."""
    length, head_dim = q.shape[2:]
    for start in range(0, length, head_dim):
        stop = min(start + head_dim, length)
        yield slice(start, stop), slice(0, early + stop if causal else k.shape[2])


def _scores(q: Tensor, k: Tensor, rows: slice, early: int, causal: bool, scale: float) -> Tensor:
    scores = (q @ k.mT).mul_(scale)
    if causal:
        position = torch.arange(early + rows.start, early + rows.stop, device=q.device)
        later = torch.arange(k.shape[2], device=q.device) > position[:, None]
        scores.masked_fill_(later, float("-inf"))
    return scores


def _unit_step(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The fused operators read a head's values one after the other."""
    return tuple(x if x.stride(-1) == 1 else x.contiguous() for x in tensors)


def _unfolded(groups: Tensor, x: Tensor) -> Tensor:
    """The result of a call with everything in it as a tensor of x's shape, laid out as (B, L, H, D)."""
    batch, heads, length, head_dim = x.shape
    tokens_first = groups.transpose(1, 2).reshape(batch, length, heads, head_dim).contiguous()
    # autograd forbids in-place edits of a function's output that is a view: this is none, and no copy
    return x.new_empty(0).set_(tokens_first.transpose(1, 2))


def _accumulation_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
