"""RoPE scaling of a loaded model: its rotary modules are built anew from a scaled config, as transformers does it."""

import copy
import inspect
from typing import Any

from torch import nn
from transformers import PreTrainedModel

TYPES = ("linear", "dynamic", "yarn")
LONGEST_LINEAR = 8192


class RopeScaling:
    """Positions beyond a model's original length, by scaled rotary frequencies. Nothing changes before `apply`.

    "linear" divides all frequencies by the factor (position interpolation, Chen et al. 2023), "dynamic" raises the
    base with the length of a text beyond the original one (NTK), "yarn" interpolates by wavelength (Peng et al. 2023).
    "auto" is linear up to a target of 8192 tokens and yarn beyond. max_position_embeddings becomes the target, but with
    "dynamic", which counts from it, it stays the original length. A model that is scaled so already stays as it is.

    Args:
        model: one whose rotary modules are built from config.rope_parameters.   scaling_type: one of the above.
        factor: target length / original length, at least 1.

    Attributes:
        type: "linear", "dynamic" or "yarn".   original_length, target_length: in tokens.

    Raises:
        ValueError: another type or factor, a model without RoPE, or one with RoPE of another kind or scaled otherwise.
    """

    def __init__(self, model: PreTrainedModel, scaling_type: str, factor: float):
        if scaling_type not in (*TYPES, "auto"):
            raise ValueError(f"scaling_type must be one of {', '.join(TYPES)} or auto, got {scaling_type!r}")
        if not factor >= 1:
            raise ValueError(f"factor must be at least 1 (target length / original length), got {factor}")
        name = type(model).__name__
        self._model = model
        self._old = find_rotary_modules(model)
        if not self._old:
            raise ValueError(
                f"rope_scaling_type={scaling_type!r}: {name} has no rotary position embeddings that are built from "
                'rope_parameters; extend a learned position table (rope_scaling_type="auto" does), or use None'
            )
        self._config: Any = self._old[0].config
        present = dict(self._config.rope_parameters or {})
        if any(rotary.config is not self._config for rotary in self._old) or "rope_theta" not in present:
            raise ValueError(
                f"rope_scaling_type={scaling_type!r}: the layers of {name} have different rotary embeddings; set "
                "rope_parameters in its config before it is loaded"
            )
        present_type = present.get("rope_type", "default")
        length = self._config.max_position_embeddings
        if present_type == "yarn":
            length = present["original_max_position_embeddings"]
        elif present_type == "linear":
            length = round(length / present["factor"])
        self.original_length, self.target_length = length, round(length * factor)
        if scaling_type == "auto":
            scaling_type = "linear" if self.target_length <= LONGEST_LINEAR else "yarn"
        self.type = scaling_type
        self._new: list[nn.Module] | None = None
        if present_type == "default":
            self._scaled_config = self._scaled(present, factor)
            self._new = [_rebuilt(rotary, self._scaled_config) for rotary in self._old]
        elif (present_type, present.get("factor")) != (scaling_type, factor):
            raise ValueError(
                f"rope_scaling_type={scaling_type!r}, rope_scaling_factor={factor}: {name} is scaled already "
                f"(rope_type={present_type!r}, factor={present.get('factor')}); load it with rope_type='default', or "
                "leave rope_scaling_type None"
            )

    def apply(self) -> None:
        """Scale the model's own config, and exchange its rotary modules."""
        if self._new is None:
            return
        self._unscaled = {name: getattr(self._config, name) for name in ("rope_parameters", "max_position_embeddings")}
        for name in self._unscaled:
            setattr(self._config, name, getattr(self._scaled_config, name))
        for rotary in self._new:
            rotary.config = self._config
        self._exchange(self._old, self._new)

    def undo(self) -> None:
        """Give back, after `apply`, the modules and the values of the config that were there before."""
        if self._new is None:
            return
        for name, value in self._unscaled.items():
            setattr(self._config, name, value)
        self._exchange(self._new, self._old)

    def _scaled(self, present: dict[str, Any], factor: float) -> Any:
        config = copy.deepcopy(self._config)
        parameters = present | {"rope_type": self.type, "factor": float(factor)}
        if self.type == "yarn":
            parameters["original_max_position_embeddings"] = self.original_length
        if self.type != "dynamic":
            config.max_position_embeddings = self.target_length
        config.rope_parameters = parameters
        config.standardize_rope_params()
        config.validate_rope()
        return config

    def _exchange(self, present: list[nn.Module], others: list[nn.Module]) -> None:
        replacements = dict(zip(present, others, strict=True))
        for parent in list(self._model.modules()):
            for name, child in list(parent._modules.items()):
                if child in replacements:
                    setattr(parent, name, replacements[child])


def find_rotary_modules(model: nn.Module) -> list[Any]:
    """The modules that hold rotary frequencies and are built from a config's rope_parameters alone."""
    return [
        module
        for module in model.modules()
        if any(name.endswith("inv_freq") for name in module._buffers)
        and getattr(getattr(module, "config", None), "rope_parameters", None)
        and _required_arguments(type(module)) == ["config"]
    ]


def _required_arguments(kind: type) -> list[str]:
    parameters = inspect.signature(kind).parameters.values()
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [p.name for p in parameters if p.default is p.empty and p.kind in positional]


def _rebuilt(rotary: Any, config: Any) -> nn.Module:
    rebuilt = type(rotary)(config).to(rotary.inv_freq.device)
    return rebuilt.train(rotary.training)
