"""The ablations of HyLoRADA: what each of its parts does to held-out perplexity, over several seeds."""

from __future__ import annotations

import argparse
from typing import Any

from .benchmark import compare
from .comparison import Arm
from .config import PRESETS

_BARE: dict[str, Any] = {"position_bias_enabled": False}
_RSLORA = PRESETS["rslora"]
_REFERENCE = "linears"
_PLAIN = [Arm("baseline", "baseline", meaning="the model as it is"), Arm("lora", "lora", meaning="scale alpha / R")]

# the arms of each ablation; in the first three the differences are taken from one of HyLoRADA's own
ABLATIONS: dict[str, list[Arm]] = {
    "parts": [
        *_PLAIN,
        Arm("rslora", "rslora", meaning="scale alpha / sqrt(R)"),
        Arm("dora", "dora", meaning="LoRA with a learned magnitude of every output feature"),
        Arm("linears", "hylorada", _BARE, "HyLoRADA's linears alone: rsLoRA, magnitude, learned blend, orthogonal A"),
        Arm("position", "hylorada", {}, "linears and position bias: the defaults"),
        Arm("landmarks", "hylorada", _BARE | {"landmark_enabled": True}, "linears and landmarks"),
        Arm("both", "hylorada", {"landmark_enabled": True}, "linears, position bias and landmarks"),
        Arm("blend-0", "hylorada", _BARE | {"use_blend": False}, "linears with the blend fixed at 0: DoRA's gain"),
        Arm(
            "blend-1",
            "hylorada",
            _BARE | {"use_dora_magnitude": False},
            "linears with the blend fixed at 1, where the gain is 1: the same as without a magnitude",
        ),
        Arm("kaiming", "hylorada", _BARE | {"lora_init": "kaiming"}, "linears with Kaiming-uniform A"),
    ],
    "attention": [
        *_PLAIN,
        Arm("lora-s2", "lora", {"s2_attn_enabled": True}, "lora, trained in shifted groups"),
        Arm("linears", "hylorada", _BARE, "HyLoRADA's linears alone"),
        Arm("linears-s2", "hylorada", _BARE | {"s2_attn_enabled": True}, "linears, trained in shifted groups"),
        Arm("both", "hylorada", {"landmark_enabled": True}, "linears, position bias and landmarks"),
        Arm(
            "all-s2",
            "hylorada",
            {"landmark_enabled": True, "s2_attn_enabled": True},
            "linears, position bias and landmarks, trained in shifted groups",
        ),
    ],
    "author": [
        Arm("baseline", "baseline", meaning="the model as it is"),
        Arm("lora", "hylorada", _RSLORA, 'what the first documents call LoRA: scale alpha / sqrt(R), "rslora" here'),
        Arm("position", "hylorada", _RSLORA | {"position_bias_enabled": True}, "the same and position bias"),
        Arm(
            "landmarks",
            "hylorada",
            _RSLORA | {"landmark_enabled": True, "landmark_position": True},
            "the same as lora and landmarks, whose gate learns the position too",
        ),
    ],
}


def run(options: argparse.Namespace) -> str:
    """Run an ablation. options: of `ablation_parser`. -> the tables and the report's files, to show."""
    ablation = options.ablation or ("author" if options.protocol == "author" else "parts")
    arms = ABLATIONS[ablation]
    unknown = sorted(set(options.arms or ()) - {arm.name for arm in arms})
    if unknown:
        allowed = ", ".join(arm.name for arm in arms)
        raise ValueError(f"--ablation {ablation} has no {', '.join(unknown)}: use {allowed}")
    chosen = [arm for arm in arms if options.arms is None or arm.name in options.arms]
    return compare(options, chosen, _REFERENCE)
