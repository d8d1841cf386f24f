"""The backends that kernel tests run on; uninitialised memory is NaN there."""

import pytest
import torch

from hylorada_kernels import backend as dispatch
from hylorada_kernels import testing
from hylorada_kernels.ops import _products
from hylorada_kernels.testing.poison import poisoned_empty

BACKENDS = ["eager", "eager-onednn", "triton"]
if torch.cuda.is_available():
    BACKENDS += [pytest.param(name, marks=pytest.mark.gpu) for name in ("eager-cuda", "triton-cuda")]


@pytest.fixture(autouse=True)
def nan_in_uninitialised_memory():
    with poisoned_empty():
        yield


def choose_library(has_onednn: bool, monkeypatch):
    """Products with or without oneDNN, of any size, whatever the processor."""
    if has_onednn and not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this PyTorch was built without oneDNN, whose products would be tested")
    monkeypatch.setattr(_products, "has_quicker_onednn", lambda: has_onednn)
    monkeypatch.setattr(_products, "ONEDNN_WORK", 1)


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    """ "eager" and "triton" (interpreted) on the CPU; with a GPU both on it too: new tensors then land there.

    "eager" is with MKL's products, or whichever library PyTorch was built with, and with oneDNN's, of any size.
    """
    name, _, where = request.param.partition("-")
    choose_library(where == "onednn", monkeypatch)
    device = "cuda" if where == "cuda" else "cpu"
    if name == "triton" and device == "cpu":
        if not dispatch.HAS_TRITON:
            pytest.skip("needs Triton")
        from hylorada_kernels.testing import interpreter

        if not interpreter.supported():
            pytest.skip(interpreter.requires_interpreter)
        testing.interpret()
    with torch.device(device):
        yield name
