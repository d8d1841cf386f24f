"""Which of a base model's own parameters are trained: embeddings, norms."""

import logging

import torch
from torch import nn
from transformers import PreTrainedModel

from .position_table import find_position_table

logger = logging.getLogger(__name__)

# under these names the norms of transformers keep their epsilon
_EPSILONS = ("eps", "variance_epsilon")


def embedding_parameters(model: PreTrainedModel, choice: bool | str) -> dict[str, nn.Parameter]:
    """The weights that train_embeddings means, by their names in the model. A head that is tied to them is logged.

    choice: False; "positions"; "tokens"; "all" of these; or True, "positions" where the model has a table, else
        "tokens". ValueError for "positions" without a table.
    """
    if choice is False:
        return {}
    table = find_position_table(model)
    if choice == "positions" and table is None:
        raise ValueError(
            f'train_embeddings="positions": {type(model).__name__} has no learned position table; use "tokens" or False'
        )
    chosen: list[nn.Module] = [table] if table is not None and choice != "tokens" else []
    if choice in ("tokens", "all") or not chosen:
        chosen.append(model.get_input_embeddings())
    parameters = _named(model, chosen)
    for name, others in tied_names(model, parameters).items():
        logger.info(
            "train_embeddings=%r trains %s too: it is tied to %s (%d parameters)",
            choice,
            ", ".join(others),
            name,
            parameters[name].numel(),
        )
    return parameters


def norm_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Weights and biases of every LayerNorm and RMSNorm, by their names in the model; ValueError without any."""
    parameters = _named(model, [module for module in model.modules() if is_norm(module)])
    if not parameters:
        raise ValueError(f"train_norms: {type(model).__name__} has no norms with parameters; leave it False")
    return parameters


def tied_names(model: nn.Module, parameters: dict[str, nn.Parameter]) -> dict[str, list[str]]:
    """For each of the parameters that stands in the model under other names too, these names."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    others = {name: [n for n in names[id(parameter)] if n != name] for name, parameter in parameters.items()}
    return {name: tied for name, tied in others.items() if tied}


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a LayerNorm or RMSNorm: torch's, or a leaf with an epsilon and a gain for every feature."""
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        return True
    own = dict(module.named_parameters(recurse=False))
    return (
        "weight" in own
        and own.keys() <= {"weight", "bias"}
        and all(parameter.dim() == 1 for parameter in own.values())
        and any(isinstance(getattr(module, name, None), float) for name in _EPSILONS)
        and not isinstance(module, nn.GroupNorm)
        and not module._buffers
        and not any(module.children())
    )


def _named(model: nn.Module, modules: list[nn.Module]) -> dict[str, nn.Parameter]:
    wanted = {id(parameter) for module in modules for parameter in module.parameters(recurse=False)}
    named = {name: parameter for name, parameter in model.named_parameters() if id(parameter) in wanted}
    coarse = [name for name, parameter in named.items() if parameter.dtype in (torch.bfloat16, torch.float16)]
    if coarse:
        logger.warning(
            "%s and %d more are trained in %s, which rounds small steps away; load the base model in float32",
            coarse[0],
            len(coarse) - 1,
            named[coarse[0]].dtype,
        )
    return named
