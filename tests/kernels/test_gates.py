"""What the kernels may cost, counted without a GPU: launches, bytes moved, bytes saved for the backward."""

import pytest
import torch

from hylorada_kernels import backend as dispatch
from hylorada_kernels import column_norm, hybrid_linear, testing, using
from hylorada_kernels.testing import interpreter, linear_inputs

if not dispatch.HAS_TRITON or not interpreter.supported():
    pytest.skip(interpreter.requires_interpreter, allow_module_level=True)


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
        assert len(names) == 2, names
        with interpreter.launches() as names:
            y.backward(leaves.dy)
        assert len(names) <= backward, names


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
