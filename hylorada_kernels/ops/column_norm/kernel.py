"""Column norm in Triton: W is read once, B A lives in registers a tile at a time. See op.py for the contract."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def column_norm_kernel(
    weight_ptr, lora_a_ptr, lora_b_ptr, norm_ptr,
    O, I, R,
    stride_wo, stride_wi, stride_ar, stride_ai, stride_bo, stride_br,
    scale,
    BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """n[o] = sqrt(sum_i (W[o, i] + s sum_r B[o, r] A[r, i])^2): squares of the sum itself cannot cancel below zero."""
    o_o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    o_i = tl.arange(0, BLOCK_I)
    o_r = tl.arange(0, BLOCK_R)
    m_o = o_o < O
    weight_rows = weight_ptr + o_o[:, None].to(tl.int64) * stride_wo
    b_rows = lora_b_ptr + o_o[:, None].to(tl.int64) * stride_bo
    squares = tl.zeros((BLOCK_O,), dtype=tl.float32)
    for i in range(0, I, BLOCK_I):
        m_i = i + o_i < I
        columns = (i + o_i).to(tl.int64)
        # [BLOCK_O, BLOCK_I]
        update = tl.zeros((BLOCK_O, BLOCK_I), dtype=tl.float32)
        for r in range(0, R, BLOCK_R):
            m_r = r + o_r < R
            b_b = tl.load(b_rows + (r + o_r)[None, :] * stride_br, mask=m_o[:, None] & m_r[None, :], other=0.0)
            b_a = tl.load(
                lora_a_ptr + (r + o_r)[:, None].to(tl.int64) * stride_ar + columns[None, :] * stride_ai,
                mask=m_r[:, None] & m_i[None, :], other=0.0,
            )  # fmt: skip
            update = tl.dot(b_b.to(tl.float32), b_a.to(tl.float32), update, input_precision="ieee")
        b_w = tl.load(weight_rows + columns[None, :] * stride_wi, mask=m_o[:, None] & m_i[None, :], other=0.0)
        adapted = b_w.to(tl.float32) + scale * update
        squares += tl.sum(adapted * adapted, axis=1)
    tl.store(norm_ptr + o_o, tl.sqrt_rn(squares), mask=m_o)


def forward(weight: Tensor, lora_a: Tensor, lora_b: Tensor, *, scale: float) -> Tensor:
    """See eager.forward."""
    rows, columns = weight.shape
    norm = torch.empty(rows, dtype=torch.float32, device=weight.device)
    if not rows:
        return norm
    block_o = 32
    column_norm_kernel[(triton.cdiv(rows, block_o),)](
        weight, lora_a, lora_b, norm,
        rows, columns, lora_a.shape[0],
        *weight.stride(), *lora_a.stride(), *lora_b.stride(),
        scale,
        BLOCK_O=block_o, BLOCK_I=64, BLOCK_R=16,
        num_warps=4, num_stages=3, enable_fp_fusion=True,
    )  # fmt: skip
    return norm
