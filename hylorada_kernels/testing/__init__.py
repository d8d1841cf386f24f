"""What tests and benchmarks of the ops share: inputs, references, the error budget, the door to the interpreter."""

from .budget import allowed_error, assert_within, relative_error
from .inputs import LinearInputs, linear_inputs
from .reference import ideal_linear, linear_amplitudes, reference_linear, reference_norm

__all__ = [
    "LinearInputs",
    "allowed_error",
    "assert_within",
    "ideal_linear",
    "interpret",
    "linear_amplitudes",
    "linear_inputs",
    "reference_linear",
    "reference_norm",
    "relative_error",
]


def interpret(**options) -> None:
    """Let the Triton kernels run on CPU tensors, with bounds, race and NaN checks; see `interpreter.interpret`."""
    from .. import backend
    from . import interpreter

    interpreter.interpret(**options)
    backend.set_interpreted()
