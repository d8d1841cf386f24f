"""Products with a low-rank factor, for the eager paths."""

import torch
from torch import Tensor
from torch.nn import functional as F


def thin_product(x: Tensor, factor: Tensor) -> Tensor:
    """x factor^T: x (T, I), factor (R, I) with few rows, one dtype -> (T, R).

    On the CPU the BLAS behind torch.mm reaches a fraction of its speed at such shapes; the same sum as a convolution
    with 1x1 kernels over a channels-last image of T pixels takes half the time in fp32. 16-bit products gain nothing.
    """
    if x.dtype != torch.float32 or not (x.is_cpu and x.is_contiguous() and x.numel() and torch.backends.mkldnn.enabled):
        return x @ factor.T
    image = x.view(1, 1, *x.shape).permute(0, 3, 1, 2)
    return F.conv2d(image, factor[:, :, None, None]).permute(0, 2, 3, 1).reshape(x.shape[0], factor.shape[0])
