"""The methods of a comparison, each one model: trained whole, trained in parts, or as it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from .components import length_scaling
from .config import BASELINES, METHODS, PRESETS, HyLoRADAConfig
from .model import HyLoRADAModel, enable_checkpointing
from .sparse_mlp import add_sparse_adapters

_LENGTH = ("rope_scaling_type", "rope_scaling_factor", "position_extension")
# the fields of HyLoRADAConfig that trained methods without one of their own follow
_FOLLOWED = {
    "full": (*_LENGTH, "gradient_checkpointing"),
    "sparse": (*_LENGTH, "gradient_checkpointing", "lora_rank"),
}


def baseline_config(name: str, **overrides: Any) -> HyLoRADAConfig | None:
    """The configuration of a method; None for "baseline", "full" and "sparse", which are other models.

    name: one of METHODS; see `get_baseline_model`
    overrides: fields of HyLoRADAConfig that every method of a comparison shares: rank, targets, dropout

    Raises:
        ValueError: an unknown method, or an override that would make it another one.
    """
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}: use one of {', '.join(METHODS)}")
    if name in BASELINES:
        return None
    clash = sorted(set(PRESETS[name]) & set(overrides))
    if clash:
        raise ValueError(f"method {name!r} decides {', '.join(clash)} itself: leave out what would change the method")
    return HyLoRADAConfig.preset(name, **overrides)


def get_baseline_model(name: str, base_model: PreTrainedModel, **overrides: Any) -> nn.Module:
    """The model of a method, with what the method trains requiring a gradient. `base_model` is changed.

    Args:
        name: "baseline", nothing is trained; "full", everything is; "lora" (alpha / R); "rslora" (alpha / sqrt(R));
            "dora" (LoRA and a learned row norm); "lorada" (LoRA and Direct Attention Adaptation); "longlora" (LoRA,
            shifted sparse attention by heads, trained embeddings and norms); "sparse" (adapters of lora_rank units
            behind every MLP, half of them active); "hylorada".
        overrides: fields of HyLoRADAConfig that every method of a comparison shares. Every method follows the length
            scaling; of the others "baseline" follows none, "full" gradient_checkpointing, "sparse" that and lora_rank.

    Raises:
        ValueError: an unknown method, an override that would make it another one, or a model that does not fit.
    """
    config = baseline_config(name, **overrides)
    if config is not None:
        return HyLoRADAModel(base_model, config)
    shared = HyLoRADAConfig(**overrides)
    length = length_scaling(base_model, shared)
    if length is not None:
        length.apply()
    if name == "sparse":
        add_sparse_adapters(base_model, shared.lora_rank, (shared.lora_rank + 1) // 2)
    else:
        base_model.requires_grad_(name == "full")
    if name != "baseline" and shared.gradient_checkpointing and base_model.supports_gradient_checkpointing:
        enable_checkpointing(base_model, {"use_reentrant": False})
    return base_model


def unused_fields(name: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that are not at HyLoRADAConfig's defaults and that a trained method ignores."""
    followed = _FOLLOWED.get(name, tuple(fields))
    return {
        field: value
        for field, value in fields.items()
        if field not in followed and value != getattr(HyLoRADAConfig, field)
    }
