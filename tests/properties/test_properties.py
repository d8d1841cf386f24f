"""What must hold for every input, on a fixed draw of cases; `make fuzz` draws many more."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hylorada_kernels import backend as dispatch
from hylorada_kernels import testing
from hylorada_kernels.testing import interpreter, linear_inputs
from hylorada_kernels.testing.attention import attention_inputs
from tests.kernels.parity import assert_parity
from tests.properties.properties import (
    attention_cases,
    check_attention,
    check_linear,
    check_model,
    check_norm,
    linear_cases,
    model_cases,
)

pytestmark = pytest.mark.usefixtures("one_thread")

fixed = {"deadline": None, "derandomize": True, "database": None, "suppress_health_check": list(HealthCheck)}
INTERPRETED = [torch.float32, torch.float16, torch.bfloat16]


# the smallest cases of what a drawn case is granted beyond the budget of the tests of the ops; without it they fail


def only_granted_where_drawn(given, backend="eager", **options):
    with pytest.raises(AssertionError, match="exceeds the budget"):
        assert_parity(given, backend, **options)
    assert_parity(given, backend, drawn=True, **options)


def small(*sizes, **options):
    return linear_inputs(*sizes, **{"bias": False, "token_scale": False} | options)


def test_a_norm_of_terms_that_cancel_is_granted_their_rounding():
    given = small(1, 1, 2, 1, blend=False, scale=1.0)
    given.lora_b = -(1 - 2.0**-7) * given.weight / given.lora_a
    only_granted_where_drawn(given)


@pytest.mark.parametrize(
    "weight, lora_a, lora_b, scale",
    [
        (-0.2225, [-1.0634, 1.1205], [-0.4807, -0.5119], 16.0),
        (0.0571, [-1.6075, -0.8524, 1.0167], [0.1379, 0.2459, 0.2984], 0.7),
    ],
)
def test_terms_that_cancel_within_the_update_cost_a_norm_digits(weight, lora_a, lora_b, scale):
    given = small(1, 1, 1, len(lora_a), magnitude=False, scale=scale)
    given.weight, given.lora_a = torch.tensor([[weight]]), torch.tensor(lora_a)[:, None]
    given.lora_b = torch.tensor([lora_b])
    check_norm(given)


def test_a_beta_near_one_is_granted_its_rounding():
    given = small(1, 2, 1, 1)
    given.blend.fill_(2.9)
    given.magnitude *= 256
    given.lora_b.zero_()
    only_granted_where_drawn(given)


def test_sinks_carry_the_norm_of_a_gradient_alone():
    given = attention_inputs(
        1, 1, 1, 4, 1, group_size=1, dtype=torch.float16, sink_tokens=1, causal=False, seed=207
    )  # fmt: skip
    check_attention(given)


@pytest.mark.parametrize("dtype, tokens, columns, seed", [(torch.bfloat16, 1, 2, 208), (torch.float16, 5, 1, 109)])
def test_few_roundings_may_be_unlucky_together(dtype, tokens, columns, seed):
    sizes, options = {1: ((2, 1), {}), 5: ((1, 5), {"token_scale_target": "delta"})}[tokens]
    only_granted_where_drawn(
        small(tokens, columns, *sizes, dtype=dtype, magnitude=False, token_scale=True, seed=seed, **options)
    )


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


@pytest.fixture
def interpreted():
    if not dispatch.HAS_TRITON or not interpreter.supported():
        pytest.skip(interpreter.requires_interpreter)
    testing.interpret()


def test_a_bias_far_above_the_product_hides_its_digits_in_a_kept_output(interpreted):
    given = small(1, 1, 1, 1, bias=True)
    given.x *= 2.0**-6
    only_granted_where_drawn(given, "triton", route="one_pass", save_output=True)
    assert_parity(given, "triton", route="one_pass", save_output=False)


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
