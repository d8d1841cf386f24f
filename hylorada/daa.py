"""Direct Attention Adaptation: a learned temperature and a learned distance bias for every attention head."""

from typing import Any

import torch
from torch import Tensor, nn

from .position import bucket_starts


class DirectAttention(nn.Module):
    """logits' = temperature_h logits + distance_bias_h[bucket(i - j)] in every layer, in fp32; logits at the start.

    Distances have the logarithmic buckets of PositionBias. A constant for a whole head is not learned: the softmax
    does not see it. The temperature multiplies the queries and costs nothing more. The distance bias does not fit into
    a fused attention: with it the model computes `row_attention`, in blocks of rows, without an L x L tensor.

    Parameters:
        temperature: (layers, heads) fp32; ones.
        distance_bias: (layers, heads, num_buckets) fp32; zeros. None for num_buckets 0.
    """

    starts: Tensor

    def __init__(self, layers: int, heads: int, num_buckets: int = 32, max_length: int = 32768, device: Any = None):
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(layers, heads, device=device))
        self.register_parameter("distance_bias", None)
        if num_buckets:
            self.distance_bias = nn.Parameter(torch.zeros(layers, heads, num_buckets, device=device))
            starts = torch.tensor(bucket_starts(num_buckets, max_length, "log")[1:], device=device)
            self.register_buffer("starts", starts, persistent=False)

    def scaled_query(self, layer: int, query: Tensor) -> Tensor:
        """query: (B, heads, L, D) -> temperature_h query, in query's dtype."""
        temperature = self.temperature[layer].to(query.device)[:, None, None]
        return (query * temperature).to(query.dtype)

    def bias_by_distance(self, layer: int, length: int, device: torch.device) -> Tensor | None:
        """The bias of the distances 0 to length - 1; (heads, length), or None."""
        if self.distance_bias is None:
            return None
        buckets = torch.bucketize(torch.arange(length, device=self.starts.device), self.starts, right=True)
        return self.distance_bias[layer][:, buckets].to(device)
