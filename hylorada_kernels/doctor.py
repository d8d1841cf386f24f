"""Says what was found on this machine, and which path each op takes here and why."""

import platform
import sys

import torch

from . import backend
from .ops import _products

OPS = ("column_norm", "hybrid_linear", "shifted_attention")
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def findings() -> list[str]:
    """Lines to print: versions, the CPU, the GPU, the backend that was asked for, and a line for each op and dtype."""
    lines = [
        f"python   {platform.python_version()}, {platform.system()} {platform.machine()}",
        f"torch    {torch.__version__}, {torch.get_num_threads()} threads",
        f"triton   {_triton()}",
        f"cpu      {_cpu()}",
        f"gpu      {_gpu()}",
        f"backend  {backend.requested()}",
    ]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for dtype in DTYPES:
        path, reason = _path(torch.empty(0, dtype=dtype, device=device))
        name = str(dtype).removeprefix("torch.")
        lines += [f"{op:<18} {name:<9} on {device}: {path}, {reason}" for op in OPS]
    if device == "cuda" and backend.HAS_TRITON:
        lines.append(f"hybrid_linear      {_routes()}")
    return lines


def _triton() -> str:
    # what it is distributed as has several names; the kernels have imported it
    return sys.modules["triton"].__version__ if backend.HAS_TRITON else "not installed"


def _cpu() -> str:
    library = "oneDNN" if _products.takes_onednn() else "PyTorch's BLAS"
    return f"{torch.backends.cpu.get_cpu_capability()}, fp32 products of layers by {library}"


def _gpu() -> str:
    if not torch.cuda.is_available():
        built = "built for CUDA, but sees no device" if torch.version.cuda else "a build without CUDA"
        return f"none: this torch is {built}"
    major, minor = torch.cuda.get_device_capability()
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    return f"{torch.cuda.get_device_name()}, sm_{major}{minor}, {memory:.0f} GiB, {torch.cuda.device_count()} in all"


def _path(x: torch.Tensor) -> tuple[str, str]:
    try:
        choice = backend.choose(x)
    except RuntimeError as error:
        return "nothing", f"it raises: {error}"
    if choice == "triton":
        return "triton", "the kernels take this dtype on this device"
    if backend.requested() == "eager":
        return "eager", "that was asked for"
    if not backend.HAS_TRITON:
        return "eager", "Triton is not installed"
    if x.dtype not in backend.TRITON_DTYPES:
        return "eager", "the kernels take no fp64"
    if not x.is_cuda:
        return "eager", "the kernels need a GPU"
    return "eager", "Triton emits no matrix instructions below sm_80"


def _routes() -> str:
    from .ops.hybrid_linear import dispatch

    path = dispatch.tuning_file(torch.cuda.get_device_name())
    measured = dispatch.read_tuning(path)
    source = f"measured, from {path}" if measured is not None else "from the table; `tune` measures it"
    return f"fused up to {dispatch.machine(torch.bfloat16).fused_up_to} in-features, {source}"
