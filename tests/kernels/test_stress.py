"""Numbers at the ends of their ranges: what is not finite goes where it belongs, and never comes from what is."""

import pytest
import torch

from hylorada_kernels import column_norm, hybrid_linear, using
from hylorada_kernels.ops.hybrid_linear.op import adapted_weight
from hylorada_kernels.testing import linear_inputs, reference_norm, relative_error
from tests.kernels.parity import assert_parity, run

NOT_FINITE = [float("nan"), float("inf"), -float("inf")]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def output(given, backend):
    with using(backend):
        return hybrid_linear(**given.arguments())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", NOT_FINITE)
def test_a_token_that_is_not_finite_spoils_itself_alone(backend, dtype, value):
    given = linear_inputs(9, 20, 12, 4, dtype=dtype)
    expected = output(given, backend)
    given.x[4, 3] = value
    y = output(given, backend)
    assert not torch.isfinite(y[4]).any()
    others = [t for t in range(9) if t != 4]
    assert torch.equal(y[others], expected[others])


@pytest.mark.parametrize("value", NOT_FINITE)
def test_a_magnitude_that_is_not_finite_spoils_its_feature_alone(backend, value):
    given = linear_inputs(9, 20, 12, 4)
    expected = output(given, backend)
    given.magnitude[5] = value
    y = output(given, backend)
    assert not torch.isfinite(y[:, 5]).any()
    others = [o for o in range(12) if o != 5]
    assert torch.equal(y[:, others], expected[:, others])


@pytest.mark.parametrize("value", NOT_FINITE)
def test_a_gradient_that_is_not_finite_reaches_its_token_alone(backend, value):
    given = linear_inputs(9, 20, 12, 4)
    _, expected = run(given, backend)
    given.dy[4, 3] = value
    _, gradients = run(given, backend)
    others = [t for t in range(9) if t != 4]
    assert torch.equal(gradients["x"][others], expected["x"][others])
    assert not torch.isfinite(gradients["x"][4]).any()
    assert not torch.isfinite(gradients["magnitude"][3])
    features = [o for o in range(12) if o != 3]
    torch.testing.assert_close(gradients["magnitude"][features], expected["magnitude"][features])


@pytest.mark.parametrize("value", NOT_FINITE)
def test_a_row_of_the_weight_that_is_not_finite_has_a_norm_that_is_not(backend, value):
    given = linear_inputs(3, 20, 12, 4)
    with using(backend):
        expected = column_norm(given.weight, given.lora_a, given.lora_b, scale=given.scale)
        given.weight[7, 2] = value
        norm = column_norm(given.weight, given.lora_a, given.lora_b, scale=given.scale)
    assert not torch.isfinite(norm[7])
    others = [o for o in range(12) if o != 7]
    torch.testing.assert_close(norm[others], expected[others], rtol=1e-6, atol=0)


def test_fp16_overflows_to_infinity_only_where_the_true_value_is_out_of_range(backend):
    given = linear_inputs(9, 20, 12, 4, dtype=torch.float16, bias=False, token_scale=False)
    given.x[:4] *= 8_000
    given.weight *= 16
    given.magnitude *= 16
    y = output(given, backend)
    truth = output(given.map(torch.Tensor.double), "eager").abs()
    # a product may be rounded before its gain, at most 2 here, is put on
    is_over, is_within = truth > 2 * 65_520, truth < 65_504 / 2
    assert is_over.any() and is_within.any()
    assert torch.isinf(y)[is_over].all() and torch.isfinite(y)[is_within].all()
    assert not torch.isnan(y).any()


@pytest.mark.parametrize("size", [2.0**-60, 2.0**-20, 2.0**20, 2.0**60])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_layer_of_any_size_matches_the_truth(backend, dtype, size):
    """W, B and m together: squares of what is smaller or larger would leave fp32."""
    given = linear_inputs(9, 20, 12, 4, dtype=dtype)
    given.weight *= size
    given.lora_b *= size
    given.magnitude *= size
    given.bias *= size
    assert_parity(given, backend)


@pytest.mark.parametrize("scale", [2.0**-30, 2.0**12])
def test_any_scale_matches_the_truth(backend, scale):
    assert_parity(linear_inputs(9, 20, 12, 4, scale=scale), backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_rank_of_1024_matches_the_truth(backend, dtype):
    assert_parity(linear_inputs(5, 24, 12, 1024, dtype=dtype), backend)


@pytest.mark.parametrize("exponent", [1, 4, 7, 10])
def test_a_merge_survives_cancellation(backend, exponent):
    """B A = -(1 - 2^-e) W: the merged weight has the norm that the magnitude says."""
    given = linear_inputs(3, 8, 12, 8, blend=False, bias=False, token_scale=False, scale=1.0)
    given.lora_a = torch.eye(8)
    given.lora_b = -(1 - 2.0**-exponent) * given.weight
    with using(backend):
        merged = adapted_weight(
            given.weight, given.lora_a, given.lora_b, given.magnitude, given.blend, scale=given.scale
        )
    truth = reference_norm(given.weight.double(), given.lora_a.double(), given.lora_b.double(), scale=1.0)
    assert relative_error(merged.norm(dim=1), given.magnitude.double()) <= 2.0**exponent * 2.0**-22
    assert (truth > 0).all()
