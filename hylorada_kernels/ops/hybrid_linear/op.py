"""Hybrid linear: contract, checks, autograd."""

import torch
from torch import Tensor

from ... import backend
from ..column_norm.op import check_adapter, column_norm
from . import eager

if backend.HAS_TRITON:
    from . import kernel

TOKEN_SCALE_TARGETS = ("output", "delta")


def hybrid_linear(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    magnitude: Tensor | None = None,
    blend: Tensor | None = None,
    *,
    scale: float,
    bias: Tensor | None = None,
    norm: Tensor | None = None,
    token_scale: Tensor | None = None,
    token_scale_target: str = "output",
    norm_grad: bool = False,
    save_output: bool = True,
    dropout_p: float = 0.0,
) -> Tensor:
    """A frozen linear layer with a low-rank update, a learned row magnitude and a blend between the two.

        z = x W^T + s drop(x) A^T B^T          n_j = || W[j, :] + s (B A)[j, :] ||
        g = (1 - beta) m / n + beta            beta = sigmoid(blend)
        y = p * g * z + bias

    With token_scale_target "delta": y = g * (x W^T + p s drop(x) A^T B^T) + bias.

    magnitude None is LoRA (g = 1; Hu et al. 2021) or rsLoRA (by its `scale`; Kalajdzievski 2023); blend None is DoRA
    (beta = 0; Liu et al. 2024); with both it is HyLoRADA. The bias is never scaled; dropout touches the low-rank path
    only and the norm ignores it.

    The norm is a constant for autograd (DoRA, section 4.3) unless `norm_grad`. Sums are kept in fp32 (fp64 for fp64
    input), and so are n, g and all that is made of m and blend; h = drop(x) A^T and the factors A and B enter matrix
    products in x's dtype. Under autocast x, weight and bias are cast as torch.nn.functional.linear would; the norm is
    taken of the weight as given.

    Args:
        x: (..., I), dtype of weight.
        weight: (O, I), any strides (a transposed view of GPT-2's Conv1D costs nothing); frozen.
        lora_a: (R, I), any float dtype.   lora_b: (O, R), any float dtype.
        magnitude: (O,), any float dtype.   blend: a scalar or (1,), the logit of beta; needs a magnitude.
        scale: alpha / sqrt(R) or alpha / R, already computed.
        bias: (O,), x's dtype.
        norm: (O,), the column norm if the caller has it; else it is computed here.
        token_scale: x.shape[:-1], the position scale p, fp32 (fp64 for fp64 input).
        save_output: keep y for the backward (no new memory where its consumer keeps it too); False computes z again
        there.
        dropout_p: in [0, 1); the caller passes 0 outside training.

    Returns:
        (..., O) in x's dtype. Gradients come in their inputs' dtypes; there is no second derivative.

    Raises:
        TypeError: dtypes that do not fit.   ValueError: shapes, devices or options that do not fit, or a weight that
        requires a gradient.
        RuntimeError: "triton" was asked for and cannot run here.
    """
    _check(x, weight, lora_a, lora_b, magnitude, blend, bias, norm, token_scale, token_scale_target, dropout_p)
    if magnitude is not None:
        if norm is None:
            with torch.set_grad_enabled(norm_grad and torch.is_grad_enabled()):
                norm = column_norm(weight, lora_a, lora_b, scale=scale)
        elif not norm_grad:
            norm = norm.detach()
    dtype = backend.autocast_dtype(x)
    if dtype is not None:
        x, weight = x.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    if x.dtype != weight.dtype or (bias is not None and bias.dtype != x.dtype):
        given = f"x is {x.dtype}, weight {weight.dtype}" + ("" if bias is None else f", bias {bias.dtype}")
        raise TypeError(f"x, weight and bias must have one dtype, got: {given}; cast x, or use torch.autocast")
    # flattened outside of the function: its output must not be a view, or autograd would forbid every in-place edit of
    # it
    leading = x.shape[:-1]
    y = _HybridLinear.apply(
        x.reshape(-1, x.shape[-1]), weight, lora_a, lora_b, magnitude, blend, norm, bias,
        None if token_scale is None else token_scale.reshape(-1),
        float(scale), token_scale_target, float(dropout_p), save_output, backend.choose(x),
    )  # fmt: skip
    return y if len(leading) == 1 else y.view(*leading, weight.shape[0])


def _check(x, weight, lora_a, lora_b, magnitude, blend, bias, norm, token_scale, token_scale_target, dropout_p):
    check_adapter(weight, lora_a, lora_b)
    if x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"x must end in {weight.shape[1]} features to fit weight {tuple(weight.shape)}, got {tuple(x.shape)}"
        )
    if not x.dtype.is_floating_point:
        raise TypeError(f"x must be floating point, got {x.dtype}")
    if blend is not None and magnitude is None:
        raise ValueError(
            "blend was given without magnitude: it mixes the magnitude's gain with 1; give both or neither"
        )
    if token_scale_target not in TOKEN_SCALE_TARGETS:
        raise ValueError(f"token_scale_target must be one of {TOKEN_SCALE_TARGETS}, got {token_scale_target!r}")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")
    rows = (weight.shape[0],)
    for name, tensor, shapes in (
        ("magnitude", magnitude, (rows,)),
        ("bias", bias, (rows,)),
        ("norm", norm, (rows,)),
        ("blend", blend, ((), (1,))),
        ("token_scale", token_scale, (x.shape[:-1],)),
        ("x", x, (x.shape,)),
    ):
        if tensor is None:
            continue
        if tuple(tensor.shape) not in [tuple(shape) for shape in shapes]:
            allowed = " or ".join(str(tuple(shape)) for shape in shapes)
            raise ValueError(f"{name} must have shape {allowed}, got {tuple(tensor.shape)}")
        if not tensor.dtype.is_floating_point:
            raise TypeError(f"{name} must be floating point, got {tensor.dtype}")
        if tensor.device != weight.device:
            raise ValueError(f"{name} is on {tensor.device} but weight is on {weight.device}; move them to one device")


def _implementation(choice: str):
    return kernel if choice == "triton" else eager


@torch.library.custom_op("hylorada::hybrid_linear", mutates_args=())
def _forward_op(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    magnitude: Tensor | None,
    blend: Tensor | None,
    norm: Tensor | None,
    bias: Tensor | None,
    token_scale: Tensor | None,
    scale: float,
    token_scale_target: str,
    dropout_p: float,
    save: bool,
    choice: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _implementation(choice).forward(
        x, weight, lora_a, lora_b, magnitude, blend, norm, bias, token_scale,
        scale=scale, token_scale_target=token_scale_target, dropout_p=dropout_p, save=save,
    )  # fmt: skip


@_forward_op.register_fake
def _(x, weight, lora_a, lora_b, magnitude, blend, norm, bias, token_scale, scale, target, dropout_p, save, choice):
    tokens, rows = x.shape[0], weight.shape[0]
    gain = x.new_empty(0 if magnitude is None else rows, dtype=x.dtype if norm is None else norm.dtype)
    keeps_product = choice == "eager" and save and magnitude is not None and bias is not None
    if choice == "eager":
        dropped = x.new_empty(x.shape if dropout_p else 0, dtype=torch.bool)
    else:
        dropped = x.new_empty(1 if dropout_p else 0, dtype=torch.int64)
    return (
        x.new_empty(tokens, rows),
        x.new_empty(tokens, lora_a.shape[0]),
        gain,
        x.new_empty((tokens, rows) if keeps_product else 0),
        dropped,
    )


@torch.library.custom_op("hylorada::hybrid_linear_backward", mutates_args=())
def _backward_op(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    magnitude: Tensor | None,
    blend: Tensor | None,
    norm: Tensor | None,
    bias: Tensor | None,
    token_scale: Tensor | None,
    h: Tensor,
    gain: Tensor,
    kept: Tensor,
    dropped: Tensor,
    scale: float,
    token_scale_target: str,
    dropout_p: float,
    needs: list[bool],
    choice: str,
) -> list[Tensor]:
    return _implementation(choice).backward(
        dy, x, weight, lora_a, lora_b, magnitude, blend, norm, bias, token_scale, h, gain, kept, dropped,
        scale=scale, token_scale_target=token_scale_target, dropout_p=dropout_p, needs=needs,
    )  # fmt: skip


@_backward_op.register_fake
def _(
    dy,
    x,
    weight,
    lora_a,
    lora_b,
    magnitude,
    blend,
    norm,
    bias,
    token_scale,
    h,
    gain,
    kept,
    dropped,
    scale,
    target,
    dropout_p,
    needs,
    choice,
):
    inputs = (x, lora_a, lora_b, magnitude, blend, norm, bias, token_scale)
    return [
        tensor.new_empty(tensor.shape) if needed else x.new_empty(0)
        for tensor, needed in zip(inputs, needs, strict=True)
    ]


class _HybridLinear(torch.autograd.Function):
    """On x (T, I) and token_scale (T,)."""

    @staticmethod
    def forward(
        ctx, x, weight, lora_a, lora_b, magnitude, blend, norm, bias, token_scale,
        scale, token_scale_target, dropout_p, save_output, choice,
    ):  # fmt: skip
        needs = [ctx.needs_input_grad[i] for i in (0, 2, 3, 4, 5, 6, 7, 8)]
        save = save_output and any(needs[3:6])
        run = _forward_op._init_fn if backend.is_plain(x) else _forward_op
        with backend.no_autocast(x):
            y, h, gain, kept, dropped = run(
                x, weight, lora_a, lora_b, magnitude, blend, norm, bias, token_scale,
                scale, token_scale_target, dropout_p, save, choice,
            )  # fmt: skip
        # the output itself stands in for the product unless the backend kept that
        kept = y if save and not kept.numel() else kept
        ctx.save_for_backward(
            x, weight, lora_a, lora_b, magnitude, blend, norm, bias, token_scale, h, gain, kept, dropped
        )
        ctx.options = (scale, token_scale_target, dropout_p, needs, choice)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        run = _backward_op._init_fn if backend.is_plain(dy) else _backward_op
        needs = ctx.options[3]
        with backend.no_autocast(dy):
            gradients = run(dy, *ctx.saved_tensors, *ctx.options)
        dx, *others = [gradient if needed else None for gradient, needed in zip(gradients, needs, strict=True)]
        return dx, None, *others, None, None, None, None, None
