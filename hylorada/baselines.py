"""The methods of a comparison, each one model: trained whole, trained in parts, or as it is."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from .config import BASELINES, METHODS, PRESETS, HyLoRADAConfig
from .model import HyLoRADAModel, enable_checkpointing
from .sparse import add_sparse_adapters


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
        overrides: fields of HyLoRADAConfig that every method of a comparison shares. "baseline" has no use for them,
            "full" for gradient_checkpointing and "sparse" for that and lora_rank only.

    Raises:
        ValueError: an unknown method, an override that would make it another one, or a model that does not fit.
    """
    config = baseline_config(name, **overrides)
    if config is not None:
        return HyLoRADAModel(base_model, config)
    shared = HyLoRADAConfig(**overrides)
    if name == "sparse":
        add_sparse_adapters(base_model, shared.lora_rank, (shared.lora_rank + 1) // 2)
    else:
        base_model.requires_grad_(name == "full")
    if name != "baseline" and shared.gradient_checkpointing and base_model.supports_gradient_checkpointing:
        enable_checkpointing(base_model, {"use_reentrant": False})
    return base_model
