"""The methods of a comparison, each a configuration of one model."""

from __future__ import annotations

from typing import Any

from .config import PRESETS, HyLoRADAConfig

METHODS: dict[str, dict[str, Any] | None] = {"baseline": None, **PRESETS}

_PLANNED = ("full", "longlora", "sparse")


def baseline_config(name: str, **overrides: Any) -> HyLoRADAConfig | None:
    """Return the configuration of a method, or None for "baseline": the model as it is.

    name: "baseline", "lora" (alpha / R), "rslora" (alpha / sqrt(R)), "dora" (LoRA and a learned row norm),
        "lorada" (LoRA and Direct Attention Adaptation), "hylorada"
    overrides: fields of HyLoRADAConfig that every method of a comparison shares: rank, targets, dropout
    """
    if name in _PLANNED:
        raise NotImplementedError(f"method {name!r} is not built yet: use one of {', '.join(METHODS)}")
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}: use one of {', '.join(METHODS)}")
    fixed = METHODS[name]
    if fixed is None:
        return None
    clash = sorted(set(fixed) & set(overrides))
    if clash:
        raise ValueError(f"method {name!r} decides {', '.join(clash)} itself: leave out what would change the method")
    return HyLoRADAConfig(**fixed, **overrides)
