"""Column norm in PyTorch, any device and dtype. See op.py for the contract."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .._products import GROUP, project_down

# below this share of ||W||^2 the expansion may have lost a digit to cancellation; above it n^2 is at least a 17th of
# the sum of its terms' sizes, whatever B A is. In practice no row ever is
CANCELLATION = 0.3
# the same for what cancels within B A, of the square of the sum of its terms' sizes: where the rows of A are dependent
INNER_CANCELLATION = 2.0**-8
# elements of W held in fp32 at a time: few calls, and small enough for a shared cache
CHUNK_ELEMENTS = 1 << 20


class Layer(NamedTuple):
    """What a norm is made of."""

    weight: Tensor
    lora_a: Tensor
    lora_b: Tensor
    scale: float
    # ||W||^2 of every row, (O,): who has it from an earlier call saves a reading of W
    base: Tensor | None = None


def forward(weight: Tensor, lora_a: Tensor, lora_b: Tensor, *, scale: float) -> Tensor:
    """See `norms_and_bases`."""
    ((norm, _),) = norms_and_bases([Layer(weight, lora_a, lora_b, scale)])
    return norm


def norms_and_bases(layers: Sequence[Layer]) -> list[tuple[Tensor, Tensor]]:
    """n^2 = ||W||^2 + 2 s <W, B A> + s^2 ||B A||^2 from W A^T (O, R) and A A^T (R, R); rows that cancel are redone.

    Low-precision weights are widened a few rows at a time: a bf16 GEMM would leave an error of 5e-5. The layers are on
    one device and of one `accumulation_dtype`; what is as long as the rows is done for all of them in one call. Every
    norm has the bits that it would have alone, and is a view of a tensor with the others, if there are any.
    """
    dtype = accumulation_dtype(layers[0].weight)
    rows = [len(layer.weight) for layer in layers]
    squared = layers[0].weight.new_empty(sum(rows), dtype=dtype)
    update_sizes, bases = torch.empty_like(squared), []
    for layer, own_squared, update_size in zip(layers, parted(squared, rows), parted(update_sizes, rows), strict=True):
        a, b, scale = layer.lora_a.to(dtype), layer.lora_b.to(dtype), layer.scale
        base, product = _base_and_product(layer, a)
        product.addmm_(b, a @ a.T, beta=2 * scale, alpha=scale**2)
        torch.sum(product.mul_(b), 1, out=own_squared)
        torch.addmv(update_size, b.abs(), torch.linalg.vector_norm(a, dim=1), beta=0, alpha=scale, out=update_size)
        bases.append(base)
    squares = joined(bases)
    cancelled = squared.add_(squares) < CANCELLATION * squares
    cancelled |= squared < INNER_CANCELLATION * update_sizes.square_()
    if cancelled.any():
        for layer, own_squared, is_bad in zip(layers, parted(squared, rows), parted(cancelled, rows), strict=True):
            update = layer.lora_b[is_bad].to(dtype) @ layer.lora_a.to(dtype)
            own_squared[is_bad] = layer.weight[is_bad].to(dtype).add_(update, alpha=layer.scale).square().sum(1)
    return list(zip(parted(squared.sqrt_(), rows), bases, strict=True))


def _base_and_product(layer: Layer, a: Tensor) -> tuple[Tensor, Tensor]:
    """-> ||W||^2 of every row, (O,), and W A^T, (O, R)."""
    weight, base = layer.weight, layer.base
    norms, products = [], []
    for rows in row_chunks(weight, a.dtype):
        wide = weight[rows].to(a.dtype)
        if base is None:
            norms.append(torch.linalg.vector_norm(wide, dim=1))
        products.append(project_down(wide, a, in_groups=True))
        # freed before more rows are widened
        del wide
    return joined(norms).square_() if base is None else base, joined(products)


def joined(tensors: Sequence[Tensor]) -> Tensor:
    """One after the other along the first dimension; one alone as it is."""
    return tensors[0] if len(tensors) == 1 else torch.cat(tuple(tensors))


def parted(tensor: Tensor, rows: Sequence[int]) -> Sequence[Tensor]:
    """Views of so many rows each; one alone as it is."""
    return (tensor,) if len(rows) == 1 else tensor.split(rows)


def backward(
    grad: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, norm: Tensor, *, scale: float
) -> tuple[Tensor, Tensor]:
    """With d = grad / n: dB = diag(d) (s W A^T + s^2 B A A^T), dA = s (diag(d) B)^T W + s^2 B^T diag(d) B A."""
    dtype = norm.dtype
    a, b = lora_a.to(dtype), lora_b.to(dtype)
    # a zero row has no direction: its norm is at a minimum there, the subgradient is 0
    d = torch.where(norm > 0, grad / norm, 0)
    weighted = scale * d[:, None] * b
    db = scale * weighted @ (a @ a.T)
    da = scale * (weighted.T @ b) @ a
    for rows in row_chunks(weight, dtype):
        wide = weight[rows].to(dtype)
        db[rows] += (scale * d[rows])[:, None] * project_down(wide, a, in_groups=True)
        da.addmm_(weighted[rows].T, wide)
        del wide
    return da.to(lora_a.dtype), db.to(lora_b.dtype)


def accumulation_dtype(tensor: Tensor) -> torch.dtype:
    """fp64 for fp64 tensors, else fp32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def row_chunks(weight: Tensor, dtype: torch.dtype) -> list[slice]:
    """Slices of rows to widen to `dtype` together, one at least: all of them when nothing has to be widened."""
    rows, columns = weight.shape
    groups = CHUNK_ELEMENTS // (GROUP * max(columns, 1))
    step = rows if weight.dtype == dtype else GROUP * max(groups, 1)
    return [slice(start, start + step) for start in range(0, max(rows, 1), max(step, 1))]
