"""The arithmetic and the least traffic of each op, and how near to a GPU's own limits a time comes."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Work(NamedTuple):
    """Floating-point operations, and the bytes that nothing can do without: inputs read and outputs written once."""

    flops: float
    ideal_bytes: float

    def achieved(self, seconds: float, limits: tuple[float, float]) -> float:
        """Share of the time that the stricter of the two limits (operations and bytes a second) would allow."""
        return max(self.flops / limits[0], self.ideal_bytes / limits[1]) / seconds


def column_norm_work(columns: int, rows: int, rank: int, element: int) -> Work:
    """W (O, I) is read, n (O,) written; B A row by row, added, squared and summed. Factors in fp32."""
    return Work(
        2 * columns * rows * rank + 4 * columns * rows,
        element * columns * rows + 4 * rank * (columns + rows) + 4 * rows,
    )


def linear_forward_work(tokens: int, columns: int, rows: int, rank: int, element: int) -> Work:
    """x W^T, x A^T and h B^T; x, W, A, B read, y written."""
    flops = 2 * tokens * (columns * rows + rank * (columns + rows)) + 2 * tokens * rows
    moved = element * (tokens * columns + columns * rows + tokens * rows) + 4 * rank * (columns + rows)
    return Work(flops, moved)


def linear_backward_work(tokens: int, columns: int, rows: int, rank: int, element: int) -> Work:
    """dx = dz W + (dz B) A, dA, dB and dm; dy, x, W, y and the factors read, dx and their gradients written."""
    flops = 2 * tokens * (columns * rows + 2 * rank * (columns + rows)) + 4 * tokens * rows
    moved = element * (2 * tokens * columns + columns * rows + 2 * tokens * rows) + 8 * rank * (columns + rows)
    return Work(flops, moved)


def attention_work(pairs: int, length: int, heads: int, kv_heads: int, head_dim: int, element: int) -> Work:
    """Q K^T and P V over the pairs that attend, of all heads together; q, k, v read, out and log-sum-exp written."""
    moved = element * head_dim * length * (2 * heads + 2 * kv_heads) + 4 * heads * length
    return Work(4 * head_dim * pairs, moved)


def measured_limits(dtype: torch.dtype) -> tuple[float, float]:
    """Operations and bytes a second of this GPU, as its library's largest product and its fastest copy reach them."""
    import triton.testing

    left = torch.randn(8192, 8192, device="cuda", dtype=dtype)
    product = triton.testing.do_bench(lambda: left @ left, return_mode="min") * 1e-3
    source = torch.empty(2**28, device="cuda", dtype=torch.uint8)
    target = torch.empty_like(source)
    copy = triton.testing.do_bench(lambda: target.copy_(source), return_mode="min") * 1e-3
    return 2 * 8192**3 / product, 2 * source.nbytes / copy
