"""Column norm: contract, checks, autograd."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ... import backend
from . import eager

if backend.HAS_TRITON:
    from . import kernel


def column_norm(weight: Tensor, lora_a: Tensor, lora_b: Tensor, *, scale: float) -> Tensor:
    """The L2 norm of every output row of an adapted weight, without building the adapted weight.

        n_j = || W[j, :] + scale * (B A)[j, :] ||_2

    DoRA calls it the column norm (Liu et al. 2024, arXiv 2402.09353, section 4): it stores weights the other way round.

    Args:
        weight: (O, I), any strides, fp64, fp32, fp16 or bf16; frozen.
        lora_a: (R, I), any float dtype.
        lora_b: (O, R), any float dtype.
        scale: alpha / sqrt(R) (rsLoRA) or alpha / R (LoRA), already computed.

    Returns:
        (O,) fp32, or fp64 for an fp64 weight; accumulated in that dtype. Differentiable in lora_a and lora_b; a zero
        row has gradient 0.

    Raises:
        TypeError: a tensor is not floating point.
        ValueError: shapes or devices that do not fit, or a weight that requires a gradient.
        RuntimeError: "triton" was asked for and cannot run here.
    """
    check_adapter(weight, lora_a, lora_b)
    return _ColumnNorm.apply(weight, lora_a, lora_b, float(scale), backend.choose(weight))


@torch.no_grad()
def column_norms(
    weights: Sequence[Tensor], lora_as: Sequence[Tensor], lora_bs: Sequence[Tensor], *, scales: Sequence[float]
) -> list[Tensor]:
    """`column_norm` of several layers, without gradients; in Triton one launch for all of one dtype.

    Layers whose tensors have gaps, or rows that are not a multiple of 8 long, are launched one by one.

    Args:
        weights, lora_as, lora_bs: one tensor a layer, as in `column_norm`, all on one device.   scales: one a layer.
    """
    layers = list(zip(weights, lora_as, lora_bs, scales, strict=True))
    for weight, lora_a, lora_b, _ in layers:
        check_adapter(weight, lora_a, lora_b)
        if weight.device != weights[0].device:
            raise ValueError(f"weights are on {weights[0].device} and {weight.device}; call once for each device")
    choices = {backend.choose(weight) for weight in weights}
    if choices == {"triton"} and all(backend.runs_directly(weight, "triton") for weight in weights):
        with backend.on_device_of(weights[0]):
            return kernel.forward_several(
                [layer[0] for layer in layers], [layer[1] for layer in layers], [layer[2] for layer in layers],
                scales=[float(layer[3]) for layer in layers],
            )  # fmt: skip
    return [column_norm(weight, lora_a, lora_b, scale=scale) for weight, lora_a, lora_b, scale in layers]


def check_adapter(weight: Tensor, lora_a: Tensor, lora_b: Tensor) -> None:
    """Raise unless weight (O, I), lora_a (R, I) and lora_b (O, R) fit one another and the weight is frozen."""
    check_shapes(weight, lora_a, lora_b)
    if weight.requires_grad:
        raise ValueError(
            "weight requires a gradient, but the op treats it as frozen; call weight.requires_grad_(False)"
        )


def check_shapes(weight: Tensor, lora_a: Tensor, lora_b: Tensor) -> None:
    """Raise unless weight (O, I), lora_a (R, I) and lora_b (O, R) fit one another."""
    tensors = {"weight": weight, "lora_a": lora_a, "lora_b": lora_b}
    for name, tensor in tensors.items():
        if tensor.dim() != 2:
            raise ValueError(f"{name} must have 2 dimensions, got shape {tuple(tensor.shape)}")
        if not tensor.dtype.is_floating_point:
            raise TypeError(f"{name} must be floating point, got {tensor.dtype}; dequantise a quantised weight first")
        if tensor.device != weight.device:
            raise ValueError(f"{name} is on {tensor.device} but weight is on {weight.device}; move them to one device")
    if lora_a.shape[1] != weight.shape[1] or lora_b.shape != (weight.shape[0], lora_a.shape[0]):
        raise ValueError(
            f"shapes do not fit: weight (O, I) = {tuple(weight.shape)}, lora_a (R, I) = {tuple(lora_a.shape)}, "
            f"lora_b (O, R) = {tuple(lora_b.shape)}"
        )
    if lora_a.shape[0] == 0:
        raise ValueError("the rank is 0: lora_a needs at least one row")


def _forward(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float, choice: str) -> Tensor:
    implementation = kernel if choice == "triton" else eager
    with backend.on_device_of(weight):
        return implementation.forward(weight, lora_a, lora_b, scale=scale)


@torch.library.custom_op("hylorada::column_norm", mutates_args=())
def _op(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float, choice: str) -> Tensor:
    return _forward(weight, lora_a, lora_b, scale, choice)


@_op.register_fake
def _(weight, lora_a, lora_b, scale, choice):
    return weight.new_empty(weight.shape[0], dtype=eager.accumulation_dtype(weight))


@torch.library.custom_op("hylorada::column_norm_backward", mutates_args=())
def _op_backward(
    grad: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, norm: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    return eager.backward(grad, weight, lora_a, lora_b, norm, scale=scale)


@_op_backward.register_fake
def _(grad, weight, lora_a, lora_b, norm, scale):
    return lora_a.new_empty(lora_a.shape), lora_b.new_empty(lora_b.shape)


class _ColumnNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, lora_a, lora_b, scale, choice):
        with backend.no_autocast(weight):
            run = _forward if backend.runs_directly(weight, choice) else _op
            norm = run(weight, lora_a, lora_b, scale, choice)
        ctx.save_for_backward(weight, lora_a, lora_b, norm)
        ctx.scale = scale
        return norm

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        weight, lora_a, lora_b, norm = ctx.saved_tensors
        with backend.no_autocast(weight):
            da, db = _op_backward(grad, weight, lora_a, lora_b, norm, ctx.scale)
        return None, da, db, None, None
