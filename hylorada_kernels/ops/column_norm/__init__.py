"""The norm of each output row of an adapted weight, without building the adapted weight."""

from .op import column_norm, column_norms

__all__ = ["column_norm", "column_norms"]
