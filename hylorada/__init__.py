"""HyLoRADA: rsLoRA and DoRA blended in one adapted linear, with position bias, for transformers' language models."""

import importlib
from typing import Any

from .config import HyLoRADAConfig

# loaded at the first use: torch and transformers take seconds to import
_LAZY = {
    "HyLoRADAModel": "model",
    "get_lora_plus_param_groups": "model",
    "UnifiedLayer": "lora",
}

__all__ = ["HyLoRADAConfig", "HyLoRADAModel", "UnifiedLayer", "get_lora_plus_param_groups"]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
