"""Plans the memory of a training run before anything is loaded: what it needs, what fits, what to switch on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, PretrainedConfig

from hylorada_kernels.nn import HybridLinear, is_conv1d

from .baselines import get_baseline_model
from .config import PRESETS, HyLoRADAConfig, whole_number
from .footprint import LASTING, Footprint, training_footprint
from .model import HyLoRADAModel
from .position_table import table_length
from .pretrained import DTYPES, load_config
from .tables import markdown_table

GIB = 2**30
QUANTIZED_BASES = (None, "nf4")
# of bitsandbytes: half a byte a weight; an 8-bit scale for 64 of them; an fp32 scale of scales for 256 of these
NF4_BLOCK, NF4_SCALES = 64, 256
NF4_CODE_BYTES = 4 * (16 + 256) + 4


@dataclass(frozen=True)
class Plan:
    """The memory of one training run.

    settings: what `plan` was asked.   footprint: the count; see `Footprint`.
    memory: bytes that are there, or None.   parameters, trainable: numbers of parameters.
    """

    settings: Mapping[str, Any]
    footprint: Footprint
    memory: int | None
    parameters: int
    trainable: int
    _model: str | PretrainedConfig = field(repr=False)

    @property
    def peak(self) -> int:
        """Bytes at the fullest moment."""
        return self.footprint.peak

    @property
    def fits(self) -> bool | None:
        """Whether the peak is within the memory; None where none was given."""
        return None if self.memory is None else self.peak <= self.memory

    def table(self) -> str:
        """The components in Markdown: kept after the forward pass, and at the fullest moment."""
        count = self.footprint
        names = [name for name in LASTING if count.lasting[name]]
        names += [name for name in (*count.kept, *count.at_peak) if name not in LASTING]
        rows = [("component", "after the forward pass, MiB", "at the peak, MiB")]
        for name in dict.fromkeys(names):
            after = count.kept.get(name, 0 if name == "gradients" else count.lasting.get(name, 0))
            rows.append((name, _mib(after), _mib(count.at_peak.get(name, 0))))
        total = sum(count.kept.values()) + sum(count.lasting.values()) - count.lasting["gradients"]
        rows.append((f"sum; the peak is in the {count.stage}", _mib(total), _mib(self.peak)))
        return markdown_table(rows)

    def alternatives(self, show_progress: bool = False) -> list[tuple[str, Plan]]:
        """What could be switched on, each alone, and all of it together, with the plan that it gives; smallest last.

        Only what is not on yet: checkpointing, bf16 weights, shifted sparse attention, half the batch, an NF4 base.
        """
        changes = self._changes()
        if len(changes) > 1:
            changes["all of these"] = {name: value for change in changes.values() for name, value in change.items()}
        plans = [
            (name, plan(self._model, memory=self.memory, **{**self.settings, **change}))
            for name, change in tqdm(changes.items(), desc="planning", unit="plan", disable=not show_progress)
        ]
        return sorted(plans, key=lambda entry: -entry[1].peak)

    def _changes(self) -> dict[str, dict[str, Any]]:
        asked = self.settings
        changes: dict[str, dict[str, Any]] = {}
        if asked["method"] != "baseline" and not asked["checkpointing"]:
            changes["gradient checkpointing"] = {"checkpointing": True}
        if asked["dtype"] == "fp32":
            changes["bf16 weights"] = {"dtype": "bf16"}
        group = asked.get("s2_group_size", HyLoRADAConfig.s2_group_size)
        sparse = asked["method"] == "longlora" or asked.get("s2_attn_enabled")
        can_group = asked["method"] in PRESETS and not sparse
        if can_group and isinstance(group, int) and asked["length"] > group:
            changes["shifted sparse attention"] = {"s2_attn_enabled": True}
        if asked["batch_size"] > 1:
            changes["half the batch"] = {"batch_size": asked["batch_size"] // 2}
        if asked["quantized_base"] is None and asked["method"] != "full":
            changes["an NF4 base"] = {"quantized_base": "nf4"}
        return changes

    def advice(self, show_progress: bool = False) -> str:
        """The alternatives in Markdown, each with its peak, what that saves, and whether it fits."""
        rows = [("switch on", "peak, MiB", "saves, MiB", "fits")]
        for name, other in [("nothing", self), *self.alternatives(show_progress)]:
            fits = "" if other.fits is None else "yes" if other.fits else "no"
            rows.append((name, _mib(other.peak), _mib(self.peak - other.peak), fits))
        return markdown_table(rows)


def plan(
    model: str | PretrainedConfig,
    method: str = "hylorada",
    *,
    length: int,
    batch_size: int = 1,
    dtype: str = "bf16",
    mixed_precision: str = "fp32",
    checkpointing: bool = True,
    quantized_base: str | None = None,
    memory: float | None = None,
    **overrides: Any,
) -> Plan:
    """Count a training step of a method on a model that is never loaded; see `training_footprint` for how.

        print(plan("smollm2-135m", length=4096, lora_rank=8, memory=4 * GIB).table())

    Args:
        model: "smollm2-135m", a directory, a hub's id (only its config is read), or a config.
        method: of `get_baseline_model`.   overrides: fields of HyLoRADAConfig: lora_rank, lora_target_modules, ...
        length, batch_size: tokens of a text, and texts of a batch.
        dtype: of the base model's weights.   mixed_precision: autocast over them; "fp32" is none.
        checkpointing: of the activations.
        quantized_base: "nf4" counts the base's linear layers (not the head) as bitsandbytes packs them in 4 bits with
            double quantisation, and beside the rest the largest of them dequantised.
        memory: bytes that are there.

    Raises:
        ValueError: a name or a combination that there is not.   OSError: no such model.
    """
    for name, value, allowed in (("dtype", dtype, DTYPES), ("mixed_precision", mixed_precision, DTYPES)):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
    if quantized_base not in QUANTIZED_BASES:
        raise ValueError(f'quantized_base must be None or "nf4", got {quantized_base!r}')
    if quantized_base is not None and method == "full":
        raise ValueError(
            'method "full" trains the weights, which a quantised base keeps frozen; use quantized_base=None'
        )
    length, batch_size = whole_number("length", length, 1), whole_number("batch_size", batch_size, 1)
    config = model if isinstance(model, PretrainedConfig) else load_config(model)
    adapted = _adapted(config, method, dtype, checkpointing, overrides)
    base: Any = adapted.base_model if isinstance(adapted, HyLoRADAModel) else adapted
    longest = table_length(base)
    if longest is not None and length > longest:
        raise ValueError(
            f"length is {length}, but the model's position table has {longest} places; plan a shorter one, or give "
            'rope_scaling_type="auto" and the rope_scaling_factor that it is to grow by'
        )
    added: list[nn.Parameter] = []
    if isinstance(adapted, HyLoRADAModel):
        added = list(adapted.added_parameters().values())
    elif method == "sparse":
        added = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    counted = training_footprint(adapted, added, length, batch_size, mixed_precision)
    if quantized_base is not None:
        counted = _with_nf4_base(counted, adapted)
    settings = {
        "method": method,
        "length": length,
        "batch_size": batch_size,
        "dtype": dtype,
        "mixed_precision": mixed_precision,
        "checkpointing": checkpointing,
        "quantized_base": quantized_base,
        **overrides,
    }
    numbers = [(parameter.numel(), parameter.requires_grad) for parameter in adapted.parameters()]
    return Plan(
        settings,
        counted,
        None if memory is None else int(memory),
        sum(number for number, _ in numbers),
        sum(number for number, trained in numbers if trained),
        model,
    )


def nf4_bytes(weights: int) -> int:
    """Bytes of a matrix of so many weights in bitsandbytes' NF4 with double quantisation."""
    scales = -(-weights // NF4_BLOCK)
    return -(-weights // 2) + scales + 4 * -(-scales // NF4_SCALES) + NF4_CODE_BYTES


def _adapted(
    config: PretrainedConfig, method: str, dtype: str, checkpointing: bool, overrides: dict[str, Any]
) -> nn.Module:
    """The model of a method without any values."""
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype])
        return get_baseline_model(method, base, gradient_checkpointing=checkpointing, **overrides)


def _with_nf4_base(counted: Footprint, model: nn.Module) -> Footprint:
    base: Any = model
    head = base.get_output_embeddings()
    linears: list[Any] = [
        module
        for module in model.modules()
        if (isinstance(module, (nn.Linear, HybridLinear)) or is_conv1d(module))
        and module is not head
        and not module.weight.requires_grad
    ]
    sizes = [(linear.weight.nbytes, linear.weight.numel()) for linear in linears]
    saved = sum(given for given, _ in sizes) - sum(nf4_bytes(numbers) for _, numbers in sizes)
    largest = max(given for given, _ in sizes)
    at_peak = dict(counted.at_peak)
    at_peak["weights"] -= saved
    at_peak["a dequantised weight"] = largest
    lasting = counted.lasting | {"weights": counted.lasting["weights"] - saved}
    return Footprint(lasting, counted.kept, at_peak, sum(at_peak.values()), counted.stage)


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f}"
