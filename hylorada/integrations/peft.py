"""PEFT's own LoRA and DoRA layers computed by the fused op: `accelerate(peft_model)`, one line in an existing script.

A layer keeps its parameters, attributes, state-dict keys and methods; only its forward is another one, by its class.
Needs peft, 0.18 or newer.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hylorada_kernels import backend, hybrid_linear
from hylorada_kernels.layer_cache import Keeper, LayerCache, Operands

from .peft_files import export_adapter, export_lora, import_adapter
from .peft_tuner import HyLoRADALinear, HyLoRADAPeftConfig, refresh_before_forward, stop_refreshing

try:
    from peft.tuners.lora.dora import DoraLinearLayer
    from peft.tuners.lora.layer import Linear
    from peft.tuners.lora.variants import DoraLinearVariant
    from peft.tuners.tuners_utils import BaseTunerLayer
except ImportError as error:
    raise ImportError(
        f"hylorada.integrations.peft needs peft 0.18 or newer: pip install 'hylorada[peft]'; {error}"
    ) from error

__all__ = [
    "HyLoRADAPeftConfig",
    "Status",
    "accelerate",
    "export_adapter",
    "export_lora",
    "import_adapter",
    "restore",
    "status",
]

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Status:
    """How the PEFT layers of a model will be computed in training, by their dotted names.

    fused: by the fused op.   fallback: by PEFT's own forward, each with the reason.
    """

    fused: list[str]
    fallback: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{len(self.fused)} of {len(self.fused) + len(self.fallback)} PEFT layers are fused"]
        reasons = list(self.fallback.values())
        lines += [f"{reasons.count(reason)} left to PEFT: {reason}" for reason in dict.fromkeys(reasons)]
        return "\n".join(lines)


def accelerate(model: nn.Module) -> Status:
    """Compute a PEFT model's LoRA, rsLoRA and DoRA layers on nn.Linear and Conv1D by the fused op, from now on.

        y = m / n * (x W^T + s drop(x) A^T B^T) + bias          n: the column norm, kept until A, B, W or s change

    It is the formula of PEFT's forward (m / n = 1 without DoRA) with the layer's own Parameters, so that optimizers,
    trainers and files stay what they are. Where the formula is not PEFT's, PEFT's own forward runs, decided at every
    call: several or no active adapters, merged, disabled, adapter_names, DoRA with dropout in training, lora_bias,
    other variants, quantised, sharded or trainable base weights, hooks inside of the layer. Layers of other kinds are
    not touched. Calling it again, after new layers were added, changes nothing for the others.

    Beside a 16-bit base the factors enter the products in 16 bits, where PEFT widens x to the factors' fp32. A zero row
    of the adapted weight gives the bias, where PEFT gives nan. There is no second derivative.

    Returns:
        `status(model)`.

    Raises:
        TypeError: not a module.   ValueError: a model without PEFT layers.
    """
    layers = [layer for _, layer in _peft_layers(model)]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no PEFT layers; call accelerate on what get_peft_model returns")
    plain: list[Any] = [layer for layer in layers if type(layer) is Linear]
    for layer in plain:
        layer._hylorada_kept = {}
        layer.__class__ = FusedLinear
    if plain:
        refresh_before_forward(model)
    return status(model)


def restore(model: nn.Module) -> None:
    """Undo `accelerate`: every layer is of PEFT's class again, with PEFT's attributes only."""
    fused: list[Any] = [layer for _, layer in _peft_layers(model) if type(layer) is FusedLinear]
    for layer in fused:
        layer.__class__ = Linear
        del layer._hylorada_kept
    if fused:
        stop_refreshing(model)


def status(model: nn.Module) -> Status:
    """Which layers the fused op will compute in training, with the adapters as they are now; why not the others.

    Ask before the model is sharded: FSDP's parameters are whole, and the layers fused, within a forward only.
    """
    fused, fallback = [], {}
    for name, layer in _peft_layers(model):
        reason = _obstacle(layer)
        if reason is None:
            fused.append(name)
        else:
            fallback[name] = reason
    return Status(fused, fallback)


class FusedLinear(Linear, Keeper):
    """PEFT's lora.Linear with another forward. `accelerate` turns layers into it; it is never constructed."""

    _hylorada_kept: dict[str, LayerCache]
    # nn.DataParallel sets it: its replicas run in threads and share what a layer keeps
    _is_replica = False

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x: (..., I) -> (..., O). See `accelerate`."""
        operands = _operands(self, self.training)
        if args or kwargs or isinstance(operands, str) or not _fits(x, operands.weight):
            return super().forward(x, *args, **kwargs)
        norm = kept_gain = None
        if operands.magnitude is not None and not self._is_replica:
            if operands.adapter not in self._hylorada_kept:
                self._hylorada_kept[operands.adapter] = LayerCache()
            norm, kept_gain = self._hylorada_kept[operands.adapter].norm_and_gain(operands.of_norm())
        return hybrid_linear(
            x,
            operands.weight,
            operands.lora_a,
            operands.lora_b,
            operands.magnitude,
            scale=operands.scale,
            bias=operands.bias,
            norm=norm,
            dropout_p=operands.dropout_p,
            kept_gain=kept_gain,
        )

    def kept(self) -> Iterator[tuple[LayerCache, Operands]]:
        """See `hylorada_kernels.layer_cache.refresh`."""
        if self._hylorada_kept and not self._is_replica:
            operands = _operands(self, self.training)
            if not isinstance(operands, str) and operands.adapter in self._hylorada_kept:
                yield self._hylorada_kept[operands.adapter], operands.of_norm()

    def delete_adapter(self, adapter_name: str) -> None:
        """PEFT's, and what was kept for the adapter is forgotten."""
        super().delete_adapter(adapter_name)
        self._hylorada_kept.pop(adapter_name, None)


class _Operands(NamedTuple):
    """What the op takes of a layer: weight (O, I), lora_a (R, I), lora_b (O, R), magnitude and bias (O,) or None."""

    adapter: str
    weight: Tensor
    lora_a: Tensor
    lora_b: Tensor
    magnitude: Tensor | None
    bias: Tensor | None
    scale: float
    dropout_p: float

    def of_norm(self) -> Operands:
        return Operands(self.weight, self.lora_a, self.lora_b, self.magnitude, None, self.scale)


def _peft_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch module with PEFT layers, got {type(model).__name__}")
    return ((name, module) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))


def _obstacle(layer: nn.Module) -> str | None:
    """What keeps a layer from the fused op in training, or None."""
    if isinstance(layer, HyLoRADALinear):
        return layer.obstacle()
    if type(layer) is Linear:
        return "not accelerated: call accelerate(model)"
    if type(layer) is not FusedLinear:
        return f"{type(layer).__module__}.{type(layer).__name__} is not PEFT's plain linear layer"
    if "forward" in layer.__dict__:
        return "its forward was replaced by a hook"
    operands = _operands(layer, training=True)
    return operands if isinstance(operands, str) else None


def _operands(layer: Any, training: bool) -> _Operands | str:
    """What the op takes of a layer with its present adapters; or, in words, what keeps the op from computing it."""
    if layer.disable_adapters:
        return "its adapters are disabled"
    if layer.merged:
        return "its adapters are merged"
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(active) != 1:
        return f"{len(active)} adapters are active: only one can be fused"
    (name,) = active
    base, lora_a, lora_b, dropout = layer.base_layer, layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
    variant = layer.lora_variant.get(name)
    if variant is not None and type(variant) is not DoraLinearVariant:
        return f"{type(variant).__name__} is other mathematics"
    if type(base) not in (nn.Linear, Conv1D):
        return f"the base layer is a {type(base).__module__}.{type(base).__name__}, not nn.Linear or Conv1D"
    if layer.fan_in_fan_out is not (type(base) is Conv1D):
        return f"fan_in_fan_out={layer.fan_in_fan_out} does not fit the base layer, a {type(base).__name__}"
    if type(lora_a) is not nn.Linear or type(lora_b) is not nn.Linear:
        return "A and B are not plain nn.Linear layers"
    if lora_b.bias is not None:
        return "lora_bias=True is not part of the fused formula"
    if type(dropout) not in (nn.Identity, nn.Dropout) or getattr(dropout, "p", 0) == 1:
        return f"the dropout is {dropout!r}"
    dropout_p = float(dropout.p) if type(dropout) is nn.Dropout and dropout.training else 0.0
    called, magnitude = [base, lora_a, lora_b, dropout], None
    if variant is not None:
        dora = layer.lora_magnitude_vector[name]
        if type(dora) is not DoraLinearLayer:
            return f"the magnitude is a {type(dora).__name__}"
        if training and type(dropout) is nn.Dropout and dropout.p:
            return (
                f"DoRA with lora_dropout={dropout.p} is other mathematics in training, where PEFT drops the base "
                "layer's input too: set lora_dropout=0; evaluation is fused"
            )
        dropout_p, magnitude = 0.0, dora.weight
        called.append(dora)
    if any(_is_hooked(module) for module in called):
        return "a hook sits on the base layer, A, B, the dropout or the magnitude"
    scale = layer.scaling[name]
    if not isinstance(scale, (int, float)) or not layer.cast_input_dtype_enabled:
        return "the scaling is not a number, or the casting of inputs is switched off"
    weight, bias = base.weight, base.bias
    parameters = [
        parameter for parameter in (weight, lora_a.weight, lora_b.weight, magnitude, bias) if parameter is not None
    ]
    if any(not backend.is_plain(parameter) or parameter.dtype not in _DTYPES for parameter in parameters):
        return "a parameter is quantised, sharded or of another special kind"
    if any(parameter.device != weight.device for parameter in parameters):
        return "its parameters are on several devices"
    if bias is not None and bias.dtype != weight.dtype:
        return f"the bias is {bias.dtype}, the weight {weight.dtype}"
    if weight.requires_grad:
        return "the base weight is trained: the fused op gives it no gradient"
    if type(base) is Conv1D:
        weight = weight.T
    return _Operands(name, weight, lora_a.weight, lora_b.weight, magnitude, bias, float(scale), dropout_p)


def _is_hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def _fits(x: Any, weight: Tensor) -> bool:
    """Whether the op takes x where nn.functional.linear would; what neither takes is left to PEFT's error."""
    return (
        backend.is_plain(x)
        and x.device == weight.device
        and x.dim() > 0
        and x.shape[-1] == weight.shape[1]
        and (x.dtype == weight.dtype or (x.is_floating_point() and backend.autocast_dtype(x) is not None))
    )
