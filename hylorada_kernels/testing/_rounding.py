"""Rounding of float32 arrays to the formats that numpy lacks: bfloat16 and the tensor cores' tf32."""

import numpy as np


def bf16_from_f32(values: np.ndarray) -> np.ndarray:
    """uint16 bit patterns of `values` rounded to nearest even, NaN kept, as the GPU's cast does."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    # half an ulp, less one unless the kept part is odd; what it carries over is the rounding
    half = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    rounded = ((bits + half) >> np.uint32(16)).astype(np.uint16)
    quiet_nan = (bits >> np.uint32(16)).astype(np.uint16) | np.uint16(0x40)
    return np.where(np.isnan(values), quiet_nan, rounded)


def f32_from_bf16(bits: np.ndarray) -> np.ndarray:
    """float32 values of bfloat16 bit patterns; exact."""
    return (np.ascontiguousarray(bits).astype(np.uint32) << np.uint32(16)).view(np.float32)


def tf32_from_f32(values: np.ndarray) -> np.ndarray:
    """`values` as a tensor core reads them: the low 13 mantissa bits are dropped, not rounded.

    Triton hands float32 to tf32 matrix instructions without a conversion, and the hardware ignores those bits.
    """
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    truncated = (bits & np.uint32(0xFFFFE000)).view(np.float32)
    return np.where(np.isnan(values), values, truncated)
