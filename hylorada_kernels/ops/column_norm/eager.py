"""Column norm in PyTorch, any device and dtype. See op.py for the contract."""

import torch
from torch import Tensor

from .._thin import GROUP, project_down

# below this share of ||W||^2 the expansion may have lost a digit to cancellation; above it n^2 is at least a 17th of
# the sum of its terms' sizes, whatever B A is. In practice no row ever is
CANCELLATION = 0.3
# the same for what cancels within B A, of the square of the sum of its terms' sizes: where the rows of A are dependent
INNER_CANCELLATION = 2.0**-8
# elements of W held in fp32 at a time: few calls, and small enough for a shared cache
CHUNK_ELEMENTS = 1 << 20


def forward(weight: Tensor, lora_a: Tensor, lora_b: Tensor, *, scale: float) -> Tensor:
    """See `norm_and_base`."""
    return norm_and_base(weight, lora_a, lora_b, scale=scale)[0]


def norm_and_base(
    weight: Tensor, lora_a: Tensor, lora_b: Tensor, *, scale: float, base: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """n^2 = ||W||^2 + 2 s <W, B A> + s^2 ||B A||^2 from W A^T (O, R) and A A^T (R, R); rows that cancel are redone.

    Low-precision weights are widened a few rows at a time: a bf16 GEMM would leave an error of 5e-5. The base is
    ||W||^2, (O,): who has it from an earlier call saves a reading of W.
    """
    dtype = accumulation_dtype(weight)
    a, b = lora_a.to(dtype), lora_b.to(dtype)
    products = b.new_empty(b.shape)
    is_known = base is not None
    squares = base if base is not None else weight.new_empty(weight.shape[0], dtype=dtype)
    for rows in row_chunks(weight, dtype):
        wide = weight[rows].to(dtype)
        if not is_known:
            torch.linalg.vector_norm(wide, dim=1, out=squares[rows])
        products[rows] = project_down(wide, a, batch_from=0)
        # freed before more rows are widened
        del wide
    if not is_known:
        squares.square_()
    squared = (torch.addmm(products, b, a @ a.T, beta=2 * scale, alpha=scale**2) * b).sum(1).add_(squares)
    update_size = scale**2 * (b.abs() @ torch.linalg.vector_norm(a, dim=1)).square_()
    cancelled = (squared < CANCELLATION * squares) | (squared < INNER_CANCELLATION * update_size)
    if cancelled.any():
        squared[cancelled] = (weight[cancelled].to(dtype) + scale * (b[cancelled] @ a)).square().sum(1)
    return squared.sqrt_(), squares


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
        db[rows] += (scale * d[rows])[:, None] * project_down(wide, a, batch_from=0)
        da.addmm_(weighted[rows].T, wide)
        del wide
    return da.to(lora_a.dtype), db.to(lora_b.dtype)


def accumulation_dtype(tensor: Tensor) -> torch.dtype:
    """fp64 for fp64 tensors, else fp32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def row_chunks(weight: Tensor, dtype: torch.dtype) -> list[slice]:
    """Slices of rows to widen to `dtype` together: all of them when nothing has to be widened."""
    rows, columns = weight.shape
    groups = CHUNK_ELEMENTS // (GROUP * max(columns, 1))
    step = rows if weight.dtype == dtype else GROUP * max(groups, 1)
    return [slice(start, start + step) for start in range(0, rows, max(step, 1))]
