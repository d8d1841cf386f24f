"""Shifted attention in Triton. See op.py for the contract.

A program has a tile of one group: with offset o a sequence is cut at 0, o, o + G, ..., and each piece into tiles. So a
causal tile sees whole tiles of keys without a mask, then the few on the diagonal, then the sinks outside of its group.

Backward, with delta = rowsum(do * out):
    dq      as the forward goes; leaves delta behind
    dkdv    a tile of keys takes the gradients of all query heads that share it, one after the other
    sinks   the first keys of a sequence are seen by all of its tokens: partial sums over splits of these,
            then the splits in order

Nothing is added up by atomics: the same bits in every run.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._tl import launch_options, next_power_of_two, target_architecture
from .layout import tokens_first

LARGEST_HEAD_DIM = 256
LOG2_E = tl.constexpr(1.4426950408889634)


class Tile(NamedTuple):
    """Edges of a program's tile (queries, keys) and how it is compiled."""

    queries: int
    keys: int
    num_warps: int
    num_stages: int


# by kernel and bytes of a value: tiles and the largest head dim that each is for. The largest that compile without
# spills on NVIDIA GPUs (fp32 head dims above 128 excepted); fp32 products run on plain multipliers, whose operands all
# stand in registers
_TILES = {
    ("forward", 2): ((64, Tile(128, 64, 4, 2)), (128, Tile(128, 64, 8, 2)), (256, Tile(64, 32, 8, 2))),
    ("forward", 4): ((64, Tile(32, 16, 4, 1)), (128, Tile(16, 16, 4, 1)), (256, Tile(16, 16, 8, 1))),
    ("dq", 2): ((128, Tile(128, 32, 8, 2)), (256, Tile(32, 32, 4, 1))),
    ("dq", 4): ((64, Tile(32, 16, 4, 1)), (256, Tile(16, 16, 8, 1))),
    ("dkdv", 2): ((64, Tile(32, 128, 8, 2)), (128, Tile(64, 32, 8, 1)), (256, Tile(32, 32, 8, 2))),
    ("dkdv", 4): ((64, Tile(32, 32, 4, 1)), (256, Tile(16, 16, 4, 1))),
}
# where 64 keys of the forward find registers, as long as there is no dropout
LARGE_GPUS = (80, 90, 100)


def chosen_tile(kernel: str, dtype: torch.dtype, block_d: int, group_size: int, dropout: bool) -> Tile:
    """The tile of "forward", "dq" or "dkdv" (of the sinks too), no longer than a group needs."""
    architecture = target_architecture()
    if architecture is None:
        tile = Tile(16, 32, 4, 1) if kernel == "dkdv" else Tile(32, 16, 4, 1)
    elif isinstance(architecture, str):
        edges = (64, 32) if kernel != "dkdv" else (32, 32) if block_d * dtype.itemsize <= 256 else (16, 16)
        tile = Tile(*edges, 4, 1)
    else:
        tile = next(tile for limit, tile in _TILES[kernel, dtype.itemsize] if block_d <= limit)
        if kernel == "forward" and (dropout or architecture not in LARGE_GPUS):
            tile = tile._replace(keys=min(tile.keys, 32))
    queries, keys = (next_power_of_two(group_size, at_least=16, at_most=edge) for edge in tile[:2])
    return tile._replace(queries=queries, keys=keys)


@triton.jit
def _tile_count(length, offset, G, BLOCK: tl.constexpr):
    """Tiles of a sequence that is cut at offset, offset + G, ..."""
    beyond = tl.maximum(length - offset, 0)
    before = tl.where(length < offset, length, offset)
    return tl.cdiv(before, BLOCK) + beyond // G * tl.cdiv(G, BLOCK) + tl.cdiv(beyond % G, BLOCK)


@triton.jit
def _boundary(cu_seqlens_ptr, index, mask, L):
    """Where a document begins, [len(index)]; within the row whatever the tensor holds."""
    return tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + index, mask=mask, other=0), 0), L).to(tl.int32)


@triton.jit
def _sequence(lengths_ptr, cu_seqlens_ptr, index, documents, L, HAS_LENGTHS: tl.constexpr, PACKED: tl.constexpr):
    """First token and length of sequence `index`: a document (none past the last), a row's valid prefix or a row."""
    first = 0
    length = L
    if PACKED:
        first = _boundary(cu_seqlens_ptr, index, index < documents, L)
        length = tl.maximum(_boundary(cu_seqlens_ptr, index + 1, index < documents, L) - first, 0)
    if HAS_LENGTHS:
        length = tl.minimum(tl.maximum(tl.load(lengths_ptr + index), 0), L).to(tl.int32)
    return first, length


@triton.jit
def _locate(
    pid, row, offset, lengths_ptr, cu_seqlens_ptr, L, G, documents,
    HAS_LENGTHS: tl.constexpr, PACKED: tl.constexpr, BLOCK: tl.constexpr, BLOCK_DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """The tile that is a program's, in positions of its sequence.

    -> first token and length of the sequence; start of the tile; lo and hi of what it may see (both hi where the tile
    has no valid token); end of what it writes, padding included. Without work, end <= start.
    """
    index = row
    if PACKED:
        # the documents whose tiles all come before this program's
        index = 0
        tiles_before = 0
        tiles = 0
        for document in range(0, documents, BLOCK_DOCUMENTS):
            o_d = document + tl.arange(0, BLOCK_DOCUMENTS)
            m_d = o_d < documents
            begin = _boundary(cu_seqlens_ptr, o_d, m_d, L)
            size = tl.maximum(_boundary(cu_seqlens_ptr, o_d + 1, m_d, L) - begin, 0)
            count = tl.where(m_d, _tile_count(size, offset, G, BLOCK), 0)
            ends = tiles + tl.cumsum(count, axis=0)
            passed = m_d & (ends <= pid)
            index += tl.sum(passed.to(tl.int32), axis=0)
            tiles_before = tl.maximum(tiles_before, tl.max(tl.where(passed, ends, 0), axis=0))
            tiles += tl.sum(count, axis=0)
        pid -= tiles_before
    first, length = _sequence(lengths_ptr, cu_seqlens_ptr, index, documents, L, HAS_LENGTHS, PACKED)
    # padding of a row is written, that of a packed document belongs to the next one
    written = length
    if HAS_LENGTHS:
        written = L
    prefix, tiles_of_group = tl.cdiv(offset, BLOCK), tl.cdiv(G, BLOCK)
    past = pid - prefix
    in_prefix = past < 0
    lo = tl.where(in_prefix, 0, offset + past // tiles_of_group * G)
    start = lo + tl.where(in_prefix, pid, past % tiles_of_group) * BLOCK
    end = tl.minimum(tl.where(in_prefix, offset, lo + G), written)
    hi = tl.minimum(end, length)
    return first, length, start, tl.where(start < hi, lo, hi), hi, end


@triton.jit
def _places(base_ptr, token, stride_l, stride_d, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Pointers to the rows from `token` on of one head, [ROWS, BLOCK_D]; within a tile 32 bits are enough."""
    o_r, o_d = tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    return base_ptr + tl.cast(token, tl.int64) * stride_l + (o_r[:, None] * stride_l + o_d[None, :] * stride_d)


@triton.jit
def _load_rows(
    base_ptr, token, m_r, D, stride_l, stride_d, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr = True
):
    """Rows from `token` on of one head, [ROWS, BLOCK_D]; 0 where masked off and past the head dim."""
    mask = (tl.arange(0, BLOCK_D) < D)[None, :]
    if MASKED:
        mask = mask & m_r[:, None]
    return tl.load(_places(base_ptr, token, stride_l, stride_d, ROWS, BLOCK_D), mask=mask, other=0.0)


@triton.jit
def _store_rows(base_ptr, token, m_r, values, D, stride_l, stride_d, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    tl.store(
        _places(base_ptr, token, stride_l, stride_d, ROWS, BLOCK_D),
        values,
        mask=m_r[:, None] & (tl.arange(0, BLOCK_D) < D)[None, :],
    )


@triton.jit
def _head(ptr, row, head, stride_b, stride_h):
    return ptr + tl.cast(row, tl.int64) * stride_b + tl.cast(head, tl.int64) * stride_h


@triton.jit
def _kept(seed, stream, o_q, o_k, dropout_p):
    """Whether dropout keeps a probability, by head and tokens, so the same in every kernel; o_q and o_k broadcast."""
    query = o_q.to(tl.uint32) + (o_k * 0).to(tl.uint32)
    key = o_k.to(tl.uint32) + (o_q * 0).to(tl.uint32)
    random, _, _, _ = tl.philox(seed, key, query, query * 0 + tl.cast(stream, tl.uint32), query * 0)
    return tl.uint_to_uniform_float(random) >= dropout_p


@triton.jit
def _softmax_step(
    acc, total, peak, b_q, k_ptr, v_ptr, first, key, o_q, o_k, m_k, seen, seed, stream, D,
    stride_kl, stride_kd, stride_vl, stride_vd, scale_log2, dropout_p,
    MASKED: tl.constexpr, DROPOUT: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One tile of keys of an online softmax in powers of 2 (Milakov and Gimelshein 2018; Dao et al. 2022)."""
    b_k = _load_rows(k_ptr, first + key, m_k, D, stride_kl, stride_kd, BLOCK_K, BLOCK_D, MASKED)
    # [BLOCK_Q, BLOCK_K]
    scores = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale_log2
    if MASKED:
        scores = tl.where(seen, scores, float("-inf"))
    higher = tl.maximum(peak, tl.max(scores, axis=1))
    shrink = tl.exp2(peak - higher)
    p = tl.exp2(scores - higher[:, None])
    total = total * shrink + tl.sum(p, axis=1)
    if DROPOUT:
        p = tl.where(_kept(seed, stream, first + o_q[:, None], first + o_k[None, :], dropout_p), p, 0.0)
    b_v = _load_rows(v_ptr, first + key, m_k, D, stride_vl, stride_vd, BLOCK_K, BLOCK_D, MASKED)
    acc = tl.dot(p.to(b_v.dtype), b_v, acc * shrink[:, None], input_precision="ieee")
    return acc, total, higher


@triton.jit
def _key_tiles(
    start, lo, hi, length, sink_tokens,
    CAUSAL: tl.constexpr, SINK: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Where the keys of a tile's group need a mask from, how many tiles do, how many of these are not sinks."""
    if CAUSAL:
        # whole tiles lie before the diagonal, as these too start where the group does
        unmasked = tl.minimum(start, hi)
        last = tl.minimum(start + BLOCK_Q, hi)
        sinks = tl.minimum(sink_tokens, lo)
    else:
        unmasked = lo + (hi - lo) // BLOCK_K * BLOCK_K
        last = hi
        sinks = tl.minimum(sink_tokens, length)
    own_tiles = tl.cdiv(last - unmasked, BLOCK_K)
    masked_tiles = own_tiles
    if SINK:
        masked_tiles += tl.where(start < hi, tl.cdiv(sinks, BLOCK_K), 0)
    return unmasked, masked_tiles, own_tiles


@triton.jit
def _masked_keys(
    tile, own_tiles, unmasked, o_q, lo, hi, length, sink_tokens,
    CAUSAL: tl.constexpr, SINK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The first key of a masked tile, its keys, those that are there, and whether each query sees each of them.

    The group's own tiles come first: so a row has seen a key before it meets a tile in which it sees none.
    """
    key = unmasked + tile * BLOCK_K
    if SINK:
        key = tl.where(tile < own_tiles, key, (tile - own_tiles) * BLOCK_K)
    o_k = key + tl.arange(0, BLOCK_K)
    m_k = o_k < hi
    if SINK:
        outside = (o_k < tl.minimum(sink_tokens, length)) & ((o_k < lo) | (o_k >= hi))
        m_k = tl.where(tile < own_tiles, m_k, outside)
    seen = m_k[None, :]
    if CAUSAL:
        seen = seen & (o_k[None, :] <= o_q[:, None])
    return key, o_k, m_k, seen


@triton.jit
def forward_kernel(
    q_ptr, k_ptr, v_ptr, lengths_ptr, cu_seqlens_ptr, seed_ptr, out_ptr, lse_ptr,
    H, ratio, L, D, G, shift, first_shifted, sink_tokens, documents,
    stride_qb, stride_qh, stride_ql, stride_qd,
    stride_kb, stride_kh, stride_kl, stride_kd,
    stride_vb, stride_vh, stride_vl, stride_vd,
    stride_ob, stride_oh, stride_ol, stride_od,
    scale, dropout_p,
    CAUSAL: tl.constexpr, SINK: tl.constexpr, HAS_LENGTHS: tl.constexpr, PACKED: tl.constexpr, DROPOUT: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """out = softmax(scale q k^T) v over what each token attends to, and the logarithm of the softmax's sum"""
    head, row = tl.program_id(1), tl.program_id(2)
    offset = tl.where(head < first_shifted, 0, shift)
    first, length, start, lo, hi, end = _locate(
        tl.program_id(0), row, offset, lengths_ptr, cu_seqlens_ptr, L, G, documents,
        HAS_LENGTHS, PACKED, BLOCK_Q, BLOCK_DOCUMENTS,
    )  # fmt: skip
    if start >= end:
        return
    o_q = start + tl.arange(0, BLOCK_Q)
    m_q = o_q < hi
    k_ptr = _head(k_ptr, row, head // ratio, stride_kb, stride_kh)
    v_ptr = _head(v_ptr, row, head // ratio, stride_vb, stride_vh)
    token = first + start
    q_ptr = _head(q_ptr, row, head, stride_qb, stride_qh)
    b_q = _load_rows(q_ptr, token, m_q, D, stride_ql, stride_qd, BLOCK_Q, BLOCK_D)
    seed = 0
    stream = row * H + head
    if DROPOUT:
        seed = tl.load(seed_ptr)
    scale_log2 = scale * LOG2_E
    acc = tl.zeros((BLOCK_Q, BLOCK_D), dtype=tl.float32)
    total = tl.zeros((BLOCK_Q,), dtype=tl.float32)
    peak = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    unmasked, masked_tiles, own_tiles = _key_tiles(start, lo, hi, length, sink_tokens, CAUSAL, SINK, BLOCK_Q, BLOCK_K)
    for key in range(lo, unmasked, BLOCK_K):
        o_k = key + tl.arange(0, BLOCK_K)
        acc, total, peak = _softmax_step(
            acc, total, peak, b_q, k_ptr, v_ptr, first, key, o_q, o_k, None, None, seed, stream, D,
            stride_kl, stride_kd, stride_vl, stride_vd, scale_log2, dropout_p, False, DROPOUT, BLOCK_K, BLOCK_D,
        )  # fmt: skip
    for tile in range(0, masked_tiles):
        key, o_k, m_k, seen = _masked_keys(
            tile, own_tiles, unmasked, o_q, lo, hi, length, sink_tokens, CAUSAL, SINK, BLOCK_K
        )
        acc, total, peak = _softmax_step(
            acc, total, peak, b_q, k_ptr, v_ptr, first, key, o_q, o_k, m_k, seen, seed, stream, D,
            stride_kl, stride_kd, stride_vl, stride_vd, scale_log2, dropout_p, True, DROPOUT, BLOCK_K, BLOCK_D,
        )  # fmt: skip
    if DROPOUT:
        acc = acc / (1.0 - dropout_p)
    # rows without keys: 0
    acc = tl.where(m_q[:, None], acc / tl.where(m_q, total, 1.0)[:, None], 0.0)
    lse = tl.where(m_q, (peak + tl.log2(tl.where(m_q, total, 1.0))) / LOG2_E, 0.0)
    m_o = o_q < end
    out_ptr = _head(out_ptr, row, head, stride_ob, stride_oh)
    _store_rows(out_ptr, token, m_o, acc, D, stride_ol, stride_od, BLOCK_Q, BLOCK_D)
    tl.store(lse_ptr + tl.cast(stream, tl.int64) * L + first + o_q, lse, mask=m_o)


@triton.jit
def _query_gradient_step(
    dq, b_q, b_do, lse_log2, delta, k_ptr, v_ptr, first, key, o_q, o_k, m_k, seen, seed, stream, D,
    stride_kl, stride_kd, stride_vl, stride_vd, scale_log2, dropout_p,
    MASKED: tl.constexpr, DROPOUT: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dq + dS k for one tile of keys, with dS = P (dP - delta)."""
    b_k = _load_rows(k_ptr, first + key, m_k, D, stride_kl, stride_kd, BLOCK_K, BLOCK_D, MASKED)
    b_v = _load_rows(v_ptr, first + key, m_k, D, stride_vl, stride_vd, BLOCK_K, BLOCK_D, MASKED)
    # [BLOCK_Q, BLOCK_K]
    p = tl.exp2(tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale_log2 - lse_log2[:, None])
    if MASKED:
        p = tl.where(seen, p, 0.0)
    dp = tl.dot(b_do, tl.trans(b_v), input_precision="ieee")
    if DROPOUT:
        kept = _kept(seed, stream, first + o_q[:, None], first + o_k[None, :], dropout_p)
        dp = tl.where(kept, dp / (1.0 - dropout_p), 0.0)
    ds = p * (dp - delta[:, None])
    return tl.dot(ds.to(b_k.dtype), b_k, dq, input_precision="ieee")


@triton.jit
def backward_dq_kernel(
    do_ptr, q_ptr, k_ptr, v_ptr, lengths_ptr, cu_seqlens_ptr, seed_ptr, out_ptr, lse_ptr, delta_ptr, dq_ptr,
    H, ratio, L, D, G, shift, first_shifted, sink_tokens, documents,
    stride_dob, stride_doh, stride_dol, stride_dod,
    stride_qb, stride_qh, stride_ql, stride_qd,
    stride_kb, stride_kh, stride_kl, stride_kd,
    stride_vb, stride_vh, stride_vl, stride_vd,
    stride_ob, stride_oh, stride_ol, stride_od,
    stride_dqb, stride_dqh, stride_dql, stride_dqd,
    scale, dropout_p,
    CAUSAL: tl.constexpr, SINK: tl.constexpr, HAS_LENGTHS: tl.constexpr, PACKED: tl.constexpr, DROPOUT: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """delta = rowsum(do * out), dq = scale sum_j dS_ij k_j"""
    head, row = tl.program_id(1), tl.program_id(2)
    offset = tl.where(head < first_shifted, 0, shift)
    first, length, start, lo, hi, end = _locate(
        tl.program_id(0), row, offset, lengths_ptr, cu_seqlens_ptr, L, G, documents,
        HAS_LENGTHS, PACKED, BLOCK_Q, BLOCK_DOCUMENTS,
    )  # fmt: skip
    if start >= end:
        return
    o_q = start + tl.arange(0, BLOCK_Q)
    m_q = o_q < hi
    k_ptr = _head(k_ptr, row, head // ratio, stride_kb, stride_kh)
    v_ptr = _head(v_ptr, row, head // ratio, stride_vb, stride_vh)
    token = first + start
    do_ptr = _head(do_ptr, row, head, stride_dob, stride_doh)
    out_ptr = _head(out_ptr, row, head, stride_ob, stride_oh)
    q_ptr = _head(q_ptr, row, head, stride_qb, stride_qh)
    b_do = _load_rows(do_ptr, token, m_q, D, stride_dol, stride_dod, BLOCK_Q, BLOCK_D)
    b_out = _load_rows(out_ptr, token, m_q, D, stride_ol, stride_od, BLOCK_Q, BLOCK_D)
    delta = tl.sum(b_do.to(tl.float32) * b_out.to(tl.float32), axis=1)
    stream = row * H + head
    numbers = tl.cast(stream, tl.int64) * L + first + o_q
    tl.store(delta_ptr + numbers, delta, mask=o_q < end)
    lse_log2 = tl.load(lse_ptr + numbers, mask=m_q, other=0.0) * LOG2_E
    b_q = _load_rows(q_ptr, token, m_q, D, stride_ql, stride_qd, BLOCK_Q, BLOCK_D)
    seed = 0
    if DROPOUT:
        seed = tl.load(seed_ptr)
    scale_log2 = scale * LOG2_E
    dq = tl.zeros((BLOCK_Q, BLOCK_D), dtype=tl.float32)
    unmasked, masked_tiles, own_tiles = _key_tiles(start, lo, hi, length, sink_tokens, CAUSAL, SINK, BLOCK_Q, BLOCK_K)
    for key in range(lo, unmasked, BLOCK_K):
        o_k = key + tl.arange(0, BLOCK_K)
        dq = _query_gradient_step(
            dq, b_q, b_do, lse_log2, delta, k_ptr, v_ptr, first, key, o_q, o_k, None, None, seed, stream, D,
            stride_kl, stride_kd, stride_vl, stride_vd, scale_log2, dropout_p, False, DROPOUT, BLOCK_K, BLOCK_D,
        )  # fmt: skip
    for tile in range(0, masked_tiles):
        key, o_k, m_k, seen = _masked_keys(
            tile, own_tiles, unmasked, o_q, lo, hi, length, sink_tokens, CAUSAL, SINK, BLOCK_K
        )
        dq = _query_gradient_step(
            dq, b_q, b_do, lse_log2, delta, k_ptr, v_ptr, first, key, o_q, o_k, m_k, seen, seed, stream, D,
            stride_kl, stride_kd, stride_vl, stride_vd, scale_log2, dropout_p, True, DROPOUT, BLOCK_K, BLOCK_D,
        )  # fmt: skip
    dq = tl.where(m_q[:, None], dq * scale, 0.0)
    dq_ptr = _head(dq_ptr, row, head, stride_dqb, stride_dqh)
    _store_rows(dq_ptr, token, o_q < end, dq, D, stride_dql, stride_dqd, BLOCK_Q, BLOCK_D)


@triton.jit
def _key_gradient_step(
    dk, dv, b_k, b_v, q_ptr, do_ptr, lse_ptr, delta_ptr, first, query, query_hi, o_k, seen, seed, stream, D,
    stride_ql, stride_qd, stride_dol, stride_dod, scale_log2, dropout_p,
    MASKED: tl.constexpr, DROPOUT: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dk + dS^T q and dv + P^T do for one tile of queries; rows that are masked off are zeros and add nothing."""
    tokens = first + query + tl.arange(0, BLOCK_Q)
    m_q = tokens < first + query_hi
    b_q = _load_rows(q_ptr, first + query, m_q, D, stride_ql, stride_qd, BLOCK_Q, BLOCK_D)
    b_do = _load_rows(do_ptr, first + query, m_q, D, stride_dol, stride_dod, BLOCK_Q, BLOCK_D)
    lse_log2 = tl.load(lse_ptr + tokens, mask=m_q, other=0.0) * LOG2_E
    delta = tl.load(delta_ptr + tokens, mask=m_q, other=0.0)
    # [BLOCK_K, BLOCK_Q]
    p = tl.exp2(tl.dot(b_k, tl.trans(b_q), input_precision="ieee") * scale_log2 - lse_log2[None, :])
    if MASKED:
        p = tl.where(seen, p, 0.0)
    dp = tl.dot(b_v, tl.trans(b_do), input_precision="ieee")
    dropped = p
    if DROPOUT:
        kept = _kept(seed, stream, tokens[None, :], first + o_k[:, None], dropout_p)
        dropped = tl.where(kept, p / (1.0 - dropout_p), 0.0)
        dp = tl.where(kept, dp / (1.0 - dropout_p), 0.0)
    dv = tl.dot(dropped.to(b_do.dtype), b_do, dv, input_precision="ieee")
    ds = p * (dp - delta[None, :])
    dk = tl.dot(ds.to(b_q.dtype), b_q, dk, input_precision="ieee")
    return dk, dv


@triton.jit
def backward_dkdv_kernel(
    do_ptr, q_ptr, k_ptr, v_ptr, lengths_ptr, cu_seqlens_ptr, seed_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    H, ratio, L, D, G, shift, first_shifted, sink_tokens, documents,
    stride_dob, stride_doh, stride_dol, stride_dod,
    stride_qb, stride_qh, stride_ql, stride_qd,
    stride_kb, stride_kh, stride_kl, stride_kd,
    stride_vb, stride_vh, stride_vl, stride_vd,
    stride_dkb, stride_dkh, stride_dkl, stride_dkd,
    scale, dropout_p,
    CAUSAL: tl.constexpr, SINK: tl.constexpr, HAS_LENGTHS: tl.constexpr, PACKED: tl.constexpr, DROPOUT: tl.constexpr,
    MIXED: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """dk = scale sum_i dS_ij q_i, dv = sum_i P_ij do_i, of all keys but the sinks

    MIXED: some key head serves query heads with different offsets. Its tiles follow the groups of the first one.
    """
    kv_head, row = tl.program_id(1), tl.program_id(2)
    offset = tl.where(kv_head * ratio < first_shifted, 0, shift)
    first, length, start, lo, hi, end = _locate(
        tl.program_id(0), row, offset, lengths_ptr, cu_seqlens_ptr, L, G, documents,
        HAS_LENGTHS, PACKED, BLOCK_K, BLOCK_DOCUMENTS,
    )  # fmt: skip
    if start >= end:
        return
    o_k = start + tl.arange(0, BLOCK_K)
    m_k = o_k < hi
    token = first + start
    k_ptr = _head(k_ptr, row, kv_head, stride_kb, stride_kh)
    v_ptr = _head(v_ptr, row, kv_head, stride_vb, stride_vh)
    b_k = _load_rows(k_ptr, token, m_k, D, stride_kl, stride_kd, BLOCK_K, BLOCK_D)
    b_v = _load_rows(v_ptr, token, m_k, D, stride_vl, stride_vd, BLOCK_K, BLOCK_D)
    seed = 0
    if DROPOUT:
        seed = tl.load(seed_ptr)
    scale_log2 = scale * LOG2_E
    dk = tl.zeros((BLOCK_K, BLOCK_D), dtype=tl.float32)
    dv = tl.zeros((BLOCK_K, BLOCK_D), dtype=tl.float32)
    # a tile without valid keys has no queries
    query_lo, query_hi = lo, hi
    for head in range(kv_head * ratio, kv_head * ratio + ratio):
        own_q = _head(q_ptr, row, head, stride_qb, stride_qh)
        own_do = _head(do_ptr, row, head, stride_dob, stride_doh)
        stream = row * H + head
        numbers = tl.cast(stream, tl.int64) * L
        own_offset = tl.where(head < first_shifted, 0, shift)
        if MIXED:
            # the groups of the first and of the last key of the tile
            group_lo = (start + G - own_offset) // G * G - G + own_offset
            group_hi = (tl.minimum(start + BLOCK_K, hi) - 1 + G - own_offset) // G * G + own_offset
            query_lo = tl.where(start < hi, tl.maximum(group_lo, 0), hi)
            query_hi = tl.where(start < hi, tl.minimum(group_hi, length), hi)
        begin = tl.maximum(query_lo, tl.minimum(start, hi)) if CAUSAL else query_lo
        # queries behind the diagonal see every key of the tile
        diagonal = tl.minimum(begin + tl.maximum(BLOCK_Q, BLOCK_K), query_hi) if CAUSAL else begin
        for query in range(begin, diagonal, BLOCK_Q):
            o_q = query + tl.arange(0, BLOCK_Q)
            seen = o_k[:, None] <= o_q[None, :]
            if MIXED:
                seen = seen & _same_group(o_k[:, None], o_q[None, :], G, own_offset)
            dk, dv = _key_gradient_step(
                dk, dv, b_k, b_v, own_q, own_do, lse_ptr + numbers, delta_ptr + numbers, first, query, query_hi,
                o_k, seen, seed, stream, D, stride_ql, stride_qd, stride_dol, stride_dod, scale_log2, dropout_p,
                True, DROPOUT, BLOCK_Q, BLOCK_D,
            )  # fmt: skip
        for query in range(diagonal, query_hi, BLOCK_Q):
            o_q = query + tl.arange(0, BLOCK_Q)
            seen = o_k[:, None] >= 0
            if MIXED:
                seen = _same_group(o_k[:, None], o_q[None, :], G, own_offset)
            dk, dv = _key_gradient_step(
                dk, dv, b_k, b_v, own_q, own_do, lse_ptr + numbers, delta_ptr + numbers, first, query, query_hi,
                o_k, seen, seed, stream, D, stride_ql, stride_qd, stride_dol, stride_dod, scale_log2, dropout_p,
                MIXED, DROPOUT, BLOCK_Q, BLOCK_D,
            )  # fmt: skip
    stored = o_k < end
    if SINK:
        stored = stored & (o_k >= tl.minimum(sink_tokens, length))
    dk = tl.where(m_k[:, None], dk * scale, 0.0)
    dv = tl.where(m_k[:, None], dv, 0.0)
    dk_ptr = _head(dk_ptr, row, kv_head, stride_dkb, stride_dkh)
    _store_rows(dk_ptr, token, stored, dk, D, stride_dkl, stride_dkd, BLOCK_K, BLOCK_D)
    dv_ptr = _head(dv_ptr, row, kv_head, stride_dkb, stride_dkh)
    _store_rows(dv_ptr, token, stored, dv, D, stride_dkl, stride_dkd, BLOCK_K, BLOCK_D)


@triton.jit
def _same_group(o_k, o_q, G, offset):
    return (o_k + G - offset) // G == (o_q + G - offset) // G


@triton.jit
def sink_partial_kernel(
    do_ptr, q_ptr, k_ptr, v_ptr, lengths_ptr, cu_seqlens_ptr, seed_ptr, lse_ptr, delta_ptr, partial_ptr,
    H, ratio, L, D, sink_tokens, sink_tiles, tokens_per_split,
    stride_dob, stride_doh, stride_dol, stride_dod,
    stride_qb, stride_qh, stride_ql, stride_qd,
    stride_kb, stride_kh, stride_kl, stride_kd,
    stride_vb, stride_vh, stride_vl, stride_vd,
    scale, dropout_p,
    CAUSAL: tl.constexpr, HAS_LENGTHS: tl.constexpr, PACKED: tl.constexpr, DROPOUT: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """What one split of a sequence's tokens gives to dk and dv of its sinks; groups do not matter to a sink

    partial: (splits, sequences, Hkv, 2, sink_tokens, D)
    """
    split, tile = tl.program_id(0) // sink_tiles, tl.program_id(0) % sink_tiles
    kv_head, index = tl.program_id(1), tl.program_id(2)
    first, length = _sequence(lengths_ptr, cu_seqlens_ptr, index, tl.num_programs(2), L, HAS_LENGTHS, PACKED)
    row = index
    if PACKED:
        row = index * 0
    o_k = tile * BLOCK_K + tl.arange(0, BLOCK_K)
    m_k = o_k < tl.minimum(sink_tokens, length)
    token = first + tile * BLOCK_K
    k_ptr = _head(k_ptr, row, kv_head, stride_kb, stride_kh)
    v_ptr = _head(v_ptr, row, kv_head, stride_vb, stride_vh)
    b_k = _load_rows(k_ptr, token, m_k, D, stride_kl, stride_kd, BLOCK_K, BLOCK_D)
    b_v = _load_rows(v_ptr, token, m_k, D, stride_vl, stride_vd, BLOCK_K, BLOCK_D)
    seed = 0
    if DROPOUT:
        seed = tl.load(seed_ptr)
    scale_log2 = scale * LOG2_E
    dk = tl.zeros((BLOCK_K, BLOCK_D), dtype=tl.float32)
    dv = tl.zeros((BLOCK_K, BLOCK_D), dtype=tl.float32)
    end = tl.minimum(split * tokens_per_split + tokens_per_split, length)
    for head in range(kv_head * ratio, kv_head * ratio + ratio):
        own_q = _head(q_ptr, row, head, stride_qb, stride_qh)
        own_do = _head(do_ptr, row, head, stride_dob, stride_doh)
        stream = row * H + head
        numbers = tl.cast(stream, tl.int64) * L
        for query in range(split * tokens_per_split, end, BLOCK_Q):
            o_q = query + tl.arange(0, BLOCK_Q)
            dk, dv = _key_gradient_step(
                dk, dv, b_k, b_v, own_q, own_do, lse_ptr + numbers, delta_ptr + numbers, first, query, end,
                o_k, o_k[:, None] <= o_q[None, :], seed, stream, D,
                stride_ql, stride_qd, stride_dol, stride_dod, scale_log2, dropout_p,
                CAUSAL, DROPOUT, BLOCK_Q, BLOCK_D,
            )  # fmt: skip
    place = ((split * tl.num_programs(2) + index) * tl.num_programs(1) + kv_head).to(tl.int64) * 2 * sink_tokens * D
    stored = o_k < sink_tokens
    dk = tl.where(m_k[:, None], dk * scale, 0.0)
    dv = tl.where(m_k[:, None], dv, 0.0)
    _store_rows(partial_ptr + place, tile * BLOCK_K, stored, dk, D, D, 1, BLOCK_K, BLOCK_D)
    _store_rows(partial_ptr + place + sink_tokens * D, tile * BLOCK_K, stored, dv, D, D, 1, BLOCK_K, BLOCK_D)


@triton.jit
def sink_finish_kernel(
    partial_ptr, lengths_ptr, cu_seqlens_ptr, dk_ptr, dv_ptr,
    L, D, sink_tokens, splits,
    stride_dkb, stride_dkh, stride_dkl, stride_dkd,
    HAS_LENGTHS: tl.constexpr, PACKED: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dk and dv of the sinks: the splits in order"""
    kv_head, index = tl.program_id(1), tl.program_id(2)
    first, length = _sequence(lengths_ptr, cu_seqlens_ptr, index, tl.num_programs(2), L, HAS_LENGTHS, PACKED)
    row = index
    if PACKED:
        row = index * 0
    tile = tl.program_id(0)
    m_k = tile * BLOCK_K + tl.arange(0, BLOCK_K) < tl.minimum(sink_tokens, length)
    dk = tl.zeros((BLOCK_K, BLOCK_D), dtype=tl.float32)
    dv = tl.zeros((BLOCK_K, BLOCK_D), dtype=tl.float32)
    place = (index * tl.num_programs(1) + kv_head).to(tl.int64) * 2 * sink_tokens * D
    for _ in range(0, splits):
        dk += _load_rows(partial_ptr + place, tile * BLOCK_K, m_k, D, D, 1, BLOCK_K, BLOCK_D)
        dv += _load_rows(partial_ptr + place + sink_tokens * D, tile * BLOCK_K, m_k, D, D, 1, BLOCK_K, BLOCK_D)
        place += tl.num_programs(2).to(tl.int64) * tl.num_programs(1) * 2 * sink_tokens * D
    token = first + tile * BLOCK_K
    dk_ptr = _head(dk_ptr, row, kv_head, stride_dkb, stride_dkh)
    dv_ptr = _head(dv_ptr, row, kv_head, stride_dkb, stride_dkh)
    _store_rows(dk_ptr, token, m_k, dk, D, stride_dkl, stride_dkd, BLOCK_K, BLOCK_D)
    _store_rows(dv_ptr, token, m_k, dv, D, stride_dkl, stride_dkd, BLOCK_K, BLOCK_D)


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
    """-> out (B, Hq, L, D), log-sum-exp of the scores (B, Hq, L). seed: of the dropout, (1,) int64, or None."""
    (batch, heads, length, _), block_d = q.shape, _head_block(q)
    out = tokens_first(q)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    if not q.numel():
        return out, lse
    tile = chosen_tile("forward", q.dtype, block_d, group_size, dropout_p > 0)
    offsets = _offsets(shift, shifted_heads)
    forward_kernel[(_tiles(length, group_size, offsets, cu_seqlens, tile.queries), heads, batch)](
        q, k, v, lengths, cu_seqlens, seed, out, lse,
        *_sizes(q, k, group_size, shift, shifted_heads, sink_tokens, cu_seqlens),
        *q.stride(), *k.stride(), *v.stride(), *out.stride(),
        scale, dropout_p,
        CAUSAL=causal, SINK=sink_tokens > 0, **_sequence_flags(lengths, cu_seqlens), DROPOUT=dropout_p > 0,
        BLOCK_DOCUMENTS=_document_block(cu_seqlens),
        BLOCK_Q=tile.queries, BLOCK_K=tile.keys, BLOCK_D=block_d,
        **launch_options(tile),
    )  # fmt: skip
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
    (batch, heads, length, head_dim), kv_heads, block_d = q.shape, k.shape[1], _head_block(q)
    dq, dk, dv = tokens_first(q), tokens_first(k), tokens_first(v)
    if not q.numel():
        # without query heads there are keys all the same
        return dq, dk.zero_(), dv.zero_()
    delta = torch.empty_like(lse)
    ratio, offsets = heads // kv_heads, _offsets(shift, shifted_heads)
    sizes = _sizes(q, k, group_size, shift, shifted_heads, sink_tokens, cu_seqlens)
    flags = {"CAUSAL": causal, **_sequence_flags(lengths, cu_seqlens), "DROPOUT": dropout_p > 0}
    common = {"SINK": sink_tokens > 0, "BLOCK_DOCUMENTS": _document_block(cu_seqlens), **flags}
    inputs = (q, k, v, lengths, cu_seqlens, seed)
    strides = (*do.stride(), *q.stride(), *k.stride(), *v.stride())

    tile = chosen_tile("dq", q.dtype, block_d, group_size, dropout_p > 0)
    backward_dq_kernel[(_tiles(length, group_size, offsets, cu_seqlens, tile.queries), heads, batch)](
        do, *inputs, out, lse, delta, dq,
        *sizes,
        *strides, *out.stride(), *dq.stride(),
        scale, dropout_p,
        **common, BLOCK_Q=tile.queries, BLOCK_K=tile.keys, BLOCK_D=block_d,
        **launch_options(tile),
    )  # fmt: skip

    tile = chosen_tile("dkdv", q.dtype, block_d, group_size, dropout_p > 0)
    backward_dkdv_kernel[(_tiles(length, group_size, offsets, cu_seqlens, tile.keys), kv_heads, batch)](
        do, *inputs, lse, delta, dk, dv,
        *sizes,
        *strides, *dk.stride(),
        scale, dropout_p,
        **common, MIXED=shift > 0 and shifted_heads == "half" and heads // 2 % ratio != 0,
        BLOCK_Q=tile.queries, BLOCK_K=tile.keys, BLOCK_D=block_d,
        **launch_options(tile),
    )  # fmt: skip

    if sink_tokens:
        sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
        sinks = min(sink_tokens, length)
        sink_tiles = triton.cdiv(sinks, tile.keys)
        splits = _splits(length, sequences * kv_heads * sink_tiles, tile.queries)
        tokens_per_split = triton.cdiv(triton.cdiv(length, splits), tile.queries) * tile.queries
        partial = q.new_empty((splits, sequences, kv_heads, 2, sinks, head_dim), dtype=torch.float32)
        sink_partial_kernel[(splits * sink_tiles, kv_heads, sequences)](
            do, *inputs, lse, delta, partial,
            heads, ratio, length, head_dim, sinks, sink_tiles, tokens_per_split,
            *strides,
            scale, dropout_p,
            **flags, BLOCK_Q=tile.queries, BLOCK_K=tile.keys, BLOCK_D=block_d,
            **launch_options(tile),
        )  # fmt: skip
        sink_finish_kernel[(sink_tiles, kv_heads, sequences)](
            partial, lengths, cu_seqlens, dk, dv,
            length, head_dim, sinks, splits,
            *dk.stride(),
            **_sequence_flags(lengths, cu_seqlens), BLOCK_K=tile.keys, BLOCK_D=block_d,
            **launch_options(tile._replace(num_stages=1)),
        )  # fmt: skip
    return dq, dk, dv


def _head_block(q: Tensor) -> int:
    if q.shape[-1] > LARGEST_HEAD_DIM:
        raise ValueError(
            f'the Triton kernels take head dims up to {LARGEST_HEAD_DIM}, got {q.shape[-1]}; use using("eager")'
        )
    return next_power_of_two(q.shape[-1], at_least=16, at_most=LARGEST_HEAD_DIM)


def _offsets(shift: int, shifted_heads: str) -> set[int]:
    return {"none": {0}, "half": {0, shift}, "all": {shift}}[shifted_heads]


def _tiles(length: int, group_size: int, offsets: set[int], cu_seqlens: Tensor | None, block: int) -> int:
    """Programs that the tiles of a row need; with documents, whose lengths the host does not know, at most."""
    if cu_seqlens is not None:
        return length // block + length // group_size + 2 * cu_seqlens.shape[0]
    return max(_tiles_of(min(offset, length), length - min(offset, length), group_size, block) for offset in offsets)


def _tiles_of(prefix: int, rest: int, group_size: int, block: int) -> int:
    """Tiles of a group of `prefix` tokens and of the groups that follow it."""
    full, last = divmod(rest, group_size)
    return triton.cdiv(prefix, block) + full * triton.cdiv(group_size, block) + triton.cdiv(last, block)


def _sizes(q, k, group_size, shift, shifted_heads, sink_tokens, cu_seqlens) -> tuple[int, ...]:
    _, heads, length, head_dim = q.shape
    first_shifted = {"none": heads, "half": heads // 2, "all": 0}[shifted_heads]
    documents = 0 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return heads, heads // k.shape[1], length, head_dim, group_size, shift, first_shifted, sink_tokens, documents


def _sequence_flags(lengths: Tensor | None, cu_seqlens: Tensor | None) -> dict[str, bool]:
    return {"HAS_LENGTHS": lengths is not None, "PACKED": cu_seqlens is not None}


def _document_block(cu_seqlens: Tensor | None) -> int:
    return 1 if cu_seqlens is None else next_power_of_two(cu_seqlens.shape[0], at_least=16, at_most=1024)


def _splits(length: int, programs: int, block_q: int) -> int:
    """Into how many parts the tokens of a sequence are cut: some 256 programs, each with a few tiles."""
    return max(1, min(256 // max(programs, 1), triton.cdiv(length, 4 * block_q)))
