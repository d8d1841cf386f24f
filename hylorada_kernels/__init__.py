"""Fused low-rank adapters and shifted sparse attention, in PyTorch and in Triton.

One linear layer is LoRA, rsLoRA, DoRA and HyLoRADA; attention within shifted groups leaks nothing from the future.
"""

from .backend import using
from .nn import HybridLinear, ShiftedAttention
from .ops.column_norm import column_norm, column_norms
from .ops.hybrid_linear import hybrid_linear
from .ops.shifted_attention import shifted_attention

__version__ = "0.1.0"
__all__ = [
    "HybridLinear",
    "ShiftedAttention",
    "column_norm",
    "column_norms",
    "hybrid_linear",
    "shifted_attention",
    "using",
]
