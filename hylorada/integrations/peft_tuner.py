"""The adapted linear as a method of PEFT's own: `get_peft_model(model, HyLoRADAPeftConfig(...))`.

It is the part of the method that can be merged, rsLoRA with a magnitude and a blend; position bias, landmarks and
shifted attention need a HyLoRADAModel. PEFT knows the method, in files too, once this module is imported.
Needs peft, 0.18 or newer.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from hylorada_kernels import column_norm, hybrid_linear
from hylorada_kernels.layer_cache import Keeper, LayerCache, Operands, refresh
from hylorada_kernels.nn import BLEND_INIT, init_lora_a, lora_scale
from hylorada_kernels.ops.hybrid_linear.op import adapted_weight

from ..config import DEFAULT_TARGET_MODULES, HyLoRADAConfig, whole_number

try:
    import peft
    from peft import PeftConfig, PeftType
    from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
    from peft.utils import register_peft_method
    from peft.utils.integrations import dequantize_bnb_weight
except ImportError as error:
    raise ImportError(
        f"hylorada.integrations.peft_tuner needs peft 0.18 or newer: pip install 'hylorada[peft]'; {error}"
    ) from error

logger = logging.getLogger(__name__)

METHOD = "hylorada"


def _new_peft_type() -> PeftType:
    """PeftType.HYLORADA. PEFT looks methods up in this enumeration, which has no public way to add one."""
    name = METHOD.upper()
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_, member._value_ = name, name
    setattr(PeftType, name, member)
    PeftType._member_map_[name] = PeftType._value2member_map_[name] = member
    PeftType._member_names_.append(name)
    return member


@contextmanager
def _registration() -> Iterator[None]:
    """ImportError for whatever a PEFT that is built otherwise raises."""
    try:
        yield
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ImportError(
            f"peft {peft.__version__} does not let a method be added ({type(error).__name__}: {error}); use peft 0.18 "
            "to 0.21, or HyLoRADAModel, which does not need PEFT"
        ) from error


with _registration():
    _PEFT_TYPE = _new_peft_type()


@dataclass
class HyLoRADAPeftConfig(PeftConfig):
    """PEFT's config of the adapted linear; beside the fields here those of every PEFT config (task_type and so on).

    Args:
        r: R.   lora_alpha: numerator of the scale.
        lora_dropout: on the low-rank path while training, in [0, 1).
        target_modules: names, matched as PEFT does, a regular expression or "all-linear"; None takes those of
            HyLoRADAConfig. nn.Linear, Conv1D, and bitsandbytes' Linear4bit.
        exclude_modules: names, or a regular expression, of layers that stay as they are.
        use_rslora: scale alpha / sqrt(R), else alpha / R.
        use_dora_magnitude: learn the magnitude of every output feature (DoRA).
        use_blend: blend DoRA with the plain update by a learned gate; there is none without a magnitude.
        lora_init: of A, "orthogonal" or "kaiming".   dora_norm_grad: let the gradient through the norm.
        modules_to_save: whole modules that are trained and saved too.
        layers_to_transform, layers_pattern: only these layers, as PEFT understands it.
    """

    r: int = 8
    lora_alpha: float = 16.0
    lora_dropout: float = 0.0
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    use_rslora: bool = True
    use_dora_magnitude: bool = True
    use_blend: bool = True
    lora_init: str = "orthogonal"
    dora_norm_grad: bool = False
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    peft_type: PeftType | str | None = field(default=_PEFT_TYPE)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = _PEFT_TYPE
        self.r = whole_number("r", self.r, 1)
        # its checks are those of the fields of the same names
        HyLoRADAConfig(
            lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout,
            use_rslora=self.use_rslora,
            use_dora_magnitude=self.use_dora_magnitude,
            use_blend=self.use_blend,
            lora_init=self.lora_init,
            dora_norm_grad=self.dora_norm_grad,
        )
        if self.layers_pattern is not None and self.layers_to_transform is None:
            raise ValueError("layers_pattern says where layers are counted: give layers_to_transform, or neither")
        if self.layers_to_transform is not None and isinstance(self.target_modules, str):
            raise ValueError(
                f"layers_to_transform: PEFT ignores it with target_modules={self.target_modules!r}; give a list of "
                "names"
            )
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            # a set, as PEFT's own configs have it
            setattr(self, name, set(value) if isinstance(value, (list, tuple)) else value)

    @property
    def scale(self) -> float:
        return lora_scale(self.r, self.lora_alpha, self.use_rslora)


class _Operands(NamedTuple):
    """Of one adapter: lora_a (R, I), lora_b (O, R), magnitude (O,) and blend (1,) or None, and its options."""

    lora_a: Tensor
    lora_b: Tensor
    magnitude: Tensor | None
    blend: Tensor | None
    config: HyLoRADAPeftConfig


def refresh_before_forward(model: nn.Module) -> None:
    """Have what a model's layers keep made anew together, where an optimizer step has made it stale."""
    if _refresh not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(_refresh)


def stop_refreshing(model: nn.Module) -> None:
    """Undo `refresh_before_forward` of the model and its parts, but for those that keep something still."""
    for module in model.modules():
        hooks = module._forward_pre_hooks
        if _refresh in hooks.values() and not any(isinstance(part, Keeper) for part in module.modules()):
            for key in [key for key, hook in hooks.items() if hook is _refresh]:
                del hooks[key]


def _refresh(model: nn.Module, _: Any) -> None:
    refresh(model)


class HyLoRADALinear(nn.Module, BaseTunerLayer, Keeper):
    """A linear layer with adapters of HyLoRADA, at most one for each name.

        y = g * (x W^T + s drop(x) A^T B^T) + bias          g = (1 - beta) m / n + beta

    Several active adapters add up what each alone adds to the base layer; so does a merge of several. A merge keeps
    the original weight on the CPU, and unmerging puts it back bit for bit.

    On bitsandbytes' Linear4bit W is the dequantised weight: norm and merged weight are made of it, x W^T is the layer's
    own product (with its rounding), and only the 4-bit weight is kept for the backward. A merge quantises the adapted
    weight anew, which rounds it. Such a base layer no longer packs its weight when it evaluates on a CPU: bitsandbytes
    rounds the weight by that, and computes no gradient of the input afterwards.

    Parameters, by adapter name: hylorada_A, hylorada_B, hylorada_lora_magnitude_vector and
    hylorada_lora_magnitude_vector_blend, in fp32 (fp64 beside an fp64 base), with PEFT's autocast_adapter_dtype or
    without.
    """

    # TRL casts the trained parameters beside a quantised base to bf16, in which small steps of a magnitude or a blend
    # are lost, except those whose names contain lora_magnitude_vector
    adapter_layer_names = (
        "hylorada_A",
        "hylorada_B",
        "hylorada_lora_magnitude_vector",
        "hylorada_lora_magnitude_vector_blend",
    )
    other_param_names = ("configs", "_caches")
    # nn.DataParallel sets it: its replicas run in threads and share what a layer keeps
    _is_replica = False
    base_layer: Any

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: HyLoRADAPeftConfig):
        super().__init__()
        self.base_layer = base_layer
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ParameterDict())
        self.configs: dict[str, HyLoRADAPeftConfig] = {}
        self._caches: dict[str, LayerCache] = {}
        self._original_weight: Tensor | None = None
        self._disable_adapters, self.merged_adapters = False, []
        self._active_adapter = adapter_name
        self._is_quantised = _check_base(base_layer)
        if self._is_quantised:
            _stop_packing(base_layer)
        self.out_features, self.in_features = self._weight().shape
        self.add_adapter(adapter_name, config)

    def add_adapter(self, name: str, config: HyLoRADAPeftConfig) -> None:
        """Make an adapter's parameters, with which the layer computes what it did without."""
        weight = self._weight()
        own: dict[str, Any] = {"device": weight.device, "dtype": torch.promote_types(weight.dtype, torch.float32)}
        lora_a, lora_b = torch.empty(config.r, self.in_features, **own), torch.zeros(self.out_features, config.r, **own)
        init_lora_a(lora_a, config.lora_init)
        self.configs[name], self._caches[name] = config, LayerCache()
        parameters = [lora_a, lora_b]
        if config.use_dora_magnitude:
            parameters.append(self._caches[name].norms.norm(weight, lora_a, lora_b, config.scale).clone())
            if config.use_blend:
                parameters.append(torch.full((1,), BLEND_INIT, **own))
        for kind, parameter in zip(self.adapter_layer_names, parameters, strict=False):
            getattr(self, kind)[name] = nn.Parameter(parameter)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x: (..., I) -> (..., O)."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        active = [] if self.disable_adapters or self.merged else self._present(self.active_adapters)
        if not active:
            return self.base_layer(x, *args, **kwargs)
        if len(active) == 1:
            return self._adapted(x, active[0])
        base = self.base_layer(x)
        return base + sum(self._adapted(x, name) - base for name in active)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put the updates of adapters, the active ones if None, into the base weight.

        safe_merge: raise ValueError, and change nothing, where the new weight is not finite.
        """
        names = self._present(check_adapters_to_merge(self, adapter_names))
        if not names:
            return
        before = list(self.merged_adapters)
        if before:
            self.unmerge()
        weight = self._combined(before + names)
        if safe_merge and not torch.isfinite(weight).all():
            if before:
                self.merge(adapter_names=before)
            raise ValueError(f"the merged weight is not finite: adapter {', '.join(names)} seems to be broken")
        self._original_weight = self._replace_weight(weight)
        self.merged_adapters = before + names

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the original weight back."""
        if self._original_weight is None:
            return
        if self._is_quantised:
            self.base_layer.weight = self._original_weight.to(self.base_layer.weight.device)
        else:
            self.base_layer.weight.copy_(self._original_weight)
        self._original_weight, self.merged_adapters = None, []

    @torch.no_grad()
    def get_delta_weight(self, adapter: str) -> Tensor:
        """diag(g) (W + s B A) - W, in W's layout and the adapter's dtype; of a layer that is not merged."""
        weight = self._weight().to(self._operands(adapter).lora_a.dtype)
        update = self._merged_weight(weight, adapter) - weight
        return update.T if type(self.base_layer) is Conv1D else update

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """PEFT asks: the update can be had as a matrix."""
        return True

    def delete_adapter(self, adapter_name: str) -> None:
        """PEFT's; the other adapters stay as they are."""
        if adapter_name in self.merged_adapters:
            self.unmerge()
        super().delete_adapter(adapter_name)

    def obstacle(self) -> str | None:
        """What keeps the layer from the fused op in training, with its present adapters, or None."""
        if self.disable_adapters:
            return "its adapters are disabled"
        if self.merged:
            return "its adapters are merged"
        if not self._present(self.active_adapters):
            return "0 adapters are active"
        if self._is_quantised:
            return "the base weight is quantised: the base layer's own product is used"
        return None

    def kept(self) -> Iterator[tuple[LayerCache, Operands]]:
        """See `hylorada_kernels.layer_cache.refresh`."""
        if not (self.disable_adapters or self.merged):
            for name in filter(self._keeps, self._present(self.active_adapters)):
                a, b, magnitude, blend, config = self._operands(name)
                yield self._caches[name], Operands(self._weight(), a, b, magnitude, blend, config.scale)

    def _keeps(self, name: str) -> bool:
        return not (self.configs[name].dora_norm_grad or self._is_quantised or self._is_replica)

    def _present(self, names: list[str]) -> list[str]:
        return [name for name in names if name in self.configs]

    def _weight(self) -> Tensor:
        """The base weight as it is now, (O, I), dequantised."""
        weight = self.base_layer.weight
        if self._is_quantised:
            return dequantize_bnb_weight(weight)
        return weight.T if type(self.base_layer) is Conv1D else weight

    def _operands(self, name: str) -> _Operands:
        parts = [getattr(self, kind) for kind in self.adapter_layer_names]
        a, b, magnitude, blend = (part.get(name) for part in parts)
        return _Operands(a, b, magnitude, blend, self.configs[name])

    def _adapted(self, x: Tensor, name: str) -> Tensor:
        """The layer's output with one adapter."""
        a, b, magnitude, blend, config = self._operands(name)
        weight, norm, kept_gain = self._weight(), None, None
        dropout_p = config.lora_dropout if self.training else 0.0
        if self._keeps(name):
            norm, kept_gain = self._caches[name].norm_and_gain(Operands(weight, a, b, magnitude, blend, config.scale))
        if not self._is_quantised:
            return hybrid_linear(
                x,
                weight,
                a,
                b,
                magnitude,
                blend,
                scale=config.scale,
                bias=self.base_layer.bias,
                norm=norm,
                norm_grad=config.dora_norm_grad,
                dropout_p=dropout_p,
                kept_gain=kept_gain,
            )
        y = self.base_layer(x)
        h = F.linear(F.dropout(x, dropout_p), a.to(x.dtype))
        y = y + F.linear(h, b.to(x.dtype)).to(y.dtype) * config.scale
        if magnitude is None:
            return y
        with torch.set_grad_enabled(config.dora_norm_grad and torch.is_grad_enabled()):
            norm = column_norm(weight, a, b, scale=config.scale)
        # a row of zeros gives the bias, as in the op
        gain = magnitude / torch.where(norm > 0, norm, torch.inf)
        if blend is not None:
            gain = torch.lerp(gain, torch.ones_like(gain), blend.sigmoid())
        # in fp32, rounded once: the base layer's product has the bias already, which is not scaled
        scaled = y * gain
        if self.base_layer.bias is not None:
            scaled = scaled + (1 - gain) * self.base_layer.bias
        return scaled.to(y.dtype)

    def _merged_weight(self, weight: Tensor, name: str) -> Tensor:
        a, b, magnitude, blend, config = self._operands(name)
        return adapted_weight(weight, a, b, magnitude, blend, scale=config.scale)

    def _combined(self, names: list[str]) -> Tensor:
        """The base weight with the updates of adapters, (O, I) in its dtype."""
        weight = self._weight()
        if len(names) == 1:
            return self._merged_weight(weight, names[0])
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        updates = [self._merged_weight(wide, name) - wide for name in names]
        return (wide + sum(updates)).to(weight.dtype)

    def _replace_weight(self, weight: Tensor) -> Tensor:
        """Give the base layer another weight (O, I). -> the one that it had."""
        present = self.base_layer.weight
        if not self._is_quantised:
            original = present.detach().to("cpu", copy=True)
            present.copy_(weight.T if type(self.base_layer) is Conv1D else weight)
            return original
        logger.warning("a merge into a 4-bit weight rounds the adapted weight to 4 bits; the results differ by that")
        self.base_layer.weight = _quantised_like(present, weight)
        return present


def _check_base(base_layer: nn.Module) -> bool:
    """Whether a base layer is quantised; TypeError where it is none that can be adapted."""
    if type(base_layer).__name__ == "Linear4bit" and type(base_layer.weight).__name__ == "Params4bit":
        return True
    # a subclass may compute anything; one that keeps nn.Linear's forward computes the same
    is_linear = isinstance(base_layer, nn.Linear) and type(base_layer).forward is nn.Linear.forward
    if not (is_linear or type(base_layer) is Conv1D):
        raise TypeError(
            "only nn.Linear, transformers' Conv1D and bitsandbytes' Linear4bit can be adapted, got "
            f"{type(base_layer).__module__}.{type(base_layer).__name__}; leave it out of target_modules"
        )
    if not base_layer.weight.dtype.is_floating_point:
        raise TypeError(f"the weight is {base_layer.weight.dtype}, not floating point; quantise with Linear4bit")
    return False


def _stop_packing(base_layer: Any) -> None:
    """Keep bitsandbytes from packing the weight anew when it evaluates on a CPU; RuntimeError where it has."""
    if getattr(base_layer.weight.quant_state, "packing_format_for_cpu", False):
        raise RuntimeError(
            "bitsandbytes has packed a 4-bit weight for evaluation on the CPU, which rounds it and stops gradients; "
            "load the model again and adapt it before it runs in evaluation mode"
        )
    base_layer.support_avx512bf16_for_cpu = False


def _quantised_like(present: Any, weight: Tensor) -> Any:
    """A weight (O, I) in another Params4bit's format."""
    options = {
        name: getattr(present, name)
        for name in ("blocksize", "compress_statistics", "quant_type", "quant_storage", "module")
    }
    return type(present)(weight.to("cpu"), requires_grad=False, **options).to(present.device)


class HyLoRADAPeftModel(BaseTuner):
    """PEFT's tuner of HyLoRADALinear layers; `get_peft_model` makes it."""

    prefix = f"{METHOD}_"
    tuner_layer_cls = HyLoRADALinear

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        refresh_before_forward(self.model)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's, with its hooks, which PEFT 0.18 leaves out."""
        return self.model(*args, **kwargs)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        model: Any = super()._unload_and_optionally_merge(*args, **kwargs)
        stop_refreshing(model)
        return model

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> Any:
        if peft_config.target_modules is None:
            peft_config.target_modules = set(DEFAULT_TARGET_MODULES)
        return peft_config

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, HyLoRADALinear):
            target.add_adapter(adapter_name, peft_config)
            return
        layer = HyLoRADALinear(target, adapter_name, peft_config)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        # PEFT takes this argument away from a method's forward
        if kwargs.get("adapter_names") is not None:
            raise ValueError("adapter_names: HyLoRADA computes one set of adapters for a whole batch; use set_adapter")
        yield


with _registration():
    register_peft_method(name=METHOD, config_cls=HyLoRADAPeftConfig, model_cls=HyLoRADAPeftModel)
