"""The one choice between the eager and the Triton implementation of an op.

Every op calls `choose` once, in its forward, and hands the answer to its backward. `HYLORADA_BACKEND` (auto, eager or
triton) is the start value, the only thing that the package reads from the environment; `using` overrides it for a block
of code.
"""

import functools
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar

import torch
from torch import Tensor

CHOICES = ("auto", "eager", "triton")
HAS_TRITON = importlib.util.find_spec("triton") is not None
TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _checked(choice: str, source: str) -> str:
    if choice not in CHOICES:
        raise ValueError(f"{source} is {choice!r}; it must be one of {', '.join(CHOICES)}")
    return choice


_start = _checked(os.environ.get("HYLORADA_BACKEND", "auto"), "HYLORADA_BACKEND")
_requested: ContextVar[str] = ContextVar("hylorada_backend", default=_start)
# torch.compile guards on a global and retraces when it changes, but cannot read a ContextVar
_requested_when_tracing = _start


@contextmanager
def using(choice: str) -> Iterator[None]:
    """Run a block with one backend: "auto" (by device), "eager" (PyTorch) or "triton" (raises where it cannot run).

    The choice belongs to the current thread (or asyncio task); a compiled function follows the thread that chose last.
    A backward pass uses what its forward used. On a GPU the forward that a checkpoint repeats runs in autograd's own
    thread, which never chose: give `checkpoint` a context_fn that chooses there, or set HYLORADA_BACKEND.

        with using("eager"):
            y = layer(x)
    """
    global _requested_when_tracing
    token = _requested.set(_checked(choice, "using(...)"))
    _requested_when_tracing = choice
    try:
        yield
    finally:
        _requested.reset(token)
        _requested_when_tracing = _requested.get()


def requested() -> str:
    """What `using` or the environment asks for in this thread: "auto", "eager" or "triton"."""
    return _requested.get()


def choose(x: Tensor) -> str:
    """ "eager" or "triton" for an op whose activations are `x`; RuntimeError where an explicit "triton" cannot run."""
    requested = _requested_when_tracing if torch.compiler.is_compiling() else _requested.get()
    if requested == "eager":
        return "eager"
    if requested == "auto":
        return (
            "triton"
            if x.is_cuda and HAS_TRITON and x.dtype in TRITON_DTYPES and has_matrix_units(x.device)
            else "eager"
        )
    obstacle = why_not_triton(x)
    if obstacle:
        raise RuntimeError(f'backend "triton" was asked for, but {obstacle}')
    return "triton"


def why_not_triton(x: Tensor) -> str | None:
    """What keeps a Triton kernel from running on `x`, and what would help; None if nothing does."""
    if not HAS_TRITON:
        return 'Triton is not installed; install triton, or use using("auto")'
    if x.dtype not in TRITON_DTYPES:
        return f'the kernels take float32, float16 and bfloat16, not {x.dtype}; use using("eager")'
    if not x.is_cuda and not interpreted():
        return (
            f"the tensors are on {x.device}; move them to a GPU, or call hylorada_kernels.testing.interpret() to run "
            'the kernels in the interpreter, or use using("auto")'
        )
    return None


def interpreted() -> bool:
    """Whether hylorada_kernels.testing.interpret() was called in this process."""
    return _interpreter["active"]


_interpreter = {"active": False}


def set_interpreted() -> None:
    """Called by hylorada_kernels.testing.interpret(): kernels may now be launched with CPU and meta tensors."""
    _interpreter["active"] = True


@functools.cache
def _compute_capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def has_matrix_units(device: torch.device) -> bool:
    """Whether Triton emits matrix instructions for this GPU (NVIDIA: from sm_80 on).

    A process without a driver can only be tracing fake CUDA tensors: it takes the branch that a current GPU would take.
    """
    if not torch.cuda.is_available() or torch.version.hip:
        return True
    return _compute_capability(device) >= (8, 0)


def is_plain(tensor: Tensor) -> bool:
    """Whether it is of no subclass: quantized, sharded and fake tensors make their products and copies themselves."""
    return type(tensor) in (Tensor, torch.nn.Parameter)


def runs_directly(tensor: Tensor, choice: str) -> bool:
    """Whether an op may call its implementation without going through the registered custom op, which saves 10 us.

    A trace (torch.compile, export), tensor subclasses (fake tensors) and meta tensors must see the custom op, which is
    opaque to them; meta tensors given to Triton are there to be compiled for.
    """
    has_values = choice == "triton" or not tensor.is_meta
    return is_plain(tensor) and has_values and not torch.compiler.is_compiling()


def is_at_hand(tensor: Tensor) -> bool:
    """Whether an op on it runs in PyTorch on the CPU, and directly: `choose` and `runs_directly` in one short call."""
    return (
        tensor.is_cpu
        and is_plain(tensor)
        and not torch.compiler.is_compiling()
        and _requested.get() in ("auto", "eager")
    )


def on_device_of(tensor: Tensor):
    """Kernels are launched on the current GPU: make it the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda and torch.cuda.is_available() else nullcontext()


def no_autocast(tensor: Tensor):
    """Autocast off for the tensor's device: inside an op the dtypes are settled."""
    kind = tensor.device.type
    return torch.autocast(kind, enabled=False) if _is_autocast(kind) else nullcontext()


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """The dtype that autocast asks for, None where it is off or the tensor is fp64 (which it leaves alone)."""
    kind = tensor.device.type
    return torch.get_autocast_dtype(kind) if _is_autocast(kind) and tensor.dtype != torch.float64 else None


def _is_autocast(kind: str) -> bool:
    return (kind in ("cpu", "cuda") or torch.amp.is_autocast_available(kind)) and torch.is_autocast_enabled(kind)
