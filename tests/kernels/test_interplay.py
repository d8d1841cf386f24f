"""The layer inside PyTorch's machinery: registered ops, torch.compile, export, autocast, fake GPUs, copies."""

import copy
import io
import pickle
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.checkpoint import checkpoint

from hylorada_kernels import HybridLinear, column_norm, column_norms, hybrid_linear, using
from hylorada_kernels import backend as dispatch
from hylorada_kernels.ops.hybrid_linear import eager
from hylorada_kernels.ops.shifted_attention import shifted_attention
from hylorada_kernels.testing import interpret, interpreter, linear_inputs

COMPILERS = ["aot_eager", "inductor"]


def trained_layer(dtype=torch.float32, **options):
    """A layer away from its initial state, where every part shows."""
    torch.manual_seed(0)
    layer = HybridLinear.from_linear(nn.Linear(50, 30).to(dtype), rank=4, **options)
    with torch.no_grad():
        layer.lora_b.normal_(std=0.3)
        layer.magnitude.mul_(torch.linspace(0.5, 1.5, 30))
    return layer


def adapter(module):
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def outcome(layer, x, dy, run=None):
    """Output and gradients of the layer, or of another way to run it."""
    trained = {name: parameter for name, parameter in layer.named_parameters() if parameter.requires_grad}
    x = x.detach().requires_grad_()
    y = (layer if run is None else run)(x)
    gradients = torch.autograd.grad(y, [x, *trained.values()], dy)
    return {"y": y.detach(), "x": gradients[0], **dict(zip(trained, gradients[1:], strict=True))}


def assert_same(found, expected, tolerance=0.0):
    assert found.keys() == expected.keys()
    for name, result in found.items():
        torch.testing.assert_close(
            result, expected[name], rtol=tolerance, atol=tolerance, msg=lambda text, n=name: f"{n}: {text}"
        )


class Recorder(TorchDispatchMode):
    """Collects the calls of this package's registered ops."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "hylorada":
            self.calls.append((function, tree_map_only(torch.Tensor, torch.Tensor.detach, args)))
        return function(*args, **(kwargs or {}))


def call_everything():
    """Use every public op, forward and backward, with all its parts and with few of them."""
    few_parts = {"bias": False, "token_scale_target": "delta"}
    uses = [({}, {}), ({"magnitude": False}, {"dropout_p": 0.5}), (few_parts, {"save_output": False})]
    for parts, options in uses:
        given = linear_inputs((2, 3), 20, 16, 4, **parts).requiring_grad()
        hybrid_linear(**given.arguments(), **options).backward(given.dy)
    # one group of rows of a thin product; rows that are not dense
    hybrid_linear(**linear_inputs(64, 8192, 4, 4).arguments())
    permuted = trained_layer(dropout=0.5)(torch.randn(1, 50, 6).transpose(1, 2).requires_grad_())
    permuted.sum().backward()
    layer = trained_layer()
    layer(torch.randn(3, 50)).sum().backward()
    column_norm(layer.weight, layer.lora_a, layer.lora_b, scale=0.5).sum().backward()
    q, k, v = (torch.randn(1, heads, 8, 16, requires_grad=True) for heads in (4, 2, 2))
    shape = {"group_size": 4, "shift": 2, "shifted_heads": "half", "sink_tokens": 1, "lengths": torch.tensor([6])}
    shifted_attention(q, k, v, **shape, dropout_p=0.5).sum().backward()


def test_every_registered_op_keeps_its_contract(backend, monkeypatch):
    """torch.library.opcheck: schema, fake tensors, autograd, dynamic shapes; no op is left out."""
    monkeypatch.setattr(dispatch, "is_at_hand", lambda tensor: False)
    monkeypatch.setattr(dispatch, "runs_directly", lambda tensor, choice: False)
    with Recorder() as recorder, using(backend):
        call_everything()
    registered = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("hylorada::")}
    assert {function.name() for function, _ in recorder.calls} == registered
    for function, arguments in recorder.calls:
        torch.library.opcheck(function, arguments)


@pytest.mark.skipif(not interpreter.supported(), reason=interpreter.requires_interpreter)
def test_every_kernel_is_launched_with_its_tensors_gpu_as_the_current_one(monkeypatch):
    interpret()
    guarded = []

    @contextmanager
    def on_device_of(tensor):
        before = len(launched)
        yield
        guarded.extend(launched[before:])

    monkeypatch.setattr(dispatch, "on_device_of", on_device_of)
    layer = trained_layer()
    with interpreter.launches() as launched, using("triton"):
        call_everything()
        layer.merged_weight()
        column_norms([layer.weight], [layer.lora_a], [layer.lora_b], scales=[0.5])
    assert {"one_pass_kernel", "backward_dx_kernel", "fingerprint_kernel", "merge_kernel"} < set(launched)
    assert sorted(guarded) == sorted(launched)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_that_fake_tensors_went_through_is_left_of_them(dtype):
    x, weight, norm, lora_a, lora_b = (torch.ones(shape) for shape in ((3, 70), (71, 70), (71,), (2, 70), (71, 2)))
    magnitude = torch.ones(71, requires_grad=True)

    def y():
        return hybrid_linear(
            x.to(dtype), weight.to(dtype), lora_a, lora_b, magnitude, scale=0.5, norm=norm, save_output=True
        )

    with FakeTensorMode(allow_non_fake_inputs=True):
        assert isinstance(y(), FakeTensor)
    y().sum().backward()
    kept = [*eager._constants.values(), magnitude.grad]
    assert len(kept) > 1 and all(type(tensor) is torch.Tensor for tensor in kept)


@pytest.mark.parametrize("compiler", COMPILERS)
def test_a_compiled_layer_is_one_graph_and_the_layer(compiler):
    layer = trained_layer()
    x, dy = torch.randn(2, 7, 50), torch.randn(2, 7, 30)
    expected = outcome(layer, x, dy)
    compiled = torch.compile(layer, fullgraph=True, backend=compiler)
    for _ in range(2):
        assert_same(outcome(layer, x, dy, compiled), expected)


def graphs(counter):
    """How many graphs were compiled: Dynamo also hands over an empty one when it finds that a number is constant."""
    return sum(len(module.graph.nodes) > 1 for module in counter.graphs)


@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize(("dynamic", "allowed"), [(True, 1), (None, 2)])
def test_other_numbers_of_tokens_need_at_most_one_more_graph(compiler, dynamic, allowed):
    layer = trained_layer()
    counter = CompileCounterWithBackend(compiler)
    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend=counter)
    for tokens in (6, 5, 12, 33):
        x, dy = torch.randn(tokens, 50), torch.randn(tokens, 30)
        assert_same(outcome(layer, x, dy, compiled), outcome(layer, x, dy))
    assert graphs(counter) == allowed


def dropped_linear(x, lora_a):
    return hybrid_linear(x, torch.zeros(30, 50), lora_a, torch.ones(30, 4), scale=1.0, dropout_p=0.5)


def dropped_attention(x, values):
    q = x.expand(1, 2, -1, -1)
    return shifted_attention(q, 2 * q, values.expand(1, 2, -1, -1), group_size=4, dropout_p=0.5)


@pytest.mark.parametrize("compiler", [None, *COMPILERS])
@pytest.mark.parametrize(
    ("function", "shape"), [(dropped_linear, (4, 50)), (dropped_attention, (6, 50))], ids=["linear", "attention"]
)
def test_a_checkpoint_repeats_its_own_dropout_and_no_other_call_does(compiler, function, shape):
    torch.manual_seed(0)
    x, weights = torch.randn(6, 50), torch.randn(shape, requires_grad=True)

    def repeated(weights):
        return checkpoint(function, x, weights, use_reentrant=False)

    def twice(weights):
        return function(x, weights) - function(x, weights)

    if compiler is not None:
        repeated, twice = (torch.compile(run, backend=compiler, fullgraph=True) for run in (repeated, twice))
    # linear in its weights: the gradient of a sum gives the sum back, if it saw the same mask
    total = repeated(weights).sum()
    total.backward()
    assert (weights * weights.grad).sum().item() == pytest.approx(total.item(), rel=1e-4)
    assert twice(weights).abs().max() > 0.1


@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("parts", [{}, {"magnitude": False, "bias": False, "token_scale": False}], ids=["all", "lora"])
def test_the_compiled_op_is_the_op(compiler, parts):
    counter = CompileCounterWithBackend(compiler)
    compiled = torch.compile(hybrid_linear, fullgraph=True, dynamic=True, backend=counter)
    for tokens in (7, 5, 12):
        results = []
        for function in (hybrid_linear, compiled):
            given = linear_inputs(tokens, 50, 37, 6, **parts).requiring_grad()
            y = function(**given.arguments())
            y.backward(given.dy)
            results.append({"y": y.detach(), **given.gradients()})
        # in a graph scalars become tensors: the compiler may add in another order
        assert_same(*results, tolerance=1e-6)
    assert graphs(counter) == 1


def test_a_compiled_layer_sees_every_step_of_the_optimizer():
    """The kept norm is used and replaced inside the graph."""
    layer = trained_layer()
    twin = copy.deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x, dy = torch.randn(7, 50), torch.randn(7, 30)
    optimizers = [torch.optim.AdamW(adapter(module), lr=0.1, fused=True) for module in (layer, twin)]
    for _ in range(3):
        for module, optimizer in zip((compiled, twin), optimizers, strict=True):
            optimizer.zero_grad()
            module(x).backward(dy)
            optimizer.step()
        assert_same(outcome(layer, x, dy, compiled), outcome(twin, x, dy))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.activation = trained_layer(), nn.GELU()

    def forward(self, x):
        return self.activation(self.up(x)).sum(-1)


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_model_can_be_saved_and_runs_for_any_number_of_tokens(strict):
    model = Block().eval()
    shapes = {"x": {0: torch.export.Dim("tokens", min=2)}}
    file = io.BytesIO()
    torch.export.save(torch.export.export(model, (torch.randn(7, 50),), dynamic_shapes=shapes, strict=strict), file)
    file.seek(0)
    exported = torch.export.load(file).module()
    for tokens in (7, 12):
        x = torch.randn(tokens, 50)
        torch.testing.assert_close(exported(x), model(x), rtol=1e-6, atol=1e-6)


def test_an_exported_model_follows_its_parameters():
    """No norm is frozen into the program."""
    model = Block().eval()
    exported = torch.export.export(model, (torch.randn(7, 50),)).module()
    x = torch.randn(7, 50)
    with torch.no_grad():
        for module in (model, exported):
            module.get_parameter("up.lora_b").mul_(3)
    torch.testing.assert_close(exported(x), model(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_computes_as_a_layer_of_that_dtype(dtype, compiled):
    """Only the norm is taken of the weight as it is, and gradients of the adapter stay in fp32."""
    layer = trained_layer()
    x, dy = torch.randn(7, 50), torch.randn(7, 30, dtype=dtype)
    run = torch.compile(layer, fullgraph=True, backend="aot_eager") if compiled else layer

    def under_autocast(x):
        with torch.autocast("cpu", dtype=dtype):
            return run(x)

    def by_hand(x):
        norm = column_norm(layer.weight, layer.lora_a, layer.lora_b, scale=layer.scale)
        factors = layer.lora_a, layer.lora_b, layer.magnitude, layer.residual_weight
        weight, bias = layer.weight.to(dtype), layer.bias.to(dtype)
        return hybrid_linear(x.to(dtype), weight, *factors, scale=layer.scale, bias=bias, norm=norm)

    found, expected = outcome(layer, x, dy, under_autocast), outcome(layer, x, dy, by_hand)
    assert found["y"].dtype == dtype and found["lora_a"].dtype == torch.float32
    assert_same(found, expected)


def on_a_traced_gpu(tensor):
    """A tensor of this shape and dtype that claims to be on a GPU; inside FakeTensorMode."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")


def like_it(result):
    return tree_map_only(torch.Tensor, lambda tensor: (tensor.shape, tensor.dtype), result)


@pytest.mark.skipif(not dispatch.HAS_TRITON, reason="needs Triton")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_a_traced_gpu_is_given_goes_to_the_kernels(dtype):
    layer = trained_layer(dtype)
    given = linear_inputs((2, 3), 50, 30, 4, dtype=dtype)
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True), using("auto"), Recorder() as recorder:
        there = given.map(on_a_traced_gpu)
        y = hybrid_linear(**there.arguments())
        norm = column_norm(there.weight, there.lora_a, there.lora_b, scale=0.5)
        parameters = {name: on_a_traced_gpu(parameter) for name, parameter in layer.named_parameters()}
        of_layer = torch.func.functional_call(layer, parameters, (there.x,))
    for result, shape, kind in ((y, (2, 3, 30), dtype), (norm, (30,), torch.float32), (of_layer, (2, 3, 30), dtype)):
        assert (result.shape, result.dtype, result.device.type) == (shape, kind, "cuda")
    assert {function.name() for function, _ in recorder.calls} >= {"hylorada::hybrid_linear", "hylorada::column_norm"}
    assert {args[-1] for _, args in recorder.calls} == {"triton"}


def test_every_op_of_the_kernels_is_traced_on_a_gpu_as_it_runs(monkeypatch):
    """Backward too; through autograd itself a torch without CUDA cannot trace a GPU's tensors."""
    if not dispatch.HAS_TRITON or not interpreter.supported():
        pytest.skip(interpreter.requires_interpreter)
    interpret()
    monkeypatch.setattr(dispatch, "is_at_hand", lambda tensor: False)
    monkeypatch.setattr(dispatch, "runs_directly", lambda tensor, choice: False)
    with Recorder() as recorder, using("triton"):
        call_everything()
    assert any("backward" in function.name() for function, _ in recorder.calls)
    for function, arguments in recorder.calls:
        expected = like_it(function(*arguments))
        with FakeTensorMode():
            found = function(*tree_map_only(torch.Tensor, on_a_traced_gpu, arguments))
        assert like_it(found) == expected, function
        assert all(tensor.device.type == "cuda" for tensor in tree_leaves(found)), function


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda module: pickle.loads(pickle.dumps(module))}


@pytest.mark.parametrize("copier", COPIES)
@pytest.mark.parametrize("compiled", [False, True])
def test_a_copy_of_a_layer_in_use_has_a_life_of_its_own(copier, compiled):
    layer = trained_layer()
    x, dy = torch.randn(7, 50), torch.randn(7, 30)
    if compiled:
        layer.compile(fullgraph=True, backend="aot_eager")
    expected = outcome(layer, x, dy)
    twin = COPIES[copier](layer)
    assert_same(outcome(twin, x, dy), expected)
    twin.lora_b.data.mul_(2)
    assert not torch.equal(twin(x), expected["y"])
    assert_same(outcome(layer, x, dy), expected)
    layer.lora_a.data.mul_(2)
    layer.lora_b.data.mul_(2)
    twin.lora_a.data.mul_(2)
    assert_same(outcome(twin, x, dy), outcome(layer, x, dy))


def test_a_copy_of_a_compiled_module_computes_the_same():
    layer = trained_layer()
    x, dy = torch.randn(7, 50), torch.randn(7, 30)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    expected = outcome(layer, x, dy, compiled)
    twin = copy.deepcopy(compiled)
    assert_same(outcome(twin._orig_mod, x, dy, twin), expected)


def test_functional_call_uses_the_parameters_that_it_is_given():
    layer, other = trained_layer(), trained_layer()
    with torch.no_grad():
        for parameter in (other.lora_a, other.lora_b, other.magnitude):
            parameter.mul_(1.5)
    x = torch.randn(7, 50)
    before = layer(x)
    found = torch.func.functional_call(layer, dict(other.named_parameters()), (x,))
    assert torch.equal(found, other(x)) and not torch.equal(found, before)
    assert torch.equal(layer(x), before)
