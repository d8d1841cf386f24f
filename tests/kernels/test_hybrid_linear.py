"""hybrid_linear: meaning, parity of both backends with the fp64 truth, layouts, gradcheck, integration, bad input."""

import itertools

import pytest
import torch
from torch.nn import functional as F

from hylorada_kernels import column_norm, hybrid_linear, using
from hylorada_kernels.ops.hybrid_linear import eager, op
from hylorada_kernels.ops.hybrid_linear.op import adapted_weight
from hylorada_kernels.testing import linear_inputs, reference_linear, relative_error
from tests.kernels.parity import assert_parity, in_triton, run, taking

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def test_zero_b_and_magnitude_of_the_rows_is_the_base_layer(backend):
    given = linear_inputs(7, 48, 40, 4, token_scale=False)
    given.lora_b.zero_()
    given.magnitude = column_norm(given.weight, given.lora_a, given.lora_b, scale=given.scale)
    with using(backend):
        y = hybrid_linear(**given.arguments())
    torch.testing.assert_close(y, F.linear(given.x, given.weight, given.bias), rtol=1e-6, atol=1e-6)


def test_blend_of_one_is_lora_and_of_zero_is_dora(backend):
    given = linear_inputs(7, 48, 40, 4)
    options = {
        "x": given.x,
        "weight": given.weight,
        "lora_a": given.lora_a,
        "lora_b": given.lora_b,
        "scale": given.scale,
    }
    with using(backend):
        plain = hybrid_linear(**options)
        dora = hybrid_linear(**options, magnitude=given.magnitude)
        for logit, expected in ((40.0, plain), (-40.0, dora)):
            blended = hybrid_linear(**options, magnitude=given.magnitude, blend=torch.tensor(logit))
            torch.testing.assert_close(blended, expected, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(plain, dora)


def test_output_is_linear_in_token_scale_and_bias_is_not_scaled(backend):
    given = linear_inputs(7, 48, 40, 4)
    given.token_scale = torch.zeros(7)
    with using(backend):
        y = hybrid_linear(**given.arguments())
    torch.testing.assert_close(y, given.bias.expand(7, -1), rtol=0, atol=0)


SHAPES = [
    # tokens, in, out, rank: aligned; odd; prime with rank 1; rank over a tile; one token; no token; in- or
    # out-features of 1
    (64, 64, 64, 16),
    (63, 111, 100, 5),
    (37, 53, 41, 1),
    (33, 70, 45, 70),
    (1, 67, 33, 8),
    (0, 32, 48, 4),
    (41, 1, 17, 3),
    (41, 17, 1, 3),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_gradients_match_the_truth(backend, shape, dtype):
    for target in ("output", "delta"):
        assert_parity(linear_inputs(*shape, dtype=dtype, token_scale_target=target), backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("flags", list(itertools.product([False, True], repeat=4)), ids=str)
def test_every_combination_of_parts_matches_the_truth(backend, flags, dtype):
    magnitude, blend, bias, token_scale = flags
    if blend and not magnitude:
        return
    given = linear_inputs(
        29, 50, 37, 6, dtype=dtype, magnitude=magnitude, blend=blend, bias=bias, token_scale=token_scale
    )
    assert_parity(given, backend)
    assert_parity(given, backend, save_output=False)


@in_triton
@pytest.mark.parametrize("route", ["one_pass", "library"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (5, 100, 70, 32)], ids=str)
def test_the_other_routes_match_the_truth(backend, route, shape, dtype):
    if route == "one_pass" and shape[3] > 32:
        return
    for target in ("output", "delta"):
        given = linear_inputs(*shape, dtype=dtype, token_scale_target=target)
        assert_parity(given, backend, route=route)
        norm = column_norm(given.weight, given.lora_a, given.lora_b, scale=given.scale)
        assert_parity(given, backend, route=route, norm=norm)


@in_triton
@pytest.mark.parametrize("route", ["one_pass", "library"])
@pytest.mark.parametrize("flags", list(itertools.product([False, True], repeat=4)), ids=str)
def test_every_combination_of_parts_matches_the_truth_on_the_other_routes(backend, route, flags):
    magnitude, blend, bias, token_scale = flags
    if blend and not magnitude:
        return
    given = linear_inputs(
        29, 50, 37, 6, dtype=torch.bfloat16, magnitude=magnitude, blend=blend, bias=bias, token_scale=token_scale
    )
    assert_parity(given, backend, route=route)
    given.weight = given.weight.T.contiguous().T
    given.lora_a = given.lora_a.T.contiguous().T
    assert_parity(given, backend, route=route, save_output=False)


@in_triton
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(64, 64, 64, 16), (37, 104, 45, 5), (1, 8, 3, 40)], ids=str)
def test_blocks_fetched_through_descriptors_match_the_truth(backend, shape, dtype, monkeypatch):
    from hylorada_kernels.ops.hybrid_linear import dispatch, kernel

    used = []
    from_tensor = kernel.TensorDescriptor.from_tensor
    monkeypatch.setattr(kernel.TensorDescriptor, "from_tensor", lambda *args: used.append(1) or from_tensor(*args))
    monkeypatch.setattr(dispatch, "INTERPRETED", dispatch.INTERPRETED._replace(has_descriptors=True))
    given = linear_inputs(*shape, dtype=dtype)
    assert_parity(given, backend)
    assert len(used) == 2
    # a transposed weight has no dense rows: the pointers take over
    given.weight = given.weight.T.contiguous().T
    assert_parity(given, backend)
    assert len(used) == 2


@in_triton
def test_every_route_leaves_the_same_norm_and_gain_behind(backend):
    """What the backward is given does not depend on who made it."""
    given = linear_inputs(20, 50, 37, 6)
    gradients = [run(given, backend, route)[1] for route in ("fused", "library", "one_pass")]
    for other in gradients[1:]:
        for name, gradient in other.items():
            torch.testing.assert_close(gradient, gradients[0][name], rtol=1e-5, atol=1e-5)


@in_triton
def test_one_pass_refuses_what_it_cannot_do(backend):
    given = linear_inputs(5, 48, 40, 33)
    with using(backend), taking("one_pass"):
        with pytest.raises(ValueError, match="ranks up to 32 and no dropout, got rank 33"):
            hybrid_linear(**given.arguments())
        with pytest.raises(ValueError, match="got rank 33 with dropout"):
            hybrid_linear(**given.arguments(), dropout_p=0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layouts_do_not_matter(backend, dtype):
    given = linear_inputs((3, 11), 50, 37, 6, dtype=dtype)
    expected, gradients = run(given, backend)
    strided = given.map(lambda tensor: tensor)
    strided.weight = given.weight.T.contiguous().T
    strided.x = torch.stack([given.x, given.x], dim=-1)[..., 0]
    strided.dy = given.dy.transpose(0, 1).contiguous().transpose(0, 1)
    strided.lora_a = given.lora_a.T.contiguous().T
    y, strided_gradients = run(strided, backend)
    assert_parity(strided, backend)
    scale = expected.double().norm()
    assert (y.double() - expected.double()).norm() <= torch.finfo(dtype).eps * scale
    assert strided_gradients["x"].shape == gradients["x"].shape == given.x.shape


def test_strides_of_vectors_do_not_matter(backend):
    given = linear_inputs(11, 50, 37, 6)
    norm = column_norm(given.weight, given.lora_a, given.lora_b, scale=given.scale)
    expected, gradients = run(given, backend, norm=norm)
    for name in ("magnitude", "bias", "token_scale"):
        setattr(given, name, torch.stack([getattr(given, name), torch.zeros_like(getattr(given, name))], -1)[..., 0])
    y, strided_gradients = run(given, backend, norm=torch.stack([norm, norm], -1)[..., 0].double())
    assert torch.equal(y, expected)
    assert all(torch.equal(strided_gradients[name], gradients[name]) for name in gradients)
    given.token_scale = torch.tensor([1.3]).expand(11)
    assert_parity(given, backend)


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.float64, torch.float32)], ids=str)
def test_factors_of_fewer_digits_cost_the_output_none(dtypes):
    dtype, factors = dtypes
    given = linear_inputs(11, 50, 37, 6, dtype=dtype)
    given.scale = 1 / 3
    given.lora_a, given.lora_b = given.lora_a.to(factors), given.lora_b.to(factors)
    truth = reference_linear(given.map(torch.Tensor.double))
    with using("eager"):
        y = hybrid_linear(**given.arguments())
    assert y.dtype == dtype and relative_error(y, truth) <= 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("parts", [(True, True), (True, False), (False, False)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_adapted_weight_is_rounded_once(backend, dtype, parts):
    magnitude, blend = parts
    given = linear_inputs(3, 50, 37, 20, dtype=dtype, magnitude=magnitude, blend=blend, bias=False, token_scale=False)
    wide = given.map(torch.Tensor.double)
    wide.x = torch.eye(50, dtype=torch.float64, device=given.x.device)
    truth = reference_linear(wide).T
    for weight in (given.weight, given.weight.T.contiguous().T):
        with using(backend):
            merged = adapted_weight(weight, given.lora_a, given.lora_b, given.magnitude, given.blend, scale=given.scale)
        assert merged.dtype == dtype and merged.is_contiguous()
        floor = 2.0**-22 if dtype == torch.float32 else relative_error(truth.to(dtype), truth)
        assert relative_error(merged, truth) <= 1.02 * floor


@pytest.mark.parametrize("bias", [False, True])
def test_small_gains_and_large_biases_keep_the_gradient_exact(backend, bias):
    given = linear_inputs(40, 50, 37, 6, dtype=torch.bfloat16, bias=bias, token_scale=False)
    given.blend.fill_(-30.0)
    given.magnitude[::5] *= 1e-6
    given.magnitude[3] = 0.0
    given.magnitude[4] *= -1.0
    if bias:
        given.bias[::3] *= 100
    assert_parity(given, backend)


def kept_gain_of(given, *, scale_weight=True):
    norm = column_norm(given.weight, given.lora_a, given.lora_b, scale=given.scale)
    beta = eager.gate(given.blend, norm.dtype)
    gain = eager.gain_of(eager.row_gain(given.magnitude, beta, norm), given.magnitude, beta, norm)
    if not scale_weight:
        return gain
    gain = eager.with_factors(gain, given.lora_a, given.lora_b, given.scale, given.weight.dtype)
    return eager.with_scaled_weight(gain, given.weight, given.lora_b, given.scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("token_scale", [None, "output", "delta"])
def test_a_scaled_weight_that_the_caller_keeps_gives_the_truth(dtype, bias, token_scale):
    for tokens, columns, rows, rank in SHAPES[1:4]:
        given = linear_inputs(
            tokens, columns, rows, rank, dtype=dtype, bias=bias, token_scale=token_scale is not None,
            token_scale_target=token_scale or "output",
        )  # fmt: skip
        given.magnitude[0] = 0.0
        given.magnitude[1] *= -1.0
        kept_gain = kept_gain_of(given)
        assert_parity(given, "eager", kept_gain=kept_gain)
        assert_parity(given, "eager", kept_gain=kept_gain, save_output=False)


@pytest.mark.parametrize("blend", [False, True])
def test_a_gain_that_the_caller_keeps_changes_no_bit(blend):
    given = linear_inputs(37, 53, 41, 3, blend=blend)
    given.magnitude[0] = 0.0
    y, gradients = run(given, "eager")
    again, their_gradients = run(given, "eager", kept_gain=kept_gain_of(given, scale_weight=False))
    assert torch.equal(y, again)
    assert all(torch.equal(gradients[name], their_gradients[name]) for name in gradients)


@pytest.mark.parametrize("scale_weight", [False, True], ids=["gain", "scaled weight"])
def test_a_backward_through_the_registered_op_needs_no_kept_gain(scale_weight, monkeypatch):
    """Compiled autograd traces the backward of a forward that ran directly."""
    given = linear_inputs(37, 53, 41, 3)
    _, expected = run(given, "eager")
    leaves = given.requiring_grad()
    y = hybrid_linear(**leaves.arguments(), kept_gain=kept_gain_of(given, scale_weight=scale_weight))
    monkeypatch.setattr(op.backend, "runs_directly", lambda tensor, choice: False)
    y.backward(given.dy)
    for name, gradient in expected.items():
        torch.testing.assert_close(getattr(leaves, name).grad, gradient, rtol=1e-5, atol=1e-5)


def test_a_norm_with_a_gradient_has_that_of_the_magnitude_of_its_forward():
    given = linear_inputs(6, 20, 16, 4, dtype=torch.bfloat16).requiring_grad()
    norm = column_norm(given.weight, given.lora_a, given.lora_b, scale=given.scale)
    with torch.no_grad():
        kept_gain = kept_gain_of(given)
    y = hybrid_linear(**given.arguments(), norm=norm, norm_grad=True, kept_gain=kept_gain)
    with torch.no_grad():
        given.magnitude.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@in_triton
def test_a_kept_gain_is_left_alone_where_it_gains_nothing(backend):
    given = linear_inputs(37, 53, 41, 3)
    y, gradients = run(given, backend)
    nonsense = eager.Gain(*(torch.full((41,), torch.nan) for _ in range(3)))
    again, their_gradients = run(given, backend, kept_gain=nonsense)
    assert torch.equal(y, again)
    assert all(torch.equal(gradients[name], their_gradients[name]) for name in gradients)


def test_zero_token_scale_keeps_the_gradient_exact(backend):
    given = linear_inputs(40, 50, 37, 6, dtype=torch.bfloat16)
    given.token_scale[::7] = 0.0
    assert_parity(given, backend)


def test_no_features_leave_the_bias(backend):
    given = linear_inputs(5, 0, 16, 4, magnitude=False)
    y, gradients = run(given, backend)
    assert torch.equal(y, given.bias.expand(5, -1))
    torch.testing.assert_close(gradients["bias"], given.dy.sum(0))
    assert gradients["lora_a"].shape == (4, 0) and not gradients["lora_b"].any()


def test_gradient_through_the_norm_matches_the_truth(backend):
    given = linear_inputs(40, 50, 37, 6)
    given.lora_b *= 3
    assert_parity(given, backend, norm_grad=True)


def test_a_row_of_zeros_gives_zeros_and_finite_gradients(backend):
    given = linear_inputs(12, 20, 16, 4, bias=False)
    given.weight[3] = 0
    given.lora_b[3] = 0
    given.magnitude[3] = 0
    y, gradients = run(given, backend)
    assert torch.equal(y[:, 3], torch.zeros(12))
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_runs_are_bit_identical(backend, dtype):
    given = linear_inputs(70, 50, 90, 6, dtype=dtype)
    y, gradients = run(given, backend)
    again, gradients_again = run(given, backend)
    assert torch.equal(y, again)
    assert all(torch.equal(gradients[name], gradients_again[name]) for name in gradients)


def test_dropout_thins_the_low_rank_path_only(backend):
    """With A and B the identity and W = 0 the output shows the mask, which must act in the backward too."""
    width, p = 64, 0.25
    x = torch.ones(96, width, requires_grad=True)
    lora_a, lora_b = torch.eye(width, requires_grad=True), torch.eye(width, requires_grad=True)
    torch.manual_seed(1)
    with using(backend):
        y = hybrid_linear(x, torch.zeros(width, width), lora_a, lora_b, scale=1.0, dropout_p=p)
    kept = (y.detach() > 0).float()
    torch.testing.assert_close(y.detach(), kept / (1 - p))
    assert abs(float(kept.mean()) - (1 - p)) < 4 * (p * (1 - p) / kept.numel()) ** 0.5
    dy = torch.randn(96, width)
    y.backward(dy)
    torch.testing.assert_close(x.grad, dy * kept / (1 - p))
    torch.testing.assert_close(lora_a.grad, dy.T @ (kept / (1 - p)), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lora_b.grad, dy.T @ (kept / (1 - p)), rtol=1e-5, atol=1e-5)
    with using(backend):
        base = hybrid_linear(x, torch.eye(width), lora_a, torch.zeros(width, width), scale=1.0, dropout_p=p)
    assert torch.equal(base, x)


def test_dropout_masks_differ_between_calls_and_follow_the_seed(backend):
    given = linear_inputs(16, 32, 24, 4)

    def output(seed):
        torch.manual_seed(seed)
        with using(backend):
            return [hybrid_linear(**given.arguments(), dropout_p=0.5) for _ in range(2)]

    first, second = output(0)
    assert not torch.equal(first, second)
    assert torch.equal(output(0)[1], second)


@pytest.mark.parametrize("target", ["output", "delta"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("save_output", [False, True])
@pytest.mark.parametrize("norm_grad", [False, True])
def test_gradcheck(target, bias, save_output, norm_grad):
    given = linear_inputs(4, 7, 5, 3, dtype=torch.float64, bias=bias, token_scale_target=target)
    norm = None if norm_grad else column_norm(given.weight, given.lora_a, given.lora_b, scale=given.scale)
    names = [name for name in given.TRAINED if getattr(given, name) is not None]

    def function(*tensors):
        return hybrid_linear(
            **{**given.arguments(), **dict(zip(names, tensors, strict=True))},
            norm=norm, norm_grad=norm_grad, save_output=save_output,
        )  # fmt: skip

    leaves = given.requiring_grad()
    assert torch.autograd.gradcheck(function, [getattr(leaves, name) for name in names])


def test_only_what_is_asked_for_gets_a_gradient(backend):
    given = linear_inputs(6, 20, 16, 4)
    for name in given.TRAINED:
        leaves = given.map(lambda tensor: tensor.detach().clone())
        getattr(leaves, name).requires_grad_(True)
        with using(backend):
            hybrid_linear(**leaves.arguments()).backward(given.dy)
        _, expected = run(given, backend)
        torch.testing.assert_close(getattr(leaves, name).grad, expected[name], rtol=1e-5, atol=1e-6)


def test_an_output_edited_in_place_is_refused_by_the_backward(backend):
    given = linear_inputs(6, 20, 16, 4, bias=False).requiring_grad()
    with using(backend):
        y = hybrid_linear(**given.arguments())
    y.detach().add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_an_output_that_is_not_kept_may_be_edited_in_place(backend):
    # as large as those that are made in groups of rows
    given = linear_inputs(64, 8, 8192, 4, bias=False, token_scale=False, magnitude=False, blend=False).requiring_grad()
    gradients = []
    for edit in (torch.Tensor.mul_, torch.Tensor.mul):
        with using(backend):
            y = hybrid_linear(**given.arguments())
        edit(y, 2).backward(given.dy)
        gradients.append(given.lora_b.grad)
        given.lora_b.grad = None
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


def test_backward_keeps_the_backend_of_its_forward(backend, monkeypatch):
    given = linear_inputs(6, 20, 16, 4).requiring_grad()
    with using(backend):
        y = hybrid_linear(**given.arguments())
    called = []

    def watched(name, backward):
        return lambda *tensors, **options: called.append(name) or backward(*tensors, **options)

    for name, module in {"eager": eager, "triton": getattr(op, "kernel", None)}.items():
        if module is not None:
            monkeypatch.setattr(module, "backward", watched(name, module.backward))
    y.backward(given.dy)
    assert called == [backend]


def test_autocast_follows_linear(backend):
    given = linear_inputs(6, 20, 16, 4)
    leaves = given.requiring_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16), using(backend):
        y = hybrid_linear(**leaves.arguments())
        assert F.linear(given.x, given.weight).dtype == y.dtype == torch.bfloat16
    y.backward(given.dy.bfloat16())
    low = given.map(lambda tensor: tensor)
    low.x, low.weight, low.bias, low.dy = (
        tensor.bfloat16() for tensor in (given.x, given.weight, given.bias, given.dy)
    )
    with using(backend):
        norm = column_norm(given.weight, given.lora_a, given.lora_b, scale=given.scale)
    expected, gradients = run(low, backend, norm=norm)
    assert torch.equal(y.detach(), expected)
    for name, gradient in leaves.gradients().items():
        assert gradient.dtype == torch.float32
        assert torch.equal(gradient, gradients[name].float()), name


@pytest.mark.parametrize("parts", [{}, {"magnitude": False}, {"bias": False, "token_scale": False}], ids=str)
def test_the_registered_ops_keep_their_contract(backend, parts):
    """torch.library.opcheck: schema, fake tensors, no aliasing; dropout's mask or seed is among the inputs."""
    given = linear_inputs(6, 20, 16, 4, **parts)
    inputs = [given.x, given.weight, given.lora_a, given.lora_b, given.magnitude, given.blend]
    checks = ("test_schema", "test_faketensor")
    for dropout_p in (0.0, 0.5):
        for norm in (None, None if given.magnitude is None else given.weight.norm(dim=1)):
            options = [given.scale, "output", dropout_p]
            dropped = op._drawn(given.x, dropout_p, backend)
            arguments = (*inputs, norm, given.bias, given.token_scale, dropped, *options)
            torch.library.opcheck(torch.ops.hylorada.hybrid_linear, (*arguments, True, backend), test_utils=checks)
    y, h, gain, _, kept = torch.ops.hylorada.hybrid_linear(*arguments, True, backend)
    saved = (h, gain, kept if kept.numel() else y, dropped)
    needs = [tensor is not None for tensor in (given.x, *inputs[2:], norm, given.bias, given.token_scale)]
    arguments = (given.dy, *inputs, norm, given.bias, given.token_scale, *saved, *options, needs, backend)
    torch.library.opcheck(torch.ops.hylorada.hybrid_linear_backward, arguments, test_utils=checks)


def test_a_position_scale_near_one_is_not_lost_in_16_bits(backend):
    with using(backend):
        for target, columns in (("output", 48), ("output", 80), ("delta", 48)):
            given = linear_inputs(256, 64, columns, 4, dtype=torch.bfloat16, bias=False, token_scale_target=target)
            scaled, plain = (
                hybrid_linear(**given.arguments() | {"token_scale": torch.full((256,), p)}).double()
                for p in (1.003, 1.0)
            )
            if target == "output":
                # each element is rounded for itself: their mean is right
                assert float((scaled * plain).sum() / plain.square().sum()) == pytest.approx(1.003, abs=2e-4)
            else:
                assert not torch.equal(scaled, plain)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"magnitude": torch.ones(1)}, r"magnitude must have shape \(6,\), got \(1,\)"),
        ({"norm": torch.ones(5)}, r"norm must have shape \(6,\), got \(5,\)"),
        ({"magnitude": None, "blend": torch.ones(1)}, "blend was given without magnitude"),
    ],
)
def test_the_adapted_weight_refuses_what_the_op_refuses(changes, message):
    given = linear_inputs(3, 8, 6, 4).arguments()
    arguments = {name: given[name] for name in ("weight", "lora_a", "lora_b", "magnitude", "scale")}
    with pytest.raises(ValueError, match=message):
        adapted_weight(**arguments | changes)


def test_the_adapted_weight_takes_vectors_with_gaps(backend):
    given = linear_inputs(3, 20, 16, 4)
    arguments = [given.weight, given.lora_a, given.lora_b]
    norm = given.weight.norm(dim=1)
    with using(backend):
        expected = adapted_weight(*arguments, given.magnitude, given.blend, scale=0.5, norm=norm)
        gaps = [torch.stack([vector, -vector], 1)[:, 0] for vector in (given.magnitude, norm)]
        assert torch.equal(adapted_weight(*arguments, gaps[0], given.blend, scale=0.5, norm=gaps[1]), expected)


BAD = {
    "x of another width": ({"x": torch.zeros(3, 9)}, ValueError, "x must end in 8 features"),
    "rank mismatch": ({"lora_b": torch.zeros(6, 3)}, ValueError, "shapes do not fit"),
    "rank 0": ({"lora_a": torch.zeros(0, 8), "lora_b": torch.zeros(6, 0)}, ValueError, "rank is 0"),
    "integer weight": ({"weight": torch.zeros(6, 8, dtype=torch.int8)}, TypeError, "weight must be floating point"),
    "trained weight": ({"weight": torch.zeros(6, 8, requires_grad=True)}, ValueError, "requires_grad_"),
    "two dtypes": ({"x": torch.zeros(3, 8, dtype=torch.bfloat16)}, TypeError, "must have one dtype"),
    "magnitude of another length": ({"magnitude": torch.zeros(5)}, ValueError, r"magnitude must have shape \(6,\)"),
    "blend without magnitude": ({"blend": torch.zeros(1)}, ValueError, "give both or neither"),
    "norm without magnitude": ({"norm": torch.ones(6)}, ValueError, "give both or neither"),
    "kept gain without magnitude": (
        {"kept_gain": eager.Gain(*[torch.ones(6)] * 3)},
        ValueError,
        "give both or neither",
    ),
    "token scale of another shape": (
        {"token_scale": torch.zeros(4)},
        ValueError,
        r"token_scale must have shape \(3,\)",
    ),
    "unknown target": ({"token_scale_target": "input"}, ValueError, "token_scale_target must be one of"),
    "dropout of 1": ({"dropout_p": 1.0}, ValueError, r"dropout_p must be in \[0, 1\)"),
    "another device": ({"x": torch.zeros(3, 8, device="meta")}, ValueError, "move them to one device"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    changes, error, message = BAD[case]
    good = {
        "x": torch.zeros(3, 8),
        "weight": torch.ones(6, 8),
        "lora_a": torch.zeros(2, 8),
        "lora_b": torch.zeros(6, 2),
        "scale": 1.0,
    }
    hybrid_linear(**good)
    with pytest.raises(error, match=message):
        hybrid_linear(**{**good, **changes})


def test_a_second_derivative_is_refused_and_a_kept_graph_is_not():
    layer_input = torch.randn(3, 5, requires_grad=True)
    lora_a, lora_b = (torch.randn(shape, requires_grad=True) for shape in ((2, 5), (4, 2)))
    y = hybrid_linear(layer_input, torch.randn(4, 5), lora_a, lora_b, scale=2.0)
    (plain,) = torch.autograd.grad(y.square().sum(), layer_input, retain_graph=True)
    (kept,) = torch.autograd.grad(y.square().sum(), layer_input, create_graph=True)
    torch.testing.assert_close(kept, plain, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        kept.sum().backward()
