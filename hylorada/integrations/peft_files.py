"""PEFT's adapter files: a HyLoRADAModel's adapter written as PEFT's, and PEFT's adapters read into a HyLoRADAModel.

PEFT itself is not needed. An adapter of PEFT is adapter_config.json and adapter_model.safetensors; what these cannot
hold stands beside them in hylorada_extras.safetensors, which PEFT ignores and `import_adapter` reads. An export has a
model card too, README.md.
"""

import hashlib
import json
import logging
import math
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn
from transformers import PreTrainedModel

from hylorada_kernels import column_norm
from hylorada_kernels.nn import lora_scale
from hylorada_kernels.ops.hybrid_linear.op import adapted_weight

from .. import hub, storage
from ..config import HyLoRADAConfig
from ..lora import UnifiedLayer, adapted_layers
from ..model import RUNTIME_PARTS, HyLoRADAModel

logger = logging.getLogger(__name__)

CONFIG_FILE = "adapter_config.json"
TENSORS_FILE = "adapter_model.safetensors"
EXTRAS_FILE = "hylorada_extras.safetensors"
EXTRAS_VERSION = 1

_PREFIX = "base_model.model."
_PEFT_NAMES = {"lora_A.weight": "lora_a", "lora_B.weight": "lora_b", "lora_magnitude_vector": "magnitude"}
# the files of peft_tuner's method
_TUNER_TYPE = "HYLORADA"
_TUNER_NAMES = {
    "hylorada_A": "lora_a",
    "hylorada_B": "lora_b",
    "hylorada_lora_magnitude_vector": "magnitude",
    "hylorada_lora_magnitude_vector_blend": "residual_weight",
}

# what acts in the model beside the adapted weights, by the field that switches it on
_BEYOND_PEFT = RUNTIME_PARTS | {
    "train_embeddings": "trained embeddings",
    "train_norms": "trained norms",
    "rope_scaling_type": "RoPE scaling",
}

_LOAD = """from peft import PeftModel
from transformers import AutoModelForCausalLM

base_model = AutoModelForCausalLM.from_pretrained("{base}")
# the folder with this file, or its name on a hub
model = PeftModel.from_pretrained(base_model, ".")"""

# fields of PEFT's config that do not say what a trained adapter computes, beside those that are read
_WITHOUT_EFFECT = {
    *(
        "auto_mapping",
        "base_model_name_or_path",
        "inference_mode",
        "peft_type",
        "peft_version",
        "revision",
        "task_type",
    ),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out"),
    *("megatron_core", "qalora_group_size", "eva_config", "loftq_config"),
}
_READ = {"r", "rank_pattern", "lora_alpha", "alpha_pattern", "lora_dropout", "use_rslora", "use_dora"}
_READ_OF_TUNER = {"use_dora_magnitude", "use_blend", "lora_init", "dora_norm_grad"}
# the other initialisations change the base weights
_HARMLESS_INITS = (True, False, "gaussian", "orthogonal", "eva")


def export_adapter(model: HyLoRADAModel, directory: str | os.PathLike) -> list[str]:
    """Write the adapter as a plain PEFT adapter: LoRA, rsLoRA or DoRA.

    A blend is folded into PEFT's magnitude, m' = g n = (1 - beta) m + beta n, with which PEFT computes the same. What
    PEFT has no place for goes into hylorada_extras.safetensors: position bias and the like, which PEFT then computes
    without (a warning says so), and the unfolded m and beta, with which `import_adapter` continues the training. In
    PEFT, DoRA's training with lora_dropout > 0 is other mathematics.

    Args:
        model: not merged.   directory: is made; PEFT files in it are replaced.

    Returns:
        The parts that stock PEFT computes without, in words; empty where it computes what the model does.

    Raises:
        TypeError: not a HyLoRADAModel.   RuntimeError: merged.   OSError: the files could not be written.
    """
    layers = _exportable(model)
    config = model.hylorada_config
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        parts: dict[str, Tensor] = {"lora_A.weight": layer.lora_a, "lora_B.weight": layer.lora_b}
        if layer.magnitude is not None:
            parts["lora_magnitude_vector"] = _folded_magnitude(layer)
        tensors |= {f"{_PREFIX}{name}.{part}": tensor for part, tensor in parts.items()}
    record = _peft_config(model, config.lora_rank, config.lora_alpha) | {
        "lora_dropout": config.lora_dropout,
        "use_rslora": config.use_rslora,
        "use_dora": config.use_dora_magnitude,
    }
    with storage.replacing_files(directory, (EXTRAS_FILE,)) as folder:
        data = _write_peft(folder, record, tensors)
        _write_extras(folder, model, data)
        kind = "DoRA" if config.use_dora_magnitude else "LoRA"
        _write_card(folder, directory, model, f"{kind} adapter", {})
    return _warn_of_missing(config, directory)


def export_lora(model: HyLoRADAModel, directory: str | os.PathLike, rank: int) -> float:
    """Write the nearest plain LoRA adapter of a rank: the SVD of each layer's whole update diag(g) (W + s B A) - W.

    Args:
        model: not merged.   directory: is made; PEFT files in it are replaced.
        rank: at most the smaller side of every adapted layer.

    Returns:
        The relative error of the updates, || approximation - update || / || update || over all layers (Frobenius); 0
        where there is no update. It is logged too.

    Raises:
        TypeError: not a HyLoRADAModel, or a rank that is not a whole number.   ValueError: a rank out of range.
        RuntimeError: merged.   OSError: the files could not be written.
    """
    layers = _exportable(model)
    if not isinstance(rank, int) or isinstance(rank, bool):
        raise TypeError(f"rank must be a whole number, got {rank!r}")
    largest = min(min(layer.in_features, layer.out_features) for layer in layers.values())
    if not 1 <= rank <= largest:
        raise ValueError(f"rank must be in 1..{largest}, the smallest side of an adapted layer, got {rank}")
    tensors: dict[str, Tensor] = {}
    squared_error = squared_size = 0.0
    for name, layer in layers.items():
        left, sizes, right = torch.linalg.svd(_update(layer), full_matrices=False)
        root = sizes[:rank].sqrt()
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = (root[:, None] * right[:rank]).float()
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = (left[:, :rank] * root).float()
        squared_error += sizes[rank:].square().sum().item()
        squared_size += sizes.square().sum().item()
    error = (squared_error / squared_size) ** 0.5 if squared_size else 0.0
    with storage.replacing_files(directory, (EXTRAS_FILE,)) as folder:
        _write_peft(folder, _peft_config(model, rank, rank), tensors)
        facts = {"Rank of the export": rank, "Relative error of the updates": f"{error:.2e}"}
        _write_card(folder, directory, model, "LoRA adapter", facts)
    logger.info("LoRA of rank %d in %s: the updates' relative error is %.2e", rank, directory, error)
    _warn_of_missing(model.hylorada_config, directory)
    return error


def import_adapter(
    base_model: PreTrainedModel, directory: str | os.PathLike, *, strict_base: bool = True
) -> HyLoRADAModel:
    """A HyLoRADAModel from the folder of a PEFT LoRA, rsLoRA or DoRA adapter, or of a HyLoRADAPeftConfig's.

    It computes what PEFT would, of LoRA and DoRA without a blend (residual_weight is None), and in training with
    lora_dropout > 0 drops the low-rank path's input only. Layers of lower rank than the largest get more rows in A,
    beside zeros in B; a layer's own alpha goes into its B. With the hylorada_extras.safetensors of `export_adapter` the
    model is the exported one.

    Args:
        base_model: is changed; where an error is raised it is left as it was.
        directory: with adapter_config.json and adapter_model.safetensors.
        strict_base: compare the base model with the one that was exported, where the extras tell.

    Raises:
        FileNotFoundError: no adapter in safetensors there.
        ValueError: the files are damaged, or ask for what a HyLoRADAModel cannot express.
    """
    if not isinstance(base_model, PreTrainedModel):
        raise TypeError(f"base_model must be a transformers PreTrainedModel, got {type(base_model).__name__}")
    directory = Path(directory)
    storage.finish_interrupted_save(directory)
    record, tensors = _read_peft(directory)
    if (directory / EXTRAS_FILE).is_file():
        adapter = _with_extras(directory, tensors)
    else:
        strict_base = False
        adapter = _from_peft(base_model, record, tensors)
    with tempfile.TemporaryDirectory() as scratch:
        storage.write_adapter(Path(scratch), adapter)
        return HyLoRADAModel.from_pretrained(base_model, scratch, strict_base=strict_base)


def _exportable(model: HyLoRADAModel) -> dict[str, UnifiedLayer]:
    if not isinstance(model, HyLoRADAModel):
        raise TypeError(f"model must be a HyLoRADAModel, got {type(model).__name__}")
    if model.merged:
        raise RuntimeError(
            "the updates are in the base weights: call unmerge_lora_weights() first, or save the merged model with "
            "save_pretrained"
        )
    return adapted_layers(model.base_model)


def _base_weight(layer: UnifiedLayer) -> Tensor:
    """(O, I), fp32 or fp64."""
    weight = layer.get_parameter("weight").detach()
    weight = weight.T if layer.weight_is_transposed else weight
    return weight.to(torch.promote_types(weight.dtype, torch.float32))


@torch.no_grad()
def _folded_magnitude(layer: UnifiedLayer) -> Tensor:
    """m' = (1 - beta) m + beta n, in m's dtype; m itself where there is no blend."""
    if layer.residual_weight is None:
        return layer.magnitude
    norm = column_norm(_base_weight(layer), layer.lora_a, layer.lora_b, scale=layer.scale)
    folded = torch.lerp(layer.magnitude.to(norm.dtype), norm, layer.residual_weight.to(norm.dtype).sigmoid())
    return folded.to(layer.magnitude.dtype)


def _update(layer: UnifiedLayer) -> Tensor:
    """diag(g) (W + s B A) - W, (O, I) fp64."""
    weight = _base_weight(layer).double()
    a, b = layer.lora_a.double(), layer.lora_b.double()
    return adapted_weight(weight, a, b, layer.magnitude, layer.residual_weight, scale=layer.scale) - weight


def _peft_config(model: HyLoRADAModel, rank: int, alpha: float) -> dict[str, Any]:
    base_model: Any = model.base_model
    layers = adapted_layers(base_model)
    is_causal_lm = base_model.can_generate() and not getattr(model.config, "is_encoder_decoder", False)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if is_causal_lm else None,
        "base_model_name_or_path": getattr(model.config, "_name_or_path", None) or None,
        "r": rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "target_modules": _shortest_targets(model.base_model, list(layers)),
        "fan_in_fan_out": any(layer.weight_is_transposed for layer in layers.values()),
        "bias": "none",
        "inference_mode": True,
    }


def _shortest_targets(model: nn.Module, names: list[str]) -> list[str]:
    """Last parts of the names, if these match no other module by PEFT's rule; else the whole names."""
    short = sorted({name.rpartition(".")[2] for name in names})
    matched = [
        name for name, _ in model.named_modules() if any(name == part or name.endswith(f".{part}") for part in short)
    ]
    return short if set(matched) == set(names) else sorted(names)


def _write_peft(folder: Path, record: dict[str, Any], tensors: Mapping[str, Tensor]) -> bytes:
    data = _serialised(tensors, {})
    (folder / TENSORS_FILE).write_bytes(data)
    (folder / CONFIG_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return data


def _serialised(tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> bytes:
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return save(stored, {"format": "pt"} | metadata)


def _write_extras(folder: Path, model: HyLoRADAModel, peft_data: bytes) -> None:
    """What `import_adapter` needs beside PEFT's file; nothing where that holds everything."""
    with tempfile.TemporaryDirectory() as scratch:
        model.save_pretrained(scratch)
        adapter = storage.read_adapter(scratch)
    layers = adapted_layers(model.base_model)
    in_peft = ("lora_a", "lora_b") if model.hylorada_config.use_blend else ("lora_a", "lora_b", "magnitude")
    held = {f"{name}.{kind}" for name in layers for kind in in_peft}
    extras = {name: tensor for name, tensor in adapter.tensors.items() if name not in held}
    # RoPE scaling and groups have no tensors: the config alone tells of them
    if extras or any(getattr(model.hylorada_config, field) for field in _BEYOND_PEFT):
        record = {
            "version": EXTRAS_VERSION,
            "config": adapter.config,
            "base_model": adapter.base_model,
            "base_fingerprint": adapter.base_fingerprint,
            "peft_sha256": hashlib.sha256(peft_data).hexdigest(),
        }
        (folder / EXTRAS_FILE).write_bytes(_serialised(extras, {"hylorada": json.dumps(record)}))


def _write_card(
    folder: Path, directory: str | os.PathLike, model: HyLoRADAModel, kind: str, facts: dict[str, Any]
) -> None:
    missing = _missing(model.hylorada_config)
    base_model = getattr(model.config, "_name_or_path", None) or "..."
    hub.write_card(
        folder,
        kind=f"{kind}, exported from HyLoRADA",
        base_model="" if base_model == "..." else base_model,
        facts=model.card_facts() | facts,
        load=_LOAD.format(base=base_model),
        library="peft",
        notes=(f"PEFT computes it without {', '.join(missing)}.",) if missing else (),
        beside=directory,
    )


def _missing(config: HyLoRADAConfig) -> list[str]:
    """The parts that act beside the adapted weights, in words."""
    return [part for field, part in _BEYOND_PEFT.items() if getattr(config, field)]


def _warn_of_missing(config: HyLoRADAConfig, directory: str | os.PathLike) -> list[str]:
    missing = _missing(config)
    if missing:
        logger.warning("PEFT computes the adapter in %s without %s", directory, ", ".join(missing))
    return missing


def _read_peft(directory: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config, and the tensors by their native names."""
    path = directory / CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{directory} holds no PEFT adapter: there is no {CONFIG_FILE} in it")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}; save or copy the adapter again") from error
    _check_record(record, path)
    if not (directory / TENSORS_FILE).is_file():
        raise FileNotFoundError(
            f"{directory} has no {TENSORS_FILE}; load an adapter of another format with PEFT, and save it again"
        )
    try:
        tensors = load_file(directory / TENSORS_FILE)
    except SafetensorError as error:
        raise ValueError(f"{directory / TENSORS_FILE} is damaged: {error}; save or copy the adapter again") from error
    return record, {_native_name(name): _widened(tensor) for name, tensor in tensors.items()}


def _check_record(record: Any, path: Path) -> None:
    """ValueError where PEFT's config asks for anything that is not read here and changes the result."""
    given = record.get("peft_type") if isinstance(record, dict) else type(record).__name__
    if given not in ("LORA", _TUNER_TYPE):
        raise ValueError(f"{path} is no LoRA, DoRA or HyLoRADA adapter: its peft_type is {given!r}")
    read = _READ | _READ_OF_TUNER if given == _TUNER_TYPE else _READ
    for field, value in record.items():
        if field == "bias":
            is_plain = value == "none"
        elif field == "init_lora_weights":
            is_plain = value in _HARMLESS_INITS
        else:
            is_plain = not value or field in _WITHOUT_EFFECT or field in read
        if not is_plain:
            raise ValueError(
                f"{path} has {field}={value!r}, which a HyLoRADAModel cannot express; merge the adapter with PEFT's "
                "merge_and_unload() and adapt the merged model"
            )


def _native_name(name: str) -> str:
    layer, kind = name, None
    for suffix, native in (_PEFT_NAMES | _TUNER_NAMES).items():
        if name.startswith(_PREFIX) and name.endswith(f".{suffix}"):
            layer, kind = name[len(_PREFIX) : -len(suffix) - 1], native
    if kind is None:
        raise ValueError(f"the adapter holds {name}, which is no A, B or magnitude of a linear layer")
    return f"{layer}.{kind}"


def _widened(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32)) if tensor.is_floating_point() else tensor


def _with_extras(directory: Path, tensors: dict[str, Tensor]) -> storage.SavedAdapter:
    path = directory / EXTRAS_FILE
    try:
        with safe_open(path, "pt") as file:
            record = json.loads((file.metadata() or {}).get("hylorada", "null"))
            extras = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error}; export the adapter again") from error
    version = record.get("version") if isinstance(record, dict) else None
    if version != EXTRAS_VERSION:
        raise ValueError(f"{path} has version {version}, this hylorada reads version {EXTRAS_VERSION}")
    if hashlib.sha256((directory / TENSORS_FILE).read_bytes()).hexdigest() != record["peft_sha256"]:
        raise ValueError(
            f"{path} belongs to another {TENSORS_FILE}, which was trained on or replaced since the export; delete "
            f"{EXTRAS_FILE} to import PEFT's adapter alone"
        )
    return storage.SavedAdapter(
        record["config"], False, record["base_model"], record["base_fingerprint"], tensors | extras
    )


def _from_peft(base_model: PreTrainedModel, record: dict[str, Any], tensors: dict[str, Tensor]) -> storage.SavedAdapter:
    """An adapter without a blend, of one rank and scale for all layers."""
    names = [name.removesuffix(".lora_a") for name in tensors if name.endswith(".lora_a")]
    known = {name for name, _ in base_model.named_modules()}
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"{type(base_model).__name__} has no layer {unknown[0]}; give the model that was adapted")
    if not names:
        raise ValueError(f"{TENSORS_FILE} holds no adapted layer")
    use_rslora, rank = bool(record.get("use_rslora")), max(tensors[f"{name}.lora_a"].shape[0] for name in names)
    method: dict[str, Any] = {
        "use_dora_magnitude": bool(record.get("use_dora")),
        "use_blend": False,
        "lora_init": "kaiming",
    }
    if record["peft_type"] == _TUNER_TYPE:
        method = {field: record[field] for field in _READ_OF_TUNER}
    config = HyLoRADAConfig(
        lora_rank=rank,
        lora_alpha=record["lora_alpha"],
        lora_dropout=record.get("lora_dropout", 0.0),
        lora_target_modules=tuple(_shortest_targets(base_model, names)),
        use_rslora=use_rslora,
        position_bias_enabled=False,
        gradient_checkpointing=False,
        **method,
    )
    scale = lora_scale(rank, config.lora_alpha, use_rslora)
    for name in names:
        a, b = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
        alpha = _pattern_value(record.get("alpha_pattern") or {}, name, config.lora_alpha)
        own_scale = lora_scale(a.shape[0], alpha, use_rslora)
        if own_scale != scale:
            tensors[f"{name}.lora_b"] = b = b * (own_scale / scale)
        if a.shape[0] < rank:
            more = nn.init.kaiming_uniform_(a.new_empty(rank - a.shape[0], a.shape[1]), a=math.sqrt(5))
            tensors[f"{name}.lora_a"] = torch.cat([a, more])
            tensors[f"{name}.lora_b"] = torch.cat([b, b.new_zeros(b.shape[0], more.shape[0])], dim=1)
    return storage.SavedAdapter(config.to_dict(), False, "", {}, tensors)


def _pattern_value(pattern: Mapping[str, float], name: str, default: float) -> float:
    """PEFT's rule: the first key that, as a regular expression, matches the end of the name from a dot on."""
    return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", name)), default)
