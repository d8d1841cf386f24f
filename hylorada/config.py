"""HyLoRADAConfig: every option of the method as one validated, frozen record."""

import dataclasses
import difflib
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DEFAULT_TARGET_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "c_attn", "c_proj")

_AT_LEAST = {
    "lora_rank": 1,
    "position_num_buckets": 1,
    "num_landmarks": 1,
    "s2_group_size": 1,
    "s2_sink_tokens": 0,
    "daa_num_buckets": 0,
    "max_sequence_length": 1,
}
# what an option belongs to: it does nothing while that is off. use_blend is not here, it is on by default
SWITCHES = {
    "dora_norm_grad": "use_dora_magnitude",
    "keep_scaled_weight": "use_dora_magnitude",
    "position_num_buckets": "position_bias_enabled",
    "position_bucket": "position_bias_enabled",
    "position_bias_target": "position_bias_enabled",
    "num_landmarks": "landmark_enabled",
    "landmark_gate": "landmark_enabled",
    "landmark_position": "landmark_enabled",
    "s2_group_size": "s2_attn_enabled",
    "s2_shift_ratio": "s2_attn_enabled",
    "s2_sink_tokens": "s2_attn_enabled",
    "s2_shift_mode": "s2_attn_enabled",
    "s2_eval": "s2_attn_enabled",
    "daa_num_buckets": "daa_enabled",
    "rope_scaling_factor": "rope_scaling_type",
    "position_extension": "rope_scaling_type",
}
# of the position that a landmarks' gate learns, by logarithm
LANDMARK_POSITION_BUCKETS = 64
_CHOICES = {
    "lora_init": ("orthogonal", "kaiming"),
    "position_bucket": ("log", "log2"),
    "position_bias_target": ("output", "delta"),
    "landmark_gate": ("token", "prefix_mean", "sequence_mean"),
    "s2_shift_mode": ("layers", "heads"),
    "train_embeddings": (False, True, "positions", "tokens", "all"),
    "rope_scaling_type": (None, "linear", "dynamic", "yarn", "auto"),
    "position_extension": ("tile", "interpolate"),
    "mixed_precision": ("bf16", "fp16", "fp32"),
}
# the adapted linear as plain low-rank adaptation: no magnitude, no blend, no position bias, the usual initial values
_LORA: dict[str, Any] = {
    "use_rslora": False,
    "use_dora_magnitude": False,
    "use_blend": False,
    "position_bias_enabled": False,
    "lora_init": "kaiming",
}
# the fields that make a config a method
PRESETS: dict[str, dict[str, Any]] = {
    "lora": _LORA,
    "rslora": {**_LORA, "use_rslora": True},
    "dora": {**_LORA, "use_dora_magnitude": True},
    "lorada": {**_LORA, "daa_enabled": True},
    "longlora": {
        **_LORA,
        "s2_attn_enabled": True,
        "s2_shift_mode": "heads",
        "train_embeddings": "tokens",
        "train_norms": True,
    },
    "hylorada": {},
}
# the methods of a comparison that are no configuration of HyLoRADAModel, and all methods
BASELINES = ("baseline", "full", "sparse")
METHODS = (*BASELINES, *PRESETS)
# YAML 1.1 reads 2e-4 as a text
_EXPONENT = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$")


@dataclass(frozen=True)
class HyLoRADAConfig:
    """What to adapt and how. The values are checked here; they are matched with a model by `HyLoRADAModel`.

    A config cannot be changed; `dataclasses.replace(config, lora_rank=16)` makes another.

    The adapted linears:
        lora_rank: R.   lora_alpha: numerator of the scale.
        lora_dropout: on the low-rank path while training, in [0, 1).
        lora_target_modules: linear layers, matched by suffix or dotted path ("q_proj", "self_attn.q_proj").
        use_rslora: scale alpha / sqrt(R), else alpha / R.
        use_dora_magnitude: learn the magnitude of every output feature (DoRA).
        use_blend: blend DoRA with the plain update by a learned gate; there is none without a magnitude.
        dora_norm_grad: let the gradient through the norm.   lora_init: of A, "orthogonal" or "kaiming".
        keep_scaled_weight: on the CPU, hold the adapted weights twice, the second time with their gain; saves time
            where several micro-batches share an optimizer step, and rounds 16-bit weights once more.

    Position bias, one scale per bucket of logical positions:
        position_bias_enabled, position_num_buckets.
        position_bucket: "log" uses every bucket, "log2" is floor(log2(position + 1)).
        position_bias_target: scale the whole adapted "output" or only the low-rank "delta".

    Landmarks:
        landmark_enabled, num_landmarks.
        landmark_gate: "token", "prefix_mean" or, for bidirectional models only, "sequence_mean".
        landmark_position: learn the gate's logits by position too.

    Shifted sparse attention:
        s2_attn_enabled.   s2_group_size: tokens, or "auto".   s2_shift_ratio: of the group, in [0, 1).
        s2_sink_tokens: attended by every group.   s2_eval: in evaluation too.
        s2_shift_mode: shift every other layer ("layers") or half of the heads ("heads").

    Direct Attention Adaptation:
        daa_enabled: learn a temperature and a distance bias for every attention head.
        daa_num_buckets: of distances; 0 for the temperature alone, which leaves the attention to a fused kernel.

    Long contexts:
        train_embeddings: False, True, "positions", "tokens" or "all".   train_norms.
        rope_scaling_type: None, "linear", "dynamic", "yarn" or "auto".
        rope_scaling_factor: target length / original length.
        position_extension: how "auto" makes a learned position table longer. "tile" repeats it, so that texts of the
            original length keep their logits bit for bit; "interpolate" stretches it.

    Training:
        gradient_checkpointing: switch on the base model's own; False leaves the base model as it is.
        mixed_precision: "bf16", "fp16" or "fp32"; what a trainer takes by default, for the model itself never casts.
        max_sequence_length: where the buckets of positions and of distances end.
    """

    lora_rank: int = 8
    lora_alpha: float = 16.0
    lora_dropout: float = 0.05
    lora_target_modules: tuple[str, ...] = DEFAULT_TARGET_MODULES
    use_rslora: bool = True
    use_dora_magnitude: bool = True
    use_blend: bool = True
    dora_norm_grad: bool = False
    lora_init: str = "orthogonal"
    keep_scaled_weight: bool = False

    position_bias_enabled: bool = True
    position_num_buckets: int = 64
    position_bucket: str = "log"
    position_bias_target: str = "output"

    landmark_enabled: bool = False
    num_landmarks: int = 8
    landmark_gate: str = "token"
    landmark_position: bool = False

    s2_attn_enabled: bool = False
    s2_group_size: int | str = 2048
    s2_shift_ratio: float = 0.5
    s2_sink_tokens: int = 0
    s2_shift_mode: str = "layers"
    s2_eval: bool = False

    daa_enabled: bool = False
    daa_num_buckets: int = 32

    train_embeddings: bool | str = False
    train_norms: bool = False
    rope_scaling_type: str | None = None
    rope_scaling_factor: float = 1.0
    position_extension: str = "tile"

    gradient_checkpointing: bool = True
    mixed_precision: str = "bf16"
    max_sequence_length: int = 32768

    def __post_init__(self):
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, _checked(field.name, field.type, getattr(self, field.name)))
        if self.rope_scaling_type is not None and self.rope_scaling_factor < 1:
            raise ValueError(
                f"rope_scaling_factor must be at least 1 with rope_scaling_type={self.rope_scaling_type!r} "
                f"(target length / original length), got {self.rope_scaling_factor}"
            )
        if self.keep_scaled_weight and self.dora_norm_grad:
            raise ValueError(
                "keep_scaled_weight=True keeps what dora_norm_grad=True makes anew in every forward; leave one of them "
                "False"
            )
        if self.position_bias_enabled and self.position_bucket == "log":
            self._check_log_buckets("position_num_buckets", 'position_bucket="log2"')
        if self.daa_enabled and self.daa_num_buckets:
            self._check_log_buckets("daa_num_buckets", "0 for the temperature alone")
        single = LANDMARK_POSITION_BUCKETS // 4
        if self.landmark_enabled and self.landmark_position and self.max_sequence_length <= single:
            raise ValueError(
                f"max_sequence_length must exceed {single} with landmark_position=True, got {self.max_sequence_length}"
            )

    def _check_log_buckets(self, field: str, instead: str):
        buckets = getattr(self, field)
        if buckets < 4:
            raise ValueError(f"{field} >= 4 is needed for logarithmic buckets, got {buckets}; use more, or {instead}")
        if self.max_sequence_length <= buckets // 4:
            raise ValueError(
                f"max_sequence_length must exceed a quarter of {field}={buckets}, the buckets of one position each, "
                f"got {self.max_sequence_length}"
            )

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> "HyLoRADAConfig":
        """The config of a method. The fields in `overrides` win.

        name: "lora", "rslora", "dora", "lorada" (LoRA and Direct Attention Adaptation), "longlora" (LoRA, shifted
            sparse attention by heads, trained embeddings and norms) or "hylorada".
        """
        if name not in PRESETS:
            raise ValueError(f"there is no preset {name!r}; use one of {', '.join(PRESETS)}")
        return cls.from_dict(PRESETS[name] | overrides)

    @classmethod
    def for_context_length(cls, max_length: int, model_max_length: int = 1024, **overrides: Any) -> "HyLoRADAConfig":
        """The components that a context length is worth.

        Always the adapted linears; from 2048 tokens position bias and landmarks; beyond model_max_length, what the base
        model was trained for, embeddings and RoPE scaling; from 4096 shifted sparse attention and norms. The fields in
        `overrides` win.
        """
        max_length = whole_number("max_length", max_length, 1)
        model_max_length = whole_number("model_max_length", model_max_length, 1)
        is_longer = max_length > model_max_length
        chosen = {
            "position_bias_enabled": max_length >= 2048,
            "landmark_enabled": max_length >= 2048,
            "train_embeddings": is_longer,
            "rope_scaling_type": "auto" if is_longer else None,
            "rope_scaling_factor": max(1.0, max_length / model_max_length),
            "s2_attn_enabled": max_length >= 4096,
            "train_norms": max_length >= 4096,
            "max_sequence_length": max_length,
        }
        return cls.from_dict(chosen | overrides)

    def to_dict(self) -> dict[str, Any]:
        """Every field, in values that JSON knows."""
        return dataclasses.asdict(self) | {"lora_target_modules": list(self.lora_target_modules)}

    def save(self, path: str | os.PathLike) -> None:
        """Write every field to a .yaml, .yml or .json file; an old one stays until the new one is whole."""
        path = _known_suffix(path)
        if path.suffix == ".json":
            text = json.dumps(self.to_dict(), indent=2) + "\n"
        else:
            import yaml

            text = yaml.safe_dump(self.to_dict(), sort_keys=False)
        unfinished = path.with_name(f".{path.name}.part")
        unfinished.write_text(text, encoding="utf-8")
        os.replace(unfinished, path)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "HyLoRADAConfig":
        """The config in a .yaml, .yml or .json file; fields that are absent take their defaults.

        Raises:
            FileNotFoundError: no such file.   TypeError, ValueError: not such a file, an unknown field, a wrong value.
        """
        path = _known_suffix(path)
        text = path.read_text(encoding="utf-8")
        try:
            values = json.loads(text) if path.suffix == ".json" else parse_yaml(text)
        except ValueError as error:
            raise ValueError(f"{path} cannot be read: {error}") from error
        if not isinstance(values, dict):
            raise ValueError(f"{path} must hold fields and their values, such as lora_rank: 8, got {values!r}")
        return cls.from_dict(values)

    def idle_options(self) -> dict[str, str]:
        """The options that are not at their defaults and do nothing, each with its switch that is off."""
        return {
            name: switch
            for name, switch in SWITCHES.items()
            if not getattr(self, switch) and getattr(self, name) != getattr(type(self), name)
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "HyLoRADAConfig":
        """The inverse of to_dict; fields that are absent take their defaults, unknown ones are an error."""
        check_names("HyLoRADAConfig", values, [field.name for field in dataclasses.fields(cls)])
        return cls(**values)


def check_names(owner: str, given: Iterable[Any], known: Sequence[str]) -> None:
    """ValueError with the closest known name where a given one is not known."""
    for name in given:
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"the fields are {', '.join(known)}"
            raise ValueError(f"{owner} has no field {name!r}; {hint}")


def _known_suffix(path: str | os.PathLike) -> Path:
    path = Path(path)
    if path.suffix not in (".yaml", ".yml", ".json"):
        raise ValueError(f"the file of a config ends in .yaml, .yml or .json, got {str(path)!r}")
    return path


def parse_yaml(text: str) -> Any:
    """What a YAML text says, numbers such as 2e-4 included; ValueError where it is none."""
    import yaml

    class Loader(yaml.SafeLoader):
        """YAML 1.1, and numbers such as 2e-4."""

    Loader.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+0123456789"))
    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"it is no YAML: {error}") from error


def _checked(name: str, declared: Any, value: Any) -> Any:
    if name == "lora_target_modules":
        return _names(name, value)
    if name == "s2_group_size" and value == "auto":
        return value
    if name in _CHOICES:
        return _choice(name, value, _CHOICES[name])
    if name in _AT_LEAST:
        return whole_number(name, value, _AT_LEAST[name])
    if declared is float:
        return _number(name, value)
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return value


def _names(name: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        raise TypeError(f'{name} must be a sequence of names such as ("{value}",), got the single string {value!r}')
    try:
        names = tuple(value)
    except TypeError:
        raise TypeError(f'{name} must be a sequence of names such as ("q_proj", "v_proj"), got {value!r}') from None
    if not names or not all(isinstance(item, str) and item.strip(".") for item in names):
        raise ValueError(
            f'{name} must hold at least one name such as "q_proj", and only non-empty strings, got {value!r}'
        )
    return names


def _choice(name: str, value: Any, allowed: tuple) -> Any:
    # 0 == False and 1 == True would otherwise pass for booleans
    if not any(value == option and type(value) is type(option) for option in allowed):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
    return value


def whole_number(name: str, value: Any, least: int) -> int:
    """The value as an int; TypeError or ValueError with the field's name where it is not one of at least `least`."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        allowed = 'a whole number or "auto"' if name == "s2_group_size" else "a whole number"
        raise TypeError(f"{name} must be {allowed}, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value!r}")
    return int(value)


def _number(name: str, value: Any) -> float:
    if name in ("lora_dropout", "s2_shift_ratio"):
        return real_number(name, value, "in [0, 1)", lambda number: 0 <= number < 1)
    return real_number(name, value, "positive and finite", lambda number: number > 0)


def real_number(name: str, value: Any, allowed: str, is_allowed: Callable[[float], bool]) -> float:
    """The value as a float; TypeError or ValueError with the field's name where it is not finite and `allowed`."""
    if isinstance(value, (bool, str)) or not hasattr(value, "__float__"):
        raise TypeError(f"{name} must be a number ({allowed}), got {value!r}")
    number = float(value)
    if not math.isfinite(number) or not is_allowed(number):
        raise ValueError(f"{name} must be {allowed}, got {number}")
    return number
