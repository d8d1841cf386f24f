"""A training step of SmolLM2-135M on the CPU, every linear layer adapted, beside the installed PEFT's LoRA and DoRA.

    pytest benchmarks/bench_training_step.py -k every_step --results benchmarks/results

(likewise accumulation, where 8 micro-batches share a norm; checkpointing; both; memory). The models are built as a user
would: `peft.get_peft_model`, and `HyLoRADAModel` with its position bias off, as PEFT has none, and on. Rank 8, fp32
adapters, fused AdamW, the default of transformers' trainer. Loss and gradients are compared with PEFT DoRA's before
anything is timed.
"""

import copy
import statistics
from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from benchmarks.memory import MIB, saved_bytes
from benchmarks.paired import median_ratio
from hylorada.config import HyLoRADAConfig
from hylorada.lora import adapted_layers
from hylorada.model import HyLoRADAModel
from hylorada.pretrained import SMOLLM2, load_pretrained
from hylorada_kernels.testing import relative_error

RANK, ALPHA = 8, 16.0
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SETTINGS = {"fp32 512": (torch.float32, 512), "bf16 512": (torch.bfloat16, 512), "bf16 128": (torch.bfloat16, 128)}
# norm-wise, of the gradients of every A, after 30 layers that round in their own ways
AGREEMENT = {torch.float32: 1e-4, torch.bfloat16: 0.1}
MICRO_BATCHES = {"every_step": 1, "accumulation": 8, "checkpointing": 1, "both": 8}
SECONDS_PER_SETTING = 100.0


def frozen_model(base: PreTrainedModel) -> nn.Module:
    """The base model alone, whose backward reaches the embeddings."""
    model = copy.deepcopy(base).requires_grad_(False)
    model.enable_input_require_grads()
    return model


def peft_model(base: PreTrainedModel, *, use_dora: bool) -> nn.Module:
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(TARGETS), use_dora=use_dora, lora_dropout=0.0)
    return get_peft_model(copy.deepcopy(base), config)


def our_model(base: PreTrainedModel, *, position_bias: bool) -> HyLoRADAModel:
    config = HyLoRADAConfig(
        lora_rank=RANK,
        lora_alpha=ALPHA,
        lora_dropout=0.0,
        lora_target_modules=TARGETS,
        use_rslora=False,
        position_bias_enabled=position_bias,
        gradient_checkpointing=False,
    )
    return HyLoRADAModel(copy.deepcopy(base), config)


def contenders(base: PreTrainedModel) -> dict[str, nn.Module]:
    models = {
        "frozen": frozen_model(base),
        "peft lora": peft_model(base, use_dora=False),
        "peft dora": peft_model(base, use_dora=True),
        "hylorada": our_model(base, position_bias=False),
        "hylorada with position bias": our_model(base, position_bias=True),
    }
    return {name: model.train() for name, model in models.items()}


def batch_of(tokens: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 49152, (1, tokens), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids}


def loss_of(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(**batch, use_cache=False).loss


def assert_agreement(theirs: nn.Module, ours: HyLoRADAModel, batch: dict[str, torch.Tensor], dtype: torch.dtype):
    """With the same A, B (not 0) and magnitudes, and a shut blend, our loss and gradients are PEFT DoRA's."""
    their_a, our_a = [], []
    for name, layer in adapted_layers(ours.base_model).items():
        other = theirs.get_submodule(f"base_model.model.{name}")
        a, b = other.lora_A["default"].weight, other.lora_B["default"].weight
        with torch.no_grad():
            b.normal_(std=0.01)
            layer.lora_a.copy_(a)
            layer.lora_b.copy_(b)
            layer.magnitude.copy_(other.lora_magnitude_vector["default"].weight)
            layer.residual_weight.fill_(-40.0)
        their_a.append(a)
        our_a.append(layer.lora_a)
    results = []
    for model, factors in ((ours, our_a), (theirs, their_a)):
        loss = loss_of(model, batch)
        gradients = torch.autograd.grad(loss, factors)
        results.append((loss.detach(), torch.cat([gradient.flatten() for gradient in gradients])))
    for name, our_result, their_result in zip(("loss", "dA"), *results, strict=True):
        error = relative_error(our_result, their_result.double())
        assert error <= AGREEMENT[dtype], f"{name} differs from PEFT DoRA's by {error:.1e}"


def training_step(model: nn.Module, batch: dict[str, torch.Tensor], micro_batches: int) -> list[Callable[[], None]]:
    """Forward and backward of every micro-batch, a call each; the last one ends with AdamW."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True) if trained else None

    def micro_batch() -> None:
        (loss_of(model, batch) / micro_batches).backward()

    def last() -> None:
        micro_batch()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    return [micro_batch] * (micro_batches - 1) + [last]


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("mode", MICRO_BATCHES)
def test_training_step(benchmark, record, paired, mode, setting):
    dtype, tokens = SETTINGS[setting]
    base, _ = load_pretrained(SMOLLM2, dtype)
    models, batch = contenders(base), batch_of(tokens)
    assert_agreement(models["peft dora"], models["hylorada"], batch, dtype)
    if MICRO_BATCHES[mode] > 1:
        # each call is long
        del models["frozen"], models["hylorada with position bias"]
    if mode in ("checkpointing", "both"):
        for model in models.values():
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    steps = {name: training_step(model, batch, MICRO_BATCHES[mode]) for name, model in models.items()}
    times = paired(steps, SECONDS_PER_SETTING, fewest=2 if MICRO_BATCHES[mode] > 1 else 6, warmup=1)
    values = {"peft lora, ms": 1e3 * statistics.median(times["peft lora"])}
    for name in models:
        if name != "peft lora":
            values[f"{name} / peft lora"] = median_ratio(times, name, "peft lora")
    values["peft dora / hylorada"] = median_ratio(times, "peft dora", "hylorada")
    record(f"training step {mode}", {"": "SmolLM2-135M", "dtype, tokens": setting}, values)
    benchmark.pedantic(lambda: [call() for call in steps["hylorada"]])


@pytest.mark.parametrize("setting", SETTINGS)
def test_memory(benchmark, record, setting):
    dtype, tokens = SETTINGS[setting]
    base, _ = load_pretrained(SMOLLM2, dtype)
    batch, values = batch_of(tokens), {}
    for name, model in contenders(base).items():
        # the norm cache is filled once per optimizer step
        loss_of(model, batch)
        given = [*model.parameters(), *model.buffers(), *batch.values()]
        values[f"{name}, saved MiB"] = saved_bytes(lambda model=model: loss_of(model, batch), given)[0] / MIB
    values["hylorada / peft dora"] = values["hylorada, saved MiB"] / values["peft dora, saved MiB"]
    values["hylorada / peft lora"] = values["hylorada, saved MiB"] / values["peft lora, saved MiB"]
    record("training step memory", {"": "SmolLM2-135M", "dtype, tokens": setting}, values)
    benchmark.pedantic(loss_of, (model, batch))
