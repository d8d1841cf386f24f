"""Inputs of shifted attention, and what it should give: the dense predicate, with every pair of tokens written out."""

import itertools
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass
class AttentionInputs:
    """Arguments of `shifted_attention`, plus the gradient that comes back from above."""

    q: Tensor
    k: Tensor
    v: Tensor
    do: Tensor
    group_size: int
    shift: int = 0
    shifted_heads: str = "none"
    causal: bool = True
    sink_tokens: int = 0
    scale: float | None = None
    lengths: Tensor | None = None
    cu_seqlens: Tensor | None = None

    TRAINED = ("q", "k", "v")

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments for `shifted_attention`."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "do"}

    def to(self, dtype: torch.dtype) -> "AttentionInputs":
        """A copy of detached leaves in another dtype that ask for a gradient."""
        leaves = {name: getattr(self, name).detach().to(dtype).requires_grad_(True) for name in self.TRAINED}
        return replace(self, **leaves, do=self.do.to(dtype))

    def gradients(self) -> dict[str, Tensor]:
        """The gradients that a backward pass left in the leaves."""
        return {name: getattr(self, name).grad for name in self.TRAINED}


def attention_inputs(
    batch: int,
    heads: int,
    kv_heads: int,
    length: int,
    head_dim: int,
    *,
    group_size: int,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device | None = None,
    lengths: list[int] | None = None,
    documents: list[int] | None = None,
    seed: int = 0,
    **options,
) -> AttentionInputs:
    """Random inputs; `documents` are the lengths of packed documents, which must add up to `length`."""
    device = device or torch.get_default_device()
    generator = torch.Generator("cpu").manual_seed(seed)

    def normal(heads: int) -> Tensor:
        shape = (batch, heads, length, head_dim)
        return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu").to(dtype).to(device)

    return AttentionInputs(
        q=normal(heads), k=normal(kv_heads), v=normal(kv_heads), do=normal(heads), group_size=group_size,
        lengths=None if lengths is None else torch.tensor(lengths, device=device),
        cu_seqlens=None if documents is None else torch.tensor([0, *itertools.accumulate(documents)], device=device),
        **options,
    )  # fmt: skip


def attended_pairs(given: AttentionInputs) -> Tensor:
    """(B, Hq, L, L), True where token i attends to token j."""
    (batch, heads, length, _), device = given.q.shape, given.q.device
    token = torch.arange(length, device=device).expand(batch, length)
    document, position, valid = torch.zeros_like(token), token, torch.ones_like(token, dtype=torch.bool)
    if given.cu_seqlens is not None:
        document = torch.searchsorted(given.cu_seqlens, token, right=True) - 1
        position = token - given.cu_seqlens[document]
    if given.lengths is not None:
        valid = token < given.lengths[:, None]
    first_shifted = {"none": heads, "half": heads // 2, "all": 0}[given.shifted_heads]
    offset = torch.where(torch.arange(heads, device=device) < first_shifted, 0, given.shift)
    group = (position[:, None] + given.group_size - offset[:, None]) // given.group_size
    # [B, H, L, L] from here on
    pairs = group[..., :, None] == group[..., None, :]
    pairs = pairs | (position < given.sink_tokens)[:, None, None, :]
    pairs = pairs & (valid[:, :, None] & valid[:, None, :] & (document[:, :, None] == document[:, None, :]))[:, None]
    if given.causal:
        pairs = pairs & (position[:, None, :] <= position[:, :, None])[:, None]
    return pairs


def reference_attention(given: AttentionInputs) -> Tensor:
    """Softmax over the attended pairs, 0 for rows without any. Any dtype; differentiable; fp64 is the tests' truth."""
    probabilities, _, v = _dense(given)
    return probabilities @ v


def sdpa_attention(given: AttentionInputs) -> Tensor:
    """PyTorch's own attention in the dtype of the inputs, under a mask of all pairs; 0 for rows without keys."""
    pairs, (k, v) = attended_pairs(given), _expanded(given)
    some = pairs.any(-1, keepdim=True)
    # a row without keys would give NaN: it sees all of them, and is dropped
    out = F.scaled_dot_product_attention(given.q, k, v, pairs | ~some, scale=given.scale)
    return torch.where(some, out, 0)


def attention_amplitudes(given: AttentionInputs) -> tuple[Tensor, dict[str, Tensor]]:
    """The root of the summed squares of the terms of the output and of the gradients of q, k and v.

    Independent rounding errors of the terms add up to a share of this, however much of the sum itself cancels.
    """
    probabilities, k, v = (tensor.detach() for tensor in _dense(given))
    out, weight = probabilities @ v, probabilities.square()
    do = given.do.square()
    # dS = P (dP - delta): dP and delta are sums over the head dim
    ds = weight * (do @ v.square().mT + (do * out.square()).sum(-1, keepdim=True)) * _scale(given) ** 2
    q = given.q.detach().square()
    amplitudes = {
        "q": ds @ k.square(),
        "k": _shared(ds.mT @ q, given),
        "v": _shared(weight.mT @ do, given),
    }
    return (weight @ v.square()).sqrt(), {name: amplitude.sqrt() for name, amplitude in amplitudes.items()}


def _scale(given: AttentionInputs) -> float:
    return given.q.shape[-1] ** -0.5 if given.scale is None else given.scale


def _expanded(given: AttentionInputs) -> tuple[Tensor, Tensor]:
    ratio = given.q.shape[1] // given.k.shape[1]
    return given.k.repeat_interleave(ratio, 1), given.v.repeat_interleave(ratio, 1)


def _shared(per_query_head: Tensor, given: AttentionInputs) -> Tensor:
    """Sum over the query heads of every key head."""
    return per_query_head.unflatten(1, (given.k.shape[1], -1)).sum(2)


def _dense(given: AttentionInputs) -> tuple[Tensor, Tensor, Tensor]:
    """Probabilities (B, Hq, L, L), and k and v for every query head."""
    pairs, (k, v) = attended_pairs(given), _expanded(given)
    scores = (given.q @ k.mT * _scale(given)).masked_fill(~pairs, float("-inf"))
    # a row without keys would give NaN, in the gradient too
    empty = ~pairs.any(-1, keepdim=True)
    return torch.where(empty, 0.0, scores.masked_fill(empty, 0.0).softmax(-1)), k, v
