"""HybridLinear: a drop-in for nn.Linear and Conv1D that starts as its base and merges into it."""

import copy
import itertools
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hylorada_kernels import HybridLinear, using
from hylorada_kernels.testing import interpreter, relative_error
from tests.kernels.parity import in_triton

FLAGS = list(itertools.product([False, True], repeat=3))


class Conv1D(nn.Module):
    """transformers' layer of GPT-2: weight (I, O)."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.randn(nx, nf) * nx**-0.5)
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x):
        return torch.addmm(self.bias, x.reshape(-1, self.nx), self.weight).view(*x.shape[:-1], self.nf)


def linear(kind, dtype=torch.float32):
    torch.manual_seed(0)
    layer = Conv1D(30, 50) if kind == "conv1d" else nn.Linear(50, 30, bias=kind == "biased")
    return layer.to(dtype)


def trained(layer):
    """Away from the initial state."""
    with torch.no_grad():
        layer.lora_b.normal_(std=0.3)
        if layer.magnitude is not None:
            layer.magnitude.mul_(torch.linspace(0.5, 1.5, layer.out_features))
    return layer


@pytest.mark.parametrize("kind", ["plain", "biased", "conv1d"])
@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_it_starts_as_its_base(kind, flags):
    use_rslora, use_magnitude, use_blend = flags
    base = linear(kind)
    x = torch.randn(2, 7, 50)
    layer = HybridLinear.from_linear(
        base, rank=4, dropout=0.3, use_rslora=use_rslora, use_magnitude=use_magnitude, use_blend=use_blend
    )
    torch.testing.assert_close(layer(x), base(x), rtol=1e-6, atol=1e-6)
    assert layer.scale == 16 / 2 if use_rslora else layer.scale == 16 / 4


def test_without_a_bias_it_starts_bit_for_bit():
    for dtype in (torch.float32, torch.bfloat16):
        base = linear("plain", dtype)
        x = torch.randn(7, 50, dtype=dtype)
        assert torch.equal(HybridLinear.from_linear(base)(x), base(x))


@pytest.mark.parametrize("kind", ["plain", "biased", "conv1d"])
@pytest.mark.parametrize("flags", [(False, False), (True, False), (True, True)], ids=["lora", "dora", "hylorada"])
def test_merging_changes_nothing_and_unmerging_restores_the_bits(kind, flags):
    base = linear(kind)
    original = base.weight.detach().clone()
    layer = trained(HybridLinear.from_linear(base, rank=4, use_magnitude=flags[0], use_blend=flags[1]))
    x = torch.randn(2, 7, 50)
    expected = layer(x).detach()
    layer.merge()
    assert layer.merged and not torch.equal(layer.weight, original)
    assert relative_error(layer(x), expected) <= 1e-6
    assert (
        relative_error(layer.to_linear()(x) if kind != "conv1d" else F.linear(x, layer.weight.T, layer.bias), expected)
        <= 1e-6
    )
    layer.merge()
    layer.unmerge()
    assert torch.equal(layer.weight, original) and not layer.merged
    assert torch.equal(layer(x), expected)


def test_merging_without_a_copy_cannot_be_undone():
    layer = trained(HybridLinear.from_linear(linear("plain")))
    layer.merge(keep_base=False)
    with pytest.raises(RuntimeError, match="keep_base=False"):
        layer.unmerge()


def test_position_scale_acts_after_a_merge_as_before_it():
    layer = trained(HybridLinear.from_linear(linear("biased"), rank=4))
    x, p = torch.randn(2, 7, 50), torch.rand(2, 7) + 0.5
    expected = layer(x, token_scale=p)
    layer.merge()
    assert relative_error(layer(x, token_scale=p), expected) <= 1e-6


def test_a_merged_weight_refuses_a_position_scale_of_the_delta():
    layer = HybridLinear.from_linear(linear("plain"), token_scale_target="delta")
    layer.merge()
    with pytest.raises(RuntimeError, match="call unmerge"):
        layer(torch.randn(7, 50), token_scale=torch.ones(7))


def test_norm_grad_sends_the_gradient_through_the_norm():
    layer = trained(HybridLinear.from_linear(linear("plain"), rank=4, use_blend=False, norm_grad=True))
    x = torch.randn(7, 50)
    layer(x).square().sum().backward()
    wide = {name: tensor.detach().double().requires_grad_() for name, tensor in layer.named_parameters()}
    adapted = wide["weight"] + layer.scale * wide["lora_b"] @ wide["lora_a"]
    gain = wide["magnitude"] / adapted.norm(dim=1)
    (x.double() @ (gain[:, None] * adapted).T).square().sum().backward()
    for name in ("lora_a", "lora_b", "magnitude"):
        assert relative_error(getattr(layer, name).grad, wide[name].grad) <= 1e-5, name


@pytest.mark.parametrize("has_run", [False, True], ids=["before a forward", "after a forward"])
@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("lora_b", (30, 5), "shapes do not fit"),
        ("lora_a", (4, 49), "shapes do not fit"),
        ("magnitude", (29,), r"magnitude must have shape \(30,\)"),
        ("residual_weight", (2,), r"blend must have shape \(\) or \(1,\)"),
        ("weight", (30, 50), "weight requires a gradient"),
    ],
)
def test_parameters_that_do_not_fit_are_named(backend, name, shape, message, has_run):
    layer, x = trained(HybridLinear.from_linear(linear("plain"), rank=4)), torch.randn(3, 50)
    with using(backend):
        if has_run:
            layer(x)
        setattr(layer, name, nn.Parameter(torch.ones(shape)))
        with pytest.raises(ValueError, match=message):
            layer(x)


def test_a_weight_that_is_unfrozen_after_a_forward_is_named(backend):
    layer, x = trained(HybridLinear.from_linear(linear("plain"), rank=4)), torch.randn(3, 50)
    with using(backend):
        layer(x)
        layer.weight.requires_grad_()
        with pytest.raises(ValueError, match="weight requires a gradient"):
            layer(x)


def test_without_gradients_it_computes_the_same_bits_and_keeps_no_graph(backend):
    layer, x = trained(HybridLinear.from_linear(linear("biased"), rank=4)), torch.randn(3, 7, 50)
    with using(backend):
        expected = layer(x)
        with torch.no_grad():
            y = layer(x)
    assert torch.equal(y, expected) and expected.requires_grad and not y.requires_grad


def test_dropout_acts_in_training_only():
    layer = trained(HybridLinear.from_linear(linear("plain"), dropout=0.5))
    x = torch.randn(7, 50)
    assert not torch.equal(layer.train()(x), layer(x))
    assert torch.equal(layer.eval()(x), layer(x))


def test_base_parameters_are_shared_and_frozen():
    base = linear("biased")
    layer = HybridLinear.from_linear(base)
    assert layer.weight is base.weight and layer.bias is base.bias
    trainable = {name for name, parameter in layer.named_parameters() if parameter.requires_grad}
    assert trainable == {"lora_a", "lora_b", "magnitude", "residual_weight"}
    assert set(layer.state_dict()) == trainable | {"weight", "bias"}


def test_adapters_are_fp32_and_gain_is_one_at_the_start():
    layer = HybridLinear.from_linear(linear("plain", torch.bfloat16), rank=4)
    assert {p.dtype for p in (layer.lora_a, layer.lora_b, layer.magnitude, layer.residual_weight)} == {torch.float32}
    torch.testing.assert_close(layer.magnitude, layer.weight.float().norm(dim=1), rtol=3e-7, atol=0)
    torch.testing.assert_close(layer.lora_a @ layer.lora_a.T, torch.eye(4), rtol=0, atol=1e-6)
    assert not layer.lora_b.any() and layer.residual_weight.item() == pytest.approx(0.1)


def test_it_can_be_built_on_the_meta_device():
    layer = HybridLinear.from_linear(nn.Linear(50, 30, device="meta"), rank=4)
    assert {name: tuple(p.shape) for name, p in layer.named_parameters() if p.requires_grad} == {
        "lora_a": (4, 50),
        "lora_b": (30, 4),
        "magnitude": (30,),
        "residual_weight": (1,),
    }
    assert layer(torch.empty(2, 50, device="meta")).shape == (2, 30)


def test_rank_above_the_width_works():
    layer = trained(HybridLinear.from_linear(linear("plain"), rank=64))
    assert layer(torch.randn(3, 50)).isfinite().all()


@pytest.mark.parametrize(
    "copier", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))], ids=["deepcopy", "pickle"]
)
def test_copies_compute_the_same(copier):
    layer = trained(HybridLinear.from_linear(linear("biased")))
    x = torch.randn(3, 50)
    assert torch.equal(copier(layer)(x), layer(x))


def test_it_compiles_as_one_graph_and_equals_eager():
    layer = trained(HybridLinear.from_linear(linear("biased")))
    x = torch.randn(2, 7, 50, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(layer(x).square().sum(), [x, layer.lora_a, layer.magnitude])
    torch.testing.assert_close(compiled(x), layer(x), rtol=0, atol=0)
    found = torch.autograd.grad(compiled(x).square().sum(), [x, layer.lora_a, layer.magnitude])
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


@in_triton
def test_a_compiled_layer_follows_the_choice_of_backend(backend):
    layer = HybridLinear.from_linear(linear("biased")).requires_grad_(False)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    for choice in ("eager", backend, "eager"):
        with using(choice), interpreter.launches() as names:
            compiled(torch.randn(3, 50))
        assert bool(names) == (choice == "triton")


def test_both_backends_train_to_the_same_adapter(backend):
    x, target = torch.randn(8, 50), torch.randn(8, 30)

    def train(choice):
        layer = trained(HybridLinear.from_linear(linear("biased"), rank=4))
        optimizer = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=0.05)
        with using(choice):
            for _ in range(3):
                optimizer.zero_grad()
                (layer.to(x.device)(x) - target).square().mean().backward()
                optimizer.step()
        return layer.lora_b.detach()

    assert relative_error(train(backend), train("eager")) <= 1e-5


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_a_merged_layer_gives_its_own_weight():
    layer = trained(HybridLinear.from_linear(linear("plain"), rank=4))
    expected = layer.merged_weight()
    layer.merge()
    assert torch.equal(layer.merged_weight(), expected)


def test_a_merged_layer_keeps_autocasts_dtype_under_a_position_scale():
    layer = trained(HybridLinear.from_linear(linear("biased"), rank=4))
    x = torch.randn(5, layer.in_features)
    p = torch.full((5,), 1.002)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before = layer(x, torch.ones(5))
        layer.merge()
        after = layer(x, torch.ones(5))
        assert after.dtype == before.dtype == torch.bfloat16
        # half a unit in the last place of a number near 1 is 0.004: some elements of the product change all the same
        assert not torch.equal(layer(x, p), after)


BAD = {
    "rank True": ({"rank": True}, ValueError, "rank must be a whole number of at least 1, got True"),
    "alpha text": ({"alpha": "16"}, ValueError, "alpha must be a positive number, got '16'"),
    "dropout text": ({"dropout": "0.1"}, ValueError, r"dropout must be a number in \[0, 1\), got '0.1'"),
    "rank 0": ({"rank": 0}, ValueError, "rank must be a whole number of at least 1, got 0"),
    "alpha 0": ({"alpha": 0.0}, ValueError, "alpha must be a positive number, got 0.0"),
    "dropout 1": ({"dropout": 1.0}, ValueError, r"dropout must be a number in \[0, 1\), got 1.0"),
    "init": ({"init": "zeros"}, ValueError, "init must be one of"),
    "scaled weight of a trained norm": (
        {"keep_scaled_weight": True, "norm_grad": True},
        ValueError,
        "keep_scaled_weight=True keeps what norm_grad=True makes anew",
    ),
    "target": ({"token_scale_target": "input"}, ValueError, "token_scale_target must be one of"),
    "not linear": (
        {"linear": nn.Conv2d(3, 3, 1)},
        TypeError,
        "only nn.Linear and transformers' Conv1D can be adapted, got Conv2d",
    ),
    "a forward of its own": (
        {"linear": Doubled(4, 3)},
        TypeError,
        "can be adapted, got Doubled with a forward of its own",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_options_are_named_and_leave_the_layer_as_it_was(case):
    changes, error, message = BAD[case]
    base = linear("plain")
    with pytest.raises(error, match=message):
        HybridLinear.from_linear(**{"linear": base, **changes})
    assert base.weight.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_backward_is_that_of_the_values_of_its_forward(dtype):
    layer, x = trained(HybridLinear.from_linear(linear("plain", dtype), rank=4)), torch.randn(3, 50, dtype=dtype)
    parameters = [layer.lora_a, layer.lora_b, layer.magnitude, layer.residual_weight]
    expected = torch.autograd.grad(layer(x).sum(), parameters)
    y = layer(x)
    with torch.no_grad():
        for parameter in parameters[1:]:
            parameter.mul_(2)
    assert all(map(torch.equal, torch.autograd.grad(y.sum(), parameters, retain_graph=True), expected))
    with torch.no_grad():
        layer.lora_a.mul_(2)
    if dtype == torch.float32:
        # there is no copy of A in another dtype
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(y.sum(), parameters)
    else:
        assert all(map(torch.equal, torch.autograd.grad(y.sum(), parameters), expected))


@pytest.mark.parametrize(("dtype", "expected"), [(torch.float32, 5), (torch.bfloat16, 4)], ids=str)
def test_few_tensors_are_saved(dtype, expected):
    """A checkpoint calls its hooks for each: x, W, h, y, and A where it is in W's dtype."""
    layer, x = trained(HybridLinear.from_linear(linear("plain", dtype), rank=4)), torch.randn(3, 50, dtype=dtype)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        layer(x.requires_grad_())
    assert len(saved) == expected
