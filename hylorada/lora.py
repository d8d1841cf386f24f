"""UnifiedLayer, the adapted linear inside a model: how such layers are found, exchanged and merged."""

import logging
from collections import Counter

from torch import Tensor, nn

from hylorada_kernels.nn import HybridLinear, is_conv1d

from .position import PositionScale

logger = logging.getLogger(__name__)

PARAMETER_NAMES = ("lora_a", "lora_b", "magnitude", "residual_weight")


class UnifiedLayer(HybridLinear):
    """A HybridLinear that asks its model for the position scale of the tokens it receives."""

    positions: PositionScale | None = None

    def forward(self, x: Tensor, token_scale: Tensor | None = None) -> Tensor:
        """x: (..., I) -> (..., O). A given token_scale takes the place of the model's."""
        if token_scale is None and self.positions is not None:
            token_scale = self.positions.for_input(x)
        return super().forward(x, token_scale)


def adapted_layers(model: nn.Module) -> dict[str, UnifiedLayer]:
    """Every adapted linear of a model by its dotted name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, UnifiedLayer)}


def adapter_parameters(layers: dict[str, UnifiedLayer]) -> dict[str, nn.Parameter]:
    """The layers' own parameters, without the base layers' weights and biases, by their dotted names."""
    return {
        f"{layer_name}.{name}": parameter
        for layer_name, layer in layers.items()
        for name, parameter in layer.named_parameters(recurse=False)
        if name in PARAMETER_NAMES
    }


def find_targets(model: nn.Module, names: tuple[str, ...], warn_unmatched: bool = True) -> dict[str, nn.Module]:
    """The linear layers that `names` mean, matched by suffix or dotted path, never by a part of a word.

    A name that matches nothing is a warning; ValueError where none matches at all.
    """
    linears = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) or is_conv1d(module)
    }
    matches = {target: [name for name in linears if f".{name}".endswith(f".{target}")] for target in names}
    found = {name for matched in matches.values() for name in matched}
    unmatched = [target for target in names if not matches[target]]
    kinds = sorted({name.rpartition(".")[2] for name in linears})
    if not found:
        raise ValueError(
            f"lora_target_modules {names} match no linear layer of {type(model).__name__}; "
            f"its linear layers are named {', '.join(kinds)}"
        )
    if unmatched and warn_unmatched:
        logger.warning(
            "lora_target_modules %s match no linear layer of %s; its linear layers are named %s",
            unmatched,
            type(model).__name__,
            ", ".join(kinds),
        )
    return {name: linear for name, linear in linears.items() if name in found}


def replace_modules(model: nn.Module, replacements: dict[nn.Module, nn.Module]) -> None:
    """Put each new module wherever its old one stands, under every name that it has."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child in replacements:
                setattr(parent, name, replacements[child])


def merge_layers(model: nn.Module, layers: dict[str, UnifiedLayer], keep_base: bool) -> None:
    """Merge all layers, or none: RuntimeError where a layer's weight belongs to other layers of the model too."""
    holders = Counter(id(parameter) for module in model.modules() for parameter in module.parameters(recurse=False))
    shared = [name for name, layer in layers.items() if holders[id(layer.weight)] > 1]
    if shared:
        raise RuntimeError(
            f"cannot merge: other layers share the weight of {', '.join(shared)} and would change too; "
            "leave it out of lora_target_modules, or untie the weights of the base model"
        )
    merged: list[UnifiedLayer] = []
    try:
        for layer in layers.values():
            layer.merge(keep_base=keep_base)
            merged.append(layer)
    except BaseException:
        for layer in merged if keep_base else ():
            layer.unmerge()
        raise
