"""The backends that kernel tests run on; uninitialised memory is NaN there."""

import pytest
import torch

from hylorada_kernels import backend as dispatch
from hylorada_kernels import testing
from hylorada_kernels.testing.poison import poisoned_empty

BACKENDS = ["eager", "triton"]
if torch.cuda.is_available():
    BACKENDS += [pytest.param(name, marks=pytest.mark.gpu) for name in ("eager-cuda", "triton-cuda")]


@pytest.fixture(autouse=True)
def nan_in_uninitialised_memory():
    with poisoned_empty():
        yield


@pytest.fixture(params=BACKENDS)
def backend(request):
    """ "eager" and "triton" (interpreted) on the CPU; with a GPU both on it too: new tensors then land there."""
    name, _, device = request.param.partition("-")
    if name == "triton" and not device:
        if not dispatch.HAS_TRITON:
            pytest.skip("needs Triton")
        from hylorada_kernels.testing import interpreter

        if not interpreter.supported():
            pytest.skip(interpreter.requires_interpreter)
        testing.interpret()
    with torch.device(device or "cpu"):
        yield name
