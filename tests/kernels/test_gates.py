"""What the kernels may cost, counted without a GPU: launches, bytes moved, bytes saved for the backward."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hylorada_kernels import HybridLinear, backend, column_norm, hybrid_linear, norm_cache, testing, using
from hylorada_kernels.ops.column_norm.eager import CHUNK_ELEMENTS
from hylorada_kernels.testing import interpreter, linear_inputs

if not backend.HAS_TRITON or not interpreter.supported():
    pytest.skip(interpreter.requires_interpreter, allow_module_level=True)

from hylorada_kernels.ops.hybrid_linear import dispatch


def with_norm(given):
    """Leaves and the norm of one layer, as a layer with a cached norm has them."""
    norm = None
    if given.magnitude is not None:
        norm = column_norm(given.weight, given.lora_a, given.lora_b, scale=given.scale)
    return given.requiring_grad(), norm


@pytest.mark.parametrize(("rank", "backward"), [(8, 4), (32, 4), (33, 5), (100, 5)])
@pytest.mark.parametrize("parts", [{}, {"magnitude": False, "token_scale": False}], ids=["hylorada", "lora"])
def test_launches(rank, backward, parts):
    testing.interpret()
    leaves, norm = with_norm(linear_inputs(40, 48, 56, rank, **parts, dtype=torch.bfloat16))
    with using("triton"):
        with interpreter.launches() as names:
            y = hybrid_linear(**leaves.arguments(), norm=norm)
        assert names == ["lora_down_kernel", "blended_gemm_kernel"]
        with interpreter.launches() as names:
            y.backward(leaves.dy)
        assert len(names) <= backward, names


@pytest.mark.parametrize(("tokens", "given_norm"), [(1, True), (16, True), (16, False), (256, False)])
def test_few_tokens_take_one_launch(tokens, given_norm):
    testing.interpret()
    leaves, norm = with_norm(linear_inputs(tokens, 48, 56, 8, dtype=torch.bfloat16))
    with using("triton"), interpreter.launches() as names:
        hybrid_linear(**leaves.arguments(), norm=norm if given_norm else None)
    assert names == ["one_pass_kernel"]


def test_the_library_route_adds_two_launches():
    testing.interpret()
    leaves, norm = with_norm(linear_inputs(40, 48, 56, 8, dtype=torch.bfloat16))
    with using("triton"), dispatch.taking("library"), interpreter.launches() as names:
        hybrid_linear(**leaves.arguments(), norm=norm)
    assert names == ["lora_down_kernel", "blend_epilogue_kernel"]


def test_a_layer_with_its_guard_takes_four_launches():
    testing.interpret()
    layer = HybridLinear.from_linear(nn.Linear(48, 56), rank=8)
    for _ in range(2):
        with using("triton"), interpreter.launches() as names:
            layer(torch.ones(40, 48))
        assert names == ["fingerprint_kernel", "column_norm_kernel", "lora_down_kernel", "blended_gemm_kernel"]


def saved_bytes(forward, known):
    """Bytes of the storages that `forward` saves for the backward, apart from those of the tensors in `known`."""
    own = {tensor.untyped_storage().data_ptr() for tensor in known if tensor is not None}
    found = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if tensor.numel() and storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = forward()
    found.pop(y.untyped_storage().data_ptr(), None)
    return sum(found.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_new_saved_bytes_are_h_and_a_few_numbers_a_row(dtype, bias):
    """y is held too, which its consumer mostly does anyway; x, the parameters and the norm belong to others."""
    testing.interpret()
    tokens, rows, rank = 64, 96, 8
    leaves, norm = with_norm(linear_inputs(tokens, 80, rows, rank, dtype=dtype, bias=bias))
    known = [leaves.x, leaves.weight, leaves.lora_a, leaves.lora_b, leaves.magnitude, leaves.blend, leaves.bias]
    with using("triton"):
        new = saved_bytes(lambda: hybrid_linear(**leaves.arguments(), norm=norm), [*known, norm, leaves.token_scale])
    assert 0 < new <= tokens * rank * dtype.itemsize + 12 * rows


def moved(log):
    return sum(launch.read + launch.written for launch in log)


@pytest.mark.parametrize("token_scale", [False, True])
def test_bytes_moved_stay_near_the_ideal(token_scale):
    """Every byte that a launch needs is counted once, as if caches were perfect; the shape is 4096^3, rank 16, shrunk.

    Ideal: the forward reads x and W and writes y; the backward reads dy, x, W and y and writes dx; factors both ways.
    """
    testing.interpret()
    size = 256
    leaves, norm = with_norm(
        linear_inputs(size, size, size, 1, dtype=torch.bfloat16, bias=False, token_scale=token_scale)
    )
    matrix, factors = 2 * size * size, 4 * 2 * size
    with using("triton"):
        with interpreter.traffic() as log:
            y = hybrid_linear(**leaves.arguments(), norm=norm)
        assert moved(log) <= 1.40 * (3 * matrix + factors)
        with interpreter.traffic() as log:
            y.backward(leaves.dy)
        # the gradient of the position scale needs x beside dx: one more reading
        ideal = (6 if token_scale else 5) * matrix + 2 * factors
        assert moved(log) <= 1.30 * ideal


def test_the_norm_reads_its_weight_once():
    testing.interpret()
    given = linear_inputs(1, 256, 256, 1, dtype=torch.bfloat16)
    with using("triton"), interpreter.traffic() as log:
        column_norm(given.weight, given.lora_a, given.lora_b, scale=given.scale)
    assert moved(log) <= 1.10 * given.weight.nbytes


def test_the_guard_reads_factors_and_a_sample():
    testing.interpret()
    layer = HybridLinear.from_linear(nn.Linear(1024, 512, bias=False), rank=8)
    with using("triton"):
        layer._norm()
        with interpreter.traffic() as log:
            layer._norm()
    factors = layer.lora_a.nbytes + layer.lora_b.nbytes
    assert moved(log) <= 1.25 * (factors + 4 * norm_cache.WEIGHT_SAMPLES) < layer.weight.nbytes / 10


def test_one_token_without_a_norm_reads_the_weight_once():
    testing.interpret()
    given = linear_inputs(1, 256, 256, 1, dtype=torch.bfloat16, bias=False, token_scale=False)
    with using("triton"), interpreter.traffic() as log:
        hybrid_linear(**given.arguments())
    assert moved(log) <= 1.10 * given.weight.nbytes


class LargestResult(TorchDispatchMode):
    """Remembers the size of the largest tensor that an operation made, views left out."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        known = {
            tensor.untyped_storage().data_ptr() for tensor in tree_leaves(args) if isinstance(tensor, torch.Tensor)
        }
        for result in tree_leaves(results):
            if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() not in known:
                self.elements = max(self.elements, result.numel())
        return results


@pytest.mark.parametrize("norm_grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_eager_path_makes_nothing_of_the_size_of_the_weight(dtype, norm_grad):
    given = linear_inputs(8, 2048, 1536, 4, dtype=dtype)
    with using("eager"), LargestResult() as largest:
        leaves = given.requiring_grad()
        hybrid_linear(**leaves.arguments(), norm_grad=norm_grad).backward(leaves.dy)
    # rows of the weight are widened a few at a time
    assert given.x.numel() <= largest.elements <= max(CHUNK_ELEMENTS, given.lora_a.numel()) < given.weight.numel() / 2
