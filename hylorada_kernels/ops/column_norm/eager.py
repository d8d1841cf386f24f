"""Column norm in PyTorch, any device and dtype. See op.py for the contract."""

from collections.abc import Sequence

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


def forward(weight: Tensor, lora_a: Tensor, lora_b: Tensor, *, scale: float) -> Tensor:
    """See `norms_and_bases`."""
    return norms_and_bases([weight], lora_a[None], lora_b[None], [None], scale=scale)[0][0]


def norms_and_bases(
    weights: Sequence[Tensor], lora_a: Tensor, lora_b: Tensor, bases: Sequence[Tensor | None], *, scale: float
) -> tuple[Tensor, list[Tensor]]:
    """Norms (L, O) of L layers of one shape, and ||W||^2 of their rows, L times (O,).

    n^2 = ||W||^2 + 2 s <W, B A> + s^2 ||B A||^2 from W A^T (O, R) and A A^T (R, R); rows that cancel are redone.
    Low-precision weights are widened a few rows at a time: a bf16 GEMM would leave an error of 5e-5. What follows the
    products is done for all layers in one call; every norm has the bits that it would have alone.

    lora_a: (L, R, I).   lora_b: (L, O, R).   bases: who has a ||W||^2 from an earlier call saves a reading of that W.
    """
    dtype = accumulation_dtype(weights[0])
    a, b = lora_a.to(dtype), lora_b.to(dtype)
    own_squares, own_products = [], []
    for weight, own_a, own_b, base in zip(weights, map(aligned, a), map(aligned, b), bases, strict=True):
        own_square, product = _base_and_product(weight, own_a, base)
        own_squares.append(own_square)
        # not a batched product, whose bits may be others for other numbers of layers
        own_products.append(product.addmm_(own_b, own_a @ own_a.T, beta=2 * scale, alpha=scale**2))
    squares, products = stacked(own_squares), stacked(own_products)
    squared = products.mul_(b).sum(2).add_(squares)
    update_sizes = torch.mul(b.abs(), torch.linalg.vector_norm(a, dim=2)[:, None], out=products).sum(2).mul_(scale)
    cancelled = squared < CANCELLATION * squares
    cancelled |= squared < INNER_CANCELLATION * update_sizes.square_()
    if cancelled.any():
        for weight, own_a, own_b, own_squared, is_bad in zip(weights, a, b, squared, cancelled, strict=True):
            adapted = weight[is_bad].to(dtype).addmm_(own_b[is_bad], own_a, alpha=scale)
            own_squared[is_bad] = adapted.square_().sum(1)
    return squared.sqrt_(), own_squares


def _base_and_product(weight: Tensor, a: Tensor, base: Tensor | None) -> tuple[Tensor, Tensor]:
    """-> ||W||^2 of every row, (O,), and W A^T, (O, R)."""
    norms, products = [], []
    for rows in row_chunks(weight, a.dtype):
        wide = weight[rows].to(a.dtype)
        if base is None:
            norms.append(torch.linalg.vector_norm(wide, dim=1))
        products.append(project_down(wide, a, in_groups=True))
        # freed before more rows are widened
        del wide
    return _joined(norms).square_() if base is None else base, _joined(products)


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    """One after the other along the first dimension; one alone as it is."""
    return tensors[0] if len(tensors) == 1 else torch.cat(tuple(tensors))


def aligned(tensor: Tensor) -> Tensor:
    """A copy where it does not begin at a cache line, as part of a stack: the bits of a product may depend on that."""
    return tensor if tensor.data_ptr() % 64 == 0 else tensor.clone()


def stacked(tensors: Sequence[Tensor]) -> Tensor:
    """In a new first dimension; one alone as a view of it."""
    return tensors[0][None] if len(tensors) == 1 else torch.stack(tuple(tensors))


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
