"""The methods of a comparison, each a configuration of one model."""

from __future__ import annotations

from typing import Any

from .config import HyLoRADAConfig

# the adapted linear as plain low-rank adaptation: no magnitude, no blend, no position bias, the usual initial values
_LORA: dict[str, Any] = {
    "use_rslora": False,
    "use_dora_magnitude": False,
    "use_blend": False,
    "position_bias_enabled": False,
    "lora_init": "kaiming",
}

METHODS: dict[str, dict[str, Any] | None] = {
    "baseline": None,
    "lora": _LORA,
    "rslora": {**_LORA, "use_rslora": True},
    "dora": {**_LORA, "use_dora_magnitude": True},
    "lorada": {**_LORA, "daa_enabled": True},
    "hylorada": {},
}

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
