"""A frozen linear layer with a low-rank update, a learned row magnitude and a blend between the two."""

from .op import hybrid_linear

__all__ = ["hybrid_linear"]
