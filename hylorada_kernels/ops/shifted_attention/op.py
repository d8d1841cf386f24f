"""Shifted attention: contract, checks, autograd."""

import torch
from torch import Tensor

from ... import backend
from . import eager
from .layout import tokens_first

if backend.HAS_TRITON:
    from . import kernel

SHIFTED_HEADS = ("none", "half", "all")
INDEX_DTYPES = (torch.int32, torch.int64)


def shifted_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group_size: int,
    shift: int = 0,
    shifted_heads: str = "none",
    causal: bool = True,
    sink_tokens: int = 0,
    scale: float | None = None,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Attention within groups of G tokens, whose borders are moved by o tokens in the shifted heads, plus sink tokens.

        gid(i) = (i + G - o) // G                 o = shift in the shifted heads, 0 in the others
        attend(i, j) = (j <= i if causal) and (gid(i) == gid(j) or j < sinks)
        out_i = sum_j softmax_j(scale q_i . k_j) v_j over the j that i attends to

    Positions count from 0 in every sequence: a row, its valid prefix (`lengths`) or one of the documents packed into it
    (`cu_seqlens`). S2-Attn of LongLoRA (Chen et al. 2024, section 3.2) without its wrap-around, which shows early
    tokens the end of the sequence: here the first o tokens are a short group of their own. With "half" the query heads
    from Hq // 2 on are shifted, whichever key and value head they share. A sink that lies in the group counts once.

    The score work is L/G of full attention's (for causal; Hq and D as they are) and no tensor is as large as L x G.
    Sums and the softmax are kept in fp32 (fp64 for fp64 input). Under autocast q, k and v are cast as for
    torch.nn.functional.scaled_dot_product_attention. Dropout thins the softmax; the backward makes its mask again.

    Args:
        q: (B, Hq, L, D), any strides.   k, v: (B, Hkv, L, D), any strides, q's dtype; Hkv divides Hq.
        group_size: G, in tokens.   shift: o in [0, G); 0 where shifted_heads is "none".
        shifted_heads: "none", "half" or "all".
        sink_tokens: how many first tokens of the sequence every token attends to.
        scale: of the scores; None is 1 / sqrt(D).
        lengths: (B,), int32 or int64; tokens of each row that count, from its start. The others get 0 and give 0.
        cu_seqlens: (documents + 1,), int32 or int64, from 0 to L without descent: where documents begin; B is 1.
        dropout_p: in [0, 1); the caller passes 0 outside training.

    Returns:
        (B, Hq, L, D) in q's dtype, laid out as (B, L, Hq, D). There is no second derivative.

    Raises:
        TypeError: dtypes that do not fit.
        ValueError: shapes, devices, boundaries or options that do not fit. The values of `lengths` and `cu_seqlens` are
            looked at on the CPU only; on a GPU wrong ones give wrong results, but touch no foreign memory.
        RuntimeError: "triton" was asked for and cannot run here.
    """
    _check(q, k, v, group_size, shift, shifted_heads, sink_tokens, lengths, cu_seqlens, dropout_p)
    dtype = backend.autocast_dtype(q)
    if dtype is not None:
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(
            f"q, k and v must have one dtype, got {q.dtype}, {k.dtype} and {v.dtype}; cast them, or use torch.autocast"
        )
    # drawn outside of the registered op, which a compiler may repeat or merge with another call of it
    seed = torch.randint(2**62, (1,), device=q.device, dtype=torch.int64) if dropout_p else None
    return _ShiftedAttention.apply(
        q, k, v, lengths, cu_seqlens, seed,
        group_size, shift, shifted_heads, causal, sink_tokens,
        q.shape[-1] ** -0.5 if scale is None else float(scale), float(dropout_p), backend.choose(q),
    )  # fmt: skip


def _check(q, k, v, group_size, shift, shifted_heads, sink_tokens, lengths, cu_seqlens, dropout_p):
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != 4:
            raise ValueError(f"{name} must be (batch, heads, length, head dim), got shape {tuple(tensor.shape)}")
        if not tensor.dtype.is_floating_point:
            raise TypeError(f"{name} must be floating point, got {tensor.dtype}")
        if tensor.device != q.device:
            raise ValueError(f"{name} is on {tensor.device} but q is on {q.device}; move them to one device")
    (batch, heads, length, head_dim), kv_heads = q.shape, k.shape[1]
    if k.shape != v.shape or (k.shape[0], *k.shape[2:]) != (batch, length, head_dim):
        raise ValueError(
            f"k and v must both be ({batch}, kv heads, {length}, {head_dim}) to fit q {tuple(q.shape)}, got "
            f"{tuple(k.shape)} and {tuple(v.shape)}"
        )
    if head_dim == 0:
        raise ValueError("the head dim is 0; it must be at least 1")
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"the {heads} heads of q must be a multiple of the {kv_heads} heads of k and v")
    if group_size <= 0:
        raise ValueError(f"group_size must be at least 1, got {group_size}")
    if not 0 <= shift < group_size:
        raise ValueError(f"shift must be in [0, {group_size}), the group size, got {shift}")
    if shifted_heads not in SHIFTED_HEADS:
        raise ValueError(f"shifted_heads must be one of {SHIFTED_HEADS}, got {shifted_heads!r}")
    if shift and shifted_heads == "none":
        raise ValueError(
            f'shift is {shift} but shifted_heads is "none", which nothing would follow from; give "half" or "all", or '
            "shift=0"
        )
    if shifted_heads == "half" and heads < 2:
        raise ValueError(f'shifted_heads is "half" but q has {heads} head(s); give "none" or "all"')
    if sink_tokens < 0:
        raise ValueError(f"sink_tokens must be at least 0, got {sink_tokens}")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")
    if lengths is not None and cu_seqlens is not None:
        raise ValueError("lengths (padded rows) and cu_seqlens (packed documents) were both given; give one of them")
    if cu_seqlens is not None and batch != 1:
        raise ValueError(f"cu_seqlens needs one packed row, got a batch of {batch}; give lengths, or pack the rows")
    for name, tensor, size in (("lengths", lengths, batch), ("cu_seqlens", cu_seqlens, None)):
        if tensor is None:
            continue
        if tensor.dtype not in INDEX_DTYPES:
            raise TypeError(f"{name} must be int32 or int64, got {tensor.dtype}")
        if tensor.device != q.device:
            raise ValueError(f"{name} is on {tensor.device} but q is on {q.device}; move it there")
        if tensor.dim() != 1 or tensor.shape[0] != (size or tensor.shape[0]) or not tensor.shape[0]:
            expected = f"({batch},)" if size else "(documents + 1,)"
            raise ValueError(f"{name} must have shape {expected}, got {tuple(tensor.shape)}")


def _check_boundaries(length: int, lengths: Tensor | None, cu_seqlens: Tensor | None) -> None:
    """Look at values, where that costs no wait for a GPU."""
    if lengths is not None and lengths.device.type == "cpu":
        given = lengths.tolist()
        if not all(0 <= value <= length for value in given):
            raise ValueError(f"lengths must be in [0, {length}], got {given}")
    if cu_seqlens is not None and cu_seqlens.device.type == "cpu":
        given = cu_seqlens.tolist()
        if given[0] != 0 or given[-1] != length or given != sorted(given):
            raise ValueError(f"cu_seqlens must rise from 0 to {length}, the length of the row, got {given}")


def _implementation(choice: str):
    return kernel if choice == "triton" else eager


def _forward(
    q, k, v, lengths, cu_seqlens, seed, group_size, shift, shifted_heads, causal, sink_tokens, scale, dropout_p, choice
):
    _check_boundaries(q.shape[2], lengths, cu_seqlens)
    with backend.on_device_of(q):
        return _implementation(choice).forward(
            q, k, v, lengths, cu_seqlens, seed,
            group_size=group_size, shift=shift, shifted_heads=shifted_heads, causal=causal, sink_tokens=sink_tokens,
            scale=scale, dropout_p=dropout_p,
        )  # fmt: skip


def _backward(
    do, q, k, v, lengths, cu_seqlens, out, lse, seed,
    group_size, shift, shifted_heads, causal, sink_tokens, scale, dropout_p, choice,
):  # fmt: skip
    with backend.on_device_of(q):
        return _implementation(choice).backward(
            do, q, k, v, lengths, cu_seqlens, out, lse, seed,
            group_size=group_size, shift=shift, shifted_heads=shifted_heads, causal=causal, sink_tokens=sink_tokens,
            scale=scale, dropout_p=dropout_p,
        )  # fmt: skip


@torch.library.custom_op("hylorada::shifted_attention", mutates_args=())
def _forward_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    seed: Tensor | None,
    group_size: int,
    shift: int,
    shifted_heads: str,
    causal: bool,
    sink_tokens: int,
    scale: float,
    dropout_p: float,
    choice: str,
) -> tuple[Tensor, Tensor]:
    return _forward(
        q, k, v, lengths, cu_seqlens, seed,
        group_size, shift, shifted_heads, causal, sink_tokens, scale, dropout_p, choice,
    )  # fmt: skip


@_forward_op.register_fake
def _(q, *_):
    own = torch.float64 if q.dtype == torch.float64 else torch.float32
    return tokens_first(q), q.new_empty(q.shape[:3], dtype=own)


@torch.library.custom_op("hylorada::shifted_attention_backward", mutates_args=())
def _backward_op(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    out: Tensor,
    lse: Tensor,
    seed: Tensor | None,
    group_size: int,
    shift: int,
    shifted_heads: str,
    causal: bool,
    sink_tokens: int,
    scale: float,
    dropout_p: float,
    choice: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return _backward(
        do, q, k, v, lengths, cu_seqlens, out, lse, seed,
        group_size, shift, shifted_heads, causal, sink_tokens, scale, dropout_p, choice,
    )  # fmt: skip


@_backward_op.register_fake
def _(do, q, k, v, *_):
    return tokens_first(q), tokens_first(k), tokens_first(v)


class _ShiftedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, lengths, cu_seqlens, seed, *options):
        run = _forward if backend.runs_directly(q, options[-1]) else _forward_op
        with backend.no_autocast(q):
            out, lse = run(q, k, v, lengths, cu_seqlens, seed, *options)
        ctx.save_for_backward(q, k, v, lengths, cu_seqlens, out, lse, seed)
        ctx.options = options
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, do):
        run = _backward if backend.runs_directly(do, ctx.options[-1]) else _backward_op
        with backend.no_autocast(do):
            gradients = run(do, *ctx.saved_tensors, *ctx.options)
        return (*gradients, None, None, None, *[None] * len(ctx.options))
