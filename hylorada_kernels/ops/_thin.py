"""Products of which one side, the rank, is thin, in PyTorch, laid down as a processor is quickest at.

A library splits a product between threads along its large sides, which is rarely how the thread that wrote the operand
was chosen: lines travel between the caches of the cores, and a thin product has too little work to hide it. A batch of
products of a few rows each is split by rows, as writing is. Measured in fp32; 16-bit products are as quick whole.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

# from this rank on a whole product is as quick
THIN_RANK = 16
# rows, or columns, of each product of a batch
GROUP = 64
# elements of the wide matrix below which the calls of a batch cost more than it saves
BATCH_ELEMENTS = 1 << 19


def project_down(wide: Tensor, factor: Tensor, *, batch_from: int = BATCH_ELEMENTS) -> Tensor:
    """wide @ factor.T: (T, K) and (R, K) -> (T, R). `batch_from`: the fewest elements of a matrix to take in groups."""
    (rows, _), rank = wide.shape, factor.shape[0]
    if not _is_thin(wide, rank):
        return F.linear(wide, factor)
    # by thin columns no vector is filled
    factor = factor.contiguous()
    whole = rows - rows % GROUP
    if not whole or wide.numel() < batch_from:
        return F.linear(wide, factor)
    groups = wide[:whole].unflatten(0, (-1, GROUP))
    product = torch.bmm(factor.expand(len(groups), -1, -1), groups.mT).mT.contiguous().view(whole, rank)
    return product if whole == rows else torch.cat([product, F.linear(wide[whole:], factor)])


def project_up(thin: Tensor, factor: Tensor, scale: float = 1.0) -> Tensor:
    """scale * thin @ factor, rounded once: (T, R) and (R, N) -> (T, N). A scale other than 1 costs a pass."""
    (rows, rank), columns = thin.shape, factor.shape[1]
    if scale != 1:
        return torch.addmm(thin.new_empty(()), thin, factor, beta=0, alpha=scale)
    if rows % GROUP or not _is_thin(thin, rank) or rows * columns < BATCH_ELEMENTS:
        return torch.mm(thin, factor)
    groups = thin.unflatten(0, (-1, GROUP))
    return torch.bmm(groups, factor.expand(len(groups), -1, -1)).flatten(0, 1)


def outer_sum(thin: Tensor, wide: Tensor, *, is_transposed: bool = False) -> Tensor:
    """thin.T @ wide, a sum of outer products of rows: (T, R) and (T, K) -> (R, K), or (K, R), any layout."""
    rank, columns = thin.shape[1], wide.shape[1]
    if _is_thin(wide, rank) and columns % GROUP == 0 and wide.numel() >= BATCH_ELEMENTS:
        groups = wide.unflatten(1, (-1, GROUP)).movedim(1, 0)
        product = torch.bmm(thin.T.expand(len(groups), -1, -1), groups)
        if is_transposed:
            return product.mT.reshape(columns, rank)
        return product.movedim(0, 1).reshape(rank, columns)
    if wide.is_cpu and wide.dtype == torch.float32 and rank >= THIN_RANK:
        product = torch.mm(wide.T, thin)
        return product if is_transposed else product.T
    product = torch.mm(thin.T, wide)
    return product.T if is_transposed else product


def _is_thin(tensor: Tensor, rank: int) -> bool:
    return tensor.is_cpu and tensor.dtype == torch.float32 and rank < THIN_RANK
