"""The layout of what shifted attention returns, which op.py promises and the implementations keep."""

import torch
from torch import Tensor


def tokens_first(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised tensor in the shape of x (B, H, L, D), laid out as (B, L, H, D), and not a view; dtype: x's."""
    _, heads, length, head_dim = x.shape
    strides = (length * heads * head_dim, head_dim, heads * head_dim, 1)
    return x.new_empty_strided(x.shape, strides, dtype=dtype)
