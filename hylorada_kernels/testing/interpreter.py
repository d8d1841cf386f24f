"""Run Triton kernels on CPU tensors, with the checks and the arithmetic that Triton's own interpreter lacks.

After `interpret()`, a kernel launched on CPU tensors is interpreted, one launched on meta tensors inside `aot(target)`
is compiled for that target, and one launched on a GPU's tensors runs as always. No GPU, driver or environment variable
is needed. bfloat16 is exact, tf32 dots read what a tensor core reads, autotuned kernels take the first configuration
that pruning leaves. What a GPU would not forgive is an error:

- a load, store or atomic outside the tensor it addresses, gaps between the rows of a view included: OutOfBounds
- an element that two programs of one launch touch and at least one writes, unless all use atomics: Race
- `and`, `or`, `not` or `if` on a block tensor: ValueError
- lanes masked off in a load without `other` hold NaN (the largest value, for integers), so that their use shows

Not noticed: shared-memory races, 32-bit overflow of offsets, and what only the compiler rejects: compile with aot() as
well. Loop variables are Python ints here: write tl.cast(k, tl.int64), not k.to(tl.int64). Import libdevice as a module.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ._memory import Bytes, OutOfBounds, Race

if TYPE_CHECKING:
    import torch

    from ._launch import Launch

try:
    import triton
except ImportError:
    triton = None

__all__ = [
    "KNOWN_TRITON",
    "Bytes",
    "OutOfBounds",
    "Race",
    "interpret",
    "launches",
    "reachable",
    "requires_interpreter",
    "supported",
    "traffic",
]

# the harness leans on internals of Triton: these are the versions it was tested with
KNOWN_TRITON = ("3.6", "3.7", "3.8", "3.9")


def _triton_version() -> str | None:
    return getattr(triton, "__version__", None)


def _requirement() -> str:
    version = _triton_version()
    found = f"Triton {version} is installed" if version else "Triton is not installed"
    return f"the interpreter needs Triton {', '.join(KNOWN_TRITON[:-1])} or {KNOWN_TRITON[-1]}; {found}"


# the reason to give where a test is skipped because `supported()` is False
requires_interpreter = _requirement()


def supported() -> bool:
    """Whether the installed Triton is one that this harness knows."""
    version = _triton_version()
    return version is not None and ".".join(version.split(".")[:2]) in KNOWN_TRITON


def interpret(race: bool = True) -> None:
    """Interpret every later launch on CPU tensors; race: look for data races. Calling it again only sets `race`."""
    install().SESSION.check_races = race


def install() -> Any:
    """Patch Triton once, and return the module that holds the session; RuntimeError where that cannot work."""
    if not supported():
        raise RuntimeError(f"{_requirement()}; install one of those, or run on a GPU without interpret()")
    if triton.knobs.runtime.interpret:
        raise RuntimeError(
            "TRITON_INTERPRET is set, and Triton's own interpreter would run, which gets bfloat16 wrong and checks "
            "nothing: unset it"
        )
    from . import _launch

    _launch.install()
    return _launch


@contextmanager
def launches() -> Iterator[list[str]]:
    """Collect the names of the kernels launched inside, in order, interpreted or on a GPU (tuning runs included)."""
    with _logged(install().SESSION.names) as names:
        yield names


@contextmanager
def traffic() -> "Iterator[list[Launch]]":
    """Collect a Launch for every interpreted launch inside: kernel, grid, and distinct bytes of each tensor argument.

    `launch.arguments[name].read` and `.written` are bytes of one argument, `launch.read` and `launch.written` the sums.
    A tensor passed as two arguments counts as both.
    """
    with _logged(install().SESSION.traffic) as log:
        yield log


@contextmanager
def reachable(*tensors: "torch.Tensor") -> Iterator[None]:
    """Let the launches inside touch tensors that they find by address, in a table of pointers.

    A stray address counts for no tensor, or for the neighbour that it hits: only its first and last element are guarded
    by what lies around them.
    """
    with _logged(install().SESSION.reachable) as admitted:
        admitted.extend(tensors)
        yield


@contextmanager
def _logged(logs: list[list]) -> Iterator[list]:
    """A new list among those appended to, for as long as the block lasts."""
    log: list = []
    logs.append(log)
    try:
        yield log
    finally:
        # by identity: lists that hold the same are equal
        logs[:] = [other for other in logs if other is not log]
