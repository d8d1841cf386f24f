"""column_norm: meaning, parity of both backends with the fp64 truth, cancellation, layouts, gradient, integration."""

import pytest
import torch

from hylorada_kernels import column_norm, using
from hylorada_kernels.ops.column_norm import column_norms
from hylorada_kernels.testing import interpreter, linear_inputs, reference_norm, relative_error

SHAPES = [(16, 64, 64), (5, 111, 100), (1, 53, 41), (70, 70, 45), (8, 1, 7), (8, 7, 1)]


def factors(rank, columns, rows, dtype=torch.float32, seed=0):
    given = linear_inputs(1, columns, rows, rank, dtype=dtype, seed=seed)
    return given.weight, given.lora_a, given.lora_b


def truth_of(weight, lora_a, lora_b, scale):
    return reference_norm(weight.double(), lora_a.double(), lora_b.double(), scale=scale)


def test_zero_b_gives_the_norm_of_the_weight(backend):
    weight, lora_a, lora_b = factors(4, 50, 30)
    with using(backend):
        norm = column_norm(weight, lora_a, torch.zeros_like(lora_b), scale=2.0)
    torch.testing.assert_close(norm, weight.norm(dim=1), rtol=3e-7, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_norm_matches_the_truth_to_1e_6(backend, shape, dtype):
    weight, lora_a, lora_b = factors(*shape, dtype=dtype)
    with using(backend):
        norm = column_norm(weight, lora_a, lora_b, scale=0.7)
    assert norm.dtype == torch.float32
    worst = (norm.double() / truth_of(weight, lora_a, lora_b, 0.7) - 1).abs().max()
    assert worst <= 1e-6


@pytest.mark.parametrize("rank", [8, 1])
@pytest.mark.parametrize("distance", [1e-1, 1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_norm_survives_cancellation(backend, distance, dtype, rank):
    """B A = -(1 - d) W: the expanded square cancels to d^2 of its terms; an fp32 W + s B A itself errs by 2^-24 / d."""
    generator = torch.Generator("cpu").manual_seed(0)
    lora_a = torch.randn(rank, 96, generator=generator).to(torch.get_default_device())
    directions = torch.randn(64, rank, generator=generator).to(torch.get_default_device())
    weight = (directions @ lora_a).to(dtype)
    # W lies in the span of A: fit B to the rounded W, so that only rounding keeps W + B A from being d W
    fitted = torch.linalg.lstsq(lora_a.double().T.cpu(), weight.double().T.cpu()).solution.T.to(weight.device)
    lora_b = (-(1 - distance) * fitted).float()
    with using(backend):
        norm = column_norm(weight, lora_a, lora_b, scale=1.0)
    assert relative_error(norm, truth_of(weight, lora_a, lora_b, 1.0)) <= 4 * 2.0**-24 / distance


def test_norm_survives_cancellation_within_the_update(backend):
    """Dependent rows of A: the terms of B A are some hundred times as large as B A and W."""
    weight, scale = torch.tensor([[0.1649]]), 16.0
    lora_a = torch.tensor([[0.6994], [-1.3805], [-0.8557], [-1.6589], [-2.1713]])
    lora_b = torch.tensor([[-0.1334, -0.0842, 0.1105, -0.1882, 0.1126]])
    with using(backend):
        norm = column_norm(weight, lora_a, lora_b, scale=scale)
    truth = truth_of(weight, lora_a, lora_b, scale)
    assert (norm.double() / truth - 1).abs().item() <= 2e-5


def test_layouts_do_not_matter(backend):
    weight, lora_a, lora_b = factors(6, 50, 37)
    with using(backend):
        expected = column_norm(weight, lora_a, lora_b, scale=0.7)
        strided = column_norm(
            weight.T.contiguous().T, lora_a.T.contiguous().T, torch.stack([lora_b, lora_b], -1)[..., 0], scale=0.7
        )
    torch.testing.assert_close(strided, expected, rtol=3e-7, atol=0)


def test_a_row_of_zeros_has_norm_zero(backend):
    weight, lora_a, lora_b = factors(6, 50, 37)
    weight[5], lora_b[5] = 0, 0
    with using(backend):
        assert column_norm(weight, lora_a, lora_b, scale=0.7)[5] == 0


def test_a_row_of_zeros_has_no_gradient(backend):
    given = linear_inputs(1, 20, 6, 3)
    given.weight[2] = 0
    given.lora_b[2] = 0
    factors = [given.lora_a.requires_grad_(), given.lora_b.requires_grad_()]
    with using(backend):
        norm = column_norm(given.weight, *factors, scale=given.scale)
    da, db = torch.autograd.grad(norm.sum(), factors)
    assert torch.isfinite(da).all() and torch.isfinite(db).all()
    assert not db[2].any() and db[1].any()


def test_no_rows_give_an_empty_norm(backend):
    with using(backend):
        assert column_norm(torch.zeros(0, 8), torch.zeros(2, 8), torch.zeros(0, 2), scale=1.0).shape == (0,)


def test_gradcheck():
    weight, lora_a, lora_b = factors(3, 7, 5, dtype=torch.float64)
    leaves = lora_a.requires_grad_(), lora_b.requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: column_norm(weight, a, b, scale=0.7), leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradient_matches_the_truth(backend, dtype):
    weight, lora_a, lora_b = factors(6, 50, 37, dtype=dtype)
    grad = torch.linspace(-1, 1, 37)
    with using(backend):
        leaves = lora_a.clone().requires_grad_(), lora_b.clone().requires_grad_()
        column_norm(weight, *leaves, scale=0.7).backward(grad)
    true = lora_a.double().requires_grad_(), lora_b.double().requires_grad_()
    reference_norm(weight.double(), *true, scale=0.7).backward(grad.double())
    for leaf, expected in zip(leaves, true, strict=True):
        assert relative_error(leaf.grad, expected.grad) <= 2e-6


def test_a_weight_that_requires_a_gradient_is_refused():
    weight, lora_a, lora_b = factors(3, 7, 5)
    with pytest.raises(ValueError, match=r"weight\.requires_grad_\(False\)"):
        column_norm(weight.requires_grad_(), lora_a, lora_b, scale=1.0)


@pytest.mark.parametrize("rank", [3, 16])
def test_several_layers_in_one_launch_are_what_each_gives_alone(backend, rank):
    """The last has rows of 50, which are not aligned: it goes by itself."""
    layers = [factors(rank, 64, 40), factors(rank, 48, 100, torch.bfloat16), factors(7, 128, 5), factors(rank, 50, 33)]
    weights, lora_as, lora_bs = (list(kind) for kind in zip(*layers, strict=True))
    scales = [0.7, 1.5, -1.0, 0.25]
    with using(backend):
        alone = [column_norm(*layer, scale=scale) for layer, scale in zip(layers, scales, strict=True)]
        if backend == "eager":
            together = column_norms(weights, lora_as, lora_bs, scales=scales)
        else:
            with interpreter.reachable(*weights, *lora_as, *lora_bs), interpreter.launches() as names:
                together = column_norms(weights, lora_as, lora_bs, scales=scales)
            assert sorted(names) == ["column_norm_kernel", "column_norms_kernel", "column_norms_kernel"]
    for norm, expected in zip(together, alone, strict=True):
        # the sums are cut at other places
        torch.testing.assert_close(norm, expected, rtol=2.0**-21, atol=0)
