"""The choice of a backend: what each request gives, what is refused, and that it stays in its thread."""

import subprocess
import sys
import threading

import pytest
import torch

from hylorada_kernels import backend, column_norm, using

X = torch.zeros(2, 2)


def test_auto_is_eager_on_the_cpu():
    with using("auto"):
        assert backend.choose(X) == "eager"


def test_auto_is_triton_for_a_traced_gpu_and_eager_for_fp64_there():
    from torch._subclasses.fake_tensor import FakeTensorMode

    if not backend.HAS_TRITON:
        pytest.skip("needs Triton")
    with FakeTensorMode(allow_non_fake_inputs=True), using("auto"):
        assert backend.choose(torch.empty(2, device="cuda")) == "triton"
        assert backend.choose(torch.empty(2, device="cuda", dtype=torch.float64)) == "eager"


def test_an_unknown_choice_is_named():
    with pytest.raises(ValueError, match="'cuda'; it must be one of auto, eager, triton"), using("cuda"):
        pass


def test_an_unknown_choice_in_the_environment_is_named():
    program = "import os; os.environ['HYLORADA_BACKEND'] = 'fast'; import hylorada_kernels"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "HYLORADA_BACKEND is 'fast'; it must be one of auto, eager, triton" in result.stderr


def test_triton_in_fp64_is_refused_with_the_way_out():
    if not backend.HAS_TRITON:
        pytest.skip("needs Triton")
    factors = torch.zeros(3, 2).double(), torch.zeros(1, 2).double(), torch.zeros(3, 1).double()
    with using("triton"), pytest.raises(RuntimeError, match=r'not torch.float64; use using\("eager"\)'):
        column_norm(*factors, scale=1.0)


def test_triton_on_cpu_tensors_without_the_interpreter_is_refused_with_the_way_out():
    if not backend.HAS_TRITON:
        pytest.skip("needs Triton")
    program = (
        "import torch, hylorada_kernels as k\n"
        "with k.using('triton'): k.column_norm(torch.zeros(3, 2), torch.zeros(1, 2), torch.zeros(3, 1), scale=1.0)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "the tensors are on cpu" in result.stderr
    assert "hylorada_kernels.testing.interpret()" in result.stderr


def test_the_choice_ends_with_its_block_and_stays_in_its_thread():
    seen = []
    with using("eager"):
        thread = threading.Thread(target=lambda: seen.append(backend._requested.get()))
        thread.start()
        thread.join()
        assert backend._requested.get() == "eager"
    assert seen == [backend._requested.get()] == ["auto"]
