"""What must hold for every input, on a fixed draw of cases; `make fuzz` draws many more."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hylorada_kernels import backend as dispatch
from hylorada_kernels import testing
from hylorada_kernels.testing import interpreter
from tests.properties.properties import (
    attention_cases,
    check_attention,
    check_linear,
    check_model,
    check_norm,
    linear_cases,
    model_cases,
)

fixed = {"deadline": None, "derandomize": True, "database": None, "suppress_health_check": list(HealthCheck)}
INTERPRETED = [torch.float32, torch.float16, torch.bfloat16]


@settings(max_examples=300, **fixed)
@given(case=linear_cases())
def test_the_adapted_linear_is_the_formula(case):
    check_linear(*case)


@settings(max_examples=200, **fixed)
@given(case=linear_cases())
def test_the_column_norm_is_the_formula(case):
    check_norm(case[0])


@settings(max_examples=200, **fixed)
@given(case=attention_cases())
def test_shifted_attention_is_the_dense_predicate(case):
    check_attention(case)


@pytest.fixture(autouse=True)
def one_thread():
    """The cases are too small to share."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def interpreted():
    if not dispatch.HAS_TRITON or not interpreter.supported():
        pytest.skip(interpreter.requires_interpreter)
    testing.interpret()


@settings(max_examples=15, **fixed)
@given(case=linear_cases(INTERPRETED), route=st.sampled_from(["fused", "one_pass", "library"]))
def test_the_interpreted_linear_is_the_formula(interpreted, case, route):
    check_linear(*case, backend="triton", route=route)


@settings(max_examples=15, **fixed)
@given(case=linear_cases(INTERPRETED))
def test_the_interpreted_column_norm_is_the_formula(interpreted, case):
    check_norm(case[0], "triton")


@settings(max_examples=8, **fixed)
@given(case=attention_cases(INTERPRETED, longest=9))
def test_interpreted_attention_is_the_dense_predicate(interpreted, case):
    check_attention(case, "triton")


@settings(max_examples=30, **fixed)
@given(case=model_cases())
def test_a_whole_model_keeps_its_equalities(case):
    check_model(case)
