"""Causal or bidirectional attention within groups of tokens, shifted for some heads, with optional sink tokens."""

from .op import shifted_attention

__all__ = ["shifted_attention"]
