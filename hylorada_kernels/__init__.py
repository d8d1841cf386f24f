"""Fused low-rank adapters: one linear layer that is LoRA, rsLoRA, DoRA and HyLoRADA, in PyTorch and in Triton."""

from .backend import using
from .nn import HybridLinear
from .ops.column_norm import column_norm
from .ops.hybrid_linear import hybrid_linear

__version__ = "0.1.0"
__all__ = ["HybridLinear", "column_norm", "hybrid_linear", "using"]
