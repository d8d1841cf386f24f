"""Matrix products in PyTorch, by the library and laid down in the way that a processor is quickest at.

PyTorch hands fp32 to MKL. oneDNN, which it brings as well and uses for 16 bits, is quicker at it on AMD's processors
with AVX-512 (`benchmarks/bench_products.py`); it compiles for each new shape, as it does in 16 bits.
`torch.backends.mkldnn.enabled = False` turns it off.

With MKL a product of which one side, the rank, is thin is taken in groups. A library splits a product between threads
along its large sides, which is rarely how the thread that wrote the operand was chosen: lines travel between the caches
of the cores, and a thin product has too little work to hide it. A batch of products of a few rows each is split by
rows, as writing is. Measured in fp32; 16-bit products are as quick whole.
"""

import functools
import platform
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import backend

# multiplications below which a call of oneDNN costs more than it saves
ONEDNN_WORK = 1 << 20
# from this rank on a whole product is as quick
THIN_RANK = 16
# rows, or columns, of each product of a batch
GROUP = 64
# elements of the wide matrix below which a batch, or oneDNN's sum of outer products, costs more than it saves
BATCH_ELEMENTS = 1 << 19


def add_linear(other: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """other + x @ weight.T, rounded once: (T, N), (T, K) and (N, K) -> (T, N). `other` may be overwritten."""
    if x.dtype == torch.float32 and _suits_onednn(x, weight, len(weight)):
        return torch.ops.mkldnn._linear_pointwise.binary(x, other, weight, None, "add")
    return other.addmm_(x, weight.T)


def add_low_rank(
    x: Tensor, weight: Tensor, thin: Tensor, factor: Tensor, scale: float = 1.0, bias: Tensor | None = None
) -> Tensor:
    """x @ weight.T + scale * thin @ factor + bias, a 16-bit sum rounded once.

    (T, K), (N, K), (T, R), (R, N) and (N,) -> (T, N). oneDNN's product is the first, for MKL's can be added to it in
    place and its own cannot.
    """
    if x.dtype == torch.float32 and _suits_onednn(x, weight, len(weight)):
        return _onednn(x, weight, bias).addmm_(thin, factor, alpha=scale)
    low = project_up(thin, factor, scale) if bias is None else torch.addmm(bias, thin, factor, alpha=scale)
    return low.addmm_(x, weight.T)


def project_down(wide: Tensor, factor: Tensor, *, in_groups: bool = False) -> Tensor:
    """wide @ factor.T: (T, K) and (R, K) -> (T, R).

    `in_groups`: where R is thin, whatever the size and the library. A weight that was just widened is taken best so.
    """
    if wide.dtype != torch.float32:
        return F.linear(wide, factor)
    (rows, _), rank = wide.shape, factor.shape[0]
    is_thin = _is_thin(wide, rank)
    if not (is_thin and in_groups) and _suits_onednn(wide, factor, rank):
        return _onednn(wide, factor)
    if not is_thin:
        return F.linear(wide, factor)
    # by thin columns no vector is filled
    factor = factor.contiguous()
    whole = rows - rows % GROUP
    if not whole or not (in_groups or wide.numel() >= BATCH_ELEMENTS):
        return F.linear(wide, factor)
    groups = wide[:whole].unflatten(0, (-1, GROUP))
    product = torch.bmm(factor.expand(len(groups), -1, -1), groups.mT).mT.contiguous().view(whole, rank)
    return product if whole == rows else torch.cat([product, F.linear(wide[whole:], factor)])


def project_up(thin: Tensor, factor: Tensor, scale: float = 1.0) -> Tensor:
    """scale * thin @ factor, rounded once: (T, R) and (R, N) -> (T, N). A scale other than 1 costs a pass."""
    if scale != 1:
        return torch.addmm(thin.new_empty(()), thin, factor, beta=0, alpha=scale)
    if thin.dtype != torch.float32:
        return torch.mm(thin, factor)
    (rows, rank), columns = thin.shape, factor.shape[1]
    if _suits_onednn(thin, factor, columns):
        return _onednn(thin, factor.T)
    if rows % GROUP or not _is_thin(thin, rank) or rows * columns < BATCH_ELEMENTS:
        return torch.mm(thin, factor)
    # no view is returned: a function's output that is one may not be edited in place
    product, groups = thin.new_empty(rows, columns), thin.unflatten(0, (-1, GROUP))
    torch.bmm(groups, factor.expand(len(groups), -1, -1), out=product.unflatten(0, (-1, GROUP)))
    return product


def outer_sum(thin: Tensor, wide: Tensor, *, is_transposed: bool = False) -> Tensor:
    """thin.T @ wide, a sum of outer products of rows: (T, R) and (T, K) -> (R, K), or (K, R), any layout."""
    if wide.dtype != torch.float32:
        product = torch.mm(thin.T, wide)
        return product.T if is_transposed else product
    rank, columns = thin.shape[1], wide.shape[1]
    is_large = wide.numel() >= BATCH_ELEMENTS
    if is_large and _suits_onednn(thin, wide, columns):
        product = _onednn(thin.T, wide.T)
    elif is_large and _is_thin(wide, rank) and columns % GROUP == 0:
        groups = wide.unflatten(1, (-1, GROUP)).movedim(1, 0)
        product = torch.bmm(thin.T.expand(len(groups), -1, -1), groups)
        if is_transposed:
            return product.mT.reshape(columns, rank)
        return product.movedim(0, 1).reshape(rank, columns)
    elif wide.is_cpu and rank >= THIN_RANK:
        product = torch.mm(wide.T, thin).T
    else:
        product = torch.mm(thin.T, wide)
    return product.T if is_transposed else product


def _is_thin(tensor: Tensor, rank: int) -> bool:
    return tensor.is_cpu and rank < THIN_RANK


def takes_onednn() -> bool:
    """Whether large fp32 products on the CPU are oneDNN's."""
    return has_quicker_onednn() and torch.backends.mkldnn.enabled


def _suits_onednn(left: Tensor, right: Tensor, columns: int) -> bool:
    """Whether an fp32 product of these, or of their transposes, that has so many columns is oneDNN's."""
    return (
        left.is_cpu
        and left.numel() * columns >= ONEDNN_WORK
        and takes_onednn()
        and backend.is_plain(left)
        and backend.is_plain(right)
    )


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")


@functools.cache
def has_quicker_onednn() -> bool:
    """Whether fp32 products of PyTorch's oneDNN are quicker than those of its MKL: on AMD's processors with AVX-512."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkl.is_available():
        return False
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    try:
        description = Path("/proc/cpuinfo").read_text()
    except OSError:
        # what Windows says
        description = platform.processor()
    return "AuthenticAMD" in description
