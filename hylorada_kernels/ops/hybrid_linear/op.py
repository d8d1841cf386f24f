"""Hybrid linear: contract, checks, autograd."""

import math

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
    kept_gain: eager.Gain | None = None,
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
        norm: (O,), any float dtype; the column norm if the caller has it, else it is computed here.
        token_scale: x.shape[:-1], the position scale p, fp32 (fp64 for fp64 input).
        save_output: keep y for the backward (no new memory where its consumer keeps it); False computes z again there.
            In Triton z is y - bias, so that a bias much larger than z costs the magnitude's and the blend's gradients
            digits; False does not.
        dropout_p: in [0, 1); the caller passes 0 outside training.
        kept_gain: what follows from magnitude, blend, norm and the factors, if the caller keeps it (`layer_cache`): on
            the CPU the eager path then does not make it again, and trusts that the caller has checked these with the
            weight. Where Triton runs, or a trace, it would gain nothing and is left alone.

    Returns:
        (..., O) in x's dtype. Gradients come in their inputs' dtypes; there is no second derivative.

    Raises:
        TypeError: dtypes that do not fit.
        ValueError: shapes, devices or options that do not fit, or a weight that requires a gradient.
        RuntimeError: "triton" was asked for and cannot run here.
    """
    if kept_gain is None or weight.requires_grad:
        check_operands(weight, lora_a, lora_b, magnitude, blend, norm)
    elif magnitude is None:
        raise ValueError("kept_gain was given without magnitude, whose gain it is; give both or neither")
    _check_input(x, weight, bias, token_scale, token_scale_target, dropout_p)
    dtype = backend.autocast_dtype(x)
    if magnitude is not None and norm is None and (norm_grad or dtype not in (None, weight.dtype)):
        with torch.set_grad_enabled(norm_grad and torch.is_grad_enabled()):
            norm = column_norm(weight, lora_a, lora_b, scale=scale)
    elif norm is not None and norm.requires_grad and not norm_grad:
        norm = norm.detach()
    if dtype is not None:
        x, weight = x.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    if x.dtype != weight.dtype or (bias is not None and bias.dtype != x.dtype):
        given = f"x is {x.dtype}, weight {weight.dtype}" + ("" if bias is None else f", bias {bias.dtype}")
        raise TypeError(f"x, weight and bias must have one dtype, got: {given}; cast x, or use torch.autocast")
    if norm is not None:
        norm = norm.to(eager.column_norm.accumulation_dtype(x))
    is_at_hand = backend.is_at_hand(x)
    choice = "eager" if is_at_hand else backend.choose(x)
    runs_directly = is_at_hand or backend.runs_directly(x, choice)
    if not is_at_hand:
        # the kernels walk along vectors with a step of one
        magnitude, norm, bias = (None if tensor is None else tensor.contiguous() for tensor in (magnitude, norm, bias))
        kept_gain = None
    elif dtype is not None and kept_gain is not None:
        kept_gain = kept_gain.to(dtype)
    if token_scale is not None:
        token_scale = token_scale.reshape(-1).contiguous()
    # flattened outside of the function: autograd forbids in-place edits of a function's output that is a view
    leading = x.shape[:-1]
    if len(leading) != 1:
        x = x.reshape(math.prod(leading), x.shape[-1])
    arguments = (
        x, weight, lora_a, lora_b, magnitude, blend, norm, bias, token_scale, _drawn(x, dropout_p, choice), kept_gain,
        (float(scale), token_scale_target, float(dropout_p)), save_output, choice, runs_directly,
    )  # fmt: skip
    with backend.no_autocast(x):
        y = _HybridLinear.apply(*arguments) if torch.is_grad_enabled() else _run(*arguments)[0]
    return y if len(leading) == 1 else y.view(*leading, weight.shape[0])


@torch.no_grad()
def adapted_weight(
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    magnitude: Tensor | None = None,
    blend: Tensor | None = None,
    *,
    scale: float,
    norm: Tensor | None = None,
) -> Tensor:
    """diag(g) (W + s B A), (O, I) in weight's dtype, rounded once: the weight of a plain layer that does the same.

    Arguments and errors are those of `hybrid_linear`; the bias stays what it was.
    """
    check_operands(weight, lora_a, lora_b, magnitude, blend, norm)
    if magnitude is not None and norm is None:
        norm = column_norm(weight, lora_a, lora_b, scale=scale)
    if norm is not None:
        norm = norm.to(eager.column_norm.accumulation_dtype(weight)).contiguous()
    magnitude = None if magnitude is None else magnitude.contiguous()
    implementation = eager if backend.choose(weight) == "eager" else kernel
    with backend.on_device_of(weight):
        return implementation.adapted_weight(weight, lora_a, lora_b, magnitude, blend, norm, scale=scale)


def check_operands(
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    magnitude: Tensor | None,
    blend: Tensor | None,
    norm: Tensor | None = None,
) -> None:
    """Raise unless they fit one another; see `hybrid_linear`."""
    check_adapter(weight, lora_a, lora_b)
    for name, tensor in (("blend", blend), ("norm", norm)):
        if tensor is not None and magnitude is None:
            raise ValueError(
                f"{name} was given without magnitude, whose gain m / n it is part of; give both or neither"
            )
    rows = ((weight.shape[0],),)
    _check_tensors(weight, ("magnitude", magnitude, rows), ("norm", norm, rows), ("blend", blend, ((), (1,))))


def _check_input(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token_scale: Tensor | None,
    token_scale_target: str,
    dropout_p: float,
) -> None:
    if x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"x must end in {weight.shape[1]} features to fit weight {tuple(weight.shape)}, got {tuple(x.shape)}"
        )
    if token_scale_target not in TOKEN_SCALE_TARGETS:
        raise ValueError(f"token_scale_target must be one of {TOKEN_SCALE_TARGETS}, got {token_scale_target!r}")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")
    _check_tensors(
        weight,
        ("x", x, (x.shape,)),
        ("bias", bias, ((weight.shape[0],),)),
        ("token_scale", token_scale, (x.shape[:-1],)),
    )


def _check_tensors(weight: Tensor, *given: tuple[str, Tensor | None, tuple]) -> None:
    device = weight.device
    for name, tensor, shapes in given:
        if tensor is None:
            continue
        if tensor.shape not in shapes:
            allowed = " or ".join(str(tuple(shape)) for shape in shapes)
            raise ValueError(f"{name} must have shape {allowed}, got {tuple(tensor.shape)}")
        if not tensor.dtype.is_floating_point:
            raise TypeError(f"{name} must be floating point, got {tensor.dtype}")
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device} but weight is on {device}; move them to one device")


def _drawn(x: Tensor, dropout_p: float, choice: str) -> Tensor | None:
    """What dropout keeps of x (T, I): its seed (1,) for Triton, else the mask (T, I); None without dropout.

    Drawn outside of the registered op, which a compiler may repeat or merge with another call of it.
    """
    if not dropout_p:
        return None
    if choice == "triton":
        return torch.randint(2**62, (1,), device=x.device, dtype=torch.int64)
    return torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(1 - dropout_p)


def _forward(
    x, weight, lora_a, lora_b, magnitude, blend, norm, bias, token_scale, dropped,
    scale, token_scale_target, dropout_p, save, choice, kept_gain=None,
):  # fmt: skip
    tensors = x, weight, lora_a, lora_b, magnitude, blend, norm, bias, token_scale, dropped
    options = {"scale": scale, "token_scale_target": token_scale_target, "dropout_p": dropout_p, "save": save}
    if choice == "eager":
        return eager.forward(*tensors, kept_gain, **options)
    with backend.on_device_of(x):
        return kernel.forward(*tensors, **options)


def _backward(
    dy, x, weight, lora_a, lora_b, magnitude, blend, norm, bias, token_scale, h, gain, kept, dropped,
    scale, token_scale_target, dropout_p, needs, choice, kept_gain=None,
):  # fmt: skip
    tensors = dy, x, weight, lora_a, lora_b, magnitude, blend, norm, bias, token_scale, h, gain, kept, dropped
    options = {"scale": scale, "token_scale_target": token_scale_target, "dropout_p": dropout_p, "needs": needs}
    if choice == "eager":
        return eager.backward(*tensors, kept_gain, **options)
    with backend.on_device_of(x):
        return kernel.backward(*tensors, **options)


def _distinct(tensors: tuple[Tensor, ...] | list[Tensor]) -> list[Tensor]:
    """A registered op may not return one tensor twice: each empty one gets to be its own."""
    return [tensor if tensor.numel() else torch.empty_like(tensor) for tensor in tensors]


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
    dropped: Tensor | None,
    scale: float,
    token_scale_target: str,
    dropout_p: float,
    save: bool,
    choice: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    y, h, gain, own_norm, kept = _distinct(
        _forward(
            x, weight, lora_a, lora_b, magnitude, blend, norm, bias, token_scale, dropped,
            scale, token_scale_target, dropout_p, save, choice,
        )
    )  # fmt: skip
    return y, h, gain, own_norm, kept


@_forward_op.register_fake
def _(x, weight, lora_a, lora_b, magnitude, blend, norm, bias, *options):
    save, choice = options[-2:]
    tokens, rows = x.shape[0], weight.shape[0]
    own = eager.column_norm.accumulation_dtype(x)
    gains = x.new_empty(0) if magnitude is None else x.new_empty(rows, dtype=own)
    norms = x.new_empty(0) if magnitude is None or norm is not None else x.new_empty(rows, dtype=own)
    keeps_product = choice == "eager" and save and magnitude is not None and bias is not None
    kept = x.new_empty((tokens, rows) if keeps_product else 0)
    return x.new_empty(tokens, rows), x.new_empty(tokens, lora_a.shape[0]), gains, norms, kept


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
    dropped: Tensor | None,
    scale: float,
    token_scale_target: str,
    dropout_p: float,
    needs: list[bool],
    choice: str,
) -> list[Tensor]:
    return _distinct(
        _backward(
            dy, x, weight, lora_a, lora_b, magnitude, blend, norm, bias, token_scale, h, gain, kept, dropped,
            scale, token_scale_target, dropout_p, needs, choice,
        )
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


def _run(
    x, weight, lora_a, lora_b, magnitude, blend, norm, bias, token_scale, dropped, kept_gain,
    options, save, choice, runs_directly,
):  # fmt: skip
    """On x (T, I) and token_scale (T,). -> y, h, gain, own norm, kept product; see `eager.forward`."""
    arguments = x, weight, lora_a, lora_b, magnitude, blend, norm, bias, token_scale, dropped, *options, save, choice
    return _forward(*arguments, kept_gain) if runs_directly else _forward_op(*arguments)


class _HybridLinear(torch.autograd.Function):
    """On x (T, I) and token_scale (T,)."""

    @staticmethod
    def forward(
        ctx, x, weight, lora_a, lora_b, magnitude, blend, norm, bias, token_scale, dropped,
        kept_gain, options, save_output, choice, runs_directly,
    ):  # fmt: skip
        needs = [ctx.needs_input_grad[0], *ctx.needs_input_grad[2:9]]
        save = save_output and any(needs[3:6])
        y, h, gain, own_norm, kept = _run(
            x, weight, lora_a, lora_b, magnitude, blend, norm, bias, token_scale, dropped,
            kept_gain, options, save, choice, runs_directly,
        )  # fmt: skip
        if norm is None and magnitude is not None:
            norm = own_norm
        # the output itself stands in for the product unless the backend kept that
        if save and not kept.numel():
            kept = y
        operands = values = lora_a, lora_b, magnitude, blend, norm, gain
        ctx.apart = None
        if kept_gain is not None and kept_gain.factors is not None and not needs[5]:
            # only their dtypes are asked for: saved, each would cost a call of every saved-tensor hook, of a checkpoint
            # for one; but A where no copy of it is kept
            ctx.apart, values = operands, (lora_a,) if kept_gain.factors[0] is None else ()
        ctx.save_for_backward(x, weight, bias, token_scale, h, kept, dropped, *values)
        ctx.options, ctx.kept_gain = (*options, needs, choice), kept_gain
        return y

    @staticmethod
    def backward(ctx, dy):
        # the wrapper that refuses a second derivative costs 20 us, and is needed where one may be asked for
        return _gradients_once(ctx, dy) if torch.is_grad_enabled() else _gradients(ctx, dy)


def _gradients(ctx, dy):
    *_, needs, choice = ctx.options
    x, weight, bias, token_scale, h, kept, dropped, *values = ctx.saved_tensors
    lora_a, lora_b, magnitude, blend, norm, gain = ctx.apart or values
    runs_directly, kept_gain = backend.runs_directly(dy, choice), ctx.kept_gain
    if not runs_directly and kept_gain is not None and kept_gain.scaled is not None:
        # the op, which knows no kept gain, would take g z for z
        kept = kept.new_empty(0)
    arguments = (
        dy, x, weight, lora_a, lora_b, magnitude, blend, norm, bias, token_scale, h, gain, kept, dropped, *ctx.options
    )  # fmt: skip
    with backend.no_autocast(dy):
        gradients = _backward(*arguments, kept_gain) if runs_directly else _backward_op(*arguments)
    dx, *others = [gradient if needed else None for gradient, needed in zip(gradients, needs, strict=True)]
    return dx, None, *others, None, None, None, None, None, None


_gradients_once = torch.autograd.function.once_differentiable(_gradients)
