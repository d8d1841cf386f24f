"""Exact causal attention in blocks of query rows, for what a fused kernel does not do: a cache, a window, a bias."""

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

ROWS = 128


def row_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    first: Tensor | None = None,
    stop: Tensor | None = None,
    latest_first: int = 0,
    group_size: int | None = None,
    offsets: Tensor | None = None,
    sink_tokens: int = 0,
    window: int | None = None,
    distance_bias: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Causal attention of the last Lq of Lk tokens.

        attend(i, j) = j <= i and first <= j < stop and i - j < window and (gid(i) == gid(j) or j - first < sinks)
        gid(i) = (i - first + G - o) // G
        out_i = sum_j softmax_j(scale q_i . k_j + distance_bias[i - j]) v_j

    Scores are computed in fp32 (fp64 for fp64 input) and exist for 128 queries at a time, beside all keys that these
    can reach: at most 128 x (G + 128 + sinks) of them for each head with groups, 128 x Lk without. The backward makes
    them again. The time is that of 128-row blocks of ordinary matrix products, not of a fused kernel.

    Args:
        q: (B, Hq, Lq, D).   k, v: (B, Hkv, Lk, D), Hkv divides Hq.   scale: of the scores.
        first, stop: (B,) int64; the columns of k where each row's tokens begin and end. first may be negative, where
            earlier tokens are no longer kept. None is all columns.   latest_first: the greatest of `first`.
        group_size: G, or None for no groups.   offsets: (Hq,) int64; o of every head.
        sink_tokens: how many first tokens every group sees.   window: how many tokens a token sees; None is all.
        distance_bias: (Hq, Lk or more), by distance.
        dropout_p: of the softmax.

    Returns:
        (B, Hq, Lq, D) in q's dtype; 0 for tokens outside of [first, stop).
    """
    length, total = q.shape[2], k.shape[2]
    with_gradient = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (q, k, v, distance_bias)
    )
    outs, begin = [], total - length
    for block in q.split(ROWS, dim=2):
        end = begin + block.shape[2]
        reach = min(total if group_size is None else group_size, total if window is None else window)
        low = max(0, begin - reach + 1)
        sinks = min(low, latest_first + sink_tokens) if sink_tokens else 0
        options = (first, stop, scale, begin, low, sinks, group_size, offsets, sink_tokens, window, dropout_p)
        arguments = (block, k[:, :, :end], v[:, :, :end], distance_bias, *options)
        if with_gradient:
            outs.append(checkpoint(_block, *arguments, use_reentrant=False, preserve_rng_state=dropout_p > 0))
        else:
            outs.append(_block(*arguments))
        begin = end
    return torch.cat(outs, dim=2)


def _block(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    distance_bias: Tensor | None,
    first: Tensor | None,
    stop: Tensor | None,
    scale: float,
    begin: int,
    low: int,
    sinks: int,
    group_size: int | None,
    offsets: Tensor | None,
    sink_tokens: int,
    window: int | None,
    dropout_p: float,
) -> Tensor:
    """Rows begin, begin + 1, ... against the columns [0, sinks) and [low, Lk)."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    rows = torch.arange(begin, begin + q.shape[2], device=q.device).unsqueeze(-1)
    columns = torch.arange(low, k.shape[2], device=q.device)
    if sinks:
        columns = torch.cat([torch.arange(sinks, device=q.device), columns])
        k, v = torch.cat([k[:, :, :sinks], k[:, :, low:]], 2), torch.cat([v[:, :, :sinks], v[:, :, low:]], 2)
    else:
        k, v = k[:, :, low:], v[:, :, low:]
    allowed = _allowed(rows, columns, first, stop, group_size, offsets, sink_tokens, window)
    with torch.autocast(q.device.type, enabled=False):
        # the query heads of one key head stand together
        grouped = q.to(dtype).unflatten(1, (k.shape[1], -1))
        scores = (grouped @ k.to(dtype).unsqueeze(2).transpose(-1, -2)).flatten(1, 2) * scale
        if distance_bias is not None:
            parts = [_bias_block(distance_bias, begin, len(rows), 0, sinks)] if sinks else []
            parts.append(_bias_block(distance_bias, begin, len(rows), low, len(columns) - sinks))
            scores = scores + torch.cat(parts, -1).to(dtype)
        weights = scores.masked_fill(~allowed, torch.finfo(dtype).min).softmax(-1)
        # rows without any key
        weights = F.dropout(weights.masked_fill(~allowed, 0), dropout_p)
        out = weights.unflatten(1, (k.shape[1], -1)) @ v.to(dtype).unsqueeze(2)
    return out.flatten(1, 2).to(q.dtype)


def _allowed(rows, columns, first, stop, group_size, offsets, sink_tokens, window) -> Tensor:
    """(B or 1, Hq or 1, rows, columns), bool; see row_attention."""
    allowed = (columns <= rows)[None, None]
    if window is not None:
        allowed = allowed & (rows - columns < window)
    if first is not None and stop is not None:
        first, stop = first[:, None, None, None], stop[:, None, None, None]
        allowed = allowed & (columns >= first) & (columns < stop) & (rows >= first) & (rows < stop)
    if group_size is not None:
        begin = 0 if first is None else first
        starts = begin + (0 if offsets is None else offsets[:, None, None]) - group_size
        same = torch.div(rows - starts, group_size, rounding_mode="floor") == torch.div(
            columns - starts, group_size, rounding_mode="floor"
        )
        allowed = allowed & (same | (columns - begin < sink_tokens))
    return allowed


def _bias_block(distance_bias: Tensor, begin: int, rows: int, low: int, columns: int) -> Tensor:
    """distance_bias[:, i - j] for i from begin and j from low; (Hq, rows, columns). Future columns get anything."""
    # every diagonal has one distance: the windows of one vector are the rows from the last to the first
    distances = begin + rows - 1 - low - torch.arange(rows + columns - 1, device=distance_bias.device)
    return distance_bias[:, distances.clamp(min=0)].unfold(-1, columns, 1).flip(1)
